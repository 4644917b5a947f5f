"""MUGE: captions (ECommerce-IC) and retrieval of goods, pictures in base64 and texts in JSON."""

import json
import pathlib

from ofa_jax import text_files
from ofa_jax.data.official.writing import (
  Content,
  Files,
  Picture,
  Skipped,
  Table,
  clean,
  find,
  joined,
  need,
  reading,
)

_CAPTIONS = "a line with image_id and text (a list) in JSON"
_QUERIES = "a line with query_id, query_text and item_ids in JSON"


def files(source: pathlib.Path, *, skipped: Skipped) -> Files:
  """`muge_caption_data/caption_{train,valid,test}.tsv`, and `muge_data/{split}_*` for retrieval.

  Captions have the columns uniq-id, image-id, caption, objects (none), image: in training a row
  for each, else one for all of a picture. The retrieval files are those of Chinese-CLIP: ids and
  pictures in `{split}_imgs.tsv`, queries in `{split}_texts.jsonl`.

  Args:
    source: with `IC_{split}.tsv` and `.jsonl`, or `MR_{split}_imgs.tsv` and `_queries.jsonl`.
    skipped: counts what is left out.
  """
  some = False
  for split in ("train", "valid", "test"):
    pictures = find(source, f"IC_{split}.tsv", f"*/IC_{split}.tsv")
    if pictures is not None:
      texts = find(pictures.parent, f"IC_{split}.jsonl")
      if texts is None and split != "test":
        texts = need(pictures.parent, f"IC_{split}.jsonl")
      rows = _captions(pictures, texts, skipped, single=split == "train")
      yield Table(f"muge_caption_data/caption_{split}.tsv", rows)
      some = True
    pictures = find(source, f"MR_{split}_imgs.tsv", f"*/MR_{split}_imgs.tsv")
    if pictures is not None:
      queries = need(pictures.parent, f"MR_{split}_queries.jsonl")
      yield Table(f"muge_data/{split}_imgs.tsv", _pictures(pictures, skipped))
      yield Content(f"muge_data/{split}_texts.jsonl", _queries(queries))
      some = True
  if not some:
    need(source, "IC_train.tsv", "MR_train_imgs.tsv")


def _pictures(path, skipped):
  for number, raw in text_files.lines(path):
    image_id, tab, encoded = text_files.decode(raw, path).strip().partition("\t")
    if tab and image_id and encoded:
      # The url-safe alphabet is read, too.
      yield image_id, Picture(f"{path}:{number} {image_id}", encoded.translate(_STANDARD))
    else:
      skipped.add("row without id and picture", f"{path}:{number}")


def _captions(path, texts, skipped, *, single):
  captions = {}
  if texts is not None:
    for number, raw in text_files.lines(texts):
      with reading(f"{texts}:{number}", _CAPTIONS):
        record = _record(raw, texts, number, _CAPTIONS)
        told = record["text"]
        told = [told] if isinstance(told, str) else told
        captions.setdefault(str(record["image_id"]), []).extend(t for t in told if clean(t))
  for image_id, picture in _pictures(path, skipped):
    told = captions.get(image_id, [])
    if texts is not None and not told:
      skipped.add("picture without a caption", image_id)
    elif single:
      for number, caption in enumerate(told):
        yield f"{image_id}_{number}", image_id, joined([caption]), "", picture
    else:
      yield image_id, image_id, joined(told), "", picture


def _queries(path) -> bytes:
  """The queries as Chinese-CLIP's texts."""
  lines = []
  for number, raw in text_files.lines(path):
    with reading(f"{path}:{number}", _QUERIES):
      record = _record(raw, path, number, _QUERIES)
      text = {
        "text_id": record["query_id"],
        "text": clean(record["query_text"]),
        "image_ids": list(record.get("item_ids") or []),
      }
    lines.append(json.dumps(text, ensure_ascii=False))
  return "".join(f"{line}\n" for line in lines).encode()


def _record(raw, path, number, form):
  try:
    return json.loads(text_files.decode(raw, path))
  except json.JSONDecodeError as error:
    raise ValueError(f"Expected {form} in {path}:{number}, found {error}") from error


_STANDARD = str.maketrans("-_", "+/")
