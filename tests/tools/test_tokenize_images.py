"""Pictures to codes: the original's resizing, noise by row, faults, shards, killed and gone on."""

import base64

import numpy as np
import pytest
from PIL import Image

from ofa_jax import partial, shards, tokenize_images
from ofa_jax.data import codes
from ofa_jax.data.quickstart import png
from ofa_jax.data.tsv import IMAGE, Table
from ofa_jax.models.vqgan import VQGANConfig
from ofa_jax.tasks.image_gen import ImageGen
from tests import drawing_files, image_gen_golden

SMALL = VQGANConfig(
  image_size=16, num_codes=8, embed_dim=32, z_channels=32, width=32, multipliers=(1, 1), blocks=1,
  attention=(),
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Fields of the task, and a TSV of its validation's pictures, of which the third is broken."""
  folder = tmp_path_factory.mktemp("tokenize")
  fields = drawing_files.write(folder)
  lines = []
  for i, (said, image) in enumerate(drawing_files.pictures(5, first=24)):
    picture = base64.urlsafe_b64encode(png(Image.fromarray(image))).decode()
    lines.append(f"p{i}\t{'AAAA' if i == 2 else picture}\t{said}\n")
  (folder / "pictures.tsv").write_text("".join(lines))
  return folder, fields


def table(folder):
  return Table([str(folder / "pictures.tsv")], columns={"id": 0, IMAGE: 1, "text": 2})


def test_the_shorter_side_is_the_originals():
  given = image_gen_golden.arrays("generate_code_preprocess")["resized"]
  with Image.open(image_gen_golden.FOLDER / "code_source.png") as image:
    found = tokenize_images.shorter_side(image.convert("RGB"), size=32)
    pixels = np.moveaxis(np.asarray(found, np.float32) / 255, -1, 0) * 2 - 1
    np.testing.assert_allclose(pixels, given, atol=1e-6)
    square = tokenize_images.square(image, size=32, fit="crop")
    np.testing.assert_array_equal(square, np.asarray(found)[:, 5:37])
    assert tokenize_images.square(image, size=32, fit="squash").shape == (32, 32, 3)


def test_what_is_written_is_what_training_reads(made, tmp_path, capsys):
  folder, fields = made
  output = tmp_path / "codes.tsv"
  tokenizer = tokenize_images.Tokenizer(fields["codec"])
  count = tokenize_images.tokenize_file(
    tokenizer, table(folder), output=output, size=64, batch_size=2, max_bad_rate=0.5
  )
  assert count == 4 and "pictures.tsv:3" in capsys.readouterr().out
  rows = [line.split("\t") for line in output.read_text().splitlines()]
  assert [row[0] for row in rows] == ["p0", "p1", "p3", "p4"]
  expected = [line.split("\t") for line in (folder / "valid.tsv").read_text().splitlines()]
  assert [row[1:] for row in rows] == [row[1:] for row in expected if row[0] != "2"]
  task = ImageGen(**{**fields, "codec": None, "valid": (str(output),)})
  example = task.examples("valid").example(0, None)
  first = task.words.code_id(0)
  assert codes.written(example["target"][:-1] - first) == rows[0][1]
  # Two jobs, put together: the same bytes.
  parts = tmp_path / "parts.tsv"
  for i in range(2):
    tokenize_images.tokenize_file(
      tokenizer, table(folder), output=parts, size=64, batch_size=2, max_bad_rate=0.5,
      shard=shards.Shard(i, 2),
    )  # fmt: skip
  shards.merge(parts, shards.Shard(None, 2))
  assert parts.read_bytes() == output.read_bytes()
  for wrong, part in (({"size": 60}, "multiple of 8"), ({"size": 4}, "multiple of 8")):
    with pytest.raises(ValueError, match=part):
      tokenize_images.tokenize_file(tokenizer, table(folder), output=output, **wrong)


def test_a_run_that_is_killed_at_its_end_is_gone_on_with(made, tmp_path, monkeypatch):
  """Lines of faulty rows are left out by then, which moves no other row's."""
  folder, fields = made
  tokenizer = tokenize_images.Tokenizer(fields["codec"])
  given = {"output": tmp_path / "codes.tsv", "size": 64, "batch_size": 2, "max_bad_rate": 0.5}
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(partial, "finish", interrupted)
    tokenize_images.tokenize_file(tokenizer, table(folder), **given)
  assert tokenize_images.tokenize_file(tokenizer, table(folder), **given) == 4
  rows = [line.split("\t")[0] for line in given["output"].read_text().splitlines()]
  assert rows == ["p0", "p1", "p3", "p4"]
  assert [path.name for path in tmp_path.iterdir()] == ["codes.tsv"]


def interrupted(*_, **__):
  raise KeyboardInterrupt


def test_noise_is_of_the_row_alone(tmp_path):
  name = drawing_files.save_random(tmp_path / "codec", SMALL)
  tokenizer = tokenize_images.Tokenizer(name)
  images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
  run = {"rows": np.arange(4), "batch_size": 2}
  likeliest = tokenizer(images, seed=None, **run)
  noisy = tokenizer(images, seed=0, **run)
  assert likeliest.shape == (4, 8, 8) and (noisy != likeliest).mean() > 0.1
  again = tokenizer(images[2:3], rows=np.array([2]), seed=0, batch_size=1)
  np.testing.assert_array_equal(again[0], noisy[2])
  assert (tokenizer(images, seed=1, **run) != noisy).any()
  with pytest.raises(ValueError, match="Expected a VQGAN in --codec"):
    tokenize_images.Tokenizer(drawing_files.chinese_clip(tmp_path))
