import hashlib
import json
import pathlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ofa_jax.data.images import (
  HALF_MEAN,
  HALF_STD,
  BadImage,
  decode,
  decode_cropped,
  normalize,
  random_crop_flip,
)
from tests.data.samples import encode, photograph
from tests.frozen_golden import DIR, golden

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "cnclip" / "preprocess"
CASES = json.loads((GOLDEN / "golden.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES)
def test_exact_decode_equals_the_original(case):
  name, size = case.split("@")
  image = decode((GOLDEN / "images" / name).read_bytes(), size=int(size))
  assert image.shape == (int(size), int(size), 3)
  assert image.dtype == np.uint8
  expected = CASES[case]
  assert hashlib.sha256(image.tobytes()).hexdigest() == expected["sha256_uint8_after_resize_rgb"]

  normalised = normalize(image).transpose(2, 0, 1)
  step = int(size) // 16
  with np.load(GOLDEN / "golden.npz") as golden:
    np.testing.assert_allclose(
      normalised[:, ::step, ::step][:, :16, :16], golden[f"{case}/sub16"], atol=1e-6
    )
    np.testing.assert_allclose(normalised[:, 0, :64], golden[f"{case}/row0"], atol=1e-6)
  np.testing.assert_allclose(normalised.mean((1, 2), dtype=np.float64), expected["mean"], atol=1e-6)


@pytest.mark.parametrize("name", sorted({case.split("@")[0] for case in CASES}))
def test_training_decode_is_close_to_the_exact_one(name):
  encoded = (GOLDEN / "images" / name).read_bytes()
  exact = decode(encoded, size=224).astype(int)
  fast = decode(encoded, size=224, exact=False).astype(int)
  # 02 is the only one decoded at a fraction of its size; it is noisier than a photograph.
  if name == "02_rgb_500x375.jpg":
    assert 0 < np.abs(fast - exact).mean() < 3.2
  else:
    np.testing.assert_array_equal(fast, exact)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (601, 333), (1000, 230), (2049, 1537)])
def test_training_decode_does_not_shift_or_shrink(mode, height, width):
  image = photograph(height, width).convert(mode)
  encoded = encode(image, format="JPEG", quality=95)
  exact = decode(encoded, size=224).astype(int)
  difference = np.abs(decode(encoded, size=224, exact=False) - exact)
  shifted = np.abs(np.roll(exact, 1, axis=1) - exact)
  assert difference.mean() < 0.6
  assert difference.mean() < 0.25 * shifted.mean()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_formats(kind, exact):
  image = photograph(48, 64)
  assert decode(encode(image, format=kind), size=32, exact=exact).shape == (32, 32, 3)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA"])
def test_converting_to_rgb_first(mode, exact):
  pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 4), dtype=np.uint8)
  image = Image.fromarray(pixels).convert("RGB").quantize(16) if mode == "P" else None
  image = image or Image.fromarray(pixels, "RGBA").convert(mode)
  encoded = encode(image, format="PNG")
  first = decode(encoded, size=16, exact=exact, rgb_first=True)
  expected = image.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(first, expected)
  assert np.array_equal(first, decode(encoded, size=16, exact=exact)) == (mode in ("RGB", "L"))


def png_header(width, height):
  def chunk(kind, data):
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

  header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
  return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


JPEG = encode(photograph(), format="JPEG")
HUGE_JPEG = JPEG.replace(struct.pack(">HH", 375, 500), struct.pack(">HH", 20000, 10000), 1)
HOSTILE = {
  "empty": b"",
  "text": b"not an image",
  "truncated JPEG": JPEG[: len(JPEG) // 2],
  "JPEG header only": JPEG[:200],
  "two bytes of JPEG": JPEG[:2],
  "truncated PNG": encode(photograph(), format="PNG")[:2000],
  "damaged PNG": encode(photograph(), format="PNG")[:1000] + bytes(5000),
  "TIFF": encode(photograph(), format="TIFF"),
  "PDF": encode(photograph(), format="PDF"),
  "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
  "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
  "200 megapixel PNG": png_header(20000, 10000),
  "200 megapixel JPEG": HUGE_JPEG,
  "absurd PNG": png_header(2**31 - 1, 2**31 - 1),
}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_bad_images(name, exact):
  with pytest.raises(BadImage) as error:
    decode(HOSTILE[name], size=32, exact=exact)
  assert len(str(error.value)) > 10
  if "megapixel" in name:
    assert "pixels" in str(error.value)


def test_random_crop_flip():
  image = np.arange(10 * 10 * 3, dtype=np.uint8).reshape(10, 10, 3)
  crops = [random_crop_flip(image, np.random.default_rng(i), size=8) for i in range(200)]
  places = [
    side[top : top + 8, left : left + 8].tobytes()
    for side in (image, image[:, ::-1])
    for top in range(3)
    for left in range(3)
  ]
  assert {crop.tobytes() for crop in crops} == set(places)
  again = random_crop_flip(image, np.random.default_rng(0), size=8)
  np.testing.assert_array_equal(again, crops[0])
  unflipped = [
    random_crop_flip(image, np.random.default_rng(i), size=8, flip=False) for i in range(99)
  ]
  assert {crop.tobytes() for crop in unflipped} == set(places[:9])


def test_normalize_gives_zero_mean_and_unit_deviation_for_clips_statistics():
  black, white = normalize(np.zeros(3, np.uint8)), normalize(np.full(3, 255, np.uint8))
  np.testing.assert_allclose(white - black, 1 / np.float32([0.26862954, 0.26130258, 0.27577711]))
  np.testing.assert_allclose(black, [-1.7922625, -1.7520971, -1.4802197], rtol=1e-6)


def test_normalize_with_other_statistics():
  image = np.uint8([[0, 255, 51]])
  half = normalize(image, mean=HALF_MEAN, std=HALF_STD)
  np.testing.assert_allclose(half, [[-1, 1, -0.6]], rtol=1e-6)


@pytest.mark.parametrize("size", [64, 224])
def test_clips_pictures_are_the_originals(size):
  """Every mode of a picture; of 224 pixels every eighth row and column is stored."""
  arrays = golden("openai_clip", "preprocess")
  folder = DIR / "openai_clip" / "images"
  step = 1 if size == 64 else 8
  for path in sorted(folder.iterdir()):
    found = decode_cropped(path.read_bytes(), size=size)
    assert (found.shape, found.dtype) == ((size, size, 3), np.uint8)
    stored = arrays[f"{path.stem}.{size}.uint8"]
    np.testing.assert_array_equal(found[::step, ::step], stored)
    normal = np.moveaxis(normalize(found[::step, ::step]), -1, 0)
    np.testing.assert_allclose(normal, arrays[f"{path.stem}.{size}"], rtol=0, atol=1e-6)


def test_a_picture_that_would_become_too_large_is_told():
  with pytest.raises(BadImage, match="more than the 89,000,000 allowed"):
    decode_cropped(encode(Image.new("L", (9000, 1)), format="PNG"), size=224)
