"""Tiny files of entailment, of GLUE, of summaries and of texts alone, in the original's formats.

Each function writes the splits into a folder and returns the fields of the task that name them,
with a tokenizer and sizes for a model that is as small.
"""

import itertools
import pathlib

from ofa_jax.data import prompts
from ofa_jax.data.quickstart_ofa import COLOURS, NUMBERS, SHAPES
from ofa_jax.tasks.glue import PARTS
from ofa_jax.tokenizers.ofa import OFATokenizer

ROWS = {"train": 48, "valid": 16, "test": 8}
WORDS = [" yes no maybe positive negative"] * 50  # so that each is one token
THINGS = [f"{colour} {shape}" for colour, shape in itertools.product(COLOURS, SHAPES)]


def snli_ve(folder: pathlib.Path, shapes: pathlib.Path) -> dict[str, object]:
  """Pictures of the quickstart `shapes`, of which a thing is there, is not, or may be large."""
  asked = ("entailment", "contradiction", "neutral")
  files, texts = {}, []
  lines = (shapes / "train.tsv").read_text(encoding="utf-8").splitlines()
  for split, begin, count in _parts():
    rows = []
    for i, line in enumerate(lines[begin : begin + count]):
      _, image_id, caption, objects, image = line.split("\t")
      label, thing = asked[i % 3], objects.split("&&")[0]
      absent = next(other for other in THINGS if other not in objects)
      said = {"entailment": f"a {thing}", "contradiction": f"a {absent}", "neutral": "it is large"}
      texts.append(prompts.entailment(said[label], caption))
      rows.append((f"{split}{i}", image_id, image, said[label], caption, label))
    files[split] = _write(folder / f"snli_ve_{split}.tsv", rows)
  return files | _sizes(folder, texts) | {"image_size": 48}


def glue(part: str, folder: pathlib.Path) -> dict[str, object]:
  """Sentences of a part of GLUE, whose label follows from the thing that they are about."""
  known = PARTS[part]
  labels = [x for x in known.labels if x.isdecimal()] or list(known.labels)
  files, texts, width = {}, [], max(known.columns.values()) + 1
  for split, begin, count in _parts():
    rows = []
    for i in range(begin, begin + count):
      thing = THINGS[i % len(THINGS)]
      said = [f"this is a {thing}", f"there are {NUMBERS[2 + i % 3]} of it"][: len(known.texts)]
      texts.append(prompts.sentences(known.template, *said))
      row = [f"c{i}"] * width
      for name, text in zip(known.texts, said, strict=True):
        row[known.columns[name]] = text
      row[known.columns["label"]] = "" if split == "test" else labels[i % len(labels)]
      rows.append(row)
    files[split] = _write(folder / f"{part}_{split}.tsv", rows)
  return files | _sizes(folder, texts) | {"part": part}


def gigaword(folder: pathlib.Path) -> dict[str, object]:
  """Sentences about things, of which the headline names the thing; some words are rare."""
  files, texts = {}, []
  for split, begin, count in _parts():
    rows = []
    for i in range(begin, begin + count):
      thing = THINGS[i % len(THINGS)]
      said = f"in the <unk> there was a {thing} , and 1 man saw it ."
      texts += [prompts.summary(said), f"man saw {thing}"]
      rows.append((said, f"man saw {thing}"))
    files[split] = _write(folder / f"gigaword_{split}.tsv", rows)
  return files | _sizes(folder, texts)


def infilling(folder: pathlib.Path) -> dict[str, object]:
  """Sentences about things, of which words will be hidden."""
  files, asked = {}, []
  for split, begin, count in _parts():
    rows = []
    for i in range(begin, begin + count):
      said = f"the {THINGS[i % len(THINGS)]} is {NUMBERS[2 + i % 3]} times there"
      asked.append(prompts.whole_text(f"<mask> {said}"))
      rows.append((str(i), said))
    files[split] = _write(folder / f"infilling_{split}.tsv", rows)
  return files | _sizes(folder, asked)


def _parts():
  """(split, its first row, its rows)."""
  begins = itertools.accumulate(ROWS.values(), initial=0)
  return [
    (split, begin, count) for (split, count), begin in zip(ROWS.items(), begins, strict=False)
  ]


def _write(path, rows):
  path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
  return (str(path),)


def _sizes(folder, texts):
  tokenizer = folder / "tokenizer"
  OFATokenizer.train(texts + WORDS, vocab_size=400).save(tokenizer)
  return {"tokenizer": str(tokenizer), "source_length": 40, "target_length": 48}
