"""The tokenizer of OpenAI's CLIP against the original."""

import builtins
import importlib.util
import pickle

import numpy as np
import pytest

from ofa_jax.tokenizers import clip
from ofa_jax.tokenizers.clip import CLIPTokenizer
from tests.frozen_golden import golden_json

GOLDEN = golden_json("openai_clip", "tokenizer")
FTFY = importlib.util.find_spec("ftfy") is not None


@pytest.fixture(scope="module")
def tokenizer():
  return CLIPTokenizer()


def test_the_vocabulary_is_the_originals(tokenizer):
  sizes = tokenizer.vocab_size, tokenizer.start, tokenizer.end, tokenizer.pad
  assert sizes == (GOLDEN["vocab_size"], GOLDEN["sot"], GOLDEN["eot"], GOLDEN["pad"])


@pytest.mark.parametrize("item", GOLDEN["items"], ids=lambda item: item["text"][:20])
def test_ids_are_the_originals(item, tokenizer):
  text = item["text"]
  if not FTFY and (not text.isascii() or "&" in text or "\0" in text):
    pytest.skip("ftfy is not installed")
  assert clip.clean(text) == item["cleaned"]
  ids = tokenizer.pieces(text)
  assert ids == item["ids"]
  names = {i: name for name, i in tokenizer.vocab.items()}
  assert [names[i] for i in ids] == item["pieces"]
  assert tokenizer.decode(ids) == item["decoded"]


def test_rows_are_the_originals(tokenizer):
  example, long = GOLDEN["padded_example"], GOLDEN["too_long"]
  rows = tokenizer([example["text"], ""])
  assert rows.dtype == np.int32
  np.testing.assert_array_equal(rows[0], example["row"])
  assert rows[1, :3].tolist() == [49406, 49407, 0]
  with pytest.raises(ValueError, match="at most 77 tokens, found"):
    tokenizer(long["text"])
  cut = next(value for name, value in long.items() if isinstance(value, list))
  np.testing.assert_array_equal(tokenizer(long["text"], truncate=True)[0], cut)


def test_plain_ascii_needs_no_repair(monkeypatch):
  """What ftfy would leave as it is does not wait for it; what it would not is told without it."""
  if FTFY:
    import ftfy

    for item in GOLDEN["items"]:
      if clip._PLAIN.fullmatch(item["text"]) and not clip._ESCAPE.search(item["text"]):
        assert ftfy.fix_text(item["text"]) == item["text"]
  real = builtins.__import__

  def without(name, *args, **kwargs):
    if name == "ftfy":
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", without)
  assert clip.clean("A  Cat &\tDog") == "a cat & dog"
  with pytest.raises(ValueError, match="pip install ftfy"):
    clip.clean("caf\u00e9")
  with pytest.raises(ValueError, match="pip install ftfy"):
    clip.clean("cats &amp; dogs")


def test_it_travels_between_processes(tokenizer):
  other = pickle.loads(pickle.dumps(tokenizer))
  np.testing.assert_array_equal(other("a red square"), tokenizer("a red square"))


def test_other_files_are_told(tmp_path, tokenizer):
  with pytest.raises(TypeError, match=r"expected a text \(str\), found int"):
    tokenizer([3])
  (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
  with pytest.raises(ValueError, match="two symbols a line, found the line 'a b c'"):
    CLIPTokenizer(tmp_path / "merges.txt")
  (tmp_path / "merges.txt").write_text("#version: 0.2\n")
  with pytest.raises(ValueError, match="found none"):
    CLIPTokenizer(tmp_path / "merges.txt")
  (tmp_path / "merges.txt").write_text("#version: 0.2\n\u732b \u732b\n")
  with pytest.raises(ValueError, match=r"expected merges of a CLIP, found"):
    CLIPTokenizer(tmp_path / "merges.txt")
