"""The recipes for one's own pictures, on small models and forty pictures with Chinese titles."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ofa_jax import cli, evaluate, hub
from ofa_jax.convert.cnclip import table as convert
from ofa_jax.decode.beam import Search
from ofa_jax.train import train
from tests.cnclip_golden import micro_config, micro_state_dict
from tests.data.samples import encode, photograph
from tests.ofa_directory import save_micro

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("two_devices")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
  """A folder with my.csv: forty pictures, eight titles."""
  folder = tmp_path_factory.mktemp("shop")
  lines = ["filepath,title"]
  picture = np.asarray(photograph(50, 50))
  for i in range(40):
    image = Image.fromarray(picture // (1 + i % 8))
    (folder / f"{i:02}.png").write_bytes(encode(image, format="PNG"))
    lines.append(f'{i:02}.png,"第{i % 8}种商品, 红色"')
  (folder / "my.csv").write_text("\n".join(lines), encoding="utf-8-sig")
  return folder


def recipe(name, model, shop, **changes):
  config = runpy.run_path(str(ROOT / "configs" / name))["get_config"](str(model))
  config.task.train = (str(shop / "my.csv"),)
  config.batch_size, config.steps, config.precision = 8, 2, "fp32"
  for field, value in changes.items():
    setattr(config, field, value)
  return config


def test_a_chinese_clip_learns_ones_own_pictures(shop, tmp_path):
  sizes = micro_config("micro_vit")
  weights = convert.from_torch(micro_state_dict("micro_vit"), sizes)
  hub.save_directory(tmp_path / "model", sizes, *weights, settings={"context_length": 24})
  config = recipe("cnclip_custom.py", tmp_path / "model", shop)
  assert config.model == sizes and config.task.context_length == 24
  results = train(config, str(tmp_path / "run"))
  log = (tmp_path / "run" / "log.txt").read_text()
  assert f"Weights: of {tmp_path / 'model'}" in log
  assert "Held out 4 of 40 pictures for the evaluations, as task.valid is not given" in log
  assert 0 < results["valid/t2i_mean_recall"] <= 1
  rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
  assert rows[-1]["step"] == 2 and np.isfinite(rows[0]["train/loss"])
  assert evaluate.run(config, str(tmp_path / "run")) == results


def test_an_ofa_learns_ones_own_pictures(shop, tmp_path):
  config = recipe("ofa_custom.py", save_micro(tmp_path), shop)
  assert config.task.image_size == 64
  rows, held = config.task.examples("train"), config.task.examples("valid")
  assert len(rows) == 36 and len(held) == 4 and "Held out 4 of 40" in held.notes[0]
  assert rows.row(0)["caption"].endswith("种商品, 红色")
  config.task.search, config.task.page = Search(num_beams=1, max_length=4), 0
  results = train(config, str(tmp_path / "run"))
  assert results.keys() >= {"valid/cider", "valid/exact"}
  told = json.loads((tmp_path / "run" / "results" / "valid_predict.json").read_text())
  assert {*(t["image_id"] for t in told)} == {held.row(i)["image_id"] for i in range(4)}


def test_captions_of_one_picture_are_rows_in_training_and_one_row_in_evaluations(shop, tmp_path):
  lines = ["filepath,title", *(f"{shop}/{i:02}.png,{c}" for i in range(2) for c in "甲乙")]
  (tmp_path / "two.csv").write_text("\n".join(lines), encoding="utf-8")
  config = recipe("ofa_custom.py", save_micro(tmp_path), tmp_path)
  config.task.train = config.task.valid = (str(tmp_path / "two.csv"),)
  for split, expected in (("train", [*"甲甲乙乙"]), ("valid", ["甲&&乙"] * 2)):
    rows = config.task.examples(split)
    assert [rows.row(i)["caption"] for i in range(len(rows))] == expected


def test_the_model_after_the_colon_is_of_the_recipes_family(tmp_path):
  with pytest.raises(ValueError, match=r"a Chinese-CLIP after the colon.*ofa_custom\.py"):
    recipe("cnclip_custom.py", save_micro(tmp_path), tmp_path)
  sizes = micro_config("micro_vit")
  weights = convert.from_torch(micro_state_dict("micro_vit"), sizes)
  hub.save_directory(tmp_path / "clip", sizes, *weights)
  with pytest.raises(ValueError, match=r"an OFA after the colon.*cnclip_custom\.py"):
    recipe("ofa_custom.py", tmp_path / "clip", tmp_path)


def test_recipes_are_found_where_the_current_folder_has_none(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ("configs/cnclip_custom.py", "./configs/quickstart.py"):
    assert os.path.samefile(cli._recipe(name), ROOT / name)
  assert cli._recipe("configs/nothing.py") is cli._recipe("other/quickstart.py") is None
  assert "configs/quickstart.py" in cli._near("configs/quickstrat.py")


def test_recipes_and_the_converter_run_from_any_folder(tmp_path):
  """A folder `configs` of somebody else's does not stand in the recipes' way."""
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "mine.py").write_text(
    "from ofa_jax.configs import cnclip_muge\n"
    "def get_config(): raise ValueError(cnclip_muge.get_config().name)\n"
  )
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  for command, told in (
    ("train --config=configs/mine.py --workdir=w", "Chinese-CLIP ViT-B-16 on MUGE"),
    ("train --config=configs/cnclip_muge.py --workdir=w", "missing: "),
    ("convert nothing out", "found 'nothing'"),
  ):
    done = subprocess.run(
      [sys.executable, "-m", *f"ofa_jax.{command}".split(" ")],
      cwd=tmp_path,
      env=environment,
      capture_output=True,
      text=True,
    )
    assert done.returncode == 1 and told in done.stderr, done.stderr
