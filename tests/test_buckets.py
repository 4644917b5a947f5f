"""Commands whose every place is in a bucket, against emulated GCS and S3."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from ofa_jax import evaluate, hub, storage, trees
from ofa_jax import train as training
from ofa_jax.convert.__main__ import convert
from ofa_jax.data import quickstart
from ofa_jax.engine import log
from tests import bucket_servers, kills, ofa_directory, tiny
from tests.evaluation_golden import RETRIEVAL, save_model
from tests.test_processes import finish, start_cluster

pytestmark = pytest.mark.usefixtures("two_devices")
ROOT = pathlib.Path(__file__).parent.parent
TIMES = ("data_time", "batch_time", "rows_per_s")


def without_times(rows):
  return [{k: v for k, v in row.items() if not k.endswith(TIMES)} for row in rows]


def weights(place):
  return weights_of(hub.open_model(place))


def weights_of(source):
  return trees.flatten(jax.device_get(dict(zip("pr", source.load(), strict=True))))


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for name, x in a.items():
    np.testing.assert_array_equal(x, b[name], err_msg=name)


@pytest.fixture(scope="module")
def local(digits, tmp_path_factory):
  """A run on this disk and its config."""
  config = tiny.config(digits, steps=4, save_every=2)
  workdir = tmp_path_factory.mktemp("local")
  training.train(config, str(workdir))
  return workdir, config


def test_a_workdir_in_a_bucket(bucket, local):
  workdir, config = local
  training.train(config, f"{bucket}/run")
  storage.remove(f"{bucket}/run/checkpoints/4")
  training.train(config, f"{bucket}/run")
  assert_equal(weights(f"{bucket}/run@4"), weights(workdir))
  names = storage.files_below(f"{bucket}/run")
  assert {"config.json", "log.txt", "metrics.jsonl"} <= names.keys()
  assert "in-use.json" not in names
  text = storage.read_bytes(f"{bucket}/run/log.txt").decode()
  assert "resumed from this workdir at step 2" in text and "Restart 1" in text


@pytest.mark.slow  # a thousand pictures are read one by one, four times, for each service
def test_a_run_is_the_same_in_a_bucket(bucket, digits, tmp_path):
  """Also when its last checkpoint is lost and it goes on from the one before."""
  data = quickstart.digits(f"{bucket}/data")
  there = tiny.config(data, evals=True, steps=4, save_every=2)
  here = tiny.config(digits, evals=True, steps=4, save_every=2)
  metrics = training.train(here, str(tmp_path / "run"))
  assert training.train(there, f"{bucket}/run") == metrics
  storage.remove(f"{bucket}/run/checkpoints/4")
  assert training.train(there, f"{bucket}/run") == metrics
  assert_equal(weights(f"{bucket}/run@4"), weights(tmp_path / "run"))
  rows = [log.read_metrics(place) for place in (f"{bucket}/run", tmp_path / "run")]
  assert without_times(rows[0])[-1] == without_times(rows[1])[-1]
  names = storage.files_below(f"{bucket}/run")
  assert {"config.json", "log.txt", "metrics.jsonl", "curves.png"} <= names.keys()
  assert any(name.startswith("results/") for name in names)
  assert "in-use.json" not in names
  text = storage.read_bytes(f"{bucket}/run/log.txt").decode()
  assert "resumed from this workdir at step 2" in text
  assert evaluate.run(there, f"{bucket}/run@2").keys() == metrics.keys()


def test_models_are_converted_to_and_from_a_bucket(bucket, tmp_path):
  model = save_model(tmp_path, "vit")
  convert(str(model), f"{bucket}/model")
  assert hub.open_model(f"{bucket}/model").form == "directory"
  assert_equal(weights(f"{bucket}/model"), weights(model))
  convert(f"{bucket}/model", f"{bucket}/model.pt", to="torch")
  convert(f"{bucket}/model", f"{bucket}/hf", to="hf")
  assert hub.open_model(f"{bucket}/hf").form == "huggingface"
  torch = hub.open_model(f"{bucket}/model.pt", config=hub.open_model(model).config)
  assert torch.form == "torch"
  for source in (torch, hub.open_model(f"{bucket}/hf")):
    assert_equal(weights_of(source), weights(model))
  convert(f"{bucket}/hf", str(tmp_path / "back"))
  assert_equal(weights(tmp_path / "back"), weights(model))
  with pytest.raises(ValueError, match="exists already"):
    convert(str(model), f"{bucket}/model")


def command(*arguments, environment=None, status=0):
  """Runs a command; its output."""
  result = subprocess.run(
    [sys.executable, "-m", *arguments],
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **(environment or {})},
    capture_output=True, text=True, timeout=600,
  )  # fmt: skip
  said = result.stdout + result.stderr
  assert result.returncode == status, said
  return said


def test_a_bucket_that_cannot_be_written_is_told_before_the_first_step(bucket, services, digits):
  services[bucket[:2]].rule = bucket_servers.read_only
  with pytest.raises(ValueError, match="nothing can be written") as error:
    training.train(tiny.config(digits), f"{bucket}/run")
  assert "--workdir" in str(error.value) and len(str(error.value).splitlines()) == 1
  missing = f"{bucket[:5]}no-such-bucket/run"
  services[bucket[:2]].rule = None
  with pytest.raises(ValueError, match="nothing can be written"):
    training.train(tiny.config(digits), missing)


@pytest.mark.slow  # five processes that compile the quickstart, for each service
def test_the_quickstart_killed_and_gone_on_with(bucket, services):
  flags = (
    f"--config={ROOT / 'configs' / 'quickstart.py'}",
    *("--config.steps=6", "--config.save_every=2", "--config.log_every=1"),
  )
  environment = {"OFA_JAX_DATA": f"{bucket}/data"}
  straight = command(
    "ofa_jax.train", *flags, f"--workdir={bucket}/straight", environment=environment
  )
  services[bucket[:2]].rule = bucket_servers.every(20)
  process = subprocess.Popen(
    [sys.executable, "-m", "ofa_jax.train", *flags, f"--workdir={bucket}/killed"],
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **environment},
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
  )  # fmt: skip
  end = time.monotonic() + 500
  while not any(
    re.search(r"checkpoints/\d+/commit_success.txt", path)
    for method, path in services[bucket[:2]].asked
    if method in ("PUT", "POST") and "killed" in path
  ) and not storage.exists(f"{bucket}/killed/checkpoints/2/commit_success.txt"):
    assert process.poll() is None and time.monotonic() < end
    time.sleep(0.1)
  process.send_signal(signal.SIGKILL)
  process.wait()
  again = command("ofa_jax.train", *flags, f"--workdir={bucket}/killed", environment=environment)
  assert "resumed from this workdir" in again and "takes over" in again
  services[bucket[:2]].rule = None
  assert_equal(weights(f"{bucket}/killed@6"), weights(f"{bucket}/straight@6"))
  rows = [without_times(log.read_metrics(f"{bucket}/{name}")) for name in ("killed", "straight")]
  assert {r["step"] for r in rows[0]} == {r["step"] for r in rows[1]} == set(range(1, 7))
  assert rows[0][-1] == rows[1][-1]
  assert f"These and all before them are in {bucket}/straight/metrics.jsonl" in straight


@pytest.mark.slow  # a process that compiles two evaluations, for each service
def test_evaluate(bucket, digits, monkeypatch):
  monkeypatch.setenv("OFA_JAX_DATA", str(digits.parent))
  config = dataclasses.replace(kills.get_config("digits"), steps=2, save_every=1)
  metrics = training.train(config, f"{bucket}/run")
  command(
    *("ofa_jax.evaluate", f"--config={ROOT / 'tests' / 'kills.py'}:digits"),
    *(f"--checkpoint={bucket}/run@2", f"--output={bucket}/metrics.json"),
    f"--results={bucket}/results",
  )
  stored = json.loads(storage.read_bytes(f"{bucket}/metrics.json"))
  assert stored.keys() == metrics.keys()
  # Ranks of near equals differ, for here programs are compiled in another way.
  np.testing.assert_allclose(stored["valid/loss"], metrics["valid/loss"], rtol=1e-4)
  assert list(storage.files_below(f"{bucket}/results"))


@pytest.mark.slow  # a dozen processes, for each service
def test_every_command(bucket, services, tmp_path):
  place = f"{bucket}/x"
  clip = save_model(tmp_path, "vit")
  ofa_directory.save_micro(tmp_path)
  storage.upload(clip, f"{place}/clip")
  storage.upload(tmp_path / "model", f"{place}/ofa")
  kills.write_pictures(tmp_path / "in.tsv")
  storage.upload(tmp_path / "in.tsv", f"{place}/in.tsv")
  data = RETRIEVAL / "dataset"
  for name in ("test_imgs.tsv", "test_texts.jsonl"):
    storage.upload(data / name, f"{place}/{name}")
  zeroshot = quickstart.digits(tmp_path / "digits") / "zeroshot"
  storage.upload(zeroshot / "label_cn.txt", f"{place}/digits/label_cn.txt")
  for label in range(10):
    picture = sorted((zeroshot / "test" / str(label)).iterdir())[0]
    storage.upload(picture, f"{place}/digits/test/{label}/{picture.name}")
  services[bucket[:2]].rule = bucket_servers.every(20)
  ssd = tmp_path / "ssd"
  for root, out, more in (
    (place, f"{place}/out", ()),
    (place, f"{place}/staged", (f"--stage={ssd}",)),
  ):
    command(
      *("ofa_jax.extract_features", f"--model={root}/clip", f"--images={root}/test_imgs.tsv"),
      *(f"--texts={root}/test_texts.jsonl", f"--output={out}", *more),
    )
    command(
      *("ofa_jax.generate", f"--model={root}/ofa", "--task=caption", "--max-bad-rate=0.1"),
      *(f"--input={root}/in.tsv", f"--output={out}/captions.jsonl", *more),
    )
    command(
      *("ofa_jax.zeroshot", f"--model={root}/clip", f"--data={root}/digits"),
      *("--dataset=digits", f"--output={out}/zeroshot.json", *more),
    )
  features = [f"--{kind}-feats={place}/out/test_{s}.{k}_feat.jsonl" for kind, s, k in (
    ("image", "imgs", "img"), ("text", "texts", "txt"),
  )]  # fmt: skip
  command("ofa_jax.retrieve", "topk", *features, f"--output={place}/out/topk.jsonl", "--top-k=10")
  command(
    *("ofa_jax.retrieve", "recall", f"--annotations={place}/test_texts.jsonl"),
    *(f"--predictions={place}/out/topk.jsonl", f"--output={place}/out/score.json"),
  )
  services[bucket[:2]].rule = None
  assert json.loads(storage.read_bytes(f"{place}/out/score.json"))["success"]
  local = tmp_path / "local"
  command(
    *("ofa_jax.extract_features", f"--model={clip}", f"--output={local}"),
    *(f"--images={data / 'test_imgs.tsv'}", f"--texts={data / 'test_texts.jsonl'}"),
  )
  command(
    *("ofa_jax.generate", f"--model={tmp_path / 'model'}", "--task=caption"),
    *(f"--input={tmp_path / 'in.tsv'}", f"--output={local}/captions.jsonl", "--max-bad-rate=0.1"),
  )
  for name in ("test_imgs.img_feat.jsonl", "test_texts.txt_feat.jsonl", "captions.jsonl"):
    content = (local / name).read_bytes().replace(str(tmp_path).encode(), b"")
    for out in ("out", "staged"):
      stored = storage.read_bytes(f"{place}/{out}/{name}").replace(place.encode(), b"")
      assert stored == content, (name, out)
  assert {p.name for p in ssd.rglob("*.tsv")} == {"test_imgs.tsv", "in.tsv"}
  assert not [name for name in storage.files_below(place) if "in-use" in name or "partial" in name]


@pytest.mark.slow  # four processes, for each service
def test_two_processes_write_one_run(bucket, digits, tmp_path):
  """Each writes its own part of the arrays: the steps are those of a local folder."""
  flags = ("--config.steps=4", "--config.save_every=2", "--config.evals=()", "--config.mesh.fsdp=2")
  for folder in (f"{bucket}/run", tmp_path / "run"):
    with socket.socket() as s:
      s.bind(("localhost", 0))
      port = s.getsockname()[1]
    cluster = start_cluster(digits, folder, *flags, "--config.mesh.data=1", port=port, num=2)
    for process in cluster:
      finish(process)
  assert_equal(weights(f"{bucket}/run"), weights(tmp_path / "run"))
  names = storage.files_below(f"{bucket}/run/checkpoints/4/model")
  assert any(name.startswith("ocdbt.process_1/") for name in names)
