"""Filling in the words that are hidden in a text (OFA, arXiv 2202.03052, section 3.2).

Some spans of words are one `<mask>` each, and the whole text is asked for. No row has a picture.
"""

import dataclasses
import functools
import json
from typing import ClassVar

import numpy as np

from ofa_jax.data import prompts
from ofa_jax.data.draws import Drawn, Draws
from ofa_jax.data.span_mask import mask_spans
from ofa_jax.data.tsv import BadRow
from ofa_jax.decode.beam import Search
from ofa_jax.scoring.bleu import bleu
from ofa_jax.tasks.answering import Answering
from ofa_jax.tasks.seq2seq import Seq2Seq, cut
from ofa_jax.tokenizers.ofa import OFATokenizer
from ofa_jax.tokenizers.special import BOS, EOS, NUM_SPECIAL

ANSWERING = Answering(
  name="infilling",
  prompt=lambda texts, chinese: prompts.whole_text(texts["text"]),
  columns={"id": 0, "text": 1},
  id="id",
  result="text",
  searched_as="infilling",
  search=Search(num_beams=5, max_length=256),
  marks=True,
)


@dataclasses.dataclass(kw_only=True)
class Infilling(Seq2Seq):
  """Texts, compared with those that come back for them with their words hidden.

  In training other words are hidden every time; in evaluations those that the row's number says.

  Attributes:
    ratio: share of the words that is hidden (--mask-ratio).
    random: share of the masks that are any word instead (--random-ratio).
    mean: words of a span (--poisson-lambda).
    max_tokens: of a text; the last ones are kept.
  """

  fields: ClassVar[tuple[str, ...]] = ("id", "text")
  answering: ClassVar[Answering] = ANSWERING
  metrics: ClassVar[tuple[str, ...]] = ("exact", "bleu4")

  columns: tuple[int, ...] = (0, 1)
  search: Search = dataclasses.field(default_factory=lambda: dataclasses.replace(ANSWERING.search))
  source_length: int = 272
  target_length: int = 257
  ratio: float = 0.3
  random: float = 0.0
  mean: float = 3.0
  max_tokens: int = 256

  def example(self, row, rng):
    text = spelled(row["text"])
    if not text:
      raise BadRow(row.name, "the text is empty")
    tokens = self.encode(f" {text}")[-self.max_tokens :]
    hidden = self.hide(tokens, np.random.default_rng(row.index) if rng is None else rng)
    before, after = map(self.encode, prompts.WHOLE_TEXT)
    learn = rng is not None
    source = [*before, *hidden, *after]
    return {
      "source": cut("source", source, self.source_length - 2, warn=learn),
      "target": cut("target", tokens, self.target_length - 1, warn=learn),
    }

  def hide(self, tokens: list[int], rng: np.random.Generator) -> list[int]:
    """The ids of a text with spans of its words hidden."""
    words = self.words
    hidden = masked(tokens, words, Drawn(rng), ratio=self.ratio, mean=self.mean)
    if not self.random:
      return hidden
    other = rng.random(len(hidden)) < self.random
    drawn = rng.integers(NUM_SPECIAL, words.mask, len(hidden))
    return [
      int(new) if token == words.mask and by else token
      for token, by, new in zip(hidden, other, drawn, strict=True)
    ]

  def check(self, config):
    faults = super().check(config)
    for field in ("ratio", "random"):
      if not 0 <= getattr(self, field) <= 1:
        faults.append(f"task.{field}: expected a share, found {getattr(self, field)}")
    if not self.mean > 0 or self.max_tokens < 1:
      faults.append(
        f"task.mean, max_tokens: expected more than 0, found {self.mean}, {self.max_tokens}"
      )
    return faults

  def score(self, predictions, streams):
    """The share of texts that come back word by word, and BLEU-4, of those that could be read."""
    rows, told = streams["examples"], self.texts(predictions)
    texts = {i: spelled(rows.row(i)["text"]) for i in told}
    return {
      "exact": np.mean(list(self.right(predictions, streams).values())),
      "bleu4": bleu([told[i] for i in texts], [[text] for text in texts.values()])[3],
    }

  def right(self, predictions, streams):
    rows = streams["examples"]
    told = self.texts(predictions)
    return {i: float(text == spelled(rows.row(i)["text"])) for i, text in told.items()}

  def results(self, predictions, streams):
    """`predict.json`: id, what the model was asked, and its text."""
    rows = streams["examples"]
    told = [
      {
        "id": rows.row(i)["id"],
        "asked": self.words.decode(rows.example(i, None)["source"]).strip(),
        "text": text,
      }
      for i, text in self.texts(predictions).items()
    ]
    return {"predict.json": json.dumps(told, ensure_ascii=False).encode()}


def masked(
  tokens: list[int], words: OFATokenizer, draws: Draws, *, ratio: float, mean: float
) -> list[int]:
  """The ids of a text with spans of its words hidden, see `span_mask.mask_spans`.

  Args:
    tokens: of the text.
    words: their tokenizer.
    draws: of the spans.
    ratio: share of the words that is hidden.
    mean: words of a span.
  """
  return mask_spans(
    [BOS, *tokens, EOS],
    [False, *map(words.begins_word, tokens), False],
    mask=words.mask,
    ratio=ratio,
    lengths=functools.partial(draws.lengths, mean=mean),
    permutation=draws.permutation,
    placed=draws.unused,
  )[1:-1]


def spelled(text: str) -> str:
  """A text as it is learnt: in lower case, single spaces between its words."""
  return " ".join(text.lower().split())
