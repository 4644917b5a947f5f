"""CIDEr and CIDEr-D: agreement of captions in rare n-grams (Vedantam et al. 2015, arXiv 1411.5726).

CIDEr-D, with which OFA validates and trains captions, clips repeated n-grams and damps differences
in length; as in the original's code, a caption's length is its number of *bigrams*. How rare an
n-gram is, its document frequency, is counted over the given references, or over a corpus once and
for all (`Frequencies`).

Everything is computed for all captions at once: an n-gram is a number, made of the number of its
first n - 1 words and of its last word. 64 images with 5 candidates and 5 references each take 10 ms
on one core, or 50 ms with counting their frequencies, where coco-caption's dictionaries take 220.
"""

import collections
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ofa_jax import storage, text_files
from ofa_jax.data import plain_pickle

ORDERS = 4
SIGMA = 6.0
SCALE = 10.0

_BASE = 1 << 24  # distinct words at most
_COUNTS = {  # what the original's `defaultdict(float)` is made of
  ("collections", "defaultdict"): collections.defaultdict,
  ("builtins", "float"): float,
  ("__builtin__", "float"): float,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Frequencies:
  """In how many of a corpus' images some reference has an n-gram.

  Attributes:
    counts: images by n-gram, as a tuple of words.
    images: images of the corpus.
  """

  counts: Mapping[tuple[str, ...], float]
  images: float

  @classmethod
  def of(cls, references: Iterable[Sequence[str]]) -> "Frequencies":
    """Counts the n-grams of the references of each image."""
    counts, images = collections.Counter(), 0
    for captions in references:
      images += 1
      counts.update({ngram for caption in captions for ngram in _ngrams(caption.split())})
    return cls(counts, images)

  @classmethod
  def load(cls, path: str | pathlib.Path) -> "Frequencies":
    """Reads the original's `coco-train-words.p`, executing nothing, or what `save` wrote.

    Raises:
      ValueError: the file is missing or something else.
    """
    try:
      data = storage.read_bytes(path).removeprefix(text_files.MARK)
      if data[:1] == b"{":
        table = json.loads(data)
        counts = {tuple(k.split(" ")): float(v) for k, v in table["document_frequency"].items()}
      else:
        table = plain_pickle.load(data, names=_COUNTS, encoding="latin1")
        counts = {tuple(k): float(v) for k, v in table["document_frequency"].items()}
      return cls(counts, float(table["ref_len"]))
    except Exception as error:  # damaged pickles raise anything from EOFError to IndexError
      raise ValueError(
        f"Expected document frequencies in {path}, a pickle or JSON of document_frequency and "
        f"ref_len, found {type(error).__name__}: {error}. Take coco-train-words.p from the "
        "original's caption data, or write a file with Frequencies.save."
      ) from error

  def save(self, path: str | pathlib.Path) -> None:
    """Writes the frequencies as JSON."""
    counts = {" ".join(ngram): count for ngram, count in self.counts.items()}
    table = {"ref_len": self.images, "document_frequency": counts}
    pathlib.Path(path).write_text(json.dumps(table), encoding="utf-8")

  @functools.cached_property
  def _table(self) -> "_Table":
    return _Table.of(self.counts)


def cider_d(
  hypotheses: Sequence[str],
  references: Sequence[Sequence[str]],
  *,
  frequencies: Frequencies | None = None,
) -> np.ndarray:
  """Returns the CIDEr-D of each hypothesis, float64[N], ten times a mean of cosines.

  Args:
    hypotheses: captions, their words separated by spaces.
    references: for each hypothesis the captions of its image, at least one.
    frequencies: of the n-grams; None: counted over these references.

  Raises:
    ValueError: the numbers do not fit.
  """
  return _score(hypotheses, references, frequencies, clip=True)


def cider(
  hypotheses: Sequence[str],
  references: Sequence[Sequence[str]],
  *,
  frequencies: Frequencies | None = None,
) -> np.ndarray:
  """Returns the CIDEr of each hypothesis, float64[N]: without clipping or a look at lengths.

  What coco-caption prints as "CIDEr" is `cider_d`. Args and raises: as there.
  """
  return _score(hypotheses, references, frequencies, clip=False)


def _score(hypotheses, references, frequencies, *, clip):
  if len(hypotheses) != len(references) or not all(map(len, references)):
    raise ValueError(
      f"Expected at least one reference for each of {len(hypotheses)} hypotheses, found "
      f"{len(references)} groups, {sum(not len(group) for group in references)} of them empty."
    )
  if not len(hypotheses):
    return np.zeros(0)
  frequencies = frequencies or Frequencies.of(references)
  # Beams of one image share its references, and some are equal: every text is looked at once.
  numbers = {}
  hyp = np.array([numbers.setdefault(text, len(numbers)) for text in hypotheses])
  ref = np.array([numbers.setdefault(text, len(numbers)) for group in references for text in group])
  sizes = np.array([len(group) for group in references])
  hyp_of_pair = np.repeat(np.arange(len(hyp)), sizes)

  vectors, lengths = _vectors([text.split() for text in numbers], frequencies)
  total = np.zeros(len(ref))
  for vector in vectors:
    total += vector.cosines(hyp[hyp_of_pair], ref, clip=clip)
  if clip:
    delta = (lengths[hyp[hyp_of_pair]] - lengths[ref]).astype(np.float64)
    total *= np.exp(-(delta**2) / (2 * SIGMA**2))
  return SCALE / ORDERS * np.bincount(hyp_of_pair, weights=total) / sizes


@dataclasses.dataclass(frozen=True, eq=False)
class _Vectors:
  """tf-idf weights of one order for several texts, without their zeros.

  Attributes:
    begins: int64[S + 1], where the entries of each text begin.
    keys: int64[E], rising: number of the text times `width` plus number of the n-gram.
    weights: float64[E].
    width: distinct n-grams.
  """

  begins: np.ndarray
  keys: np.ndarray
  weights: np.ndarray
  width: int

  def cosines(self, left: np.ndarray, right: np.ndarray, *, clip: bool) -> np.ndarray:
    """float64[P] for pairs of texts; with `clip` no left weight counts beyond the right one."""
    if not len(self.keys):
      return np.zeros(len(left))
    # Every entry of the left text of every pair, and its place in the right text, if it has one.
    sizes = self.begins[left + 1] - self.begins[left]
    pair = np.repeat(np.arange(len(left)), sizes)
    entry = np.arange(len(pair)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    entry += self.begins[left][pair]
    wanted = right[pair] * self.width + self.keys[entry] % self.width
    place = np.searchsorted(self.keys, wanted).clip(max=len(self.keys) - 1)
    known = self.keys[place] == wanted
    pair, mine, other = pair[known], self.weights[entry[known]], self.weights[place[known]]
    products = (np.minimum(mine, other) if clip else mine) * other
    dots = np.bincount(pair, weights=products, minlength=len(left))
    texts = len(self.begins) - 1
    norms = np.sqrt(np.bincount(self.keys // self.width, self.weights**2, minlength=texts))
    norm = norms[left] * norms[right]
    return np.divide(dots, norm, out=np.zeros(len(left)), where=norm > 0)


def _vectors(
  texts: Sequence[list[str]], frequencies: Frequencies
) -> tuple[list[_Vectors], np.ndarray]:
  """The vectors of each order, and int64[S], the number of bigrams of each text."""
  table = frequencies._table
  new = {}
  words = [[table.number(word, new) for word in text] for text in texts]
  sizes = np.array([len(text) for text in words])
  text_of = np.repeat(np.arange(len(texts)), sizes)
  last = np.array([word for text in words for word in text], np.int64)

  # The n-grams of one order: where they begin, their numbers here, and those of the table.
  begins = np.arange(len(last))
  grams, known, vectors = np.zeros(len(last), np.int64), np.zeros(1, np.int64), []
  for order in range(ORDERS):
    inside = text_of[begins] == text_of[(begins + order).clip(max=len(last) - 1)]
    inside &= begins + order < len(last)
    begins, grams = begins[inside], grams[inside]
    codes, grams = np.unique(grams * _BASE + last[begins + order], return_inverse=True)
    known, counts = table.find(order, known[codes // _BASE], codes % _BASE)
    idf = np.log(frequencies.images) - np.log(np.maximum(counts, 1.0))
    keys, repeats = np.unique(text_of[begins] * len(codes) + grams, return_counts=True)
    weights = repeats * idf[keys % max(len(codes), 1)]
    bounds = np.searchsorted(keys, np.arange(len(texts) + 1) * len(codes))
    vectors.append(_Vectors(bounds, keys, weights, max(len(codes), 1)))
  return vectors, np.maximum(sizes - 1, 0)


@dataclasses.dataclass(frozen=True, eq=False)
class _Table:
  """Frequencies as sorted arrays, one pair for each order.

  Attributes:
    words: number of each word of the corpus.
    codes: for each order the n-grams, rising: number of the (n-1)-gram times `_BASE` plus the last
      word's; an n-gram's number is its place here.
    counts: their frequencies.
  """

  words: dict[str, int]
  codes: tuple[np.ndarray, ...]
  counts: tuple[np.ndarray, ...]

  @classmethod
  def of(cls, frequencies: Mapping[tuple[str, ...], float]) -> "_Table":
    # With every n-gram its beginnings; those that the file does not list have a count of zero.
    grams = {ngram[:n]: 0.0 for ngram in frequencies for n in range(1, len(ngram))} | frequencies
    words = {word: i for i, word in enumerate(sorted({word for ngram in grams for word in ngram}))}
    number, codes, counts = {(): 0}, [], []
    for order in range(1, ORDERS + 1):
      level = {number[g[:-1]] * _BASE + words[g[-1]]: g for g in grams if len(g) == order}
      rising = sorted(level)
      number = {level[code]: i for i, code in enumerate(rising)}
      codes.append(np.array(rising, np.int64))
      counts.append(np.array([grams[level[code]] for code in rising], np.float64))
    return cls(words, tuple(codes), tuple(counts))

  def number(self, word: str, new: dict[str, int]) -> int:
    """The number of a word; words that the corpus does not have are entered into `new`."""
    if word in self.words:
      return self.words[word]
    return new.setdefault(word, len(self.words) + len(new))

  def find(
    self, order: int, begins: np.ndarray, words: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and counts of n-grams of a beginning's number (-1: unknown) and a last word."""
    codes = self.codes[order]
    if not len(codes):
      return np.full(len(words), -1), np.zeros(len(words))
    wanted = np.where(begins < 0, -1, begins * _BASE + words)
    place = np.searchsorted(codes, wanted).clip(max=len(codes) - 1)
    known = codes[place] == wanted
    return np.where(known, place, -1), np.where(known, self.counts[order][place], 0.0)


def _ngrams(words: Sequence[str]) -> Iterable[tuple[str, ...]]:
  for n in range(1, ORDERS + 1):
    for i in range(len(words) - n + 1):
      yield tuple(words[i : i + n])
