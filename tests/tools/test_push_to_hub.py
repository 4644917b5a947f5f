"""The upload, with the hub replaced by a folder."""

import json
import pathlib
import runpy
import shutil
import sys

import huggingface_hub
import pytest

import ofa_jax
from ofa_jax import hub
from ofa_jax.convert.cnclip import huggingface
from tests import ofa_golden
from tests.cnclip_golden import micro_config
from tests.test_hub import weights

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "push_to_hub.py"


class FakeHub:
  """Repositories that are folders."""

  def __init__(self, root, monkeypatch):
    self.root, self.private = root, {}
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)

  def create_repo(self, repo, *, private, exist_ok):
    assert exist_ok
    self.private.setdefault(repo, private)
    return f"https://huggingface.co/{repo}"

  def upload_folder(self, *, repo_id, folder_path, commit_message):
    assert commit_message
    shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)

  def upload_file(self, *, repo_id, path_or_fileobj, path_in_repo):
    (self.root / repo_id / path_in_repo).write_bytes(path_or_fileobj)


@pytest.fixture
def fake(tmp_path, monkeypatch):
  return FakeHub(tmp_path / "hub", monkeypatch)


@pytest.fixture
def command(monkeypatch, capsys):
  tool = runpy.run_path(str(TOOL), run_name="tool")

  def run(*args):
    monkeypatch.setattr(sys, "argv", ["push_to_hub.py", *map(str, args), "--license=apache-2.0"])
    try:
      tool["main"]()
    except SystemExit as error:
      raise SystemExit(capsys.readouterr().err) from error
    return capsys.readouterr().out

  return run


@pytest.fixture
def directory(tmp_path):
  hub.save_directory(tmp_path / "model", micro_config("micro_vit"), *weights())
  return tmp_path / "model"


def test_a_model_directory_is_uploaded_with_a_card(directory, tmp_path, fake, command):
  rows = [
    {"step": 5, "valid/t2i_r1": 0.5, "valid/zeroshot_top1": 0.25},
    {"step": 10, "train/loss": 1.0},
    {"step": 10, "valid/t2i_r1": 0.75},
  ]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  out = command(directory, "me/small", f"--run={tmp_path}", "--private")
  assert out == "https://huggingface.co/me/small\n"
  assert fake.private == {"me/small": True}
  there = fake.root / "me" / "small"
  text = (there / "README.md").read_text()
  card = huggingface_hub.ModelCard(text)
  assert (card.data.license, card.data.library_name) == ("apache-2.0", "ofa-jax")
  assert "| valid/t2i_r1 | 0.7500 (step 10) |\n| valid/zeroshot_top1 | 0.2500 (step 5) |" in text
  assert "train/loss" not in text and "Licence: apache-2.0." in text
  model, _ = ofa_jax.load_from_name(there)
  assert f"| parameters | {model.num_params:,} |" in text
  assert f"image_size {model.image_size}, patch_size" in text
  assert 'snapshot_download("me/small")' in text
  assert not (directory / "README.md").exists()


def test_a_hugging_face_directory_and_a_card_of_ones_own(tmp_path, fake, command):
  folder = tmp_path / "hf"
  huggingface.save(folder, micro_config("micro_vit"), weights()[0], context_length=52)
  command(folder, "me/hf")
  text = (fake.root / "me" / "hf" / "README.md").read_text()
  assert 'ChineseCLIPModel.from_pretrained("me/hf")' in text and "metric" not in text
  (folder / "README.md").write_text("mine")
  command(folder, "me/own")
  assert (fake.root / "me" / "own" / "README.md").read_text() == "mine"


def test_the_card_of_an_ofa():
  source = hub.Source(
    config=ofa_golden.micro_config(), load=weights, form="huggingface", settings={}
  )
  card = runpy.run_path(str(TOOL), run_name="tool")["card"]
  text = card(source, "me/small", run=None, license="mit")
  assert "This is an OFA (arXiv 2202.03052)" in text
  assert "| encoder_layers | 2 |" in text
  # transformers has no OFA, whatever the directory's layout.
  assert "ofa_jax.load_from_name" in text and "library_name: ofa-jax" in text


def test_what_cannot_be_uploaded_is_told(directory, tmp_path, fake, command, monkeypatch):
  with pytest.raises(SystemExit, match=r"found 0 rows"):
    command(directory, "me/small", f"--run={tmp_path}")
  with pytest.raises(SystemExit, match=r"error: Expected a model's name"):
    command(tmp_path / "absent", "me/small")
  source = hub.Source(config=micro_config("micro_vit"), load=weights, form="run", settings={})
  monkeypatch.setattr(hub, "open_model", lambda path: source)
  with pytest.raises(SystemExit, match=r"found a run in .*ofa_jax\.convert"):
    command(tmp_path, "me/small")
  monkeypatch.undo()
  assert not fake.root.exists()


def test_a_refusal_of_the_hub_says_how_to_log_in(directory, fake, command, monkeypatch):
  def refuse(*_, **__):
    raise OSError("401 Unauthorized")

  monkeypatch.setattr(fake, "create_repo", refuse)
  with pytest.raises(SystemExit, match=r"401 Unauthorized\. Log in with"):
    command(directory, "me/small")
