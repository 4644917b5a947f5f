import gzip
import json
import pathlib
import pickle
import random
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ofa_jax.tokenizers.bert import ChineseBertTokenizer

GOLDEN = pathlib.Path(__file__).parents[1] / "golden/cnclip/tokenizer/golden.jsonl.gz"


@pytest.fixture(scope="module")
def tokenizer():
  return ChineseBertTokenizer()


@pytest.fixture(scope="module")
def golden():
  with gzip.open(GOLDEN, "rt", encoding="utf-8") as lines:
    return [json.loads(line) for line in lines]


def padded(ids, length):
  return ids + [0] * (length - len(ids))


@pytest.mark.parametrize("context_length", [3, 8, 24, 52, 64, 77])
def test_equals_the_original(tokenizer, golden, context_length):
  tokens = tokenizer([row["text"] for row in golden], context_length=context_length)
  expected = [padded(row[f"ids_{context_length}"], context_length) for row in golden]
  assert tokens.dtype == np.int32
  assert tokens.tolist() == expected
  assert len(golden) == 255


@pytest.mark.parametrize(
  ("text", "ids"),
  [
    ("", []),
    ("杰尼龟", [3345, 2225, 7991]),
    ("32不粘锅", [8211, 679, 5111, 7222]),
    ("iPhone 13 Pro Max手机壳", [8210, 8124, 8376, 8621, 2797, 3322, 1900]),
    ("Café naïve résumé", [8377, 11469, 8857, 8847, 11442, 8505]),
    ("😂🔥x", [8104, 21125, 8206]),
    ("한국어", [303, 10928, 9877, 13454, 13479, 11953, 13463, 13472]),
    ("\u200b零宽\u3000空格\tTab", [7439, 2160, 4958, 3419, 10476]),
    ("[MASK]", [138, 9622, 8998, 140]),  # split like any other punctuation
    ("“”", [100, 100]),  # not in the vocabulary; `normalize_caption` replaces them
    ("\ud83d 一", [100, 671]),  # half of an emoji, as broken JSON has it
    ("ΣΑΣ", [226, 13380, 13395]),  # σ ##α ##ς: a final sigma is another letter
  ],
)
def test_known_ids(tokenizer, text, ids):
  assert tokenizer.encode(text).tolist() == padded([101, *ids, 102], 52)


def test_random_unicode_equals_the_six_steps(tokenizer):
  rng = random.Random(0)
  alphabets = [
    range(0x20, 0x7F),
    range(0x250),
    range(0x300, 0x400),  # combining marks and Greek
    range(0x2000, 0x2070),  # spaces, controls, punctuation
    range(0x4E00, 0x9FFF),
    range(0xAC00, 0xD7A4),  # Hangul, which NFD takes apart
    range(0xE000, 0x10000),
    range(0x1F300, 0x1F700),
    range(0x20000, 0x30000),
    range(sys.maxunicode + 1),
  ]
  texts = []
  for _ in range(4000):
    chosen = rng.choices(alphabets, k=3)
    texts.append("".join(chr(rng.choice(rng.choice(chosen))) for _ in range(rng.randrange(30))))
  texts += ["a" * n for n in (199, 200, 201)] + ["字" + "é" * n for n in (199, 200, 201)]
  vocab = read_vocab(tokenizer.vocab)
  expected = [padded([101, *six_steps(text, vocab)[:50], 102], 52) for text in texts]
  assert tokenizer(texts).tolist() == expected


@pytest.mark.parametrize(
  "planes",
  [
    (0, 1, 2, 3, 14),
    # Unassigned and private characters, of which one is as the other: seconds.
    pytest.param((*range(4, 14), 15, 16), marks=pytest.mark.slow),
  ],
  ids=["assigned", "others"],
)
def test_every_character_is_cleaned_as_by_the_first_five_steps(tokenizer, planes):
  # Between letters, where it shows whether a character is kept, dropped or a word of its own. Lone
  # surrogates are the exception: they are replaced by another unknown character.
  for plane in planes:
    codes = (plane * 65536 + i for i in range(65536))
    text = " ".join(f"a{chr(code)}B" for code in codes if not 0xD800 <= code < 0xE000)
    assert tokenizer.normalize(text).split() == words(text)


def test_one_text_and_no_text(tokenizer):
  assert tokenizer("杰尼龟").shape == (1, 52)
  assert tokenizer([]).shape == (0, 52)
  assert tokenizer(iter(["一", "二"]), context_length=3)[:, 1].tolist() == [671, 753]


def test_context_length_without_room_for_the_marks(tokenizer):
  assert tokenizer(["杰尼龟"], context_length=2).tolist() == [[101, 102]]
  for length in (1, 0, -1):
    with pytest.raises(ValueError, match="at least 2"):
      tokenizer([], context_length=length)
    with pytest.raises(ValueError, match="at least 2"):
      tokenizer.encode("杰尼龟", length)


@pytest.mark.parametrize("text", [None, 3, b"text"])
def test_what_is_not_a_text(tokenizer, text):
  with pytest.raises(TypeError, match=r"expected a text \(str\), found"):
    tokenizer.encode(text)
  with pytest.raises(TypeError, match=r"expected a text \(str\), found"):
    tokenizer(["一", text])
  with pytest.raises(TypeError, match=r"expected a text \(str\), found"):
    tokenizer(text)


def test_a_file_that_is_no_vocabulary(tmp_path):
  path = tmp_path / "vocab.txt"
  path.write_text("[PAD]\n[UNK]\n一\n")
  with pytest.raises(ValueError, match=r"no line \[CLS\] and no line \[SEP\]"):
    ChineseBertTokenizer(path)


def test_pickled_and_shared_by_threads(golden):
  tokenizer = pickle.loads(pickle.dumps(ChineseBertTokenizer()))
  with ThreadPoolExecutor(4) as pool:
    tokens = list(pool.map(tokenizer.encode, [row["text"] for row in golden] * 4))
  assert [row.tolist() for row in tokens] == [padded(row["ids_52"], 52) for row in golden] * 4


# The steps of the original, one after another, as plainly as possible.


def read_vocab(path):
  lines = path.read_bytes().decode().split("\n")[:-1]
  assert len(lines) == 21128
  return {line.strip(): i for i, line in enumerate(lines)}


def six_steps(text, vocab):
  return [i for word in words(text) for i in word_pieces(word, vocab)]


def words(text):
  cleaned = ""
  for char in text:
    category = unicodedata.category(char)
    if char in " \t\n\r" or category == "Zs":
      cleaned += " "
    elif char in "\0\ufffd" or category in ("Cc", "Cf"):
      continue
    else:
      cleaned += f" {char} " if is_cjk(ord(char)) else char
  found = []
  for token in cleaned.split():
    token = unicodedata.normalize("NFD", token.lower())
    token = "".join(char for char in token if unicodedata.category(char) != "Mn")
    for char in token:
      if is_punctuation(char):
        token = token.replace(char, f" {char} ")
    found += token.split()
  return found


def is_cjk(code):
  return (
    0x4E00 <= code <= 0x9FFF
    or 0x3400 <= code <= 0x4DBF
    or 0x20000 <= code <= 0x2A6DF
    or 0x2A700 <= code <= 0x2B73F
    or 0x2B740 <= code <= 0x2B81F
    or 0x2B820 <= code <= 0x2CEAF
    or 0xF900 <= code <= 0xFAFF
    or 0x2F800 <= code <= 0x2FA1F
  )


def is_punctuation(char):
  code = ord(char)
  ascii_symbol = 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126
  return ascii_symbol or unicodedata.category(char).startswith("P")


def word_pieces(word, vocab):
  if len(word) > 200:
    return [vocab["[UNK]"]]
  pieces, start = [], 0
  while start < len(word):
    for end in range(len(word), start, -1):
      piece = ("##" if start else "") + word[start:end]
      if piece in vocab:
        break
    else:
      return [vocab["[UNK]"]]
    pieces.append(vocab[piece])
    start = end
  return pieces
