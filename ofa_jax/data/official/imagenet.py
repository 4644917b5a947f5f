"""ImageNet-1K: a folder of pictures a synset, and the words of the synsets."""

import collections
import csv
import io
import os
import pathlib
import pickle

from ofa_jax import text_files
from ofa_jax.data.folder import image_files
from ofa_jax.data.official.writing import (
  Content,
  Files,
  Picture,
  Skipped,
  Table,
  clean,
  find,
  need,
)

SUBSET = 5  # one of so many validation pictures is in the subset that is validated on

_FOLDERS = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", ".")
_WORDS = ("LOC_synset_mapping.txt", "synset_words.txt")


def files(source: pathlib.Path, *, skipped: Skipped) -> Files:
  """`imagenet_1k_data/imagenet_1k_{train,val,val_subset}.tsv` and `class2label_new.pkl`.

  Columns: image, number of the class from 1 on, words of the synset. Numbers are those of the
  synsets in order. The pictures of val lie in folders as those of train, or together, beside
  `LOC_val_solution.csv`.
  """
  words = _words(need(source, *_WORDS))
  yield Content(
    "imagenet_1k_data/class2label_new.pkl",
    pickle.dumps({text: number for number, text in words.values()}, protocol=2),
  )
  root = next((source / f for f in _FOLDERS if (source / f / "train").is_dir()), None)
  root = root or next((source / f for f in _FOLDERS if (source / f / "val").is_dir()), None)
  if root is None:
    raise ValueError(f"Expected folders train and val in {source}, found neither of them")
  if (root / "train").is_dir():
    yield Table("imagenet_1k_data/imagenet_1k_train.tsv", _by_folder(root / "train", words))
  if not (root / "val").is_dir():
    return
  solution = find(source, "LOC_val_solution.csv")
  if any(entry.is_dir() for entry in os.scandir(root / "val")):
    rows = list(_by_folder(root / "val", words))
  elif solution is not None:
    rows = list(_solved(solution, root / "val", words, skipped))
  else:
    raise ValueError(
      f"Expected folders named by synsets in {root / 'val'}, or LOC_val_solution.csv in {source}, "
      "found pictures without classes"
    )
  yield Table("imagenet_1k_data/imagenet_1k_val.tsv", rows)
  yield Table("imagenet_1k_data/imagenet_1k_val_subset.tsv", rows[::SUBSET])


def _words(path: pathlib.Path) -> dict[str, tuple[int, str]]:
  """Number and words of each synset; the words of a later one that has the same get a number."""
  names = {}
  for number, line in enumerate(text_files.read(path).splitlines(), 1):
    synset, _, text = line.strip().partition(" ")
    if synset and not clean(text):
      raise ValueError(f"Expected a synset and its words in {path}:{number}, found {line[:60]!r}")
    if synset:
      names[synset] = clean(text)
  if not names:
    raise ValueError(f"Expected synsets and their words in {path}, found none")
  words, before = {}, collections.Counter()
  for number, synset in enumerate(sorted(names), 1):
    text = names[synset]
    before[text] += 1
    words[synset] = number, text if before[text] == 1 else f"{text} {before[text]}"
  return words


def _by_folder(folder, words):
  synsets = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
  unknown = [name for name in synsets if name not in words]
  if unknown:
    raise ValueError(
      f"Expected folders named by the {len(words)} synsets in {folder}, found "
      f"{', '.join(unknown[:5])}"
    )
  for name in synsets:
    number, text = words[name]
    yield from ((Picture(path), str(number), text) for path in image_files(folder / name))


def _solved(solution, folder, words, skipped):
  """The pictures of a table of ids, each with a synset first in its prediction."""
  for row in csv.DictReader(io.StringIO(text_files.read(solution))):
    image_id, told = row.get("ImageId"), (row.get("PredictionString") or "").split()
    if not image_id or not told or told[0] not in words:
      skipped.add("picture without a class", f"{image_id} in {solution}")
      continue
    number, text = words[told[0]]
    yield Picture(os.path.join(folder, f"{image_id}.JPEG")), str(number), text
