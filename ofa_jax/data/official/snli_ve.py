"""SNLI-VE (arXiv 1901.06706): `snli_ve_{train,dev,test}.jsonl` and the pictures of Flickr30k."""

import json
import pathlib

from ofa_jax import text_files
from ofa_jax.data.official.writing import (
  Files,
  Pictures,
  Skipped,
  Table,
  clean,
  find,
  need,
  reading,
)

LABELS = ("entailment", "neutral", "contradiction")

_FORM = "a line with Flickr30K_ID, pairID, gold_label, sentence1 and sentence2 in JSON"


def files(source: pathlib.Path, *, skipped: Skipped) -> Files:
  """`snli_ve_data/snli_ve_{train,dev,test}.tsv`.

  Columns: uniq-id, image-id, image, hypothesis, premise, label.
  """
  paths = {split: find(source, f"snli_ve_{split}.jsonl") for split in ("train", "dev", "test")}
  if not any(paths.values()):
    need(source, "snli_ve_train.jsonl")
  pictures = Pictures(source, "flickr30k-images", "flickr30k_images", "images")
  for split, path in paths.items():
    if path is not None:
      yield Table(f"snli_ve_data/snli_ve_{split}.tsv", _rows(path, pictures, skipped))


def _rows(path, pictures, skipped):
  for number, raw in text_files.lines(path):
    if not raw.strip():
      continue
    where = f"{path}:{number}"
    with reading(where, _FORM):
      try:
        record = json.loads(text_files.decode(raw, path))
      except json.JSONDecodeError as error:
        raise ValueError(f"Expected {_FORM} in {where}, found {error}") from error
      label, image_id = record["gold_label"], str(record["Flickr30K_ID"])
      hypothesis, premise = clean(record["sentence2"]), clean(record["sentence1"])
      if label not in LABELS:
        skipped.add("row without a label", where)
      elif not hypothesis or not premise:
        skipped.add("empty text", where)
      else:
        image = pictures(f"{image_id.removesuffix('.jpg')}.jpg")
        yield str(record["pairID"]), image_id, image, hypothesis, premise, label
