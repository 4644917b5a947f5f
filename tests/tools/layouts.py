"""Small pictures and files for data sets in the layouts of their makers, and rows read back."""

import base64
import io
import json

import numpy as np
from PIL import Image


def picture(path=None, *, colour=0, kind="JPEG"):
  """Bytes of a small picture, and a file with them."""
  file = io.BytesIO()
  Image.fromarray(np.full((20, 30, 3), colour, np.uint8)).save(file, kind)
  if path is not None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file.getvalue())
  return file.getvalue()


def read(path):
  return [line.split("\t") for line in path.read_text("utf-8").removesuffix("\n").split("\n")]


def shown(path, image):
  """The rows of a file, without their picture."""
  rows = read(path)
  for row in rows:
    assert Image.open(io.BytesIO(base64.b64decode(row[image]))).size == (30, 20)
    row[image] = "IMAGE"
  return rows


def write_json(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value), encoding="utf-8")
