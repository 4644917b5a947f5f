"""Both stages of text to image with the original's kinds of helpers: VQGAN, CLIP, Inceptions."""

import base64
import dataclasses
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from ofa_jax import tokenize_images
from ofa_jax.config import Eval
from ofa_jax.data.quickstart import png
from ofa_jax.data.tsv import IMAGE, Table
from ofa_jax.models.inception import InceptionConfig
from ofa_jax.models.openai_clip import CLIPTextConfig, OpenAICLIPConfig
from ofa_jax.models.vqgan import VQGANConfig
from ofa_jax.train import train
from tests import drawing_files, tiny
from tests.test_image_gen_training import check
from tests.test_train import assert_bit_equal, final_state

# Two networks of Inception compile for a minute each, and nothing of it is in a cache.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("two_devices")]

CODEC = VQGANConfig(
  image_size=drawing_files.SIDE, num_codes=drawing_files.NUM_CODES, embed_dim=32, z_channels=32,
  width=32, multipliers=(1, 1, 1, 1), blocks=1, attention=(),
)  # fmt: skip
CLIP = OpenAICLIPConfig(
  vision=tiny.MODEL.vision, text=CLIPTextConfig(width=32, layers=1, heads=4), embed_dim=16
)
OF_CLIP = {"score", "clipsim", "cmmd", "nll"}
METRICS = {
  *(f"valid/{name}" for name in (*OF_CLIP, "fid_ofa", "inception_score")),
  *(f"own/{name}" for name in (*OF_CLIP, "fid_pytorch_fid")),
}


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
  """Rows whose codes are of a VQGAN of no size, by `tokenize_images`, and its judges."""
  folder = tmp_path_factory.mktemp("stages")
  fields = drawing_files.write(folder)
  codec = drawing_files.save_random(folder / "vqgan", CODEC)
  judge = drawing_files.save_random(folder / "clip", CLIP)
  tokenizer = tokenize_images.Tokenizer(codec)
  for split, first, number in (("train", 0, 24), ("valid", 24, 5)):
    lines = [
      f"{i}\t{base64.urlsafe_b64encode(png(Image.fromarray(image))).decode()}\t{said}\n"
      for i, (said, image) in enumerate(drawing_files.pictures(number, first=first))
    ]
    (folder / f"{split}_pictures.tsv").write_text("".join(lines))
    count = tokenize_images.tokenize_file(
      tokenizer,
      Table([str(folder / f"{split}_pictures.tsv")], columns={"id": 0, IMAGE: 1, "text": 2}),
      output=str(folder / f"{split}.tsv"),
      size=CODEC.image_size,
      fit="crop",
      seed=None,
      batch_size=8,
      max_bad_rate=0.0,
    )
    assert count == number
  codes = [line.split("\t")[1] for line in (folder / "valid.tsv").read_text().splitlines()]
  four = (f"{line[:-1]}\t{own}\n" for line, own in zip(lines, codes, strict=True))
  (folder / "four.tsv").write_text("".join(four))
  return {**fields, "codec": codec, "judge": judge}


@pytest.fixture(scope="module")
def judged(fields):
  """The evaluations: with the original's FID and with that of papers."""
  folder = pathlib.Path(fields["codec"]).parent
  rows = {"valid": (str(folder / "four.tsv"),), "columns": (0, 1, 2, 3), "compared": True}
  inceptions = {
    name: drawing_files.save_random(folder / variant, InceptionConfig(variant=variant))
    for name, variant in (("valid", "torchvision"), ("own", "pytorch_fid"))
  }

  def of(evaluation: Eval, name: str) -> Eval:
    task = dataclasses.replace(evaluation.task, **rows, inception=inceptions[name])
    return dataclasses.replace(evaluation, name=name, task=task)

  def evaluations(config):
    (given,) = config.evals
    return dataclasses.replace(config, evals=tuple(of(given, name) for name in inceptions))

  return evaluations


def trained(config, workdir):
  """Trains, and again from the middle: the same to the bit."""
  metrics = train(config, str(workdir))
  assert metrics.keys() == METRICS
  assert metrics["valid/inception_score"] >= 1
  own = {name: value for name, value in metrics.items() if name.startswith("valid/")}
  rows = check(workdir, own, *(name.removeprefix("valid/") for name in own))
  assert np.isfinite([*metrics.values()]).all()
  broken = workdir.with_name("broken")
  shutil.copytree(workdir, broken)
  shutil.rmtree(broken / "checkpoints" / "3")
  assert train(config, str(broken)) == metrics
  assert_bit_equal(final_state(workdir), final_state(broken))
  return rows


@pytest.fixture(scope="module")
def first(fields, judged, tmp_path_factory):
  """The workdir of the first stage."""
  workdir = tmp_path_factory.mktemp("first") / "run"
  trained(judged(drawing_files.config(fields)), workdir)
  return workdir


def test_the_first_stage_goes_on_where_it_stopped(first):
  assert (first / "checkpoints" / "3").is_dir()


def test_the_second_stage_learns_from_openais_clip(fields, judged, first, tmp_path):
  config = judged(drawing_files.config(fields, "base,clip"))
  rows = trained(dataclasses.replace(config, init=f"{first}@best"), tmp_path / "run")
  assert all(row["train/best"] > row["train/reward"] for row in rows)
  assert all(row["train/spread"] > 0 for row in rows)
