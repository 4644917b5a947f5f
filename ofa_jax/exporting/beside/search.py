"""Beam search over an exported decoder, in NumPy alone: the hypotheses of `ofa_jax`'s own search.

A hypothesis begins with bos; its score is the sum of its tokens' log-probabilities, eos included,
divided by length ** length_penalty. Of each step's 2 * num_beams best continuations those that end
count only among the first num_beams; an input is done when it has that many ended hypotheses.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

BOS, PAD, EOS, UNK = range(4)


@dataclasses.dataclass(kw_only=True)
class Search:
  """What is searched for.

  Attributes:
    num_beams: hypotheses of an input, M.
    max_length: tokens before eos; eos is forced after them. What the decoder reads first is not
      counted.
    min_length: tokens before eos may come.
    length_penalty: exponent of the length that scores are divided by.
    normalize_scores: whether they are divided at all.
    temperature: divides the logits.
    unk_penalty: taken off the log-probability of the unknown token.
    no_repeat_ngram_size: n-grams of this size occur once; 0 allows all.
  """

  num_beams: int = 5
  max_length: int = 16
  min_length: int = 1
  length_penalty: float = 1.0
  normalize_scores: bool = True
  temperature: float = 1.0
  unk_penalty: float = 0.0
  no_repeat_ngram_size: int = 0


def generate(
  step: Callable[[Any, np.ndarray, int], tuple[np.ndarray, Any]],
  reorder: Callable[[Any, np.ndarray], Any],
  cache: Any,
  *,
  batch: int,
  search: Search,
  prompts: np.ndarray | None = None,
) -> list[list[dict[str, Any]]]:
  """Searches for the answers to all inputs at once.

  Args:
    step: (cache, tokens int32[B, M], position) -> (logits float32[B, M, V] of what follows these
      tokens, cache).
    reorder: (cache, parents int[B, M]) -> the cache of these hypotheses of each input.
    cache: of M = num_beams hypotheses.
    batch: B, the number of inputs.
    search: what to search for.
    prompts: int32[B, P], filled up with `PAD`: what the decoder reads before it answers, without
      bos. It is left out of the results, whose score is then not divided by lengths.

  Returns:
    For each input its hypotheses, the best first: "tokens" int32[n] with the end, "score", and
    "positional_scores" float32[n].
  """
  read = 0 if prompts is None else prompts.shape[1]
  search = dataclasses.replace(search, max_length=search.max_length + read)
  beams, length = search.num_beams, search.max_length
  limit = np.full(batch, length)
  if prompts is not None:
    limit += (prompts != PAD).sum(axis=1) - read
  rows = np.arange(batch)[:, None]
  tokens = np.full((batch, beams, length + 2), PAD, np.int32)
  tokens[:, :, 0] = BOS
  sums = np.zeros((batch, beams, length + 1), np.float32)
  # At the beginning all beams are the same, so that only the first one counts.
  total = np.tile(np.where(np.arange(beams) < 1, 0, -np.inf).astype(np.float32), (batch, 1))
  ended, done = np.zeros((batch, beams), bool), np.zeros(batch, bool)
  found: list[list[dict[str, Any]]] = [[] for _ in range(batch)]
  for position in range(length + 1):
    if done.all():
      break
    logits, cache = step(cache, tokens[:, :, position], position)
    log_probs = _log_softmax(np.asarray(logits, np.float32) / np.float32(search.temperature))
    inside = np.zeros(batch, bool)  # whether the next token still belongs to the prompt
    if prompts is not None:
      inside = position < (prompts != PAD).sum(axis=1)
      _force_prompt(log_probs, prompts, position, length)
    _apply_rules(log_probs, tokens, position, inside, position >= limit, search)
    scores = (log_probs + total[..., None]).reshape(batch, -1)
    totals, at = _largest(scores, min(2 * beams, scores.shape[1] - 1))
    parents, words = at // log_probs.shape[-1], (at % log_probs.shape[-1]).astype(np.int32)

    ends = (words == EOS) & (totals > -np.inf)
    counted = ends[:, :beams] & ~ended & ~done[:, None]
    for i, j in np.argwhere(counted):
      if len(found[i]) < beams:
        found[i].append(_hypothesis(tokens, sums, i, parents[i, j], position, totals[i, j], search))
    done |= np.array([len(x) >= beams for x in found]) | (position >= limit)
    ends[:, :beams] |= ended

    chosen = np.argsort(ends, axis=1, kind="stable")[:, :beams]
    parents, words, total, ended = (
      np.take_along_axis(x, chosen, axis=1) for x in (parents, words, totals, ends)
    )
    if beams > 1:
      cache = reorder(cache, parents)
    tokens, sums = tokens[rows, parents], sums[rows, parents]
    tokens[:, :, position + 1], sums[:, :, position] = words, total
    # Where no hypothesis is possible any more, none can end.
    done |= (ended | (total == -np.inf)).all(axis=1)
  found = [sorted(hypotheses, key=lambda x: -x["score"]) for hypotheses in found]
  if prompts is None:
    return found
  return [
    [_behind(hypothesis, number) for hypothesis in hypotheses]
    for hypotheses, number in zip(found, (prompts != PAD).sum(axis=1), strict=True)
  ]


def _hypothesis(tokens, sums, row, parent, position, total, search):
  """The one that ends at `position`, as a result."""
  cumulative = np.append(sums[row, parent, :position], total)
  score = total
  if search.normalize_scores:
    score = total / np.float32(position + 1) ** np.float32(search.length_penalty)
  return {
    "tokens": np.append(tokens[row, parent, 1 : position + 1], np.int32(EOS)),
    "score": float(score),
    "positional_scores": np.diff(cumulative, prepend=np.float32(0)),
  }


def _behind(hypothesis, number):
  """A hypothesis without the `number` tokens that it was made to begin with."""
  positional = hypothesis["positional_scores"][number:]
  return {
    "tokens": hypothesis["tokens"][number:],
    "score": float(positional.sum()),
    "positional_scores": positional,
  }


def _log_softmax(logits):
  logits = logits - logits.max(axis=-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def _force_prompt(log_probs, prompts, position, length):
  """Leaves inputs that are inside their prompt nothing but its next token."""
  if position >= min(prompts.shape[1], length):
    return
  for row, token in enumerate(prompts[:, position]):
    if token != PAD:
      kept = log_probs[row, :, token].copy()
      log_probs[row] = -np.inf
      log_probs[row, :, token] = kept


def _apply_rules(log_probs, tokens, position, inside, at_end, search):
  """Edits log-probabilities in place; they are not normalised again."""
  log_probs[..., UNK] -= np.float32(search.unk_penalty)
  log_probs[np.isnan(log_probs)] = -np.inf
  log_probs[..., PAD] = -np.inf
  if position < search.min_length:
    log_probs[~inside, :, EOS] = -np.inf
  end = log_probs[at_end, :, EOS]
  log_probs[at_end] = -np.inf
  log_probs[at_end, :, EOS] = end
  size = search.no_repeat_ngram_size
  if size and position + 2 >= size:
    for row, beam in np.ndindex(tokens.shape[:2]):
      words = tokens[row, beam, : position + 1]
      last = words[position + 2 - size :]
      for begin in range(position + 2 - size):
        if np.array_equal(words[begin : begin + size - 1], last):
          log_probs[row, beam, words[begin + size - 1]] = -np.inf


def _largest(scores, number):
  """The `number` largest of each row and where they are, the first of equal ones first."""
  bound = -np.partition(-scores, number - 1, axis=1)[:, number - 1 : number]
  totals, at = np.empty((len(scores), number), scores.dtype), np.empty((len(scores), number), int)
  for row, values in enumerate(scores):
    places = np.flatnonzero(values >= bound[row])
    order = places[np.argsort(-values[places], kind="stable")][:number]
    totals[row], at[row] = values[order], order
  return totals, at
