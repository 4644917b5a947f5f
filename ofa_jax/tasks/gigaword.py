"""Summaries of news articles in a line (OFA, arXiv 2202.03052, section 4.2; Gigaword, arXiv
1509.00685).

No row has a picture, and none is computed. In training some of the words that the decoder sees are
others than those of the summary, as if it had erred.
"""

import dataclasses
import json
from typing import ClassVar

from ofa_jax.data import prompts
from ofa_jax.data.text import known_words, pre_caption
from ofa_jax.data.tsv import BadRow
from ofa_jax.decode.beam import Search
from ofa_jax.scoring import gigaword as scoring
from ofa_jax.scoring import rouge
from ofa_jax.tasks.answering import Answering
from ofa_jax.tasks.seq2seq import Seq2Seq, cut
from ofa_jax.tokenizers.special import NUM_SPECIAL

ANSWERING = Answering(
  name="gigaword",
  prompt=lambda texts, chinese: prompts.summary(texts["text"], chinese=chinese),
  columns={"text": 0},
  id="id",
  result="hyp",
  searched_as="summary",
  search=Search(num_beams=6, max_length=32, length_penalty=0.7, no_repeat_ngram_size=3),
  tell=lambda text, scale: scoring.hypothesis(text),
)


@dataclasses.dataclass(kw_only=True)
class Gigaword(Seq2Seq):
  """Summaries, compared with the headlines that the articles had.

  Attributes:
    max_words: of an article; its prompt is then cut to so many tokens as `source_length` holds, as
      in the original also in the middle of what stands behind the article (--max-src-length).
    max_target_words: of a summary (--max-tgt-length).
    noise: share of the summary's tokens that the decoder sees as others (--noise-ratio).
    bootstrap: whether ROUGE is also told as in the original's last evaluation, see
      `scoring.gigaword.scores`.
  """

  fields: ClassVar[tuple[str, ...]] = ("text", "summary")
  answering: ClassVar[Answering] = ANSWERING
  metrics: ClassVar[tuple[str, ...]] = (
    *(f"{kind}_{part}" for kind in scoring.KINDS for part in ("f1", "recall")),
    *scoring.KINDS,
  )

  columns: tuple[int, ...] = (0, 1)
  search: Search = dataclasses.field(default_factory=lambda: dataclasses.replace(ANSWERING.search))
  source_length: int = 514
  target_length: int = 128
  max_words: int = prompts.MAX_ARTICLE_WORDS
  max_target_words: int = 64
  noise: float = 0.0
  bootstrap: bool = False

  def example(self, row, rng):
    if not pre_caption(row["text"], max_words=1):
      raise BadRow(row.name, "the article is empty")
    chinese = self.words.kind == "bert-chinese"
    ids = self.encode(prompts.summary(row["text"], chinese=chinese, max_words=self.max_words))
    summary = known_words(pre_caption(row["summary"], max_words=self.max_target_words))
    if not summary and rng is not None:
      raise BadRow(row.name, "the summary is empty")
    target = cut("target", self.encode(summary), self.target_length - 1, warn=rng is not None)
    example = {
      "source": cut("source", ids, self.source_length - 2, warn=rng is not None),
      "target": target,
    }
    return example if rng is None else example | {"seen": self.noised(target, rng)}

  def noised(self, target, rng):
    """What the decoder sees of a summary's ids: some are any other text's, by `noise`."""
    other = rng.random(len(target)) < self.noise
    drawn = rng.integers(NUM_SPECIAL, self.words.mask + 1, len(target))
    return [int(b) if o else a for a, b, o in zip(target, drawn, other, strict=True)]

  def check(self, config):
    faults = super().check(config)
    if not 0 <= self.noise < 1:
      faults.append(f"task.noise: expected 0 <= share < 1, found {self.noise}")
    if self.max_words < 1 or self.max_target_words < 1:
      faults.append(
        "task.max_words, max_target_words: expected at least 1, found "
        f"{self.max_words}, {self.max_target_words}"
      )
    return faults

  def streams(self, split):
    rouge.check()  # what it lacks is told before anything is compiled
    return super().streams(split)

  def score(self, predictions, streams):
    """ROUGE, over the articles that have a summary and could be read."""
    pairs = self._pairs(predictions, streams).values()
    if not pairs:
      return {}
    return scoring.scores(*zip(*pairs, strict=True), bootstrap=self.bootstrap)

  def right(self, predictions, streams):
    """ROUGE-L's F of each summary."""
    pairs = self._pairs(predictions, streams)
    if not pairs:
      return {}
    told, references = zip(*pairs.values(), strict=True)
    told = [scoring.hypothesis(text, validation=True) for text in told]
    rows = rouge.summary_scores(told, [text.lower() for text in references], stem=True)
    return dict(zip(pairs, rows["rougeL"][:, 2].tolist(), strict=True))

  def _pairs(self, predictions, streams):
    """(answer, summary) by row, of the articles that have one and could be read."""
    rows, answers = streams["examples"], self.texts(predictions)
    references = {i: rows.row(i)["summary"] for i in answers}
    return {i: (text, references[i]) for i, text in answers.items() if references[i].strip()}

  def results(self, predictions, streams):
    """`predict.json`: "hyp" and "ref" of each article as they are scored, by the row's number."""
    rows = streams["examples"]
    told = [
      {"id": i, "hyp": hyp, "ref": rows.row(i)["summary"].lower()}
      for i, hyp in self.told(predictions).items()
    ]
    return {"predict.json": json.dumps(told, ensure_ascii=False).encode()}
