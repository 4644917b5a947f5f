"""The log-probability of every one of many answers, with few steps of the decoder.

As in the original, an answer's score is the sum of the log-probabilities of its tokens and of eos,
each renormalised over what the trie of all answers allows there. So only the forks of the trie
contribute: a token without an alternative has probability one. The prompts, which may be of
different lengths, are run once, in one pass; then the beginnings of answers at which the trie
forks, or that lead to such, are run once each, all of the same length together. Of the logits only
those of the continuations are looked at.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ofa_jax.decode.beam import Reorder, Step
from ofa_jax.decode.trie import check
from ofa_jax.models.ofa.encoder import Encoded
from ofa_jax.models.ofa.model import OFA
from ofa_jax.numerics import wide
from ofa_jax.tokenizers.special import EOS, PAD

Prefill = Callable[[Any, jax.Array], tuple[jax.Array, Any]]
Look = Callable[[jax.Array, np.ndarray, np.ndarray], jax.Array]


class Level(NamedTuple):
  """Beginnings of answers of one length; the first level is the empty one, after the prompt.

  Attributes:
    tokens: int32[M], the last token of each.
    parents: int32[M], the place in the level before of what it continues.
    places: int32[E], of the continuations to score: the place of what they continue.
    follow: int32[E], their tokens.
  """

  tokens: np.ndarray
  parents: np.ndarray
  places: np.ndarray
  follow: np.ndarray


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["levels", "forks", "paths", "num_answers", "num_steps"],
  meta_fields=["num_forks"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What to run and to look at for a set of answers, padded so that similar sets share a program.

  Attributes:
    levels: see `Level`; none where there is nothing to choose.
    forks: int32[E], which fork the continuations belong to, those of all levels in a row.
    paths: int32[A, N], the continuations that each answer takes at forks; E stands for none.
    num_answers: A without padding.
    num_steps: token-steps after the prompt, without padding.
    num_forks: at least the number of forks.
  """

  levels: tuple[Level, ...]
  forks: np.ndarray
  paths: np.ndarray
  num_answers: int
  num_steps: int
  num_forks: int

  @property
  def width(self) -> int:
    """The most beginnings that are run together."""
    return max((len(level.tokens) for level in self.levels), default=1)


def plan(answers: Sequence[Sequence[int]]) -> Plan:
  """Finds out what has to be run.

  Args:
    answers: token ids of each, without bos and eos.

  Raises:
    ValueError: there is no answer, or one without tokens.
  """
  check(answers)
  ended = [(*answer, EOS) for answer in answers]
  follow = {}  # beginning -> its continuations
  for answer in ended:
    for i, token in enumerate(answer):
      follow.setdefault(answer[:i], {})[token] = None
  branching = (beginning for beginning, tokens in follow.items() if len(tokens) > 1)
  forks = {beginning: i for i, beginning in enumerate(branching)}
  needed = {fork[:i]: None for fork in forks for i in range(len(fork) + 1)}
  num_forks = _round_up(len(forks) + 1)  # one more for what only fills up
  levels, fork_of, edges, before = [], [], {}, {(): 0}
  for length in range(max(map(len, needed), default=-1) + 1):
    level = {x: i for i, x in enumerate(x for x in needed if len(x) == length)}
    here = [(x, token) for x in level if x in forks for token in follow[x]]
    edges |= {edge: len(fork_of) + i for i, edge in enumerate(here)}
    levels.append(
      Level(
        tokens=_padded([x[-1] if x else 0 for x in level]),
        parents=_padded([before[x[:-1]] for x in level]),
        places=_padded([level[x] for x, _ in here]),
        follow=_padded([token for _, token in here]),
      )
    )
    fork_of += [forks[x] for x, _ in here]
    fork_of += [num_forks - 1] * (len(levels[-1].places) - len(here))
    before = level
  paths = [
    [edges[answer[:i], token] for i, token in enumerate(answer) if answer[:i] in forks]
    for answer in ended
  ]
  table = np.full((_round_up(len(paths)), max(map(len, paths))), len(fork_of), np.int32)
  for row, path in zip(table, paths, strict=False):
    row[: len(path)] = path
  return Plan(
    levels=tuple(levels),
    forks=np.array(fork_of, np.int32),
    paths=table,
    num_answers=len(answers),
    num_steps=max(len(needed) - 1, 0),  # the empty beginning is the prompt's last step
    num_forks=num_forks,
  )


def score_answers(model: OFA, encoded: Encoded, *, prompts: jax.Array, plan: Plan) -> jax.Array:
  """Returns the log-probabilities float32[B, A] of all answers (-inf: padding of the plan).

  It may be called in a jitted function, with a plan that is an argument or a constant.

  Args:
    model: an OFA.
    encoded: of B inputs, from `OFA.encode`.
    prompts: int32[B, P], what the decoder reads before the answer, bos first; shorter ones are
      filled up with `PAD` on the right.
    plan: of the answers.
  """

  def look(states, places, tokens):
    return jnp.einsum(
      "bed,ed->be",
      states[:, places],
      model.tokens(tokens),
      preferred_element_type=wide(states.dtype),
    )

  return score(
    model.step_hidden,
    model.start(encoded, max_length=prompts.shape[1] + len(plan.levels)),
    prefill=model.prefill,
    reorder=model.reorder,
    prompts=prompts,
    plan=plan,
    look=look,
  )


def score(
  step: Step,
  cache: Any,
  *,
  prefill: Prefill,
  reorder: Reorder,
  prompts: jax.Array,
  plan: Plan,
  look: Look | None = None,
) -> jax.Array:
  """`score_answers` with any model.

  Args:
    step: (cache, tokens int32[B, M], positions int32[B]) -> (outputs [B, M, ...], cache).
    cache: of one hypothesis, with positions for the prompt and all levels but the first.
    prefill: (cache, prompts int32[B, P]) -> (outputs [B, 1, ...] of each one's last token, cache).
    reorder: (cache, parents int32[B, M]) -> cache of these hypotheses of each input.
    prompts: as for `score_answers`.
    plan: of the answers.
    look: (outputs, places int32[E], tokens int32[E]) -> float32[B, E], the logits of some tokens
      at some of the M places; None: the outputs are logits float32[B, M, V].
  """
  batch, look = prompts.shape[0], look or (lambda logits, places, tokens: logits[:, places, tokens])
  real = jnp.arange(len(plan.paths)) < plan.num_answers
  if not plan.levels:
    return jnp.broadcast_to(jnp.where(real, 0.0, -jnp.inf), (batch, len(plan.paths)))
  lengths = jnp.sum(prompts != PAD, axis=1)
  edges = []
  for depth, level in enumerate(plan.levels):
    if depth:
      cache = reorder(cache, jnp.broadcast_to(level.parents, (batch, len(level.parents))))
      tokens = jnp.broadcast_to(level.tokens, (batch, len(level.tokens)))
      outputs, cache = step(cache, tokens, lengths + depth - 1)
    else:
      outputs, cache = prefill(cache, prompts)
    edges.append(look(outputs, level.places, level.follow))
  logits = jnp.concatenate(edges, axis=1).T
  highest = jax.ops.segment_max(logits, plan.forks, plan.num_forks)
  weights = jnp.exp(logits - highest[plan.forks])
  norms = highest + jnp.log(jax.ops.segment_sum(weights, plan.forks, plan.num_forks))
  log_probs = jnp.pad(logits - norms[plan.forks], ((0, 1), (0, 0)))
  return jnp.where(real, log_probs[plan.paths].sum(1).T, -jnp.inf)


def _padded(numbers: list[int]) -> np.ndarray:
  """int32 array, filled up with zeros; at least one element."""
  array = np.zeros(_round_up(max(len(numbers), 1)), np.int32)
  array[: len(numbers)] = numbers
  return array


def _round_up(number: int) -> int:
  """The next number with three significant bits, at most a quarter more."""
  unit = 1 << max(number.bit_length() - 3, 0)
  return -(-number // unit) * unit
