"""Tasks whose answers come out of a list: questions about images, entailment, sentences' labels.

What they share is here: what the decoder reads before it answers, which ids may follow in training,
and how the best answer is found (`tasks/choice.py`). A task adds its list and what a row asks.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ofa_jax.data.rows import Row
from ofa_jax.data.tsv import BadRow
from ofa_jax.decode.answers import on_each_device
from ofa_jax.decode.candidates import Plan
from ofa_jax.decode.trie import DEAD
from ofa_jax.models.ofa.model import OFA
from ofa_jax.tasks import choice, confidence
from ofa_jax.tasks.choice import Choices
from ofa_jax.tasks.seq2seq import Seq2Seq, cut


@dataclasses.dataclass(kw_only=True)
class Chosen(Seq2Seq):
  """Answers that are learnt and chosen from a list.

  Attributes:
    prompt: what the decoder reads before it answers, see `choice.prompt`.
    inference: "allcand" scores all answers, "beamsearch" searches, in the list if there is one.
    answer_length: tokens of an answer (--max-tgt-length).
  """

  source_length: int = 128
  target_length: int = 160
  prompt: str = "prev_output"
  inference: str = "allcand"
  answer_length: int = 30

  @property
  def constrained(self) -> bool:
    """Whether there is a list; where not, any answer is learnt and given."""
    return True

  @property
  def choices(self) -> Choices | None:
    """The answers to choose from; ValueError where they cannot be read."""
    raise NotImplementedError

  @property
  def prompts(self) -> bool:
    """Whether the decoder reads something before it answers."""
    return self.prompt != "none"

  @property
  def learnt_tokens(self) -> int:
    """Those of the longest answer, and its end."""
    return self.answer_length + self.target_ends

  def asks(
    self, source: Sequence[int], answer: str | None, *, row: Row, learn: bool
  ) -> dict[str, object]:
    """The fields of an example but its picture.

    Args:
      source: ids of the question, as long as the model reads it.
      answer: what is right; None: nothing is known.
      row: for messages.
      learn: whether the answer has to be one of the list.

    Raises:
      BadRow: it has to be, and is not.
    """
    target = [] if answer is None else self.encode(f" {answer}")
    target = cut("answer", target, self.answer_length, warn=learn)
    example = {"source": source, "prompt": choice.prompt(source, self.prompt), "target": target}
    if self.constrained:
      nodes = self.choices.trie.path(target)
      if nodes is None and learn:
        raise BadRow(row.name, f"the answer {answer!r} is not among those to choose from")
      example["node"] = self._nodes(() if nodes is None else nodes)
    return example

  def blank(self):
    example = super().blank()
    return example | {"node": self._nodes(())} if self.constrained else example

  def check(self, config):
    faults = super().check(config)
    for field, known in (("prompt", choice.PROMPTS), ("inference", choice.INFERENCE)):
      if getattr(self, field) not in known:
        faults.append(
          f"task.{field}: expected one of {', '.join(known)}, found {getattr(self, field)!r}"
        )
    if self.inference == "beamsearch" and self.prompt == "src":
      faults.append(
        "task.prompt: expected none or prev_output with task.inference=beamsearch, found src, "
        "whose end ends the search"
      )
    room = max(self.learnt_tokens, 2)  # `assemble` leaves room for an answer and its end
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
    if not self.constrained:
      return None
    if training and not load:
      return choice.placed(choice.usual_trie(), mesh, load=False)
    scored = not training and self.inference == "allcand"
    return choice.placed(self.choices.plan if scored else self.choices.trie, mesh, load=load)

  def prepare(self, model, batch, *, rngs, step, frozen):
    batch = super().prepare(model, batch, rngs=rngs, step=step, frozen=frozen)
    return batch if frozen is None else {**batch, "trie": frozen}

  def allowed(self, batch, *, vocab_size):
    if not self.constrained:
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
      told = {"answer": jnp.argmax(scores, axis=1), "score": jnp.max(scores, axis=1)}
      if self.temperatures:
        told["log_probabilities"] = confidence.of_choices(scores, temperatures=self.temperatures)
      return told

    return on_each_device(best)(model, dict(batch), frozen)

  @property
  def calibrated_as(self):
    return confidence.name_of(self.answering, chosen=self.inference == "allcand")

  def probabilities(self, predictions):
    rows = predictions["examples"]
    if "log_probabilities" in rows:  # among all candidates
      return np.exp(rows["log_probabilities"].astype(np.float64))
    return super().probabilities(predictions)

  def texts(self, predictions):
    """The answers by row, of all rows that could be read."""
    rows = predictions["examples"]
    if "answer" in rows:
      texts = self.choices.texts
      return {int(i): texts[rows["answer"][i]] for i in np.flatnonzero(rows["valid"])}
    return super().texts(predictions)

  def _nodes(self, path):
    """The places in the trie of an answer's tokens and its end; nothing is learnt at the others."""
    nodes = np.full(self.learnt_tokens, DEAD, np.int32)
    nodes[: len(path)] = path[: self.learnt_tokens]
    return nodes
