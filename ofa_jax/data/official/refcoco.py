"""RefCOCO, RefCOCO+ and RefCOCOg: refs(...).p and instances.json, and the pictures of COCO."""

import pathlib

from ofa_jax import storage
from ofa_jax.data import plain_pickle
from ofa_jax.data.official.writing import (
  Files,
  Pictures,
  Skipped,
  Table,
  clean,
  find,
  load_json,
  need,
  reading,
)

# Folder of the data set -> its name in files, and the splits' pickle by who split it.
DATA = {
  "refcoco": ("refcoco", "refs(unc).p"),
  "refcoco+": ("refcocoplus", "refs(unc).p"),
  "refcocog": ("refcocog", "refs(umd).p"),
}
SPLITS = ("train", "val", "testA", "testB", "test")

_REFS = "a list of refs with ref_id, ann_id, image_id, split and sentences (sent)"
_INSTANCES = "images (id, file_name) and annotations (id, bbox)"


def files(source: pathlib.Path, *, skipped: Skipped) -> Files:
  """`refcoco_data/refcoco_*.tsv`, `refcocoplus_data/...`, `refcocog_data/...`, of what is there.

  Columns: uniq-id, image-id, text, "x0,y0,x1,y1", image.
  """
  there = [name for name in DATA if find(source / name, "refs(*).p")]
  if not there:
    need(source, *(f"{name}/{pickled}" for name, (_, pickled) in DATA.items()))
  for name in there:
    yield from _of(source, name, skipped)


def _of(source, name, skipped) -> Files:
  called, usual = DATA[name]
  path = find(source / name, usual, "refs(*).p")
  annotated = need(source / name, "instances.json")
  with reading(path, _REFS):
    refs = _load(path)
    splits = {ref["split"] for ref in refs}
  with reading(annotated, _INSTANCES):
    instances = load_json(annotated)
    names = {image["id"]: image["file_name"] for image in instances["images"]}
    boxes = {record["id"]: record["bbox"] for record in instances["annotations"]}
  coco = ("images/mscoco/images/train2014", "images/train2014", "train2014", "images", "")
  pictures = Pictures(source, *coco)

  def rows(split):
    with reading(path, _REFS):
      for ref in refs:
        if ref["split"] != split:
          continue
        ref_id, image_id = ref["ref_id"], ref["image_id"]
        if ref["ann_id"] not in boxes or image_id not in names:
          skipped.add("text whose box or picture is not in instances.json", str(ref_id))
          continue
        x, y, width, height = boxes[ref["ann_id"]]
        box = ",".join(f"{value:.2f}" for value in (x, y, x + width, y + height))
        image = pictures(names[image_id])
        for number, sentence in enumerate(ref["sentences"]):
          text = clean(sentence["sent"])
          if text:
            yield f"{ref_id}_{number}", str(image_id), text, box, image
          else:
            skipped.add("empty text", f"{ref_id}_{number}")

  for split in SPLITS:
    if split in splits:
      yield Table(f"{called}_data/{called}_{split}.tsv", rows(split))


def _load(path: pathlib.Path) -> list[dict]:
  """The refs, pickled by Python 2, whose texts are bytes in UTF-8, mostly."""
  data = storage.read_bytes(path)
  try:
    refs = plain_pickle.load(data, encoding="utf-8")
  except ValueError:
    try:
      refs = plain_pickle.load(data, encoding="latin-1")
    except ValueError as error:
      raise ValueError(f"Expected {_REFS} in {path}, found {error}") from error
  if not isinstance(refs, list):
    raise ValueError(f"Expected {_REFS} in {path}, found {type(refs).__name__}")
  return refs
