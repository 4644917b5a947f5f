"""GLUE (arXiv 1804.07461): the folders CoLA, MNLI, MRPC, QNLI, QQP, RTE and SST-2 as downloaded."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from ofa_jax import text_files
from ofa_jax.data.official.writing import Files, Skipped, Table, clean, find, need


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """A part of GLUE.

  Attributes:
    folder: as downloaded.
    texts: names of its columns of texts.
    label: name of the column of labels.
    written: the columns that are written: names of columns, "label", or "" for an empty one.
    labels: what labels are written as; those that are not in it are no labels.
    headless: names of the columns of files without a header.
    splits: endings of what is written -> file.
  """

  folder: str
  texts: tuple[str, ...]
  label: str = "label"
  written: tuple[str, ...]
  labels: Mapping[str, str]
  headless: tuple[str, ...] = ()
  splits: Mapping[str, str] = dataclasses.field(
    default_factory=lambda: {split: f"{split}.tsv" for split in ("train", "dev", "test")}
  )


_NUMBERS = {"0": "0", "1": "1"}
_ENTAILED = {name: name for name in ("entailment", "not_entailment")}

PARTS = {
  "cola": Part(
    folder="CoLA",
    texts=("sentence",),
    written=("index", "sentence", "label"),
    labels=_NUMBERS,
    headless=("index", "label", "star", "sentence"),
  ),
  "mnli": Part(
    folder="MNLI",
    texts=("sentence1", "sentence2"),
    label="gold_label",
    written=("sentence1", "sentence2", "label"),
    labels={"neutral": "0", "entailment": "1", "contradiction": "2"},  # as OFA numbers them
    splits={
      "train": "train.tsv",
      "dev": "dev_matched.tsv",
      "dev_mismatched": "dev_mismatched.tsv",
      "test": "test_matched.tsv",
      "test_mismatched": "test_mismatched.tsv",
    },
  ),
  "mrpc": Part(
    folder="MRPC",
    texts=("#1 String", "#2 String"),
    label="Quality",
    written=("#1 String", "#2 String", "label"),
    labels=_NUMBERS,
  ),
  "qnli": Part(
    folder="QNLI",
    texts=("question", "sentence"),
    written=("index", "question", "sentence", "label"),
    labels=_ENTAILED,
  ),
  "qqp": Part(
    folder="QQP",
    texts=("question1", "question2"),
    label="is_duplicate",
    written=("id", "qid1", "qid2", "question1", "question2", "label"),
    labels=_NUMBERS,
  ),
  "rte": Part(
    folder="RTE",
    texts=("sentence1", "sentence2"),
    written=("index", "sentence1", "sentence2", "label"),
    labels=_ENTAILED,
  ),
  "sst2": Part(folder="SST-2", texts=("sentence",), written=("sentence", "label"), labels=_NUMBERS),
}


def files(source: pathlib.Path, *, skipped: Skipped) -> Files:
  """`{part}_data/{part}_{train,dev,test}.tsv` of the parts that are there, in OFA's columns.

  A test row is never left out, since answers are told by its number; its label is empty.
  """
  there = {
    name: folder
    for name, part in PARTS.items()
    if (folder := find(source, part.folder, part.folder.replace("-", ""))) is not None
  }
  if not there:
    need(source, *(part.folder for part in PARTS.values()))
  for name, folder in there.items():
    part = PARTS[name]
    for ending, file in part.splits.items():
      if (folder / file).is_file():
        test = ending.startswith("test")
        rows = _rows(part, folder / file, None if test else skipped)
        yield Table(f"{name}_data/{name}_{ending}.tsv", rows, complete=test)


def _rows(part, path, skipped):
  """Rows as they are written; of a test split `skipped` is None."""
  names = None
  for number, raw in text_files.lines(path):
    # Quotes are characters here; and lines end with a line feed, whatever else is in them.
    values = text_files.decode(raw, path).rstrip("\r\n").split("\t")
    if names is None:
      headless = part.headless if len(values) == len(part.headless) else ()
      names = headless or [value.strip() for value in values]
      _check(part, names, path, labelled=skipped is not None)
      if not headless:
        continue
    row = dict(zip(names, map(clean, values), strict=False))
    fault = _fault(part, names, values, row, labelled=skipped is not None)
    if fault and skipped is None:
      raise ValueError(
        f"Expected every row of {path}, whose number its answer is told by, found in line "
        f"{number} a {fault}"
      )
    if fault:
      skipped.add(fault, f"{path}:{number}")
      continue
    row["label"] = "" if skipped is None else part.labels[row[part.label]]
    yield tuple(row.get(name, "") for name in part.written)


def _check(part: Part, names: Sequence[str], path: pathlib.Path, *, labelled: bool) -> None:
  wanted = [*part.texts, *([part.label] if labelled else [])]
  missing = [name for name in wanted if name not in names]
  if missing:
    raise ValueError(
      f"Expected columns {', '.join(missing)} in the first line of {path}, found "
      f"{', '.join(text_files.shown(name, 40) for name in names[:12])}"
    )


def _fault(part, names, values, row, *, labelled) -> str | None:
  if len(values) != len(names):
    return "row with another number of columns"
  if not all(row[name] for name in part.texts):
    return "row with an empty text"
  if labelled and row[part.label] not in part.labels:
    return "row without a label"
  return None
