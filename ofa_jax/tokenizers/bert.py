"""Chinese-CLIP's BERT tokenizer: Python's Unicode tables for the characters, Rust for the pieces.

The original is Google BERT's `FullTokenizer` (`do_lower_case=True`), whose character rules are
those of Python's `unicodedata` and `str.lower`. The ready-made normalisers of `tokenizers` differ
(they drop private-use characters, have no final sigma and miss a block of CJK extension E), so a
string is normalised here, by two translations around `lower` and NFD, and `tokenizers` cuts the
words into pieces.
"""

import functools
import pathlib
import string
import unicodedata
from collections.abc import Callable, Iterable

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

CONTEXT_LENGTH = 52
MAX_WORD = 200

_VOCAB = pathlib.Path(__file__).with_name("vocab.txt")
_CJK = (
  (0x4E00, 0x9FFF),
  (0x3400, 0x4DBF),
  (0x20000, 0x2A6DF),
  (0x2A700, 0x2B73F),
  (0x2B740, 0x2B81F),
  (0x2B820, 0x2CEAF),
  (0xF900, 0xFAFF),
  (0x2F800, 0x2FA1F),
)
# Rust has no strings with lone surrogates. This private-use character takes their place: like them
# it is in no vocabulary, so that the word becomes [UNK] as in the original.
_UNKNOWN = "\ue000"
_LONG = 4096  # characters of a text that is cut before its words are looked up


class ChineseBertTokenizer:
  """Turns text into the token ids of Chinese-CLIP's text tower.

  Like the original's `tokenize`, it neither replaces curly quotes (see `data.text`) nor recognises
  "[CLS]" and the like inside a text. Safe to share between threads and to pickle.

  Args:
    vocab: file with one token a line, the line number being the id; None = the released models'.
    max_word: characters; a longer word is one [UNK].

  Raises:
    ValueError: the vocabulary lacks a special token.
  """

  def __init__(self, vocab: str | pathlib.Path | None = None, *, max_word: int = MAX_WORD):
    self.vocab = pathlib.Path(vocab or _VOCAB)
    self.max_word = max_word
    with self.vocab.open(encoding="utf-8-sig") as lines:  # `splitlines` would also cut at U+2028
      ids = {line.strip(): i for i, line in enumerate(lines)}
    missing = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if token not in ids]
    if missing:
      raise ValueError(
        f"{self.vocab} is not a BERT vocabulary: expected one token a line, "
        f"found no line {' and no line '.join(missing)}"
      )
    self.pad, self.cls, self.sep = ids["[PAD]"], ids["[CLS]"], ids["[SEP]"]
    self._pieces = Tokenizer(
      models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=max_word)
    )
    self._pieces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    self._clean, self._split = _Table(_clean), _Table(_split)

  def __call__(
    self, texts: str | Iterable[str], *, context_length: int = CONTEXT_LENGTH
  ) -> np.ndarray:
    """Returns int32[N, context_length] for one text (N = 1) or several.

    Raises:
      TypeError: a text is not a string.
      ValueError: `context_length` leaves no room for [CLS] and [SEP].
    """
    _check_context_length(context_length)
    if isinstance(texts, str) or not isinstance(texts, Iterable):
      texts = [texts]
    rows = [self.encode(text, context_length) for text in texts]
    return np.stack(rows) if rows else np.empty((0, context_length), np.int32)

  def encode(self, text: str, context_length: int = CONTEXT_LENGTH) -> np.ndarray:
    """Returns int32[context_length]: [CLS], the first pieces, [SEP], then padding.

    Raises: as `__call__`.
    """
    if not isinstance(text, str):
      raise TypeError(f"expected a text (str), found {type(text).__name__}: {text!r:.80}")
    _check_context_length(context_length)
    pieces = self.pieces(text, most=context_length - 2)
    tokens = np.full(context_length, self.pad, np.int32)
    tokens[0] = self.cls
    tokens[1 : len(pieces) + 1] = pieces
    tokens[len(pieces) + 1] = self.sep
    return tokens

  def pieces(self, text: str, *, most: int | None = None) -> list[int]:
    """Returns the ids of the pieces of a text, without [CLS] and [SEP].

    Args:
      text: of any length; what cannot come into the first `most` pieces is not looked at.
      most: the first so many; None: all.
    """
    if most is None or len(text) <= _LONG:
      return self._pieces.encode(self.normalize(text)).ids[:most]
    return self._pieces.encode(" ".join(self._first_words(text, most))).ids[:most]

  def _first_words(self, text: str, most: int) -> list[str]:
    """The first words of a long text, at least one piece each, so that `most` words are enough.

    Characters are cleaned one by one; lower case looks past others up to the next space, accents up
    to the next letter. A text cut at a space of the cleaned one therefore has the very words of the
    whole. Words beyond `max_word` are unknown however long they are.
    """
    size = _LONG
    while True:
      part = text[:size].translate(self._clean)
      if size < len(text):
        part = part[: part.rfind(" ") + 1]
      words = unicodedata.normalize("NFD", part.lower()).translate(self._split).split(None, most)
      if len(words) > most or size >= len(text):
        return [word[: self.max_word + 1] for word in words[:most]]
      size *= 4

  def normalize(self, text: str) -> str:
    """Returns the text in lower case, without accents, its words separated by spaces."""
    text = text.translate(self._clean).lower()
    return unicodedata.normalize("NFD", text).translate(self._split)

  def __reduce__(self):
    return functools.partial(ChineseBertTokenizer, self.vocab, max_word=self.max_word), ()


class _Table(dict):
  """A table for `str.translate` that asks `rule` once for every character it meets."""

  def __init__(self, rule: Callable[[str], str]):
    super().__init__()
    self._rule = rule

  def __missing__(self, code: int) -> str:
    self[code] = self._rule(chr(code))
    return self[code]


def _clean(char: str) -> str:
  """What a character of the raw text becomes: nothing, a space, itself, or a word of its own."""
  if char in "\t\n\r":
    return " "
  category = unicodedata.category(char)
  if char == "\ufffd" or category in ("Cc", "Cf"):
    return ""
  if category in ("Zs", "Zl", "Zp"):
    return " "
  if category == "Cs":
    return _UNKNOWN
  code = ord(char)
  return f" {char} " if any(first <= code <= last for first, last in _CJK) else char


def _split(char: str) -> str:
  """What a character becomes after NFD: accents go, punctuation is a word of its own."""
  category = unicodedata.category(char)
  if category == "Mn":
    return ""
  return f" {char} " if char in string.punctuation or category.startswith("P") else char


def _check_context_length(context_length: int) -> None:
  if context_length < 2:
    raise ValueError(
      f"context_length must be at least 2, to hold [CLS] and [SEP]; found {context_length}"
    )
