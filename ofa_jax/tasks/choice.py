"""Answers out of candidates: what visual questions, entailment and classification share.

The decoder reads nothing, the question, or the question with its end before it answers
(`prompt`). In training the trie of the answers says what may follow (`Choices.trie`). In evaluation
either every answer is scored and the best is taken, or a beam search keeps to the trie.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ofa_jax.decode import candidates
from ofa_jax.decode.beam import BOS, EOS
from ofa_jax.decode.trie import Trie, build
from ofa_jax.models.ofa.encoder import Encoded
from ofa_jax.models.ofa.model import OFA

PROMPTS = ("none", "src", "prev_output")  # the original's --prompt-type
INFERENCE = ("allcand", "beamsearch")  # the original's --val-inference-type
Arrays = TypeVar("Arrays", Trie, candidates.Plan)
MAX_POSITIONS = 1 << 16  # of all hypotheses in a device's cache: in Base 37 kB each, in fp32


@dataclasses.dataclass(frozen=True, eq=False)
class Choices:
  """A list of answers, made ready to be learnt and to be chosen from.

  Attributes:
    texts: the answers, by their numbers.
    trie: of their tokens.
    plan: for scoring all of them.
  """

  texts: tuple[str, ...]
  trie: Trie
  plan: candidates.Plan

  @classmethod
  def of(cls, texts: Sequence[str], encode: Callable[[str], list[int]]) -> "Choices":
    """Encodes the answers, each behind a space.

    Raises:
      ValueError: there is none, or one without tokens.
    """
    tokens = [encode(f" {text}") for text in texts]
    return cls(tuple(texts), build(tokens), candidates.plan(tokens))


def prompt(source: Sequence[int], kind: str) -> list[int]:
  """What the decoder reads, behind bos, before it answers.

  Args:
    source: the question's ids, without begin and end.
    kind: one of `PROMPTS`: nothing, the question and its end, or the question.
  """
  return {"none": [], "src": [*source, EOS], "prev_output": list(source)}[kind]


def scores(model: OFA, encoded: Encoded, prompts: jax.Array, plan: candidates.Plan) -> jax.Array:
  """Returns the log-probabilities float32[B, A] of all answers; -inf behind the last one.

  A thousand beginnings of answers may be run for each input: so many inputs at once as
  `MAX_POSITIONS` allows, the others after them.

  Args:
    model: an OFA.
    encoded: of B inputs.
    prompts: int32[B, P], from `prompt`, without bos, filled up with padding.
    plan: of the answers.
  """
  prompts = jnp.pad(prompts, ((0, 0), (1, 0)), constant_values=BOS)
  room = plan.width * (prompts.shape[1] + len(plan.levels))
  together = max(1, MAX_POSITIONS // room)

  def part(rows):
    encoded, prompts = rows
    return candidates.score_answers(model, encoded, prompts=prompts, plan=plan)

  batch = prompts.shape[0]
  if together >= batch:
    return part((encoded, prompts))
  together = max(n for n in range(1, together + 1) if batch % n == 0)
  positions = jnp.broadcast_to(encoded.positions, (batch, *encoded.positions.shape[1:]))
  rows = encoded._replace(positions=positions), prompts
  rows = jax.tree.map(lambda x: x.reshape(-1, together, *x.shape[1:]), rows)
  return jax.lax.map(part, rows).reshape(batch, -1)


def placed(arrays: Arrays, mesh: Mesh, *, load: bool) -> Arrays:
  """A trie or a plan on every device of a mesh; `load` False gives its ShapeDtypeStructs."""
  whole = NamedSharding(mesh, PartitionSpec())
  if load:
    return jax.device_put(arrays, whole)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
    jax.eval_shape(lambda: jax.tree.map(jnp.asarray, arrays)),
  )


def usual_trie() -> Trie:
  """An empty trie with room for the 3,129 answers of VQA v2, to compile for without reading any."""
  first, edges = (np.zeros(n, np.int32) for n in (8193, 8192))
  return Trie(first=first, tokens=edges, nodes=edges, width=4096)
