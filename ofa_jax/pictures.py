"""Pages of pictures for people: what a model said of them, or found.

Each page is a PNG file for `Task.results`. Where no font of this machine has all of its characters,
as on many servers those of Chinese, an HTML file beside it has the same page for a browser.
"""

import base64
import dataclasses
import functools
import html
import io
import logging
import textwrap
import unicodedata
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ofa_jax import fonts

RIGHT, WRONG, PLAIN = "#1a7f37", "#cf222e", "#57606a"
_SIDE, _GAP, _LINE = 1.8, 0.15, 0.15  # inches: of a cell, between cells, of a line of text
_LETTERS, _LINES = 28, 4  # of a text: letters in a line, and lines
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
  """A place on a page.

  Attributes:
    image: uint8[H, W, 3], or None.
    lines: texts with their colours, below the picture.
    frame: colour around the picture, or None.
    boxes: on the picture, each x0, y0, x1, y1 in its pixels, with their colours.
  """

  image: np.ndarray | None = None
  lines: tuple[tuple[str, str], ...] = ()
  frame: str | None = None
  boxes: tuple[tuple[Sequence[float], str], ...] = ()


def captions(
  name: str,
  images: Sequence[np.ndarray],
  texts: Sequence[str],
  expected: Sequence[Sequence[str]],
  *,
  columns: int = 6,
) -> dict[str, bytes]:
  """Pictures with what a model says of them, green where that is a reference, and the references.

  Args:
    name: of the page.
    images: uint8[H, W, 3] each.
    texts: one each.
    expected: the references of each.
    columns: pictures in a row.

  Returns: as `page`.
  """
  cells = [
    Cell(
      image=image,
      lines=((text, RIGHT if text in group else WRONG), *((other, PLAIN) for other in group)),
    )
    for image, text, group in zip(images, texts, expected, strict=True)
  ]
  return page(name, in_rows(cells, columns=columns))


def in_rows(cells: Sequence[Cell], *, columns: int = 6) -> list[Sequence[Cell]]:
  """Cells so many in a row."""
  return [cells[i : i + columns] for i in range(0, len(cells), columns)]


def answer(image: np.ndarray | None, asked: str, told: str, expected: str, *, right: bool) -> Cell:
  """A cell: what was asked, what was told, and, where that is wrong, what is right."""
  lines = [*([(asked, "black")] if asked else []), (told, RIGHT if right else WRONG)]
  return Cell(image=image, lines=(*lines, *([] if right else [(expected, PLAIN)])))


def retrieval(
  name: str,
  queries: Sequence[str],
  images: Sequence[Sequence[np.ndarray]],
  right: Sequence[Sequence[bool]],
) -> dict[str, bytes]:
  """Texts with the pictures that a model ranks highest for each, the right ones framed.

  Args:
    name: of the page.
    queries: the texts.
    images: for each text its pictures, uint8[H, W, 3], the best first.
    right: for each of them whether the text belongs to it.

  Returns: as `page`.
  """
  rows = [
    [
      Cell(lines=((query, "black"),)),
      *(Cell(image=i, frame=RIGHT if r else None) for i, r in zip(ranked, good, strict=True)),
    ]
    for query, ranked, good in zip(queries, images, right, strict=True)
  ]
  return page(name, rows)


def page(name: str, rows: Sequence[Sequence[Cell]]) -> dict[str, bytes]:
  """A page of rows of cells, as the files `name.png` and, where fonts are missing, `name.html`.

  Raises:
    ValueError: there are no rows.
  """
  if not rows:
    raise ValueError("Expected rows of pictures for a page, found none.")
  families, missing = fonts.of_texts(t for row in rows for cell in row for t, _ in cell.lines)
  files = {f"{name}.png": _png(rows, families)}
  if missing:
    files[f"{name}.html"] = _html(name, rows)
    _tell_missing(name)
  return files


@functools.cache  # once a page
def _tell_missing(name: str) -> None:
  _log.warning(
    "Some characters of the page %s are in no font of this machine: the .html beside its .png has "
    "them. For Chinese install a font (%s), or name a file in %s",
    name,
    fonts.PACKAGE,
    fonts.VARIABLE,
  )


def _html(name: str, rows: Sequence[Sequence[Cell]]) -> bytes:
  """The page for a browser, its pictures in it."""
  body = []
  for row in rows:
    cells = []
    for cell in row:
      style = f' style="border:4px solid {cell.frame}"' if cell.frame else ""
      shown = (
        ""
        if cell.image is None
        else f'<img{style} src="{data_url(with_boxes(cell.image, cell.boxes))}">'
      )
      lines = [f'<p style="color:{c}">{html.escape(text)}</p>' for text, c in cell.lines]
      cells.append(f"<td>{shown}{''.join(lines)}</td>")
    body.append(f"<tr>{''.join(cells)}</tr>\n")
  return (
    f'<!doctype html>\n<meta charset="utf-8">\n<title>{html.escape(name)}</title>\n'
    "<style>td {vertical-align: top; text-align: center; width: 11em} p {margin: .2em} "
    f"img {{width: 10em}}</style>\n<table>\n{''.join(body)}</table>\n"
  ).encode()


def with_boxes(
  image: np.ndarray, boxes: Sequence[tuple[Sequence[float], str]], *, numbered: bool = False
) -> np.ndarray:
  """A picture uint8[H, W, 3] with boxes x0, y0, x1, y1 in its pixels drawn, each in its colour.

  Args:
    image: the picture.
    boxes: with their colours.
    numbered: whether their numbers, from 1, are in their corners.
  """
  drawn = Image.fromarray(image)
  pen = ImageDraw.Draw(drawn)
  width = max(1, drawn.width // 90)
  for number, (box, colour) in enumerate(boxes, 1):
    pen.rectangle(tuple(box), outline=colour, width=width)
    if numbered:
      font = ImageFont.load_default(max(12, drawn.width // 24))
      corner = (box[0] + 2 * width, box[1] + width)
      edge = {"stroke_width": 2, "stroke_fill": "white"}
      pen.text(corner, str(number), fill=colour, font=font, **edge)
  return np.asarray(drawn)


def data_url(image: np.ndarray, *, kind: str = "png") -> str:
  """A picture uint8[H, W, 3] as an address that holds all of it; `kind` is "png" or "jpeg"."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, format=kind, quality=90)
  return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _png(rows: Sequence[Sequence[Cell]], font: list[str]) -> bytes:
  import matplotlib.figure  # slow to import, and needed once an evaluation

  heights = [max(map(_height, row), default=_SIDE) + _GAP for row in rows]
  width, height = max(map(len, rows)) * (_SIDE + _GAP) + _GAP, sum(heights) + _GAP
  figure = matplotlib.figure.Figure(figsize=(width, height))
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
    ax.imshow(with_boxes(cell.image, cell.boxes))
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
