"""The tokenizer of OpenAI's CLIP: byte pairs of lower-case words.

The original repairs a text with ftfy, undoes HTML's escapes twice, makes runs of whitespace one
space and everything lower case; cuts it into words, contractions, single digits and runs of other
characters by a regular expression; and merges the bytes of each. Here `regex` cuts, as there, and
`tokenizers` merges.
"""

import functools
import html
import pathlib
from collections.abc import Iterable

import numpy as np
import regex
from tokenizers import models

CONTEXT_LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"
FILE = "merges.txt"  # in model directories

_MERGES = pathlib.Path(__file__).with_name("clip_merges.txt")
_WORD_END = "</w>"
_PATTERN = (
  r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
# Of plain ASCII ftfy changes nothing but HTML's escapes.
_PLAIN, _ESCAPE = regex.compile(r"[\t\n -~]*"), regex.compile(r"&#?[0-9A-Za-z]{1,24};")
_CACHED = 100_000  # words whose pieces are kept


class CLIPTokenizer:
  """Turns text into the token ids of CLIP's text tower.

  Like the original it takes a special token that a text spells out for that token. Safe to share
  between threads and to pickle.

  Args:
    merges: file with one merge a line, the first line being a comment; None = the released models'.

  Raises:
    ValueError: the file is none of merges.
  """

  def __init__(self, merges: str | pathlib.Path | None = None):
    self.merges = pathlib.Path(merges or _MERGES)
    lines = self.merges.read_text(encoding="utf-8-sig").split("\n")
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    wrong = [" ".join(pair) for pair in pairs if len(pair) != 2 or not all(pair)]
    if wrong or not pairs:
      raise ValueError(
        f"{self.merges}: expected merges of a CLIP, two symbols a line, found "
        + (f"the line {wrong[0]!r:.80}" if wrong else "none")
      )
    self._bytes = _byte_symbols()
    symbols = list(self._bytes.values())
    names = [*symbols, *(symbol + _WORD_END for symbol in symbols), *map("".join, pairs)]
    self.vocab = {name: i for i, name in enumerate([*names, START, END])}
    if len(self.vocab) != len(names) + 2:
      raise ValueError(f"{self.merges}: expected merges of a CLIP, found a symbol twice")
    self.start, self.end, self.pad = self.vocab[START], self.vocab[END], 0
    try:
      self._merge = models.BPE(self.vocab, pairs, end_of_word_suffix=_WORD_END)
    except Exception as error:  # of the Rust library, for a merge of symbols that are not there
      raise ValueError(f"{self.merges}: expected merges of a CLIP, found: {error}") from error
    self._names = {i: name for name, i in self.vocab.items()}
    self._of_symbol = {symbol: byte for byte, symbol in self._bytes.items()}
    self._find = regex.compile(_PATTERN, regex.IGNORECASE).findall
    self._of_word = functools.lru_cache(_CACHED)(self._word)

  @property
  def vocab_size(self) -> int:
    """Tokens that there are."""
    return len(self.vocab)

  def __call__(
    self,
    texts: str | Iterable[str],
    *,
    context_length: int = CONTEXT_LENGTH,
    truncate: bool = False,
  ) -> np.ndarray:
    """Returns int32[N, context_length] for one text (N = 1) or several.

    Args:
      texts: of the rows.
      context_length: tokens of a row: start, pieces, end, then zeros.
      truncate: cut a text that is longer; its last token is the end all the same.

    Raises:
      TypeError: a text is not a string.
      ValueError: a text is longer, as in the original; or it needs ftfy, which is not there.
    """
    if isinstance(texts, str) or not isinstance(texts, Iterable):
      texts = [texts]
    rows = [self._row(text, context_length, truncate=truncate) for text in texts]
    return np.stack(rows) if rows else np.empty((0, context_length), np.int32)

  def pieces(self, text: str) -> list[int]:
    """Returns the ids of a text, without start and end. Raises as `__call__`."""
    if not isinstance(text, str):
      raise TypeError(f"expected a text (str), found {type(text).__name__}: {text!r:.80}")
    return [i for word in self._find(clean(text)) for i in self._of_word(word)]

  def decode(self, tokens: Iterable[int]) -> str:
    """Returns the text of ids, as the original gives it: with a space behind every word."""
    joined = "".join(self._names[int(i)] for i in tokens).replace(_WORD_END, " ")
    # A space is no symbol of a byte, and of the specials all are.
    data = b"".join(
      bytes([self._of_symbol[c]]) if c in self._of_symbol else c.encode() for c in joined
    )
    return data.decode("utf-8", "replace")

  def _row(self, text: str, context_length: int, *, truncate: bool) -> np.ndarray:
    ids = [self.start, *self.pieces(text), self.end]
    if len(ids) > context_length:
      if not truncate:
        raise ValueError(
          f"Expected a text of at most {context_length} tokens, found {len(ids)}: {text!r:.80}; "
          "shorten it, or truncate"
        )
      ids = [*ids[: context_length - 1], self.end]
    row = np.full(context_length, self.pad, np.int32)
    row[: len(ids)] = ids
    return row

  def _word(self, word: str) -> tuple[int, ...]:
    if word in (START, END):
      return (self.vocab[word],)
    symbols = "".join(self._bytes[byte] for byte in word.encode("utf-8", "replace"))
    return tuple(token.id for token in self._merge.tokenize(symbols))

  def __reduce__(self):
    return CLIPTokenizer, (self.merges,)


def clean(text: str) -> str:
  """A text as its words are looked for in: repaired, unescaped, in lower case.

  Raises:
    ValueError: it needs ftfy, which is not there.
  """
  if not _PLAIN.fullmatch(text) or _ESCAPE.search(text):
    text = _repaired(text)
  text = html.unescape(html.unescape(text)).strip()
  return regex.sub(r"\s+", " ", text).strip().lower()


def _byte_symbols() -> dict[int, str]:
  """A printable character for every byte, in the order of the vocabulary, as GPT-2 has them."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in plain]
  return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def _repaired(text: str) -> str:
  try:
    import ftfy
  except ImportError as error:
    raise ValueError(
      "Expected ftfy, by which CLIP's tokenizer repairs texts that are not plain ASCII; install it "
      "with: pip install ftfy"
    ) from error
  return ftfy.fix_text(text)
