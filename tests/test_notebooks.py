"""The notebooks run from above to below, and their pairs are the same pages.

Each is a script with cells in the percent format; `jupytext --sync notebooks/*.py` makes the
`.ipynb` beside it of it, which the site links to.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import pytest
from flax import nnx

from ofa_jax import hub, trees
from ofa_jax.configs import quickstart as recipes
from ofa_jax.data import quickstart_world
from ofa_jax.exporting import folder
from tests.compiling import QUICK
from tests.documents import ROOT

FOLDER = ROOT / "notebooks"
NAMES = ("own_pictures", "ofa_tasks", "convert_and_export")


def cells_of(script):
  """(kind, source) of the cells of a script in the percent format."""
  head, *parts = re.split(r"^# %%", script, flags=re.MULTILINE)
  assert "formats: ipynb,py:percent" in head
  for part in parts:
    mark, _, source = part.partition("\n")
    source = source.strip("\n")
    if mark.strip() == "[markdown]":
      yield "markdown", re.sub(r"^# ?", "", source, flags=re.MULTILINE)
    else:
      assert not mark.strip(), mark
      yield "code", source


@pytest.mark.parametrize("name", NAMES)
def test_pairs_are_the_same_page(name):
  page = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
  script = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
  kept = [(cell["cell_type"], "".join(cell["source"])) for cell in page["cells"]]
  assert kept == list(cells_of(script)), "jupytext --sync notebooks/*.py"
  assert kept[0][0] == "markdown" and kept[0][1].startswith("# ")
  for cell in page["cells"]:  # small outputs, of a run that found no fault
    outputs = cell.get("outputs", [])
    assert len(json.dumps(outputs)) < 20_000
    assert not [out for out in outputs if out["output_type"] == "error" or "/tmp" in str(out)]


def test_there_is_no_other():
  assert {path.stem for path in FOLDER.iterdir() if path.suffix != ".md"} == {*NAMES}
  listed = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
  assert all(f"notebooks/{name}.ipynb" in listed for name in NAMES)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def world(place):
  """A model of the small world's kind, narrower, that has learnt nothing."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(quickstart_world, "PICTURES", {"train": 4, "valid": 4, "novel": 4})
    patch.setattr(quickstart_world, "SENTENCES", {"train": 4, "valid": 4})
    config = recipes.world(place / "data")
  sizes = {"width": 32, "mlp": 64, "encoder_layers": 1, "decoder_layers": 1}
  model = dataclasses.replace(config.model, **sizes)
  words = next((place / "data").glob("world-*")) / "tokenizer"
  weights = jax.jit(lambda: trees.split(model.build(rngs=nnx.Rngs(0)))[1:])()
  hub.save_directory(place / "world", model, *weights, settings={"image_size": 32}, files=words)
  return place / "world"


def execute(name, place, **more):
  """Runs a notebook's script in a process of its own; what it prints."""
  environment = (
    os.environ
    | QUICK
    | {
      "OFA_JAX_NOTEBOOKS": str(place / "work"),
      "OFA_JAX_NOTEBOOK_STEPS": "2",
      "PYTHONPATH": str(ROOT),
    }
  )
  done = subprocess.run(
    [sys.executable, FOLDER / f"{name}.py"],
    cwd=place, env=environment | more, capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


def test_ones_own_pictures(place, digits):
  said = execute("own_pictures", place, OFA_JAX_DATA=str(digits.parent))
  assert said.count("t2i_r1") == 2 and "蓝色的数字" in said
  assert len(re.findall(r"\d{3}\.png -?\d\.\d\d", said)) == 12
  assert (place / "work" / "mine" / "checkpoints").is_dir()


def test_ofas_tasks(place, world):
  said = execute("ofa_tasks", place, OFA_JAX_NOTEBOOK_WORLD=str(world))
  for part in ("what colour is the", "top left", "drawn at", "drawn as", "it is a"):
    assert part in said


def test_conversion_and_export(place, digits):
  """Of the run that the first has trained."""
  if folder.missing("onnx"):
    pytest.skip('no packages of the extra "export"')
  said = execute("convert_and_export", place, OFA_JAX_DATA=str(digits.parent))
  assert "model.safetensors" in said and "within" in said
  assert "Converting" not in said  # what jax2onnx says of itself
  assert float(re.search(r"largest difference: (\S+)", said)[1]) < 1e-5
