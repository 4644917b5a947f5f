"""Texts of any length: what is cut before it is tokenised has the ids of the whole."""

import resource
import time

import numpy as np
import pytest

from ofa_jax.tokenizers import bert, ofa
from ofa_jax.tokenizers.bert import ChineseBertTokenizer
from ofa_jax.tokenizers.ofa import OFATokenizer
from tests.ofa_files import write_bpe

# Whatever a cut could get between: words, accents, final sigmas, signs that become nothing.
ALPHABET = [
  *("a", "B", "cat ", " dog", "猫", "一只狗", " ", "  ", "\t", "\n", ".", "!?", "'s", "don't "),
  *("ΟΔΟΣ", "Σ", "ΑΣ'", "e\u0301", "\u0323\u0301", "\u200d", "\x00", "\ufffd", "\u3000", "İ"),
  *("😀", "\ud800", "\u2028", "가", "ﬁ", "x" * 150, "y" * 230, "ſ", "\u0345", "1", "23 "),
]


def texts(count, parts):
  rng = np.random.default_rng(0)
  for _ in range(count):
    some = rng.choice(len(ALPHABET), rng.integers(1, 6))
    yield "".join(ALPHABET[i] for i in rng.choice(some, parts))


@pytest.fixture(scope="module")
def words():
  return ChineseBertTokenizer()


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
  return OFATokenizer.from_directory(write_bpe(tmp_path_factory.mktemp("bpe")))


@pytest.mark.parametrize("most", [1, 7, 50])
def test_the_first_pieces_of_a_long_text_are_those_of_the_whole(words, monkeypatch, most):
  monkeypatch.setattr(bert, "_LONG", 16)  # so that short texts are long ones
  for text in texts(400, 120):
    assert words.pieces(text, most=most) == words.pieces(text)[:most], text


@pytest.mark.parametrize("most", [1, 7, 50])
def test_the_first_ids_of_a_long_text_are_those_of_the_whole(bpe, monkeypatch, most):
  monkeypatch.setattr(ofa, "_LONG", 4)
  for text in texts(400, 120):
    assert bpe.encode(text, most=most) == bpe.encode(text)[:most], text


def test_chinese_ids_too(monkeypatch, tmp_path):
  monkeypatch.setattr(bert, "_LONG", 16)
  tokenizer = ofa.ChineseBert(bert._VOCAB)
  for text in [*texts(100, 60), "[MASK]猫" * 50, "猫[SEP] dog " * 50]:
    assert tokenizer.encode(text, most=9) == tokenizer.encode(text)[:9], text


@pytest.mark.parametrize(
  "part", ["一只猫在垫子上", "the cat. ", "x", " ", "a\u0301", "😀", "\x00", "."]
)
def test_ten_megabytes_take_little_time_and_memory(words, bpe, part):
  text = part * (10 * 2**20 // len(part.encode()))
  before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
  tokens = words.encode(text, 52)
  ids = bpe.encode(text, most=64)
  assert time.process_time() - begin < 30  # bounds, not measures: 5 s and 1.9 GB it was
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 * 1024
  short = part * (20_000 // len(part))
  assert (tokens == words.encode(short, 52)).all() or part in "x\x00 "
  assert ids == bpe.encode(short)[:64] or part == " "
