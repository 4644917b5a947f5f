"""OFA's vocabulary: one numbering for words, image codes and coordinates.

A dictionary counts `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, then the lines of `dict.txt`, then
`<mask>`, `<code_0>` ... and `<bin_0>` ... Text is cut into pieces by GPT-2's byte-level BPE, or by
BERT's word pieces for the Chinese models, and a piece's place in `dict.txt` gives its number.

A directory holds one of

  dict.txt encoder.json vocab.bpe   the English models: dict.txt lists GPT-2's ids by frequency
  dict.txt vocab.txt                the Chinese models: dict.txt lists the pieces of vocab.txt
  vocab.json merges.txt             the English models as Hugging Face has them, already in order

Released dictionaries end before `<mask>`; the original appends it, 8,192 codes and 1,000 bins. A
dictionary of another size lists them itself, which the original reads just as well.
"""

import collections
import json
import pathlib
import re
import unicodedata
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ofa_jax import staging
from ofa_jax.tokenizers.bert import ChineseBertTokenizer
from ofa_jax.tokenizers.special import BOS, EOS, PAD, UNK

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
NUM_CODES = 8192
NUM_BINS = 1000
LAYOUTS = {
  "gpt2": ("dict.txt", "encoder.json", "vocab.bpe"),
  "bert-chinese": ("dict.txt", "vocab.txt"),
  "huggingface": ("vocab.json", "merges.txt"),
}

_LONG = 64  # characters for each wanted piece; of more the beginning is tokenised first
_WORD_END = re.compile(r"(?s)(?<=\S) (?=\S)")  # in a text that is read backwards
_BERT_SPECIALS = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")
_BERT_MAX_WORD = 100


class OFATokenizer:
  """Text to the ids of OFA's dictionary and back; safe to share between threads and to pickle.

  Args:
    pieces: what cuts text into the dictionary's symbols and joins them: `ByteLevelBPE` or
      `ChineseBert`.
    symbols: the dictionary's symbols in the order of their ids, from `<s>` to the last bin.

  Attributes:
    bos, pad, eos, unk, mask: ids of the special symbols.
    vocab_size: symbols in all.
    num_codes, num_bins: image codes and coordinate bins among them.
    kind: "gpt2" or "bert-chinese".
    chinese: the latter, whose texts have no spaces.

  Raises:
    ValueError: the symbols are not in the order that the models rely on.
  """

  bos, pad, eos, unk = BOS, PAD, EOS, UNK

  def __init__(self, pieces: "ByteLevelBPE | ChineseBert", symbols: Sequence[str]):
    self.kind, self.chinese = pieces.kind, pieces.kind == "bert-chinese"
    self.symbols = tuple(symbols)
    self.vocab_size = len(self.symbols)
    self.num_codes = sum(symbol.startswith("<code_") for symbol in self.symbols)
    self.num_bins = sum(symbol.startswith("<bin_") for symbol in self.symbols)
    tail = _tail(self.num_codes, self.num_bins)
    self.mask = self.vocab_size - len(tail)
    if self.symbols[:4] != SPECIALS or self.symbols[self.mask :] != tail:
      raise ValueError(
        f"Expected a dictionary that begins with {' '.join(SPECIALS)} and ends with <mask>, the "
        f"codes and the bins, found {' '.join(self.symbols[:4])} ... {' '.join(self.symbols[-3:])}."
      )
    self._pieces = pieces
    self._ids = {symbol: i for i, symbol in enumerate(self.symbols)}
    # The dictionary's id of every piece; pieces that it does not list are <unk>.
    self._table = [self._ids.get(symbol, self.unk) for symbol in pieces.symbols]
    self._begins = [
      i < len(SPECIALS) or (i < self.mask and pieces.begins_word(symbol))
      for i, symbol in enumerate(self.symbols)
    ]

  @classmethod
  def from_directory(cls, directory: str | pathlib.Path) -> "OFATokenizer":
    """Reads the files of a tokenizer, in any of the three layouts above.

    Raises:
      ValueError: files are missing or damaged.
    """
    directory = staging.local_folder(directory, below=False)
    kind = _layout(directory)
    files = [directory / name for name in LAYOUTS[kind]]
    if kind == "huggingface":
      return _from_hugging_face(*files)
    symbols = _read_dictionary(files[0])
    pieces = (ByteLevelBPE.from_files if kind == "gpt2" else ChineseBert)(*files[1:])
    if not set(symbols).intersection(pieces.symbols):
      raise ValueError(
        f"Expected {files[0]} to list the pieces of {files[1].name}, found none of them: these "
        "files are not of one model. Take all from the same place."
      )
    return cls(pieces, symbols)

  @classmethod
  def train(
    cls, texts: Iterable[str], *, vocab_size: int, num_codes: int = 0, num_bins: int = 0
  ) -> "OFATokenizer":
    """Makes a byte-level BPE for a small model of its own, the frequent pieces first.

    Args:
      texts: what the model will read and write, prompts included.
      vocab_size: the most symbols that the dictionary may have, all kinds included.
      num_codes: image codes among them.
      num_bins: coordinate bins among them.

    Raises:
      ValueError: `vocab_size` leaves no room for the 256 bytes.
    """
    texts = list(texts)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = len(SPECIALS) + len(_tail(num_codes, num_bins))
    if vocab_size < others + len(alphabet):
      raise ValueError(
        f"Expected a vocab_size of at least {others + len(alphabet)} = {len(alphabet)} bytes + "
        f"{others} specials, codes and bins, found {vocab_size}."
      )
    bpe = _tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
      vocab_size=vocab_size - others, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    pieces = ByteLevelBPE(model["vocab"], [tuple(pair) for pair in model["merges"]])
    counts = collections.Counter(piece for text in texts for piece in pieces.encode(text))
    frequent = sorted(range(len(pieces.symbols)), key=lambda piece: (-counts[piece], piece))
    listed = [pieces.symbols[piece] for piece in frequent]
    return cls(pieces, (*SPECIALS, *listed, *_tail(num_codes, num_bins)))

  def save(self, directory: str | pathlib.Path) -> None:
    """Writes the files that `from_directory` and the original read; the counts in dict.txt are 1.

    A tokenizer from Hugging Face's layout is written in the original's.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    listed = self.symbols[len(SPECIALS) :]
    released = _tail(NUM_CODES, NUM_BINS)
    if listed[-len(released) :] == released:
      listed = listed[: -len(released)]
    lines = "".join(f"{symbol} 1\n" for symbol in listed)
    (directory / "dict.txt").write_text(lines, encoding="utf-8", newline="\n")
    self._pieces.save(directory)

  def encode(self, text: str, *, most: int | None = None) -> list[int]:
    """Returns the ids of a text, without `<s>` and `</s>`.

    Prompts and targets begin with a space, as the first word of a sentence has no other mark. What
    looks like a symbol inside the text ("<mask>") is text like any other; see `lookup`.

    Args:
      text: of any length; what cannot come into the first `most` ids is hardly looked at.
      most: the first so many; None: all.
    """
    return [self._table[piece] for piece in self._pieces.encode(text, most=most)]

  def encode_marked(self, text: str, *, most: int | None = None) -> list[int]:
    """As `encode`, but that "<mask>" is the symbol, instead of words and the spaces before them."""
    *parts, last = text.split(self.symbols[self.mask])
    ids = []
    for part in parts:
      ids += [*self.encode(part.rstrip(" "), most=most), self.mask]
    return [*ids, *self.encode(last, most=most)][:most]

  def lookup(self, symbols: str) -> list[int]:
    """Returns the ids of symbols separated by spaces, such as "<bin_3> <bin_7>"; others: unk."""
    return [self._ids.get(symbol, self.unk) for symbol in symbols.split()]

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids; `<s>`, `</s>` and `<pad>` are left out, other symbols stay.

    Bytes that are not UTF-8 become U+FFFD. The original leaves `<pad>` to its callers, all of which
    strip it, and fails on `<unk>` in the validation of captions.
    """
    left_out = (self.bos, self.pad, self.eos)
    return self._pieces.decode([self.symbols[i] for i in map(int, ids) if i not in left_out])

  def begins_word(self, token: int) -> bool:
    """Whether a word begins with this id: a piece behind a space, or a special symbol.

    Of Chinese, whose pieces have no spaces, every piece is a word but those that go on with one.
    """
    return self._begins[token]

  def code_id(self, code: int) -> int:
    """The id of image code `code`, 0 to `num_codes` - 1."""
    return self._numbered("code", code, self.num_codes, self.mask + 1)

  def bin_id(self, index: int) -> int:
    """The id of coordinate bin `index`, 0 to `num_bins` - 1."""
    return self._numbered("bin", index, self.num_bins, self.mask + 1 + self.num_codes)

  def _numbered(self, name, index, count, first):
    if not 0 <= index < count:
      raise ValueError(f"Expected a {name} from 0 to {count - 1}, found {index}.")
    return first + int(index)


class ByteLevelBPE:
  """GPT-2's byte-level BPE.

  Args:
    encoder: number of every piece, pieces being spelled in GPT-2's visible bytes ("Ġthe").
    merges: pairs of pieces, the first merged first.

  Attributes:
    symbols: for each piece number the dictionary's symbol, which is the number in decimals.
  """

  kind = "gpt2"

  def __init__(self, encoder: dict[str, int], merges: Sequence[tuple[str, str]]):
    try:
      self._bpe = _tokenizer(models.BPE(encoder, list(merges)))
    except Exception as error:  # tokenizers has no class of its own
      raise ValueError(f"The merges do not belong to these pieces: {error}") from error
    self._encoder, self._merges = encoder, tuple(merges)
    self._spelling = {str(number): piece for piece, number in encoder.items()}
    self._join = decoders.ByteLevel()
    self.symbols = [str(number) for number in range(max(encoder.values()) + 1)]

  @classmethod
  def from_files(cls, encoder: pathlib.Path, merges: pathlib.Path) -> "ByteLevelBPE":
    """Reads GPT-2's encoder.json and vocab.bpe."""
    try:
      return cls(_read_numbers(encoder), _read_merges(merges))
    except ValueError as error:
      raise ValueError(f"{encoder} and {merges}: {error}") from error

  def encode(self, text: str, *, most: int | None = None) -> list[int]:
    """Returns the numbers of the pieces of a text; half an emoji (from broken JSON) becomes "?"."""
    text = text.encode(errors="replace").decode()
    size = _LONG * (most or 0)
    while size and size < len(text):
      # No piece goes from a word into the space behind it, so that a text cut there has the very
      # pieces of the whole. One without spaces is cut inside, far behind what is kept.
      place = _WORD_END.search(text[size - 1 :: -1])
      end, room = (size - place.end(), most) if place else (size, 4 * most)
      numbers = self._bpe.encode(text[:end]).ids
      if len(numbers) >= room:
        return numbers[:most]
      size *= 4
    return self._bpe.encode(text).ids[:most]

  def decode(self, symbols: Sequence[str]) -> str:
    """Returns the text of dictionary symbols; those that are no piece's number stay as they are."""
    return self._join.decode([self._spelling.get(symbol, symbol) for symbol in symbols])

  def begins_word(self, symbol: str) -> bool:
    """Whether a word begins with a symbol: it is a piece behind a space, or a made-up word."""
    piece = self._spelling.get(symbol)
    return symbol.startswith("madeupword") if piece is None else piece.startswith("Ġ")

  def save(self, directory: pathlib.Path) -> None:
    """Writes encoder.json and vocab.bpe."""
    (directory / "encoder.json").write_text(json.dumps(self._encoder), encoding="utf-8")
    merges = "".join(f"{left} {right}\n" for left, right in self._merges)
    (directory / "vocab.bpe").write_text("#version: 0.2\n" + merges, encoding="utf-8", newline="\n")


class ChineseBert:
  """Word pieces as `transformers.BertTokenizer` cuts them, in the version that OFA trained with.

  Unlike Chinese-CLIP's tokenizer it keeps "[MASK]" and the like whole, drops characters for private
  use, knows no final sigma, and calls words above 100 characters unknown.

  Attributes:
    symbols: for each number of a piece the dictionary's symbol, which is the piece.
  """

  kind = "bert-chinese"

  def __init__(self, vocab: pathlib.Path):
    self._bert = ChineseBertTokenizer(vocab, max_word=_BERT_MAX_WORD)
    with pathlib.Path(vocab).open(encoding="utf-8") as lines:
      self.symbols = [line.strip() for line in lines]

  def encode(self, text: str, *, most: int | None = None) -> list[int]:
    """Returns the numbers of the pieces of a text, or the first `most` of them."""
    numbers = []
    for part in _BERT_SPECIAL.split(text):
      room = None if most is None else most - len(numbers)
      if room is not None and room <= 0:
        break
      if part in _BERT_SPECIALS:
        numbers.append(self.symbols.index(part))
      else:
        numbers += self._bert.pieces("".join(map(_bert_char, part)), most=room)
    return numbers

  def decode(self, symbols: Sequence[str]) -> str:
    """Returns the text of dictionary symbols, with spaces between its characters."""
    text = " ".join(symbols).replace(" ##", "").strip()
    for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
      text = text.replace(spaced, spaced.strip())
    return text

  def begins_word(self, symbol: str) -> bool:
    """Whether a word begins with a symbol."""
    return not symbol.startswith("##")

  def save(self, directory: pathlib.Path) -> None:
    """Writes vocab.txt."""
    target = directory / "vocab.txt"
    if not (target.exists() and target.samefile(self._bert.vocab)):
      target.write_bytes(self._bert.vocab.read_bytes())


_BERT_SPECIAL = re.compile("(" + "|".join(map(re.escape, _BERT_SPECIALS)) + ")")


def _bert_char(char: str) -> str:
  if char == "Σ":  # lower-cased alone, before it is known to end a word
    return "σ"
  return "" if unicodedata.category(char)[0] == "C" and char not in "\t\n\r" else char


def layout_files(directory: pathlib.Path) -> tuple[str, ...]:
  """The names of a tokenizer's files in a folder; ValueError where they are missing."""
  return LAYOUTS[_layout(directory)]


def _layout(directory: pathlib.Path) -> str:
  for kind, names in LAYOUTS.items():
    if all((directory / name).is_file() for name in names):
      return kind
  there = sorted(path.name for path in directory.glob("*")) if directory.is_dir() else ()
  raise ValueError(
    f"Expected the tokenizer of OFA in {directory}: "
    + "; or ".join(" + ".join(names) for names in LAYOUTS.values())
    + f". Found {', '.join(there[:12]) or 'nothing'}. The English files are in the original "
    "repository's utils/BPE, the Chinese ones in utils/BERT_CN_dict."
  )


def _tokenizer(model: models.BPE) -> Tokenizer:
  bpe = Tokenizer(model)
  bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  return bpe


def _tail(num_codes: int, num_bins: int) -> tuple[str, ...]:
  codes, bins = (f"<code_{k}>" for k in range(num_codes)), (f"<bin_{k}>" for k in range(num_bins))
  return ("<mask>", *codes, *bins)


def _read_dictionary(path: pathlib.Path) -> list[str]:
  """The symbols of a dict.txt, from `<s>` to the last bin."""
  symbols, faults = list(SPECIALS), []
  with path.open("rb") as lines:  # decoded one by one, so that a fault has a place
    for number, raw in enumerate(lines, start=1):
      try:
        symbol, count = raw.decode("utf-8").rstrip("\r\n").rsplit(" ", 1)
        int(count)
        symbols.append(symbol)
      except ValueError:  # no space, no number, not UTF-8
        faults.append(f"{path}:{number} {raw[:40]!r}")
  if faults or len(symbols) == len(SPECIALS):
    raise ValueError(
      f'Expected lines "symbol count" in {path}, found {len(faults) or "none"} others'
      f"{': ' if faults else ''}{'; '.join(faults[:5])}. Take the file from the model's repository."
    )
  return symbols if "<mask>" in symbols else symbols + list(_tail(NUM_CODES, NUM_BINS))


def _read_numbers(path: pathlib.Path) -> dict[str, int]:
  try:
    numbers = json.loads(path.read_bytes())
    if numbers and all(type(number) is int and number >= 0 for number in numbers.values()):
      return numbers
  except (ValueError, AttributeError):
    pass
  raise ValueError(
    f'Expected {path} to be a JSON object {{"piece": number, ...}}, found something else. Download '
    "it again."
  )


def _read_merges(path: pathlib.Path) -> list[tuple[str, str]]:
  merges, faults = [], []
  for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
    line = raw.decode("utf-8", "replace").strip()
    if not line or line.startswith("#version"):
      continue
    pair = tuple(line.split(" "))
    if len(pair) == 2:
      merges.append(pair)
    else:
      faults.append(f"{path}:{number} {line[:40]!r}")
  if faults:
    raise ValueError(
      f"Expected two pieces a line in {path}, found {len(faults)} other lines: "
      f"{'; '.join(faults[:5])}. Download it again."
    )
  return merges


def _from_hugging_face(vocab: pathlib.Path, merges: pathlib.Path) -> OFATokenizer:
  """Reads vocab.json, whose numbers are the dictionary's ids, and merges.txt."""
  ids = _read_numbers(vocab)
  order = sorted(ids, key=ids.get)
  if order[: len(SPECIALS)] != list(SPECIALS) or ids[order[-1]] != len(order) - 1:
    raise ValueError(
      f"Expected {vocab} to number {' '.join(SPECIALS)} and all pieces from 0 without a gap, found "
      f"{len(order)} pieces up to {ids[order[-1]]}, the first {' '.join(order[:4])}."
    )
  special = re.compile(r"<(s|pad|/s|unk|mask|code_\d+|bin_\d+)>|madeupword\d+")
  encoder = {piece: number for piece, number in ids.items() if not special.fullmatch(piece)}
  try:
    pieces = ByteLevelBPE(encoder, _read_merges(merges))
  except ValueError as error:
    raise ValueError(f"{vocab} and {merges}: {error}") from error
  symbols = [piece if piece not in encoder else str(ids[piece]) for piece in order]
  if "<code_0>" not in ids:  # these were added when the tokenizer was built
    symbols += _tail(NUM_CODES, NUM_BINS)["<mask>" in ids :]
  return OFATokenizer(pieces, symbols)
