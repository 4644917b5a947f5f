"""Pictures of many captions as files: what `ofa_jax.generate --task=image` writes.

  OUTPUT/000012_0.png   the best picture of row 12, 000012_1.png the next one
  OUTPUT/drawn.jsonl    one object a row: id, caption, files, scores, codes; or an error
  OUTPUT/page.png       the first captions with their best pictures

A PNG file carries its "caption" and its "score". While rows are missing, `drawn.jsonl` ends with
".partial"; a run that was killed goes on behind the last row that is in it.
"""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from ofa_jax import api, cli, files, jobs, outputs, partial, pictures
from ofa_jax.data import codes, pipeline, sources
from ofa_jax.data.bad_rows import Pass
from ofa_jax.data.folder import DRAWN
from ofa_jax.data.protocols import TextImages
from ofa_jax.data.tsv import BadRow
from ofa_jax.inference.ofa import OFAModel
from ofa_jax.tasks import image_gen

PAGE = 24  # captions on the page


def draw_file(
  model: OFAModel,
  table: TextImages,
  *,
  output: str | os.PathLike,
  options: Mapping[str, Any],
  batch_size: int = 16,
  max_bad_rate: float = 0.01,
) -> int:
  """Draws the captions of all rows into a folder; returns of how many there are pictures.

  Args:
    model: from `load_from_name`.
    table: with "text" and perhaps "id".
    output: the folder.
    options: arguments of `OFAModel.draw`.
    batch_size: captions that are drawn together.
    max_bad_rate: the largest share of rows that cannot be drawn; see `pipeline.BadRows`.

  Raises:
    ValueError: models that do not fit together, options that contradict each other.
    TooManyBadRows: more rows cannot be drawn.
  """
  folder = pathlib.Path(output)
  folder.mkdir(parents=True, exist_ok=True)
  painter = model.painter(options.get("codec"), options.get("judge"))
  work = {
    "input": partial.fingerprint(table.files),
    "columns": dict(table.columns),
    **model.identity,
    "helpers": painter.identity,
    "options": dict(options),
    "batch size": batch_size,
  }

  def batches(begin: int, bad: pipeline.BadRows) -> Iterator[list[bytes]]:
    for first in range(begin, len(table), batch_size):
      rows = range(first, min(first + batch_size, len(table)))
      yield [*_lines(model, painter, table, rows, folder=folder, options=options, bad=bad)]

  written = jobs.write_lines(
    folder / DRAWN,
    batches,
    total=len(table),
    batch_size=batch_size,
    work=work,
    title="image",
    unit="captions",
    max_bad_rate=max_bad_rate,
    is_bad=lambda line: "error" in json.loads(line),
  )
  good = [line for line in map(json.loads, written) if "files" in line]
  write_page(folder, [(x["caption"], folder / x["files"][0]) for x in good[:PAGE]])
  return len(good)


def command(
  names: Sequence[str],
  *,
  text: str | None,
  paths: Sequence[str] | None,
  columns: Mapping[str, int | str],
  output: str | None,
  options: Mapping[str, Any],
  batch_size: int,
  max_bad_rate: float,
  given: Mapping[str, Any],
) -> None:
  """What `ofa_jax.generate --task=image` does.

  Args:
    names: the model's.
    text: one caption; or
    paths: files of them, of which `columns` says where what is.
    columns: empty: id and text, the first two.
    output: the folder.
    options: arguments of `OFAModel.draw`.
    batch_size, max_bad_rate: as for `draw_file`.
    given: how the model is loaded, see `api.load_from_name`.

  Raises:
    ValueError: neither a caption nor files, or no folder; as `draw_file`.
  """
  if not output:
    raise ValueError("Expected --output, the folder of the pictures, found none")
  if text is not None and not text.strip():
    raise ValueError("Expected words in --text, the caption, found none")
  if bool(text) == bool(paths):
    raise ValueError("Expected --text or --input for --task=image, found " +
                     ("both" if text else "neither"))  # fmt: skip
  outputs.check_folder(output)
  folder = pathlib.Path(output)
  folder.mkdir(parents=True, exist_ok=True)
  table = None
  if paths:
    table = sources.open_rows(paths, columns=columns, places=image_gen.ANSWERING.columns)
    if "text" not in table.columns:
      raise ValueError(
        f"Expected captions in {', '.join(paths)}, found none; --columns=id:0,text:1 names them"
      )
  model, _ = api.load_from_name([*names], **given)
  if not isinstance(model, OFAModel):
    raise ValueError(f"Expected an OFA in --model, found {type(model.config).__name__}")
  with cli.sole_writer(folder / DRAWN, inputs=[*(paths or ()), *names]):
    if table is not None:
      limits = {"batch_size": batch_size, "max_bad_rate": max_bad_rate}
      count = draw_file(model, table, output=folder, options=options, **limits)
      print(f"Pictures of {count} captions of {len(table)} are in {folder}")
      return
    drawn = model.drawings([text], **options)
    names = save(folder, "000000", text, drawn.images[0], drawn.scores[0])
    write_page(
      folder, [(f"{x:.3f}", folder / n) for x, n in zip(drawn.scores[0], names, strict=True)]
    )
    line = {"caption": text, "files": names, "scores": drawn.scores[0].round(6).tolist()}
    print(json.dumps(line, ensure_ascii=False))


def save(
  folder: pathlib.Path,
  name: str,
  caption: str,
  drawn: Sequence[np.ndarray],
  scores: Sequence[float],
) -> list[str]:
  """Writes the pictures uint8[S, S, 3] of a caption, the best first; returns the files' names."""
  names = []
  for rank, (image, score) in enumerate(zip(drawn, scores, strict=True)):
    about = PngImagePlugin.PngInfo()
    about.add_itxt("caption", caption)
    about.add_text("score", f"{score:.6f}")
    names.append(f"{name}_{rank}.png")
    with files.written_whole(folder / names[-1], replace=True) as made:
      Image.fromarray(image).save(made, "PNG", pnginfo=about)
  return names


def write_page(folder: pathlib.Path, shown: Sequence[tuple[str, pathlib.Path]]) -> None:
  """Writes the contact sheet of captions and picture files, if there are any."""
  cells = []
  for caption, path in shown:
    with Image.open(path) as image:
      cells.append(pictures.Cell(image=np.asarray(image), lines=((caption, "black"),)))
  if cells:
    for name, content in pictures.page("page", pictures.in_rows(cells)).items():
      (folder / name).write_bytes(content)


def _lines(model, painter, table, rows, *, folder, options, bad) -> Iterator[bytes]:
  """The lines of some rows, whose pictures are written before."""
  captions, faults = {}, {}
  for row in rows:
    try:
      captions[row] = _caption(painter, table, row)
    except BadRow as error:
      faults[row] = error
  bad.add([*faults.values()], seen=len(rows), rows=[*faults], whole=Pass(len(table), len(table)))
  drawn = model.drawings([*captions.values()], **options) if captions else None
  place = dict(zip(captions, range(len(captions)), strict=True))
  for row in rows:
    line = {"id": _id(table, row)}
    if row in faults:
      line["error"] = str(faults[row])
    else:
      i = place[row]
      line |= {
        "caption": captions[row],
        "files": save(folder, f"{row:06d}", captions[row], drawn.images[i], drawn.scores[i]),
        "scores": [round(float(x), 6) for x in drawn.scores[i]],
        "codes": [codes.written(x) for x in drawn.codes[i]],
      }
    yield f"{json.dumps(line, ensure_ascii=False)}\n".encode()


def _caption(painter, table, row) -> str:
  """What a row says; BadRow where there is nothing, or too much for the judge."""
  caption = table.text(row, "text").strip()
  if not caption:
    raise BadRow(table.name(row), "the caption is empty")
  try:
    painter.check(caption)
  except ValueError as error:
    raise BadRow(table.name(row), str(error)) from error
  return caption


def _id(table, row) -> str | int:
  """The row's id; without ids its number."""
  if "id" not in table.columns:
    return row
  try:
    return table.text(row, "id")
  except BadRow:
    return row
