import itertools
import json
import pickle
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ofa_jax.tokenizers import bert
from ofa_jax.tokenizers.ofa import OFATokenizer
from tests.ofa_files import GOLDEN, write_bpe

CASES = json.loads((GOLDEN / "tokenizer/tokenizer.json").read_text())
TEXTS = (
  "a red circle",
  " two blue squares, and 3 green ones!",
  "don't\t they'll  stop\n\nnow ",
  "naïve café 😀 中文 \u00a0\u2028x",
  "",
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return write_bpe(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def tokenizer(directory):
  return OFATokenizer.from_directory(directory)


@pytest.fixture(scope="module")
def small():
  return OFATokenizer.train(TEXTS * 3, vocab_size=300, num_codes=8, num_bins=4)


@pytest.fixture(scope="module")
def chinese(tmp_path_factory):
  """The released files: dict.txt is vocab.txt with the lines stripped."""
  directory = tmp_path_factory.mktemp("bpe_cn")
  shutil.copy(bert._VOCAB, directory / "vocab.txt")
  with bert._VOCAB.open(encoding="utf-8") as lines:
    symbols = [line.strip() for line in lines]
  (directory / "dict.txt").write_text("".join(f"{s} 1\n" for s in symbols), encoding="utf-8")
  return directory


@pytest.mark.parametrize("case", CASES["encode"], ids=range(len(CASES["encode"])))
def test_equals_the_original(tokenizer, case):
  if "text" in case:
    assert tokenizer.encode(case["text"]) == case["dict_ids"]
    assert tokenizer.decode(case["dict_ids"]) == case["decoded"]
  else:
    assert tokenizer.lookup(case["text_use_bpe_False"]) == case["dict_ids"]


@pytest.mark.parametrize(
  ("text", "ids"),
  [
    (" what does the image describe?", [99, 473, 5, 2274, 6190, 116]),
    (" yes", [4420]),
    (" no", [117]),
    (" maybe", [2085]),
    (
      ' which region does the text " a man " describe?',
      [61, 976, 473, 5, 2788, 22, 10, 313, 22, 6190, 116],
    ),
    (
      " what is the complete image? caption: a dog",
      [99, 16, 5, 1498, 2274, 116, 3747, 35, 10, 2335],
    ),
    (' what is the complete text of " "?', [99, 16, 5, 1498, 2788, 9, 22, 22, 116]),
    (" what are the objects in the image?", [99, 32, 5, 8720, 11, 5, 2274, 116]),
    ("  what does the region describe? region:", [1437, 99, 473, 5, 976, 6190, 116, 976, 35]),
    (" object: sky water", [7626, 35, 6360, 514]),
  ],
)
def test_known_prompts(tokenizer, text, ids):
  assert tokenizer.encode(text) == ids


def test_ids_of_the_released_vocabulary(tokenizer):
  assert tokenizer.vocab_size == CASES["dict_len"] == 59457
  assert (tokenizer.num_codes, tokenizer.num_bins, tokenizer.kind) == (8192, 1000, "gpt2")
  assert {s: tokenizer.lookup(s)[0] for s in CASES["ids"]} == CASES["ids"]
  assert (tokenizer.bos, tokenizer.pad, tokenizer.eos, tokenizer.unk) == (0, 1, 2, 3)
  assert tokenizer.mask == 50264
  assert (tokenizer.code_id(0), tokenizer.code_id(8191)) == (50265, 58456)
  assert (tokenizer.bin_id(0), tokenizer.bin_id(999)) == (58457, 59456)
  assert tokenizer.lookup("<bin_1000> nothing") == [3, 3]
  with pytest.raises(ValueError, match="bin from 0 to 999, found 1000"):
    tokenizer.bin_id(1000)
  with pytest.raises(ValueError, match="code from 0 to 8191, found -1"):
    tokenizer.code_id(-1)


def test_decode_leaves_out_the_frame_and_keeps_other_symbols(tokenizer):
  ids = [0, *tokenizer.encode(" a dog"), 3, 50264, 58457, 2, 1, 1]
  assert tokenizer.decode(ids) == tokenizer.decode(np.int32(ids)) == " a dog<unk><mask><bin_0>"
  half = tokenizer.encode("😀")[:1]
  assert tokenizer.decode(half) == "\ufffd"


def test_broken_unicode_is_not_an_error(small, chinese):
  assert small.decode(small.encode("a \ud83d dog")) == "a ? dog"
  assert OFATokenizer.from_directory(chinese).decode([4, 104]) == "[PAD] [UNK]"
  assert OFATokenizer.from_directory(chinese).encode("\ud83d") == []


def test_the_dictionary_of_a_small_model_lists_its_own_codes_and_bins(tmp_path, directory):
  """The micro model of the goldens: 59 pieces, 32 codes, 16 bins."""
  shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
  symbols = (GOLDEN / "tokenizer/dict_symbols.txt").read_text().split()
  (tmp_path / "dict.txt").write_text("".join(f"{symbol} 1\n" for symbol in symbols[4:]))
  tokenizer = OFATokenizer.from_directory(tmp_path)
  assert list(tokenizer.symbols) == symbols
  assert tokenizer.vocab_size == 112
  assert (tokenizer.mask, tokenizer.code_id(0), tokenizer.bin_id(0)) == (63, 64, 96)
  numbers = json.loads((directory / "encoder.json").read_text())
  ids = tokenizer.encode(" the image, and a dog")
  assert 3 in ids  # most pieces are unknown to it
  assert ids[0] == symbols.index(str(numbers["Ġthe"])) == 5


def plain_bpe(text, encoder, merges):
  """Byte-level BPE as its paper says it, for texts of ASCII words, digits and signs."""
  visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in visible]
  spell = dict(zip(visible, map(chr, visible), strict=True))
  spell |= {b: chr(256 + k) for k, b in enumerate(others)}
  rank = {pair: k for k, pair in enumerate(merges)}
  words = re.findall(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+", text
  )
  pieces = []
  for word in words:
    parts = [spell[b] for b in word.encode()]
    while True:
      pairs = [pair for pair in itertools.pairwise(parts) if pair in rank]
      if not pairs:
        break
      best = min(pairs, key=rank.get)
      at = next(k for k, pair in enumerate(itertools.pairwise(parts)) if pair == best)
      parts[at : at + 2] = ["".join(best)]
    pieces += [encoder[part] for part in parts]
  return pieces


@pytest.mark.parametrize("text", TEXTS)
def test_trained_pieces_are_those_of_a_plain_bpe(small, text):
  encoder, merges = small._pieces._encoder, small._pieces._merges
  expected = [small.symbols.index(str(n)) for n in plain_bpe(text, encoder, merges)]
  assert small.encode(text) == expected
  assert small.decode(expected) == text


def test_training(small):
  assert small.vocab_size <= 300
  assert (small.num_codes, small.num_bins) == (8, 4)
  assert small.bin_id(3) == small.vocab_size - 1
  assert len(small.encode(" squares")) < len(" squares")  # learnt
  assert small.encode("Ω\x00") and small.decode(small.encode("Ω\x00")) == "Ω\x00"  # not met
  again = OFATokenizer.train(TEXTS * 3, vocab_size=300, num_codes=8, num_bins=4)
  assert again.symbols == small.symbols
  with pytest.raises(ValueError, match="at least 261 = 256 bytes"):
    OFATokenizer.train(TEXTS, vocab_size=200)


@pytest.mark.parametrize("name", ["tokenizer", "small", "chinese"])
def test_saved_and_pickled_tokenizers_are_the_same(name, tmp_path, request):
  original = request.getfixturevalue(name)
  if name == "chinese":
    original = OFATokenizer.from_directory(original)
  original.save(tmp_path)
  for copy in (OFATokenizer.from_directory(tmp_path), pickle.loads(pickle.dumps(original))):
    assert copy.symbols == original.symbols
    assert copy.kind == original.kind
    assert [copy.encode(text) for text in TEXTS] == [original.encode(text) for text in TEXTS]
  original.save(tmp_path)  # again, over its own files
  if name == "tokenizer":  # the file of a released size is the released one, without codes
    assert "code" not in (tmp_path / "dict.txt").read_text()


def test_threads_share_one_tokenizer(tokenizer):
  texts = [case["text"] for case in CASES["encode"] if "text" in case] * 50
  with ThreadPoolExecutor(8) as threads:
    assert list(threads.map(tokenizer.encode, texts)) == [tokenizer.encode(t) for t in texts]


@pytest.mark.parametrize("complete", [True, False])
def test_hugging_faces_layout(small, tokenizer, tmp_path, complete):
  """vocab.json numbers the pieces as the dictionary does; codes may have been added later."""
  source = small if complete else tokenizer
  pieces = source._pieces
  names = [pieces._spelling.get(symbol, symbol) for symbol in source.symbols]
  if not complete:
    names = [f"madeupword{n}" if n.startswith("unused") else n for n in names[: source.mask + 1]]
  (tmp_path / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
  merges = "".join(f"{a} {b}\n" for a, b in pieces._merges)
  (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
  copy = OFATokenizer.from_directory(tmp_path)
  assert (copy.vocab_size, copy.mask) == (source.vocab_size, source.mask)
  texts = TEXTS if complete else [c["text"] for c in CASES["encode"] if "text" in c]
  assert [copy.encode(text) for text in texts] == [source.encode(text) for text in texts]
  assert [copy.decode(copy.encode(text)) for text in texts] == list(texts)
  copy.save(tmp_path / "original")
  assert OFATokenizer.from_directory(tmp_path / "original").symbols == copy.symbols


def test_chinese_equals_transformers(chinese):
  """Made with the Python `BertTokenizer` of transformers 4.57, `do_lower_case=True`."""
  tokenizer = OFATokenizer.from_directory(chinese)
  lines = (GOLDEN / "tokenizer/bert_chinese.jsonl").read_text().splitlines()
  for case in map(json.loads, lines):
    ids = tokenizer.encode(case["text"])
    assert [tokenizer.symbols[i] for i in ids] == case["pieces"]
    assert tokenizer.decode(ids) == case["decoded"]
  assert len(lines) == 150


def test_chinese_equals_the_original(chinese):
  """Prompts, mixed and full-width texts, accents, Hangul, what the vocabulary lacks."""
  tokenizer = OFATokenizer.from_directory(chinese)
  stored = json.loads((GOLDEN / "tokenizer/chinese.json").read_text(encoding="utf-8"))
  assert tokenizer.vocab_size == stored["vocab"]
  for case in stored["items"]:
    assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
    assert tokenizer.decode(case["ids"]) == case["decoded"], case["text"]
  assert len(stored["items"]) > 10


def test_ids_of_the_chinese_vocabulary(chinese):
  tokenizer = OFATokenizer.from_directory(chinese)
  assert (tokenizer.vocab_size, tokenizer.kind, tokenizer.mask) == (30325, "bert-chinese", 21132)
  assert tokenizer.lookup("[PAD] [UNK] [CLS] [SEP] [MASK]") == [4, 104, 105, 106, 107]
  assert (tokenizer.code_id(0), tokenizer.code_id(8191)) == (21133, 29324)
  assert (tokenizer.bin_id(0), tokenizer.bin_id(999)) == (29325, 30324)


def test_missing_files_are_told(tmp_path, directory):
  with pytest.raises(ValueError, match=r"dict\.txt \+ encoder\.json .*Found nothing.*utils/BPE"):
    OFATokenizer.from_directory(tmp_path / "absent")
  shutil.copy(directory / "dict.txt", tmp_path)
  with pytest.raises(ValueError, match=r"vocab\.json \+ merges\.txt\. Found dict\.txt"):
    OFATokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("dict.txt", b"", r"dict\.txt, found none others"),
    ("dict.txt", b"13 1\n262\n\xff 1\n", r"found 2 others: .*dict\.txt:2 .*; .*dict\.txt:3"),
    ("dict.txt", b"a 1\nb 1\n", r"to list the pieces of encoder\.json, found none"),
    ("dict.txt", b"13 1\n<mask> 1\n<bin_0> 1\n<code_0> 1\n", r"ends with <mask>"),
    ("encoder.json", b"{", r"encoder\.json to be a JSON object"),
    ("encoder.json", b'["a"]', r"encoder\.json to be a JSON object"),
    ("encoder.json", b'{"a": 0, "b": 1}', r"encoder\.json and .*vocab\.bpe: The merges do not"),
    ("vocab.bpe", b"#version\n\xc4\xa0 t\nx\na b c\n", r"found 2 other lines: .*:3 'x'; .*:4"),
  ],
)
def test_damaged_files_are_told(tmp_path, directory, name, content, message):
  shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    OFATokenizer.from_directory(tmp_path)


def test_a_gap_in_hugging_faces_numbers_is_told(tmp_path):
  (tmp_path / "vocab.json").write_text(json.dumps({"<s>": 0, "<pad>": 1, "</s>": 2, "a": 9}))
  (tmp_path / "merges.txt").write_text("#version: 0.2\n")
  with pytest.raises(ValueError, match=r"without a gap, found 4 pieces up to 9"):
    OFATokenizer.from_directory(tmp_path)


def test_words_begin_behind_a_space(small, chinese, tokenizer):
  ids = small.encode(" two blue squares, and 3 green ones!")
  begun = "".join("|" * small.begins_word(i) + small.decode([i]).strip() for i in ids)
  assert begun == "|two|blue|squares,|and|3|green|ones!"
  assert [small.begins_word(i) for i in range(5)][:4] == [True] * 4
  assert not any(map(small.begins_word, (small.mask, small.code_id(0), small.bin_id(3))))
  assert all(map(tokenizer.begins_word, tokenizer.lookup("madeupword0000")))
  words = OFATokenizer.from_directory(chinese)
  assert all(map(words.begins_word, words.encode("中文")))
  assert not words.begins_word(*words.lookup("##s"))


def test_a_mask_in_a_text_is_the_symbol(small):
  ids = small.encode_marked(" two <mask> squares,<mask>")
  assert ids == [*small.encode(" two"), small.mask, *small.encode(" squares,"), small.mask]
  assert small.encode_marked(" two <mask> squares", most=2) == ids[:2]
  assert small.encode_marked(" a dog") == small.encode(" a dog")
  assert small.mask not in small.encode(" two <mask>")
