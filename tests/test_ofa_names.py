"""The names of the fine-tuned and the Chinese OFAs; the download of a file is replaced."""

import hashlib
import pathlib
import sys

import numpy as np
import pytest

import ofa_jax
from ofa_jax import hub
from ofa_jax.convert import __main__ as convert_command
from ofa_jax.convert import releases
from ofa_jax.convert.ofa import released
from ofa_jax.convert.ofa import table as convert
from ofa_jax.tasks.words import tokenizer_folder
from ofa_jax.tokenizers.ofa import OFATokenizer
from ofa_jax.weights import open_start
from tests.ofa_directory import write_words
from tests.ofa_files import write_chinese
from tests.ofa_golden import micro_config
from tests.test_hub_ofa import SETTINGS, assert_same, save_fairseq, tensors, weights


def write_chinese_words(folder):
  """A Chinese tokenizer of the micro model's 112 symbols."""
  folder.mkdir()
  pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(0x4E00, 0x4E00 + 54))]
  tail = ("<mask>", *(f"<code_{k}>" for k in range(32)), *(f"<bin_{k}>" for k in range(16)))
  (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
  (folder / "dict.txt").write_text("".join(f"{symbol} 1\n" for symbol in (*pieces, *tail)))
  return folder


@pytest.mark.parametrize(
  ("name", "average"),
  [("OFA-base-vqa", True), ("OFA-large-caption", False), ("OFA-CN-large-ocr", False)],
)
def test_fine_tuned_names_are_downloaded_and_converted_once(tmp_path, monkeypatch, name, average):
  served, chinese = tmp_path / "served", "-CN-" in name
  served.mkdir()
  words = (write_chinese_words if chinese else write_words)(tmp_path / "words")
  moved = {key: 2 * tensors()[key] for key in (convert.WORDS, *convert.TIED)}
  extra = {"extra_state": {"ema_fp32_params": moved}} if average else {}
  file, *others = hub.RELEASES[name].files
  save_fairseq(served / file, **extra)
  asked = []

  def get(url, path, *, sha256):
    asked.append((url, bool(sha256)))
    folder = words if sha256 else served
    path.write_bytes((folder / path.name).read_bytes())

  monkeypatch.setattr(releases, "_get", get)
  for _ in range(2):
    source = hub.open_model(name, download_root=tmp_path / "cache")
    assert (source.form, source.settings) == ("directory", SETTINGS)
  server = "https://ofa-beijing.oss-cn-beijing.aliyuncs.com/checkpoints/"
  utils = "utils/BERT_CN_dict" if chinese else "utils/BPE"
  assert asked[0] == (f"{server}{file}", False)
  assert [url.rpartition("/OFA/")[2].partition("/")[2] for url, _ in asked[1:]] == [
    f"{utils}/{x}" for x in others
  ]
  assert source.tokenizer.chinese == chinese and source.tokenizer.vocab_size == 112
  found = np.asarray(source.load()[0]["tokens"]["embedding"])
  np.testing.assert_array_equal(found, (moved if average else tensors())[convert.WORDS].numpy())
  assert {path.name for path in (tmp_path / "cache").iterdir()} == {name, f"{name}-released"}


def test_training_starts_from_a_pretrained_name_as_it_was_trained(tmp_path, monkeypatch):
  words = write_chinese_words(tmp_path / "words")
  twice = {key: 2 * tensors()[key] for key in (convert.WORDS, *convert.TIED)}
  save_fairseq(words / "ofa_cn_base.pt", extra_state={"ema": twice})

  def get(url, path, *, sha256):
    path.write_bytes((words / path.name).read_bytes())

  monkeypatch.setattr(releases, "_get", get)
  start = open_start("OFA-CN-base", config=micro_config(), seed=0, download_root=tmp_path / "cache")
  assert_same(start.load(), weights())
  assert start.tokenizer.chinese


def test_a_tokenizer_needs_no_weights(tmp_path, monkeypatch):
  words = write_chinese_words(tmp_path / "words")
  save_fairseq(words / "caption_cn_base.pt")
  monkeypatch.setenv("HOME", str(tmp_path))
  asked = []

  def get(url, path, *, sha256):
    asked.append(path.name)
    path.write_bytes((words / path.name).read_bytes())

  monkeypatch.setattr(releases, "_get", get)
  folder = tokenizer_folder("OFA-CN-base-muge")
  assert OFATokenizer.from_directory(folder).chinese and asked == ["dict.txt", "vocab.txt"]
  monkeypatch.setattr(sys, "argv", ["convert", "OFA-CN-base-muge", str(tmp_path / "ours")])
  convert_command.main()
  assert asked == ["dict.txt", "vocab.txt", "caption_cn_base.pt"]
  model, _ = ofa_jax.load_from_name("OFA-CN-base-muge")
  assert model.tokenizer.chinese and hub.open_model(tmp_path / "ours").tokenizer.chinese
  assert tokenizer_folder("OFA-CN-base-muge") == tmp_path / ".cache/ofa_jax/OFA-CN-base-muge"
  assert len(asked) == 3


def test_the_page_on_weights_has_every_name_and_file():
  text = (pathlib.Path(__file__).parents[1] / "docs" / "weights.md").read_text(encoding="utf-8")
  for name, release in hub.RELEASES.items():
    assert f"`{name}`" in text and f"`{release.files[0]}`" in text, name
    if release.addresses:
      assert f"`{name}`: `{release.files[0]}`" in text, name


def test_released_tokenizers_are_told_by_their_sums(tmp_path):
  files = write_chinese(tmp_path)
  release = hub.RELEASES["OFA-CN-base"]
  for name, address in zip(release.files[1:], release.addresses[1:], strict=True):
    assert hashlib.sha256((files / name).read_bytes()).hexdigest() == address.sha256, name
  assert OFATokenizer.from_directory(files).vocab_size == released.CHINESE_WORDS
  for name, release in hub.RELEASES.items():
    if release.addresses:
      assert len(release.addresses) == len(release.files) > 2, name
      assert [bool(x.sha256) for x in release.addresses] == [
        False,
        *(True for _ in release.files[1:]),
      ]
