"""Small data files for the tests of this folder."""

import base64
import io

import numpy as np
from PIL import Image


def photograph(height=375, width=500):
  """A smooth random picture."""
  coarse = np.random.default_rng(0).integers(0, 256, (height // 25, width // 25, 3), dtype=np.uint8)
  return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image, **options):
  """The bytes of an image file."""
  file = io.BytesIO()
  image.save(file, **options)
  return file.getvalue()


def plain_jpeg(value, size=24):
  """A JPEG of one grey value."""
  return encode(Image.new("RGB", (size, size), (value,) * 3), format="JPEG", quality=95)


def write_tsv(path, rows):
  """Writes (id, bytes) rows."""
  path.write_bytes(b"".join(b"%s\t%s\n" % (i.encode(), base64.b64encode(b)) for i, b in rows))
  return path
