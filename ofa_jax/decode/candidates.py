"""The log-probability of every one of many answers, with few steps of the decoder.

As in the original, an answer's score is the sum of the log-probabilities of its tokens and of eos,
each renormalised over what the trie of all answers allows there. So only the forks of the trie
contribute: a token without an alternative has probability one. The prompt is run once; then the
beginnings of answers at which the trie forks, or that lead to such, are run once each, all of the
same length together. Of the logits only those of the continuations are looked at.
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
from ofa_jax.tokenizers.special import EOS

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
    found = [(x, token) for x in level if x in forks for token in follow[x]]
    edges |= {edge: len(fork_of) + i for i, edge in enumerate(found)}
    levels.append(
      Level(
        tokens=_padded([x[-1] if x else 0 for x in level]),
        parents=_padded([before[x[:-1]] for x in level]),
        places=_padded([level[x] for x, _ in found]),
        follow=_padded([token for _, token in found]),
      )
    )
    fork_of += [forks[x] for x, _ in found]
    fork_of += [num_forks - 1] * (len(levels[-1].places) - len(found))
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


def score(
  step: Step,
  cache: Any,
  *,
  reorder: Reorder,
  prompts: jax.Array,
  length: jax.Array,
  plan: Plan,
  look: Look | None = None,
) -> jax.Array:
  """Returns the log-probabilities float32[B, A] of all answers (padded ones are 0).

  Args:
    step: (cache, tokens int32[B, M], position int32[]) -> (outputs [B, M, ...], cache).
    cache: of one hypothesis, with positions for the prompt and all levels but the first.
    reorder: (cache, parents int32[B, M]) -> cache of these hypotheses of each input.
    prompts: int32[B, P], what the decoder reads before the answer, bos first; all equally long.
    length: int32[], the tokens of a prompt without padding.
    plan: of the answers.
    look: (outputs, places int32[E], tokens int32[E]) -> float32[B, E], the logits of some tokens
      at some of the M places; None: the outputs are logits float32[B, M, V].
  """
  batch, look = len(prompts), look or (lambda logits, places, tokens: logits[:, places, tokens])
  if not plan.levels:
    return jnp.zeros((batch, len(plan.paths)), jnp.float32)
  found = []
  for depth, level in enumerate(plan.levels):
    if depth:
      cache = reorder(cache, jnp.broadcast_to(level.parents, (batch, len(level.parents))))
      tokens = jnp.broadcast_to(level.tokens, (batch, len(level.tokens)))
      outputs, cache = step(cache, tokens, length + depth - 1)
    else:
      outputs, cache = _read(step, cache, prompts, length)
    found.append(look(outputs, level.places, level.follow))
  logits = jnp.concatenate(found, axis=1).T
  highest = jax.ops.segment_max(logits, plan.forks, plan.num_forks)
  weights = jnp.exp(logits - highest[plan.forks])
  norms = highest + jnp.log(jax.ops.segment_sum(weights, plan.forks, plan.num_forks))
  log_probs = jnp.pad(logits - norms[plan.forks], ((0, 1), (0, 0)))
  return log_probs[plan.paths].sum(1).T


def _read(step, cache, prompts, length):
  """Runs the prompt; the outputs [B, 1, ...] are those of its last token."""

  def one(position, cache):
    tokens = jax.lax.dynamic_slice_in_dim(prompts, position, 1, axis=1)
    return step(cache, tokens, position)

  cache = jax.lax.fori_loop(0, length - 1, lambda i, cache: one(i, cache)[1], cache)
  return one(length - 1, cache)


def _padded(numbers: list[int]) -> np.ndarray:
  """int32 array, filled up with zeros; at least one element."""
  array = np.zeros(_round_up(max(len(numbers), 1)), np.int32)
  array[: len(numbers)] = numbers
  return array


def _round_up(number: int) -> int:
  """The next number with three significant bits, at most a quarter more."""
  unit = 1 << max(number.bit_length() - 3, 0)
  return -(-number // unit) * unit
