"""A small real data set, made without a download: handwritten digits with Chinese captions.

The images are the 1,797 scans of scikit-learn's `load_digits` (Alpaydin and Kaynak, UCI 1998; 8x8
greys of 13 writers), enlarged to 32x32. The files are in Chinese-CLIP's raw formats, so that what
reads them reads any other data set:

  {train,valid}_imgs.tsv     image id, tab, base64 of a PNG
  {train,valid}_texts.jsonl  {"text_id", "text", "image_ids"}
  zeroshot/                  the held-out images as test/<class>/<id>.png, label_cn.txt, label.txt

360 images are held out, 36 of each digit, spread evenly over the writers. A text is one template
with one digit's name and belongs to every image of that digit in its split, so that each image has
as many captions as there are templates. A caption of one image only would be a question without an
answer: nothing tells which of the 36 threes is meant. Guessing has a recall@1 of 10 %.
"""

import base64
import io
import itertools
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image

from ofa_jax import storage
from ofa_jax.files import room_for, written_whole

VERSION = 1  # a part of the folder's name: raise it with every change of what is written
CLASS_NAMES = tuple("零一二三四五六七八九")
TEMPLATES = (
  "手写数字{}的图片",
  "一张写着数字{}的照片",
  "数字{}的手写体",
  "有人用笔写下了数字{}",
  "手写的{}",
  "这是数字{}",
)

_WHOLE = "whole.txt"
_SIZE = 32  # pixels
_VALID_PER_CLASS = 36


def digits(directory: str | os.PathLike) -> pathlib.Path:
  """Returns the folder of the data set under `directory`, making it if it is not there."""
  return make_once(directory, f"digits-v{VERSION}", _write)


def make_once(
  directory: str | os.PathLike, name: str, write: Callable[[pathlib.Path], None]
) -> pathlib.Path:
  """Returns the folder `name` under `directory`, made by `write` if it is not there.

  `write` makes the folder that it is given, too.

  The folder appears whole or not at all, also when several processes make it at once; in a bucket
  it is whole where there is a file `whole.txt` in it.
  """
  if storage.in_bucket(directory):
    place = storage.of(directory) / name
    if not storage.exists(place / _WHOLE):
      with tempfile.TemporaryDirectory(prefix="ofa_jax-") as folder:
        made = pathlib.Path(folder) / name
        write(made)
        storage.upload(made, place)
      storage.write_bytes(place / _WHOLE, b"")
    return place
  path = pathlib.Path(directory) / name
  if path.is_dir():
    return path
  try:
    with room_for(path), written_whole(path) as made:
      write(made)
  except (ValueError, OSError):
    if not path.is_dir():  # else another process was first: its folder holds the same bytes
      raise
  return path


def write_lines(path: pathlib.Path, lines: Iterable[str]) -> None:
  """Writes a text file in UTF-8, a line each."""
  with path.open("w", encoding="utf-8", newline="\n") as file:
    file.writelines(f"{line}\n" for line in lines)


def _write(path: pathlib.Path) -> None:
  images, labels = scans()
  valid = held_out(labels)
  zeroshot = path / "zeroshot"
  for label in range(len(CLASS_NAMES)):
    (zeroshot / "test" / str(label)).mkdir(parents=True)
  for i in np.flatnonzero(valid):
    (zeroshot / "test" / str(labels[i]) / f"{i:04}.png").write_bytes(images[i])
  write_lines(zeroshot / "label_cn.txt", CLASS_NAMES)
  write_lines(zeroshot / "label.txt", map(str, range(len(CLASS_NAMES))))

  text_ids = itertools.count()
  for split, chosen in (("train", ~valid), ("valid", valid)):
    rows = (f"{i}\t{base64.b64encode(images[i]).decode()}" for i in np.flatnonzero(chosen))
    write_lines(path / f"{split}_imgs.tsv", rows)
    texts = (
      {
        "text_id": next(text_ids),
        "text": template.format(name),
        "image_ids": np.flatnonzero(chosen & (labels == label)).tolist(),
      }
      for label, name in enumerate(CLASS_NAMES)
      for template in TEMPLATES
    )
    rows = (json.dumps(text, ensure_ascii=False) for text in texts)
    write_lines(path / f"{split}_texts.jsonl", rows)


def scans() -> tuple[list[bytes], np.ndarray]:
  """Returns the images as PNG files and their labels, int[1797]."""
  from sklearn.datasets import load_digits  # half a second, for the first run only

  scans, labels = load_digits(return_X_y=True)
  greys = np.rint(scans.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
  size = (_SIZE, _SIZE)
  larger = (Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC) for grey in greys)
  return [png(image.convert("RGB")) for image in larger], labels


def png(image: Image.Image) -> bytes:
  """A picture as a file."""
  file = io.BytesIO()
  image.save(file, "PNG")
  return file.getvalue()


def held_out(labels: np.ndarray) -> np.ndarray:
  """Returns bool[N], True for the held-out images; no generator, so the same everywhere."""
  valid = np.zeros(len(labels), bool)
  for label in range(len(CLASS_NAMES)):
    members = np.flatnonzero(labels == label)
    valid[members[np.arange(_VALID_PER_CLASS) * len(members) // _VALID_PER_CLASS]] = True
  return valid
