"""A folder of pictures with a table (.csv or .tsv with a header) for each split."""

import functools
import pathlib

from ofa_jax.data.official.vqa import answer_of, column
from ofa_jax.data.official.writing import Files, Picture, Skipped, Table, clean, joined, need
from ofa_jax.data.table import header, read_columns

IMAGES = ("image", "filepath", "file_name", "filename", "path")
CAPTIONS = ("caption", "title", "text", "description")


def files(source: pathlib.Path, *, skipped: Skipped) -> Files:
  """`csv_data/{name}.tsv` of every table, for the task that its columns make up.

  image, question, answer: as VQA. image, text, box (x0,y0,x1,y1): as RefCOCO. image, caption: as
  captions, of a table called train a row each, else a row for all of a picture. A path is relative
  to the table; other names of columns are in `IMAGES` and `CAPTIONS`.
  """
  need(source, "*.csv", "*.tsv")
  tables = sorted([*source.glob("*.csv"), *source.glob("*.tsv")])
  twice = [
    path.stem for path in tables if path.with_suffix(".csv") in tables and path.suffix == ".tsv"
  ]
  if twice:
    raise ValueError(f"Expected one table of each name in {source}, found {twice[0]}.csv and .tsv")
  for path in tables:
    names = header(str(path))
    image = _first(names, IMAGES, path)
    read = functools.partial(read_columns, [path], skip=skipped.add)
    if {"question", "answer"} <= set(names):
      rows = _answers(read([image, "question", "answer"]), skipped)
    elif {"text", "box"} <= set(names):
      rows = _boxes(read([image, "text", "box"]), skipped)
    else:
      captions = read([image, _first(names, CAPTIONS, path)])
      rows = _captions(captions, skipped, single=path.stem == "train")
    yield Table(f"csv_data/{path.stem}.tsv", rows)


def _first(names, known, path) -> str:
  name = next((name for name in known if name in names), None)
  if name is None:
    raise ValueError(
      f"Expected a column {' or '.join(known)} in the first line of {path}, found "
      f"{', '.join(names[:12]) or 'nothing'}"
    )
  return name


def _answers(read, skipped):
  for number, (path, question, answer) in enumerate(read):
    told = [answer_of(part) for part in answer.split("&&") if part.strip()]
    if not clean(question) or not told:
      skipped.add("empty question or answer", path)
      continue
    said = joined(column(part, 1.0) for part in told)
    yield str(number), _id(path), clean(question), said, "", Picture(path)


def _boxes(read, skipped):
  for number, (path, text, box) in enumerate(read):
    if clean(text):
      yield str(number), _id(path), clean(text), clean(box).replace(" ", ""), Picture(path)
    else:
      skipped.add("empty text", path)


def _captions(read, skipped, *, single):
  of = {}
  for number, (path, caption) in enumerate(read):
    if not clean(caption):
      skipped.add("empty caption", path)
    elif single:
      yield str(number), _id(path), joined([caption]), "", Picture(path)
    else:
      of.setdefault(path, []).append(caption)
  for number, (path, captions) in enumerate(of.items()):
    yield str(number), _id(path), joined(captions), "", Picture(path)


def _id(path: str) -> str:
  return pathlib.PurePath(path).stem
