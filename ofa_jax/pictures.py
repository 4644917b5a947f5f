"""Pages of pictures for people: what a model said of them, or found.

Each page is a PNG file as bytes, for `Task.results`. Chinese needs a font that has it (Debian and
Ubuntu: fonts-noto-cjk); without one its characters are boxes.
"""

import dataclasses
import io
import textwrap
import unicodedata
import warnings
from collections.abc import Sequence

import numpy as np

RIGHT, WRONG, PLAIN = "#1a7f37", "#cf222e", "#57606a"
FONTS = (
  "Noto Sans CJK SC",
  "Noto Sans CJK JP",
  "Noto Sans SC",
  "Source Han Sans SC",
  "WenQuanYi Micro Hei",
  "WenQuanYi Zen Hei",
  "PingFang SC",
  "Heiti SC",
  "Microsoft YaHei",
  "SimHei",
)

_SIDE, _GAP, _LINE = 1.8, 0.15, 0.15  # inches: of a cell, between cells, of a line of text
_LETTERS, _LINES = 28, 4  # of a text: letters in a line, and lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
  """A place on a page.

  Attributes:
    image: uint8[H, W, 3], or None.
    lines: texts with their colours, below the picture.
    frame: colour around the picture, or None.
  """

  image: np.ndarray | None = None
  lines: tuple[tuple[str, str], ...] = ()
  frame: str | None = None


def captions(
  images: Sequence[np.ndarray],
  texts: Sequence[str],
  expected: Sequence[Sequence[str]],
  *,
  columns: int = 6,
) -> bytes:
  """Pictures with what a model says of them, green where that is a reference, and the references.

  Args:
    images: uint8[H, W, 3] each.
    texts: one each.
    expected: the references of each.
    columns: pictures in a row.
  """
  cells = [
    Cell(
      image=image,
      lines=((text, RIGHT if text in group else WRONG), *((other, PLAIN) for other in group)),
    )
    for image, text, group in zip(images, texts, expected, strict=True)
  ]
  return page([cells[i : i + columns] for i in range(0, len(cells), columns)])


def retrieval(
  queries: Sequence[str],
  images: Sequence[Sequence[np.ndarray]],
  right: Sequence[Sequence[bool]],
) -> bytes:
  """Texts with the pictures that a model ranks highest for each, the right ones framed.

  Args:
    queries: the texts.
    images: for each text its pictures, uint8[H, W, 3], the best first.
    right: for each of them whether the text belongs to it.
  """
  rows = [
    [
      Cell(lines=((query, "black"),)),
      *(Cell(image=i, frame=RIGHT if r else None) for i, r in zip(ranked, good, strict=True)),
    ]
    for query, ranked, good in zip(queries, images, right, strict=True)
  ]
  return page(rows)


def page(rows: Sequence[Sequence[Cell]]) -> bytes:
  """A PNG of rows of cells; ValueError when there are none."""
  import matplotlib.figure  # slow to import, and needed once an evaluation

  if not rows:
    raise ValueError("Expected rows of pictures for a page, found none.")
  heights = [max(map(_height, row), default=_SIDE) + _GAP for row in rows]
  width, height = max(map(len, rows)) * (_SIDE + _GAP) + _GAP, sum(heights) + _GAP
  figure = matplotlib.figure.Figure(figsize=(width, height))
  font = _fonts()
  for i, row in enumerate(rows):
    top = height - _GAP - sum(heights[:i])
    for j, cell in enumerate(row):
      left = _GAP + j * (_SIDE + _GAP)
      where = (left / width, (top - _SIDE) / height, _SIDE / width, _SIDE / height)
      _draw(figure.add_axes(where), cell, font)
  file = io.BytesIO()
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*[Gg]lyph.*missing")
    figure.savefig(file, format="png", dpi=100)
  return file.getvalue()


def _draw(ax, cell: Cell, font: list[str]) -> None:
  ax.set(xticks=[], yticks=[])
  for spine in ax.spines.values():
    spine.set(visible=cell.frame is not None, color=cell.frame, linewidth=4)
  lines = _wrapped(cell)
  if cell.image is None:
    begin = 0.5 + len(lines) / 2 * _LINE / _SIDE
  else:
    ax.imshow(cell.image)
    begin = -_GAP / 2 / _SIDE
  # Not mathematics: a caption may have dollar signs.
  options = {"transform": ax.transAxes, "va": "top", "ha": "center", "parse_math": False}
  for k, (line, colour) in enumerate(lines):
    ax.text(0.5, begin - k * _LINE / _SIDE, line, color=colour, fontsize=8, family=font, **options)


def _height(cell: Cell) -> float:
  """Inches of a cell, the lines below the picture included."""
  return _SIDE if cell.image is None else _SIDE + _GAP / 2 + _LINE * len(_wrapped(cell))


def _wrapped(cell: Cell) -> list[tuple[str, str]]:
  """The lines of a cell, short enough for it."""
  lines = []
  for text, colour in cell.lines:
    wide = any(unicodedata.east_asian_width(char) in "WF" for char in text)
    width = _LETTERS // 2 if wide else _LETTERS
    pieces = textwrap.wrap(text, width, max_lines=_LINES, placeholder=" …") or [""]
    lines += [(piece, colour) for piece in pieces]
  return lines


def _fonts() -> list[str]:
  import matplotlib.font_manager

  installed = {font.name for font in matplotlib.font_manager.fontManager.ttflist}
  return ["DejaVu Sans", *(name for name in FONTS if name in installed)]
