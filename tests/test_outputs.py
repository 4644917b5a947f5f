"""Outputs that cannot be written are told before the work."""

import errno
import os
import socket
import subprocess
import sys

import pytest

from ofa_jax import cli, outputs
from ofa_jax.engine import lock
from tests import forked
from tests.evaluation_golden import RETRIEVAL

DATA = RETRIEVAL / "dataset"


def refused(check, *args, **kwargs):
  with pytest.raises(ValueError) as error:
    check(*args, **kwargs)
  assert len(str(error.value).splitlines()) == 1
  return str(error.value)


def test_what_can_be_written_leaves_nothing(tmp_path):
  (tmp_path / "old").write_text("old")
  for name in ("old", "new", "a/b/new"):
    outputs.check_file(tmp_path / name, inputs=(None, tmp_path / "other"))
  outputs.check_folder(tmp_path)
  outputs.check_folder(tmp_path / "a" / "b")
  outputs.check_new(tmp_path / "a")
  assert [p.name for p in tmp_path.iterdir()] == ["old"]
  assert (tmp_path / "old").read_text() == "old"


def test_places_of_another_kind(tmp_path):
  (tmp_path / "folder").mkdir()
  (tmp_path / "file").touch()
  os.mkfifo(tmp_path / "pipe")
  (tmp_path / "loop").symlink_to("loop")
  for name, told in {
    "folder": "the folder",
    "folder/": "the folder",
    "file/x": "is a file, not a folder",
    "file/deep/x": "is a file, not a folder",
    "pipe": "a device or pipe",
    "loop": "symbolic links",
    "x" * 250: "too long",
  }.items():
    assert told in refused(outputs.check_file, f"{tmp_path}/{name}"), name
  assert "the file" in refused(outputs.check_folder, tmp_path / "file", flag="--workdir")
  assert "is a file" in refused(outputs.check_folder, tmp_path / "file" / "x")
  assert "exists already" in refused(outputs.check_new, tmp_path / "folder")
  assert "--output, found" in refused(outputs.check_file, "/dev/null")
  for check in (outputs.check_file, outputs.check_folder, outputs.check_new):
    refused(check, "")
    assert "gs:// or s3://" in refused(check, "https://host/x")
  assert {p.name for p in tmp_path.iterdir()} == {"folder", "file", "pipe", "loop"}


def test_a_missing_folder_is_made_or_told(tmp_path):
  path = tmp_path / "missing" / "m.json"
  assert f"no folder {path.parent}" in refused(outputs.check_file, path, makes_parents=False)


def test_an_input_is_not_written_over(tmp_path):
  (tmp_path / "a").write_text("data")
  (tmp_path / "link").symlink_to("a")
  os.link(tmp_path / "a", tmp_path / "hard")
  for name in ("a", "link", "hard", "../" + tmp_path.name + "/a"):
    message = refused(outputs.check_file, tmp_path / name, inputs=(None, tmp_path / "a"))
    assert "which is read too" in message


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_no_space_and_no_right(tmp_path, monkeypatch, number):
  def fsync(file):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(os, "fsync", fsync)
  for check in (outputs.check_file, outputs.check_folder, outputs.check_new):
    assert os.strerror(number) in refused(check, tmp_path / "x")
  assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_a_folder_of_another_user(tmp_path):
  script = (
    "import os\nfrom ofa_jax import outputs\nos.setuid(12345)\n"
    f"outputs.check_file({str(tmp_path / 'x')!r})"
  )
  done = subprocess.run(
    [sys.executable, "-c", script], cwd=forked.ROOT, capture_output=True, text=True
  )
  assert "Permission denied" in done.stderr.splitlines()[-1], done.stderr


def test_the_second_writer_of_a_file_is_refused_and_a_dead_one_succeeded(tmp_path, capsys):
  path = tmp_path / "out.json"
  with cli.sole_writer(path):
    with pytest.raises(lock.HeldError, match=f"process {os.getpid()} "), cli.sole_writer(path):
      pytest.fail("two writers")
    with cli.sole_writer(tmp_path / "another.json"):
      pass
  place = tmp_path / f"out.json.{lock.NAME}"
  place.write_text(f'{{"host": "{socket.gethostname()}", "pid": 7, "since": "today"}}')
  with cli.sole_writer(path):
    path.write_text("whole")
  assert "process 7 on" in capsys.readouterr().err
  assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_what_must_be_new_is_looked_at_under_its_lock(tmp_path):
  path = tmp_path / "model"
  with cli.sole_writer(path, new=True):
    path.mkdir()
  place = tmp_path / f"model.{lock.NAME}"
  place.write_text("{}")  # of a conversion that was killed after its last rename
  with pytest.raises(ValueError, match="exists already"), cli.sole_writer(path, new=True):
    pytest.fail("must not get here")
  assert [p.name for p in tmp_path.iterdir()] == ["model"]


FEATURES = RETRIEVAL / "vit" / "test_imgs.img_feat.jsonl"
TOPK = ["retrieve", "topk", f"--image-feats={FEATURES}"]
TOPK += [f"--text-feats={RETRIEVAL / 'vit' / 'test_texts.txt_feat.jsonl'}"]
CONFIG = "--config=configs/quickstart.py"
TSV = f"--input={DATA / 'test_imgs.tsv'}"
# No model is there: each of them is refused before it would be looked for.
CASES = {
  "zeroshot, a folder": (["zeroshot", "--model=M", "--data=D", "--output={}/folder"], "the folder"),
  "zeroshot, held": (["zeroshot", "--model=M", "--data=D", "--output={}/held"], "the only one"),
  "topk, a folder": ([*TOPK, "--output={}/folder"], "the folder"),
  "topk, an input": ([*TOPK, f"--output={FEATURES}"], "which is read too"),
  "topk, held": ([*TOPK, "--output={}/held"], "the only one"),
  "recall, a folder": (
    ["retrieve", "recall", "--annotations=A", "--predictions=P", "--output={}/folder"],
    "the folder",
  ),
  "to-tr, a file on the way": (
    ["retrieve", "to-tr", f"--input={DATA / 'test_texts.jsonl'}", "--output={}/file/x"],
    "not a folder",
  ),
  "evaluate, missing": (
    ["evaluate", CONFIG, "--checkpoint=M", "--output={}/missing/dir/m.json"],
    "no folder",
  ),
  "evaluate, results": (
    ["evaluate", CONFIG, "--checkpoint=M", "--results={}/file"],
    "--results, found the file",
  ),
  "evaluate, held": (
    ["evaluate", CONFIG, "--checkpoint=M", "--output={}/held"],
    "the only one",
  ),
  "evaluate, held results": (
    ["evaluate", CONFIG, "--checkpoint=M", "--results={}/run"],
    "the only one",
  ),
  "train, a file": (["train", CONFIG, "--workdir={}/file"], "--workdir, found the file"),
  "train, held": (["train", CONFIG, "--workdir={}/run"], "the only one"),
  "generate, a folder": (
    ["generate", "--model=M", "--task=caption", TSV, "--output={}/folder"],
    "the folder",
  ),
  "generate, held": (
    ["generate", "--model=M", "--task=caption", TSV, "--output={}/held"],
    "the only one",
  ),
  "generate, its input": (
    ["generate", "--model=M", "--task=caption", "--input={}/in.tsv", "--output={}/in.tsv"],
    "which is read too",
  ),
  "extract, a file": (
    ["extract_features", "--model=M", f"--texts={DATA / 'test_texts.jsonl'}", "--output={}/file"],
    "found the file",
  ),
  "extract, a URL": (
    ["extract_features", "--model=M", f"--texts={DATA / 'test_texts.jsonl'}", "--output=az://b"],
    "gs:// or s3://",
  ),
  "compile_ahead, missing": (
    ["compile_ahead", CONFIG, "--topology=v5e:2x2", "--output={}/missing/x.json"],
    "no folder",
  ),
  "compile_ahead, held": (
    ["compile_ahead", CONFIG, "--topology=v5e:2x2", "--output={}/held"],
    "the only one",
  ),
  "convert, there": (["tools/convert_torch_weights.py", "M", "{}/folder"], "exists already"),
  "convert, at home": (
    ["tools/convert_torch_weights.py", "M", "~/folder"],
    "/folder exists already",
  ),
  "convert, held": (["tools/convert_torch_weights.py", "M", "{}/held"], "the only one"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with what is in the way."""
  folder = tmp_path_factory.mktemp("place")
  (folder / "folder").mkdir()
  (folder / "file").write_text("old")
  (folder / "in.tsv").write_bytes((DATA / "test_imgs.tsv").read_bytes())
  return folder


@pytest.fixture(scope="module")
def outcomes(place):
  """Status and output of every command."""
  environment = {"OFA_JAX_DATA": str(place / "data"), "HOME": str(place)}
  cases = [
    {"command": [part.format(place) for part in command], "environment": environment}
    for command, _ in CASES.values()
  ]
  with lock.one_writer(place / "held", file=True), lock.one_writer(place / "run"):
    return dict(zip(CASES, forked.run(cases), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_commands_tell_before_their_work(outcomes, name):
  status, output = outcomes[name]
  assert status == 1 and CASES[name][1] in output, output
  assert output.startswith("error: ") and "Traceback" not in output


def test_commands_change_nothing_where_they_are_refused(outcomes, place):
  names = {p.name for p in place.iterdir()} - {"data"}
  assert names == {"folder", "file", "in.tsv"}  # nor is the folder of the held run there any more
  assert (place / "file").read_text() == "old" and not list((place / "folder").iterdir())
