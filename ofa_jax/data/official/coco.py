"""COCO captions by Karpathy's split: `dataset_coco.json` and the folders of pictures."""

import pathlib

from ofa_jax.data.official.writing import (
  Files,
  Pictures,
  Skipped,
  Table,
  clean,
  joined,
  load_json,
  need,
  reading,
)

TRAINED = ("train", "restval")
_FORM = "images with filepath, filename, split, cocoid and sentences (raw, sentid)"


def files(source: pathlib.Path, *, skipped: Skipped) -> Files:
  """`caption_data/caption_{stage1_train,stage2_train,val,test}.tsv`.

  Columns: uniq-id, image-id, caption, objects (none), image. A row of stage 1 is one caption, of
  the others one picture with all of its captions.
  """
  path = need(source, "dataset_coco.json", "*/dataset_coco.json")
  with reading(path, _FORM):
    records = load_json(path)["images"]
    splits = {record["split"] for record in records}
  pictures = Pictures(source, "", "images", "coco")

  def rows(wanted, *, single):
    with reading(path, _FORM):
      for record in records:
        if record["split"] not in wanted:
          continue
        number = str(record["cocoid"] if "cocoid" in record else record["imgid"])
        image = pictures(f"{record.get('filepath', '')}/{record['filename']}".lstrip("/"))
        captions = []
        for sentence in record["sentences"]:
          if not clean(sentence["raw"]):
            skipped.add("empty caption", f"{sentence['sentid']} of the picture {number}")
            continue
          captions.append((str(sentence["sentid"]), sentence["raw"]))
        if single:
          yield from ((name, number, joined([raw]), "", image) for name, raw in captions)
        elif captions:
          yield number, number, joined(raw for _, raw in captions), "", image

  for name, wanted, single in (
    ("stage1_train", TRAINED, True),
    ("stage2_train", TRAINED, False),
    ("val", ("val",), False),
    ("test", ("test",), False),
  ):
    if splits & set(wanted):
      yield Table(f"caption_data/caption_{name}.tsv", rows(wanted, single=single))
