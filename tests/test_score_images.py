"""Scores of folders of pictures against the originals' scripts, and what is told of wrong input."""

import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import multihost_utils
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ofa_jax import hub, score_images
from ofa_jax.convert import families
from ofa_jax.data import images, judged
from ofa_jax.inference import judges
from ofa_jax.models import inception, pillow
from ofa_jax.models.abstract import abstract
from ofa_jax.score_images import Plan, score
from ofa_jax.scoring import clip_scores, fid
from ofa_jax.scoring.fid import Moments
from tests.compiling import QUICK
from tests.frozen_golden import DIR, golden_json, shapes_of, state_dict

SETS = DIR / "fid_is"
END_TO_END = golden_json("fid_is", "metrics")["end_to_end"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
  """Model directories by the name of their tensors' list."""
  folder = tmp_path_factory.mktemp("judges")

  def path(name):
    if not (folder / name).exists():
      tensors = state_dict(name)
      (family,) = [family for family in families.FAMILIES if family.wrote(tensors)]
      config, _ = family.infer(tensors, {})
      hub.save_directory(folder / name, config, *family.from_torch(tensors, config))
    return str(folder / name)

  return path


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
  """A folder of PNG files with captions in them, and these."""
  folder = tmp_path_factory.mktemp("captioned")
  captions = {}
  for i, path in enumerate(sorted((DIR / "openai_clip" / "images").iterdir())):
    info = PngInfo()
    captions[path.name] = f"a picture of number {i}"
    info.add_text("caption", captions[path.name])
    Image.open(path).convert("RGB").save(folder / path.name, pnginfo=info)
  return folder, captions


@pytest.mark.slow  # two models of 100 MB are written and read, 10 s each
@pytest.mark.parametrize("dims", [64, 192])
def test_distances_of_folders_are_the_originals(dims, stored):
  """Both variants at once, over two batches, the second one padded."""
  plan = Plan(
    metrics=("fid",),
    inceptions=(stored("torchvision"), stored("pytorch_fid")),
    dims=dims,
    batch_size=4,
  )
  found = score(plan, fake=str(SETS / "set_a"), real=str(SETS / "set_b"))
  expected = {
    f"fid_ofa_{dims}": END_TO_END["ofa_fid_script_sorted_files_batch3"][str(dims)]["fid"],
    f"fid_pytorch_fid_{dims}": END_TO_END["pytorch_fid_sets"][str(dims)],
  }
  assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow  # two more runs, 10 s
def test_statistics_out_of_a_file_are_those_of_the_pictures(stored, tmp_path):
  plan = Plan(metrics=("fid",), inceptions=(stored("torchvision"),), dims=64, batch_size=4)
  npz = str(tmp_path / "real.npz")
  found = score(plan, fake=str(SETS / "set_a"), real=str(SETS / "set_b"), statistics=npz)
  again = score(plan, fake=str(SETS / "set_a"), real=npz)
  assert again == {"fid_ofa_64": pytest.approx(found["fid_ofa_64"], rel=1e-9)}
  with np.load(npz) as arrays:
    assert arrays["mu"].shape == (64,) and arrays["sigma"].shape == (64, 64)


def test_both_sides_see_the_pictures_as_their_scripts_do():
  """What the host prepares is what the network would make of the picture itself."""
  picture = Image.open(SETS / "image_1.png").convert("RGB")
  pixels = np.asarray(picture)
  np.testing.assert_array_equal(
    judged.for_ofa_fid(picture), pillow.resize(pixels[None], (299, 299), kind="bilinear")[0]
  )
  expected = inception.resize(jnp.float32(pixels[None]) / 255, size=299, corners=False)[0]
  found = judged.for_pytorch_fid(picture)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_clips_scores_are_those_of_its_features(stored, captioned, tmp_path):
  """Through the command, once with captions in the pictures and once with a table of them."""
  folder, captions = captioned
  clip = stored("clip")
  source = hub.open_model(clip)
  model = nnx.merge(abstract(source.config)[0], *source.load())

  def features(paths):
    pixels = [images.normalize(images.decode_cropped(p.read_bytes(), size=64)) for p in paths]
    with jax.default_matmul_precision("highest"):
      return jax.jit(model.encode_image)(np.stack(pixels))

  drawn = features(sorted(folder.iterdir()))
  real = features(sorted((SETS / "set_b").iterdir()))
  with jax.default_matmul_precision("highest"):
    said = jax.jit(model.encode_text)(source.tokenizer(list(captions.values())))
  expected = {
    "cmmd": clip_scores.cmmd(real, drawn),
    "clipsim": clip_scores.clipsim(drawn, said),
  }
  output = tmp_path / "scores.json"
  flags = [f"--fake={folder}", f"--real={SETS / 'set_b'}", "--metrics=cmmd,clipsim"]
  done = subprocess.run(
    [sys.executable, "-m", "ofa_jax.score_images", *flags, f"--clip={clip}", f"--output={output}"],
    capture_output=True,
    text=True,
    env={**os.environ, **QUICK},
  )
  assert done.returncode == 0, done.stderr
  assert json.loads(output.read_text()) == pytest.approx(expected, rel=1e-4, abs=1e-4)
  assert f"Scores are in {output}" in done.stdout
  table = tmp_path / "captions.csv"
  lines = [f"{name},{text}" for name, text in reversed(captions.items())]
  table.write_text("\n".join(["filepath,title", *lines]) + "\n")
  plan = Plan(metrics=("clipsim",), clip=clip)
  found = score(plan, fake=str(folder), captions=str(table))
  assert found == {"clipsim": pytest.approx(expected["clipsim"], abs=1e-5)}


@pytest.mark.slow  # the whole network, 15 s
def test_the_inception_score_is_the_originals(stored):
  plan = Plan(metrics=("is", "fid"), inceptions=(stored("torchvision"),), batch_size=8)
  found = score(plan, fake=str(SETS / "set_a"), real=str(SETS / "set_b"))
  mean, std = END_TO_END["ofa_is_script_set_a_splits1"]
  assert found["inception_score"] == pytest.approx(mean, rel=1e-6)
  assert found["inception_score_std"] == pytest.approx(std, abs=1e-9)
  assert np.isfinite(found["fid_ofa"]) and found["fid_ofa"] > 0


def test_hosts_add_up_what_they_have_seen(monkeypatch):
  """As two processes would, of which each has some of the rows."""
  x = np.random.default_rng(0).normal(size=(9, 5)) * 100 + 3
  halves = [(np.array([0, 2, 4, 6, 8]), x[::2]), (np.array([1, 3, 5, 7]), x[1::2])]
  parts = [Moments.of(rows) for _, rows in halves]
  numbers = [np.concatenate([[m.count], m.total, m.products.ravel()]) for m in parts]
  monkeypatch.setattr(jax, "process_count", lambda: 2)

  def of_moments(mine):
    np.testing.assert_array_equal(mine, numbers[0].view(np.uint32))
    return np.stack([n.view(np.uint32) for n in numbers])

  monkeypatch.setattr(multihost_utils, "process_allgather", of_moments)
  found = judges.sum_over_hosts(parts[0])
  whole = Moments.of(x)
  assert found.count == 9
  np.testing.assert_allclose(found.total, whole.total, rtol=1e-14)
  np.testing.assert_allclose(found.products, whole.products, rtol=1e-14)

  def of_rows(mine):
    if not isinstance(mine, tuple):
      return np.array([5, 4])
    index, rows = (np.asarray(x) for x in mine)
    other = np.pad(halves[1][0], (0, 1), constant_values=-1), np.pad(halves[1][1], ((0, 1), (0, 0)))
    return np.stack([index, other[0]]), np.stack([rows, np.float32(other[1])])

  monkeypatch.setattr(multihost_utils, "process_allgather", of_rows)
  np.testing.assert_array_equal(judges.rows_of_hosts(*halves[0]), np.float32(x))


@pytest.mark.slow  # two processes, each of which compiles for itself, 20 s
def test_two_processes_are_one(stored, captioned, tmp_path):
  """Sums over processes: of an odd number of pictures, so that the last batch is one process's."""
  folder, _ = captioned
  fake = tmp_path / "fake"
  fake.mkdir()
  for path in sorted(folder.iterdir())[:5]:
    (fake / path.name).write_bytes(path.read_bytes())
  command = [
    *(sys.executable, "-m", "ofa_jax.score_images", f"--fake={fake}", f"--real={SETS / 'set_b'}"),
    *("--metrics=fid,cmmd,clipsim", "--dims=64", "--batch-size=4"),
    *(f"--inception={stored('torchvision')}", f"--clip={stored('clip')}"),
  ]

  def run(name, **environment):
    return subprocess.Popen(
      [*command, f"--output={tmp_path / name}"],
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
      env={**os.environ, **QUICK, **environment},
    )  # fmt: skip

  with socket.socket() as listener:
    listener.bind(("localhost", 0))
    port = listener.getsockname()[1]
  job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
  both = [run("two.json", **job, JAX_PROCESS_ID=str(i)) for i in range(2)]
  for process in (run("one.json"), *both):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
  one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
  assert set(one) == {"fid_ofa_64", "cmmd", "clipsim"}
  assert two == pytest.approx(one, rel=1e-5)


def test_whole_batches_only():
  plan = Plan(metrics=("fid",), drop_rest=128)
  assert [score_images._compared(plan, n) for n in (5, 127, 128, 300)] == [5, 127, 128, 256]
  assert score_images._compared(Plan(metrics=("fid",)), 300) == 300


def test_what_is_missing_is_told_before_anything_runs(tmp_path):
  """And before weights are read: these models have none."""

  def described(name):
    tensors = shapes_of(name)
    (family,) = [family for family in families.FAMILIES if family.wrote(tensors)]
    content = {"family": family.name, "format": 1, **family.to_json(family.infer(tensors, {})[0])}
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(json.dumps(content))
    return str(tmp_path / name)

  fake, real = str(SETS / "set_a"), str(SETS / "set_b")
  torchvision, pytorch_fid, clip = map(described, ("torchvision", "pytorch_fid", "clip"))
  one, none = tmp_path / "one", tmp_path / "none"
  one.mkdir(), none.mkdir()
  (one / "0.png").write_bytes((SETS / "set_a" / "0.png").read_bytes())
  narrow = tmp_path / "narrow.npz"
  fid.save(narrow, Moments.of(np.random.default_rng(0).normal(size=(9, 64))).statistics)
  table = tmp_path / "captions.csv"
  table.write_text("filepath,title\n0.png,a red square\n")
  inceptions = {"inceptions": (torchvision,)}
  for plan, inputs, message in (
    (Plan(metrics=("fvd",)), {}, r"metrics out of fid, is, cmmd, clipsim, found \['fvd'\]"),
    (Plan(metrics=("fid",), dims=100, **inceptions), {}, "64, 192, 768, 2048 dims, found 100"),
    (Plan(metrics=("fid",)), {"real": real}, "--inception for fid, found none"),
    (Plan(metrics=("fid",), inceptions=(clip,)), {}, "an Inception v3, found an OpenAI CLIP"),
    (Plan(metrics=("fid",), inceptions=(torchvision,) * 2), {}, "of a variant, found torchvision"),
    (Plan(metrics=("is",), inceptions=(pytorch_fid,)), {}, "torchvision's Inception v3"),
    (Plan(metrics=("cmmd",)), {}, "--clip for cmmd, found none"),
    (Plan(metrics=("cmmd",), clip=torchvision), {}, "a CLIP, found an Inception v3"),
    (Plan(metrics=("cmmd",), clip=clip), {}, "--real with pictures for cmmd"),
    (Plan(metrics=("cmmd",), clip=clip), {"real": str(narrow)}, "--real with pictures for cmmd"),
    (Plan(metrics=("fid",), **inceptions), {}, "--real for fid"),
    (
      Plan(metrics=("fid",), **inceptions),
      {"real": str(narrow)},
      "reference statistics of 2048 dims.*found 64",
    ),
    (Plan(metrics=("fid",), **inceptions), {"real": str(one)}, "two real pictures, found 1"),
    (
      Plan(metrics=("fid",), **inceptions),
      {"fake": str(one), "real": real},
      "at least two pictures to compare with others, found 1",
    ),
    (
      Plan(metrics=("fid",), **inceptions),
      {"fake": str(none), "real": real},
      "Expected pictures.*found none",
    ),
    (
      Plan(metrics=("is",), **inceptions),
      {"real": real, "statistics": str(tmp_path / "new.npz")},
      "the metric fid for --save-statistics",
    ),
    (Plan(metrics=("is",), splits=7, **inceptions), {}, "at least 7 pictures for as many splits"),
    (Plan(metrics=("clipsim",), clip=clip), {}, r"found none for 6: .*--captions"),
    (
      Plan(metrics=("clipsim",), clip=clip),
      {"captions": str(table)},
      "found none for 5: .*has to name all pictures",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      score(plan, **{"fake": fake, **inputs})
