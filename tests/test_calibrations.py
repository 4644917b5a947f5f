"""Where calibrations are kept, and what is told of files that are something else."""

import dataclasses
import json
import pathlib
import tarfile

import pytest

from ofa_jax import calibrations, checksums, hub
from ofa_jax.calibrations import Calibration
from ofa_jax.convert.__main__ import convert
from ofa_jax.engine import checkpoint
from ofa_jax.tasks import refcoco
from tests.ofa_directory import save_micro

ONE = Calibration(temperature=1.5, rows=200, right=0.7, ece_before=0.2, ece_after=0.02)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return save_micro(tmp_path_factory.mktemp("ofa"))


@pytest.fixture
def source(directory):
  yield hub.open_model(directory)
  (directory / calibrations.NAME).unlink(missing_ok=True)


def test_kept_with_the_model(source, directory):
  assert calibrations.load(source) == calibrations.of_model(directory) == {}
  place = calibrations.store(calibrations.place_of(source), {"vqa/chosen": ONE})
  assert place == directory / calibrations.NAME
  other = dataclasses.replace(ONE, temperature=0.5, search={"num_beams": 5})
  calibrations.store(directory, {"refcoco/generated": other})
  known = calibrations.load(hub.open_model(directory))
  assert known == {"vqa/chosen": ONE, "refcoco/generated": other}
  calibrations.store(directory, {"refcoco/generated": ONE})  # in place of the other
  assert calibrations.of_model(str(directory)) == {"vqa/chosen": ONE, "refcoco/generated": ONE}
  assert not checksums.faults(directory)


def test_of_a_run_with_its_checkpoint(tmp_path):
  """Its other files and checksums stay as they are, and it opens as before."""
  with tarfile.open(pathlib.Path(__file__).parent / "stored" / "run.tar.gz") as archive:
    archive.extractall(tmp_path, filter="data")
  run = hub.open_model(tmp_path / "run")
  place = calibrations.place_of(run)
  assert place == tmp_path / "run" / "checkpoints" / "3"
  calibrations.store(place, {"vqa/chosen": ONE})
  for name in (tmp_path / "run", f"{tmp_path / 'run'}@3", place):
    assert calibrations.of_model(name) == {"vqa/chosen": ONE}
  with checkpoint.open_run(str(tmp_path / "run")) as checkpoints:
    assert checkpoints.steps() == [3]
  assert not checksums.faults(place)
  convert(str(tmp_path / "run"), str(tmp_path / "model"))  # it goes where the weights go
  assert calibrations.of_model(tmp_path / "model") == {"vqa/chosen": ONE}
  assert not checksums.faults(tmp_path / "model")


def test_says_what_it_was_fitted_with():
  search = refcoco.ANSWERING.search
  assert ONE.says("M", search=search) == (
    "probabilities by the calibration of M: temperature 1.5, fitted to 200 answers"
  )
  same = dataclasses.replace(ONE, search=calibrations.searched(search))
  assert same.says("M", search=search) == ONE.says("M", search=search)
  other = dataclasses.replace(search, num_beams=9)
  assert same.says("M", search=other).endswith(
    "searched for with num_beams 5; calibrate again for this search"
  )


@pytest.mark.parametrize(
  "content",
  [
    "{",
    "[]",
    json.dumps({"format": 9, "answers": {}}),
    json.dumps({"format": 1, "answers": {"vqa/chosen": {"temperature": 1.0}}}),
    json.dumps({"format": 1, "answers": {"x": {**dataclasses.asdict(ONE), "temperature": 0}}}),
    json.dumps({"format": 1, "answers": {"x": {**dataclasses.asdict(ONE), "temperature": "a"}}}),
    json.dumps({"format": 1, "answers": 3}),
  ],
)
def test_another_file_is_told(source, directory, content):
  (directory / calibrations.NAME).write_text(content)
  with pytest.raises(ValueError, match=r"calibration\.json: expected"):
    calibrations.load(source)
  with pytest.raises(ValueError, match=r"calibration\.json: expected"):
    calibrations.store(directory, {"vqa/chosen": ONE})


def test_what_is_no_folder_has_none(tmp_path):
  (tmp_path / "model.pt").write_bytes(b"")
  for name in (tmp_path / "model.pt", tmp_path / "nothing", tmp_path, "OFA-huge"):
    assert calibrations.of_model(name) == {}
