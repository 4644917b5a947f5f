"""Answering questions about images (OFA, arXiv 2202.03052, section 3.3; VQA v2, arXiv 1612.00837).

A row has a question and people's answers with their confidences; the answer of the highest
confidence is learnt, with that confidence as its weight. The names of the objects that a detector
saw may stand behind the question. Answers come from a list, which is then learnt with ("constrained
training") and chosen from, or they are free.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ofa_jax.data import answers as answer_lists
from ofa_jax.data import prompts
from ofa_jax.data.text import pre_question
from ofa_jax.data.tsv import IMAGE, BadRow, Table
from ofa_jax.decode.answers import on_each_device
from ofa_jax.decode.beam import Search
from ofa_jax.decode.candidates import Plan
from ofa_jax.decode.trie import DEAD
from ofa_jax.models.ofa.model import OFA
from ofa_jax.scoring import vqa
from ofa_jax.tasks import choice
from ofa_jax.tasks.answering import Answering
from ofa_jax.tasks.choice import Choices
from ofa_jax.tasks.seq2seq import Seq2Seq, cut, load_tokenizer

COUNTED = "train"  # instead of a file: the answers are counted in the training data
MAX_OBJECTS = 30  # the original's --max-object-length


def asked(
  texts: Mapping[str, str], *, max_words: int = prompts.MAX_WORDS, max_objects: int = MAX_OBJECTS
) -> str:
  """The question in "text", and behind it the names in "objects", "&&" between them, if given."""
  question = prompts.question(texts["text"], max_words=max_words)
  if max_objects and "objects" in texts:
    return question + prompts.objects(texts["objects"], most=max_objects)
  return question


ANSWERING = Answering(
  prompt=lambda texts, chinese: asked(texts),
  columns={"id": 0, IMAGE: 5, "text": 2, "objects": 4},
  id="question_id",
  result="answer",
  number_ids=True,
  reads_prompt=True,
  # The length of an answer is ours, the original's is 200 with the question.
  search=Search(num_beams=5, max_length=30, normalize_scores=False),
)


@dataclasses.dataclass(kw_only=True)
class VQA(Seq2Seq):
  """Answers to questions about images, compared with those that people gave.

  Attributes:
    answers: the answers to choose from: a file, see `data/answers.py`, or "train", those that are
      learnt at least `least` times in the training data. None: any answer, in training (the
      original's --unconstrained-training) as in evaluation.
    least: see there; the published list has those that nine questions have.
    prompt: what the decoder reads before it answers, see `choice.prompt`.
    inference: "allcand" scores all answers, "beamsearch" searches, in the list if there is one.
    max_words: of a question (--max-src-length).
    max_objects: names behind the question (--max-object-length); 0: none (no --add-object).
    answer_length: tokens of an answer (--max-tgt-length).
  """

  metrics: ClassVar[tuple[str, ...]] = ("vqa_score",)
  names: ClassVar[tuple[str, ...]] = ("id", IMAGE, "text", "answer", "objects")
  answering: ClassVar[Answering] = ANSWERING

  columns: tuple[int, ...] = (0, 5, 2, 3, 4)
  source_length: int = 128
  target_length: int = 160
  answers: str | None = None
  least: int = 9
  prompt: str = "prev_output"
  inference: str = "allcand"
  max_words: int = prompts.MAX_WORDS
  max_objects: int = MAX_OBJECTS
  answer_length: int = 30
  search: Search = dataclasses.field(default_factory=lambda: dataclasses.replace(ANSWERING.search))

  @property
  def fields(self) -> tuple[str, ...]:
    """The columns; that of the objects may be missing where they are not used."""
    return self.names if self.max_objects or len(self.columns) == 5 else self.names[:4]

  @property
  def prompts(self) -> bool:
    """Whether the decoder reads something before it answers."""
    return self.prompt != "none"

  @property
  def choices(self) -> Choices | None:
    """The answers to choose from; ValueError where they cannot be read."""
    if self.answers is None:
      return None
    files = self.train if self.answers == COUNTED else ()
    return load_choices(self.answers, self.tokenizer, files, self.columns[3], self.least)

  def example(self, row, rng):
    try:
      confidences = vqa.confidences(row["answer"])
    except ValueError as error:
      raise BadRow(row.name, str(error)) from error
    if rng is not None and not confidences:
      raise BadRow(row.name, "there is no answer to learn")
    source = self._question(row, warn=rng is not None)
    answer = vqa.best(confidences) if confidences else None
    target = [] if answer is None else self.encode(f" {answer}")
    target = cut("answer", target, self.answer_length, warn=rng is not None)
    given = choice.prompt(source, self.prompt)
    example = {
      IMAGE: self.image(row, rng),
      "source": source,
      "prompt": given,
      "target": target,
      "conf": np.float32(confidences[answer] if confidences else 1),
    }
    if self.answers is not None:
      nodes = self.choices.trie.path(target)
      if nodes is None and rng is not None:
        raise BadRow(row.name, f"the answer {answer!r} is not among those to choose from")
      example["node"] = np.full(self.learnt_tokens, DEAD, np.int32)
      if nodes is not None:
        example["node"][: len(nodes)] = nodes
    return example

  def blank(self):
    example = super().blank() | {"conf": np.float32(1)}
    if self.answers is not None:
      example["node"] = np.full(self.learnt_tokens, DEAD, np.int32)
    return example

  @property
  def learnt_tokens(self) -> int:
    """Those of the longest answer, and its end."""
    return self.answer_length + 1

  def check(self, config):
    faults = super().check(config)
    for field, known in (("prompt", choice.PROMPTS), ("inference", choice.INFERENCE)):
      if getattr(self, field) not in known:
        faults.append(
          f"task.{field}: expected one of {', '.join(known)}, found {getattr(self, field)!r}"
        )
    if self.inference == "allcand" and self.answers is None:
      faults.append(
        "task.answers: expected a file of answers, or 'train', to choose from, found none; "
        "task.inference=beamsearch needs none"
      )
    if self.inference == "beamsearch" and self.prompt == "src":
      faults.append(
        "task.prompt: expected none or prev_output with task.inference=beamsearch, found src, "
        "whose end ends the search"
      )
    if self.answer_length < 1 or self.max_words < 1 or self.max_objects < 0 or self.least < 1:
      faults.append(
        "task.answer_length, max_words, least: expected at least 1, and max_objects at least 0, "
        f"found {self.answer_length}, {self.max_words}, {self.least}, {self.max_objects}"
      )
    room = self.answer_length + 1
    room += {"none": 0, "src": self.source_length - 1}.get(self.prompt, self.source_length - 2)
    if self.target_length < room:
      faults.append(
        f"task.target_length: expected at least {room}, for a question of task.source_length and "
        f"an answer of task.answer_length behind it, found {self.target_length}"
      )
    return faults

  def examples(self, split):
    _ = self.choices  # its faults are told before anything is compiled
    return super().examples(split)

  def frozen(self, mesh, *, precision, training=True, load=True):
    """The trie of the answers; for evaluations by "allcand" the plan of how to score them."""
    del precision
    if self.answers is None:
      return None
    if training and not load:
      return choice.placed(choice.usual_trie(), mesh, load=False)
    scored = not training and self.inference == "allcand"
    return choice.placed(self.choices.plan if scored else self.choices.trie, mesh, load=load)

  def prepare(self, model, batch, *, rngs, step, frozen):
    batch = super().prepare(model, batch, rngs=rngs, step=step, frozen=frozen)
    return batch if frozen is None else {**batch, "trie": frozen}

  def allowed(self, batch, *, vocab_size):
    if self.answers is None:
      return None
    return batch["trie"].allowed(batch["node"], vocab_size=vocab_size)

  def scores(self, model: OFA, batch: Mapping[str, jax.Array], plan: Plan) -> jax.Array:
    """The log-probabilities float32[B, A] of all answers; -inf behind the last one."""
    encoded = model.encode(batch["source"], **self.pictures(batch))
    return choice.scores(model, encoded, self.decoder_prompts(batch), plan)

  def predict(self, model, batch, *, rngs, frozen):
    """Of "allcand" the number of each row's best "answer" and its score."""
    if self.inference == "beamsearch":
      return super().predict(model, batch, rngs=rngs, frozen=frozen)

    def best(model, batch, plan):
      scores = self.scores(model, batch, plan)
      return {"answer": jnp.argmax(scores, axis=1), "score": jnp.max(scores, axis=1)}

    return on_each_device(best)(model, dict(batch), frozen)

  def texts(self, predictions):
    """The answers by row, of all rows that could be read."""
    read = predictions["examples"]
    if "answer" in read:
      texts = self.choices.texts
      return {int(i): texts[read["answer"][i]] for i in np.flatnonzero(read["valid"])}
    return super().texts(predictions)

  def score(self, predictions, streams):
    """The original's "vqa_score", over the questions that have answers and could be read."""
    rows = streams["examples"]
    answers = self.texts(predictions)
    references = {i: vqa.confidences(rows.row(i)["answer"]) for i in answers}
    known = [i for i in answers if references[i]]
    if not known:
      return {}
    return {"vqa_score": vqa.score([answers[i] for i in known], [references[i] for i in known])}

  def _question(self, row, *, warn):
    """The ids of a question, and of the objects behind it."""
    if not pre_question(row["text"], max_words=1):
      raise BadRow(row.name, "the question is empty")
    ids = self.encode(asked(row, max_words=self.max_words, max_objects=self.max_objects))
    return cut("source", ids, self.source_length - 2, warn=warn)


@functools.lru_cache(maxsize=4)
def load_choices(
  answers: str, tokenizer: str, files: tuple[str, ...], column: int, least: int
) -> Choices:
  """The answers of a file, or those counted in a column of training files, read once.

  Raises:
    ValueError: they cannot be read, or there are none.
  """
  if answers == COUNTED:
    texts = answer_lists.counted(_learnt(files, column), least=least)
  else:
    texts = answer_lists.load(answers)
  return Choices.of(texts, load_tokenizer(tokenizer).encode)


def _learnt(files, column):
  """The answers that the rows of training files teach; bad rows are told where they are read."""
  table = Table(files, columns={"answer": column})
  for i in range(len(table)):
    try:
      confidences = vqa.confidences(table.text(i, "answer"))
    except (BadRow, ValueError):
      continue
    if confidences:
      yield vqa.best(confidences)
