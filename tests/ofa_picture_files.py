"""Tiny files of the tasks that see pictures, in the original's formats.

Each function writes the splits into a folder and returns the fields of the task that name them,
with a tokenizer and sizes for a model that is as small. Pictures are those of OFA's quickstart, of
64 pixels.
"""

import json
import pathlib

import numpy as np

from ofa_jax.data import prompts
from ofa_jax.data.quickstart_ofa import COLOURS, SHAPES
from ofa_jax.tokenizers.ofa import OFATokenizer
from tests import vqa_files

ROWS = {"train": 48, "valid": 16, "test": 8}
BINS = 16
CHINESE = dict(zip((*COLOURS, *SHAPES), "红绿蓝黄紫黑方点条", strict=True))


def caption(folder: pathlib.Path, shapes: pathlib.Path) -> dict[str, object]:
  """Captions: unique id, image id, captions, objects, image."""
  files = {split: _write(folder, split, rows) for split, rows in _rows(shapes)}
  words = {"tokenizer": str(shapes / "tokenizer"), "frequencies": None}
  return files | words | {"image_size": 48, "target_length": 20}


def vqa(folder: pathlib.Path, shapes: pathlib.Path) -> dict[str, object]:
  """Questions after colours and shapes; the test split is the validation's."""
  vqa_files.write(folder, shapes)
  names = {"train": "train", "valid": "valid", "test": "valid"}
  files = {split: (str(folder / f"{name}.tsv"),) for split, name in names.items()}
  words = {"tokenizer": str(folder / "tokenizer"), "answers": str(folder / "answers.json")}
  lengths = {"source_length": 32, "target_length": 40, "answer_length": 8}
  return files | words | lengths | {"image_size": 48}


def refcoco(folder: pathlib.Path, shapes: pathlib.Path) -> dict[str, object]:
  """Boxes of the first thing in a picture: unique id, image id, text, box, image."""
  files, texts = {}, []
  for split, rows in _rows(shapes):
    lines = []
    for name, picture, _, objects, image in rows:
      text = objects.split("&&")[0]
      texts.append(prompts.region(text))
      lines.append((name, picture, text, _box(name), image))
    files[split] = _write(folder, split, lines)
  return files | _words(folder, texts, num_bins=BINS) | {"image_size": 48}


def refcoco_chinese(folder: pathlib.Path, shapes: pathlib.Path) -> dict[str, object]:
  """The same in Chinese: id, text, box, image."""
  files, texts = {}, []
  for split, rows in _rows(shapes):
    lines = []
    for name, _, _, objects, image in rows:
      text = _chinese(objects.split("&&")[0])
      texts.append(prompts.region(text, chinese=True))
      lines.append((name, text, _box(name), image))
    files[split] = _write(folder, split, lines)
  return files | _chinese_words(folder, texts, num_bins=BINS) | {"image_size": 48}


def image_classify(folder: pathlib.Path, shapes: pathlib.Path) -> dict[str, object]:
  """The first thing in a picture is its class: image, number from 1, words."""
  classes = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
  files = {}
  for split, rows in _rows(shapes):
    labels = [objects.split("&&")[0] for _, _, _, objects, _ in rows]
    lines = [
      (row[4], str(classes.index(label) + 1), label)
      for row, label in zip(rows, labels, strict=True)
    ]
    files[split] = _write(folder, split, lines)
  answers = folder / "classes.json"
  answers.write_text(json.dumps({name: i for i, name in enumerate(classes)}))
  texts = [prompts.caption(), *(f" {name}" for name in classes)]
  lengths = {"image_size": 48, "answer_length": 8, "target_length": 16}
  return files | _words(folder, texts) | lengths | {"answers": str(answers)}


def ocr(folder: pathlib.Path, shapes: pathlib.Path) -> dict[str, object]:
  """What the pictures would say if they said it, in traditional characters: id, image, text."""
  files, texts = {}, [prompts.reading(chinese=True), "红绿蓝黄紫黑方点条"]
  for split, rows in _rows(shapes):
    lines = [
      (name, image, _chinese(objects.split("&&")[0]).replace("红", "紅").replace("点", "點"))
      for name, _, _, objects, image in rows
    ]
    files[split] = _write(folder, split, lines)
  return files | _chinese_words(folder, texts) | {"image_size": 64, "target_length": 12}


def muge(folder: pathlib.Path, shapes: pathlib.Path) -> dict[str, object]:
  """Captions of things in Chinese: unique id, image id, captions, objects, image."""
  files, texts = {}, [prompts.caption(chinese=True)]
  for split, rows in _rows(shapes):
    lines = []
    for name, picture, _, objects, image in rows:
      things = [_chinese(thing) for thing in objects.split("&&")]
      said = "，".join(things)
      texts.append(said)
      captions = said if split == "train" else f"{said}&&{things[0]}"
      lines.append((name, picture, "" if split == "test" else captions, "", image))
    files[split] = _write(folder, split, lines)
  return files | _chinese_words(folder, texts) | {"image_size": 48, "target_length": 20}


def _rows(shapes):
  """(split, its rows of the quickstart's columns)."""
  lines = (shapes / "train.tsv").read_text(encoding="utf-8").splitlines()
  begin = 0
  for split, count in ROWS.items():
    yield split, [line.split("\t") for line in lines[begin : begin + count]]
    begin += count


def _box(name):
  """A box somewhere in a picture."""
  rng = np.random.default_rng(list(name.encode()))
  (x, y), (width, height) = rng.uniform(0, 32, 2), rng.uniform(8, 32, 2)
  return f"{x:.2f},{y:.2f},{x + width:.2f},{y + height:.2f}"


def _chinese(thing):
  return "".join(CHINESE[word] for word in thing.split())


def _write(folder, split, rows):
  path = folder / f"{split}.tsv"
  path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
  return (str(path),)


def _words(folder, texts, *, num_bins=0):
  tokenizer = folder / "tokenizer"
  OFATokenizer.train(texts, vocab_size=400, num_bins=num_bins).save(tokenizer)
  return {"tokenizer": str(tokenizer), "source_length": 40}


def _chinese_words(folder, texts, *, num_bins=0):
  tokenizer = folder / "tokenizer"
  tokenizer.mkdir()
  symbols = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set("".join(texts)) - {" "})]
  (tokenizer / "vocab.txt").write_text("".join(f"{x}\n" for x in symbols), encoding="utf-8")
  symbols += ["<mask>", *(f"<bin_{k}>" for k in range(num_bins))]
  (tokenizer / "dict.txt").write_text("".join(f"{x} 1\n" for x in symbols), encoding="utf-8")
  return {"tokenizer": str(tokenizer), "source_length": 40}
