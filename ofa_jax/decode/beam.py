"""Beam search and sampling as OFA's generator does them, with the whole loop on the device.

The scores are the original's (fairseq's `SequenceGenerator` with OFA's changes): a hypothesis
begins with bos; its score is the sum of its tokens' log-probabilities, those of a forced prefix and
of eos included, divided by length ** length_penalty. Of each step's 2 * beams best continuations
those that end count only among the first `beams`; an input is done when it has that many ended
hypotheses, though a better one could still come.

The model is two functions, `step` and `reorder`, and a cache that only they look into. All shapes
are static: [B, M], inputs by hypotheses.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ofa_jax.decode import sample
from ofa_jax.decode.trie import ROOT, Trie
from ofa_jax.tokenizers.special import BOS, EOS, PAD, UNK

Step = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any]]
Reorder = Callable[[Any, jax.Array], Any]


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Search:
  """What is searched for; the defaults are the original's, where it has any.

  A static argument of jitted functions, and not frozen: fields of a config's are flags.

  Attributes:
    num_beams: hypotheses of an input, M.
    max_length: tokens before eos; eos is forced after them.
    min_length: tokens, those of a prefix included, before eos may come where it is not forced.
    length_penalty: exponent of the length that scores are divided by.
    normalize_scores: whether they are divided at all.
    temperature: divides the logits.
    unk_penalty: taken off the log-probability of the unknown token.
    no_repeat_ngram_size: n-grams of this size occur once, bos and prefix included; 0 allows all.
    allowed_range: token ids (first, end) beside the four special ones that are allowed.
    gen_code: image codes, which end after `max_length` tokens and have no special ones.
    mask_probs: range and trie mask the probabilities, which then do not sum up to one, instead of
      the logits (the original's zero-shot mode).
    diverse_groups: groups of beams that avoid each other's tokens (arXiv:1610.02424).
    diversity_strength: taken off for every time that a group before took the token.
    sample: tokens are drawn, and `num_beams` is the number of samples.
    top_k, top_p: what they are drawn from, see `sample.draw`.
  """

  num_beams: int = 5
  max_length: int = 200
  min_length: int = 1
  length_penalty: float = 1.0
  normalize_scores: bool = True
  temperature: float = 1.0
  unk_penalty: float = 0.0
  no_repeat_ngram_size: int = 0
  allowed_range: tuple[int, int] | None = None
  gen_code: bool = False
  mask_probs: bool = False
  diverse_groups: int = 1
  diversity_strength: float = 0.5
  sample: bool = False
  top_k: int = 0
  top_p: float = 0.0

  def __post_init__(self):
    """Refuses what contradicts itself.

    Raises:
      ValueError: all that does.
    """
    low, high = self.allowed_range or (UNK + 1, UNK + 2)
    faults = [
      message
      for wrong, message in (
        (self.num_beams < 1, f"num_beams >= 1, found {self.num_beams}"),
        (self.max_length < 1, f"max_length >= 1, found {self.max_length}"),
        (
          self.min_length > self.max_length,
          f"min_length <= max_length, found {self.min_length} > {self.max_length}",
        ),
        (not self.temperature > 0, f"temperature > 0, found {self.temperature}"),
        (
          self.no_repeat_ngram_size < 0,
          f"no_repeat_ngram_size >= 0, found {self.no_repeat_ngram_size}",
        ),
        (
          not UNK < low < high,
          f"allowed_range (first > {UNK}, end > first), found {self.allowed_range}",
        ),
        (
          self.diverse_groups < 1 or self.num_beams % self.diverse_groups != 0,
          f"diverse_groups that divide the {self.num_beams} beams, found {self.diverse_groups}",
        ),
        (self.top_k < 0, f"top_k >= 0, found {self.top_k}"),
        (not 0 <= self.top_p <= 1, f"top_p in [0, 1], found {self.top_p}"),
        (
          not self.sample and bool(self.top_k or self.top_p),
          "sample=True with top_k or top_p, found beam search",
        ),
        (self.sample and self.diverse_groups > 1, "sample or diverse_groups, found both"),
      )
      if wrong
    ]
    if faults:
      raise ValueError("\n".join(f"Expected {fault}" for fault in faults))


class Hypotheses(NamedTuple):
  """Ended hypotheses, the best first.

  Attributes:
    tokens: int32[B, M, max_length + 1], without bos, with eos, then pad.
    lengths: int32[B, M], eos counted; 0 where there is no hypothesis.
    scores: float32[B, M]; -inf where there is none.
    positional_scores: float32[B, M, max_length + 1], log-probabilities of the tokens, then 0.
  """

  tokens: jax.Array
  lengths: jax.Array
  scores: jax.Array
  positional_scores: jax.Array


class _State(NamedTuple):
  step: jax.Array  # int32[], tokens after bos so far
  tokens: jax.Array  # int32[B, M, max_length + 2], bos first
  sums: jax.Array  # float32[B, M, max_length + 1], cumulative scores after each token
  total: jax.Array  # float32[B, M], the last of them
  ended: jax.Array  # bool[B, M], hypotheses that only fill their place
  done: jax.Array  # bool[B]
  node: jax.Array  # int32[B, M], of the trie
  limit: jax.Array  # int32[B], tokens before eos is forced
  hypotheses: Hypotheses  # in the order in which they ended
  count: jax.Array  # int32[B]
  cache: Any


def generate(
  step: Step,
  cache: Any,
  *,
  reorder: Reorder,
  search: Search,
  batch: int,
  prefix_tokens: jax.Array | None = None,
  trie: Trie | None = None,
  limits: jax.Array | None = None,
  active: jax.Array | None = None,
  rngs: jax.Array | None = None,
) -> Hypotheses:
  """Searches for the continuations of all inputs at once.

  Args:
    step: (cache, tokens int32[B, M], position int32[]) -> (logits float32[B, M, V], cache), the
      logits of what follows these tokens; or float32[N, B, M, V] of N models, whose probabilities
      are averaged (see `ensemble`).
    cache: of M = num_beams hypotheses and max_length + 1 positions.
    reorder: (cache, parents int32[B, M]) -> cache of these hypotheses of each input.
    search: what to search for.
    batch: the number of inputs, B.
    prefix_tokens: int32[B, P], which every hypothesis begins with (after bos); shorter ones are
      padded with `PAD` on the right.
    trie: what may follow the prefix.
    limits: int32[B], tokens of each input before eos is forced, up to `max_length`; None: that.
    active: bool[B], False for inputs that only fill the batch, which get no hypotheses.
    rngs: PRNG keys [B], one for each input, for sampling: so what is drawn for an input does not
      depend on those beside it, nor on the device that it is on.

  Raises:
    ValueError: more beams than tokens in the vocabulary; sampling without keys.
  """
  if search.sample and (rngs is None or rngs.shape != (batch,)):
    shape = "none" if rngs is None else f"shape {rngs.shape}"
    raise ValueError(f"Expected a PRNG key for each of {batch} inputs to sample, found {shape}")
  beams, length = search.num_beams, search.max_length

  def body(state: _State) -> _State:
    tokens = jax.lax.dynamic_index_in_dim(state.tokens, state.step, axis=2, keepdims=False)
    logits, cache = step(state.cache, tokens, state.step)
    _check_vocabulary(search, logits.shape[-1])
    inside = jnp.zeros(batch, bool)  # whether the next token still belongs to the prefix
    if prefix_tokens is not None:
      inside = state.step < jnp.sum(prefix_tokens != PAD, axis=1)
    log_probs = _log_probs(logits, search, trie, state.node, inside)
    if prefix_tokens is not None:
      state, log_probs = _force_prefix(state, log_probs, prefix_tokens, search)
    log_probs = _apply_rules(log_probs, state, search, inside)
    keys = None
    if search.sample:
      keys = jax.vmap(jax.random.fold_in, (0, None))(rngs, state.step)
    candidates = _candidates(log_probs, state.total, search, keys)
    state, ends = _collect(state._replace(cache=cache), candidates, search)
    return _continue(
      state, candidates, ends, search=search, reorder=reorder, trie=trie, inside=inside
    )

  def unfinished(state: _State) -> jax.Array:
    return (state.step <= length) & ~jnp.all(state.done)

  first = (
    jnp.arange(beams) < search.diverse_groups
  )  # at the beginning the beams of a group are all the same
  state = _State(
    step=jnp.int32(0),
    tokens=jnp.full((batch, beams, length + 2), PAD, jnp.int32).at[:, :, 0].set(BOS),
    sums=jnp.zeros((batch, beams, length + 1), jnp.float32),
    total=jnp.broadcast_to(jnp.where(first | search.sample, 0.0, -jnp.inf), (batch, beams)),
    ended=jnp.zeros((batch, beams), bool),
    done=jnp.zeros(batch, bool) if active is None else ~active,
    node=jnp.full((batch, beams), ROOT, jnp.int32),
    limit=jnp.full(batch, length, jnp.int32) if limits is None else limits,
    hypotheses=Hypotheses(
      tokens=jnp.full((batch, beams, length + 1), PAD, jnp.int32),
      lengths=jnp.zeros((batch, beams), jnp.int32),
      scores=jnp.full((batch, beams), -jnp.inf, jnp.float32),
      positional_scores=jnp.zeros((batch, beams, length + 1), jnp.float32),
    ),
    count=jnp.zeros(batch, jnp.int32),
    cache=cache,
  )
  hypotheses = jax.lax.while_loop(unfinished, body, state).hypotheses
  best = jnp.argsort(-hypotheses.scores, axis=1, stable=True)
  return jax.tree.map(
    lambda x: jnp.take_along_axis(x, best.reshape(best.shape + (1,) * (x.ndim - 2)), axis=1),
    hypotheses,
  )


def ensemble(models: Sequence[tuple[Step, Reorder]]) -> tuple[Step, Reorder]:
  """Makes one `step` and `reorder` of several models', whose caches are a tuple.

  The probabilities are averaged after each model's own temperature and masks.
  """

  def step(caches, tokens, position):
    outputs = [
      step(cache, tokens, position) for (step, _), cache in zip(models, caches, strict=True)
    ]
    logits, caches = zip(*outputs, strict=True)
    return jnp.stack(logits), caches

  def reorder(caches, parents):
    return tuple(
      reorder(cache, parents) for (_, reorder), cache in zip(models, caches, strict=True)
    )

  return step, reorder


def _log_probs(logits, search, trie, node, inside):
  """Log-probabilities float32[B, M, V] of the next token among those that are allowed."""
  logits = logits.astype(jnp.float32) / search.temperature
  vocab_size = logits.shape[-1]
  allowed = None
  if trie is not None:
    allowed = trie.allowed(node, vocab_size=vocab_size) | inside[:, None, None]
  elif search.allowed_range is not None:
    ids = jnp.arange(vocab_size)
    low, high = search.allowed_range
    allowed = (ids <= UNK) | ((ids >= low) & (ids < high))
  if allowed is not None and not search.mask_probs:
    logits = jnp.where(allowed, logits, -jnp.inf)
  log_probs = jax.nn.log_softmax(logits)
  if logits.ndim == 4:
    log_probs = jax.nn.logsumexp(log_probs, axis=0) - jnp.log(logits.shape[0])
  if allowed is not None and search.mask_probs:
    log_probs = jnp.where(allowed, log_probs, -jnp.inf)
  return log_probs


def _force_prefix(state, log_probs, prefix_tokens, search):
  """Leaves inputs that are inside their prefix nothing but its next token."""
  width = prefix_tokens.shape[1]
  token = jnp.take(prefix_tokens, jnp.minimum(state.step, width - 1), axis=1)[:, None]
  token = jnp.where((state.step < width) & (state.step < search.max_length), token, PAD)
  # A prefix that contains eos ends every beam with the first one's hypothesis.
  ends = token == EOS

  def first_for_all(x):
    return jnp.where(ends.reshape(ends.shape + (1,) * (x.ndim - 2)), x[:, :1], x)

  tokens, sums, total, log_probs = (
    first_for_all(x) for x in (state.tokens, state.sums, state.total, log_probs)
  )
  forced = (token != PAD)[..., None] & (jnp.arange(log_probs.shape[-1]) != token[..., None])
  log_probs = jnp.where(forced, -jnp.inf, log_probs)
  return state._replace(tokens=tokens, sums=sums, total=total), log_probs


def _apply_rules(log_probs, state, search, inside):
  """The original's edits of log-probabilities, which are not normalised again."""
  ids, step = jnp.arange(log_probs.shape[-1]), state.step
  at_end = (step >= state.limit)[:, None, None]
  log_probs = jnp.where(ids == UNK, log_probs - search.unk_penalty, log_probs)
  banned = (ids == PAD) | jnp.isnan(log_probs)
  # The original waives min_length while any input of the batch is inside its prefix.
  banned |= (ids == EOS) & (step < search.min_length) & ~inside[:, None, None]
  banned |= (ids != EOS) & at_end
  if search.gen_code:
    banned |= (ids <= UNK) & ~at_end
  log_probs = jnp.where(banned, -jnp.inf, log_probs)
  if search.no_repeat_ngram_size:
    log_probs = _ban_repeats(log_probs, state.tokens, step, search.no_repeat_ngram_size)
  return log_probs


def _ban_repeats(log_probs, tokens, step, size):
  """Bans tokens that would complete an n-gram which the hypothesis has already."""
  batch, beams, width = tokens.shape
  if size > width:
    return log_probs
  begins = jnp.arange(width - size + 1)
  last = jax.lax.dynamic_slice_in_dim(tokens, step + 2 - size, size - 1, axis=2)
  same = (begins + size - 1 <= step) & (step + 2 >= size)
  same = jnp.broadcast_to(same, (batch, beams, len(begins)))
  for i in range(size - 1):
    same &= tokens[:, :, i : i + len(begins)] == last[:, :, i : i + 1]
  limit = jnp.where(same, -jnp.inf, jnp.inf)
  at = jnp.arange(batch)[:, None, None], jnp.arange(beams)[None, :, None], tokens[:, :, size - 1 :]
  return log_probs.at[at].min(limit)


class _Candidates(NamedTuple):
  totals: jax.Array  # float32[B, C]
  tokens: jax.Array  # int32[B, C]
  parents: jax.Array  # int32[B, C], the hypotheses that they continue


def _candidates(log_probs, total, search, keys) -> _Candidates:
  """Continuations, the best first: C = 2 * beams, or one for each beam where they are drawn."""
  batch, beams, _ = log_probs.shape
  if search.sample:
    draw = functools.partial(sample.draw, top_k=search.top_k, top_p=search.top_p)
    tokens, scores = jax.vmap(lambda log_probs, key: draw(log_probs, rngs=key))(log_probs, keys)
    return _Candidates(total + scores, tokens, jnp.broadcast_to(jnp.arange(beams), total.shape))
  groups = search.diverse_groups
  if groups == 1:
    return _best(log_probs, total)
  taken = jnp.zeros_like(log_probs[:, 0])
  of_groups = []
  for group in range(groups):
    penalty = search.diversity_strength * taken[:, None]
    best = _best(log_probs[:, group::groups] - penalty, total[:, group::groups])
    taken = taken.at[jnp.arange(batch)[:, None], best.tokens].add(1.0)
    of_groups.append(best._replace(parents=best.parents * groups + group))
  return _Candidates(
    *(jnp.stack(x, axis=2).reshape(batch, -1) for x in zip(*of_groups, strict=True))
  )


def _best(log_probs, total) -> _Candidates:
  batch, beams, vocab_size = log_probs.shape
  scores = (log_probs + total[..., None]).reshape(batch, -1)
  totals, at = sample.largest(scores, min(2 * beams, scores.shape[1] - 1))
  return _Candidates(totals, at % vocab_size, at // vocab_size)


def _collect(state, candidates, search):
  """Stores the hypotheses that end here; returns the candidates that did, bool[B, C]."""
  beams, step, hypotheses = search.num_beams, state.step, state.hypotheses
  ends = (candidates.tokens == EOS) & (candidates.totals > -jnp.inf)
  counted = ends[:, :beams] & ~state.ended & ~state.done[:, None]
  at = state.count[:, None] + jnp.cumsum(counted, axis=1) - 1
  at = jnp.where(counted, at, beams)  # beyond: dropped, as those that are too many
  parents, totals = candidates.parents[:, :beams], candidates.totals[:, :beams]
  position = jnp.arange(search.max_length + 1)
  tokens = _take(state.tokens, parents)[:, :, 1:]
  tokens = jnp.where(position < step, tokens, jnp.where(position == step, EOS, PAD))
  sums = jnp.where(position < step, _take(state.sums, parents), totals[..., None])
  before = jnp.pad(sums[..., :-1], ((0, 0), (0, 0), (1, 0)))
  positional = jnp.where(position <= step, sums - before, 0)
  scores = totals
  if search.normalize_scores:
    scores = totals / (step + 1).astype(jnp.float32) ** search.length_penalty

  def store(into, values):
    return into.at[jnp.arange(at.shape[0])[:, None], at].set(values, mode="drop")

  lengths = jnp.broadcast_to(step + 1, at.shape)
  hypotheses = Hypotheses(*map(store, hypotheses, (tokens, lengths, scores, positional)))
  count = state.count + jnp.sum(counted, axis=1, dtype=jnp.int32)
  done = state.done | (count >= beams) | (step >= state.limit)
  ends = ends.at[:, :beams].set(ends[:, :beams] | state.ended)
  return state._replace(hypotheses=hypotheses, count=count, done=done), ends


def _continue(state, candidates, ends, *, search, reorder, trie, inside):
  """Goes on with the best candidates that did not end."""
  step, beams = state.step, search.num_beams
  if search.sample:  # everyone stays in place, and nothing has to move
    parents, tokens, totals, ended = candidates.parents, candidates.tokens, candidates.totals, ends
    cache, sequences, sums, node = state.cache, state.tokens, state.sums, state.node
  else:
    chosen = jnp.argsort(ends, axis=1, stable=True)[:, :beams]
    parents, tokens, totals, ended = (
      jnp.take_along_axis(x, chosen, axis=1)
      for x in (candidates.parents, candidates.tokens, candidates.totals, ends)
    )
    cache = reorder(state.cache, parents) if beams > 1 else state.cache
    sequences, sums, node = (_take(x, parents) for x in (state.tokens, state.sums, state.node))
  if trie is not None:
    node = jnp.where(inside[:, None], node, trie.child(node, tokens))
  return state._replace(
    step=step + 1,
    tokens=jax.lax.dynamic_update_index_in_dim(sequences, tokens, step + 1, axis=2),
    sums=jax.lax.dynamic_update_index_in_dim(sums, totals, step, axis=2),
    total=totals,
    ended=ended,
    # Where no hypothesis is possible any more, none can end.
    done=state.done | jnp.all(ended | (totals == -jnp.inf), axis=1),
    node=node,
    cache=cache,
  )


def _take(x, parents):
  """Rows of x [B, M, ...] by the hypotheses int32[B, M'] of the same input."""
  return jnp.take_along_axis(x, parents.reshape(parents.shape + (1,) * (x.ndim - 2)), axis=1)


def _check_vocabulary(search, vocab_size):
  if search.num_beams >= vocab_size and not search.sample:
    raise ValueError(
      f"Expected fewer beams than tokens in the vocabulary, found {search.num_beams} beams and "
      f"{vocab_size} tokens"
    )
  if search.allowed_range is not None and search.allowed_range[1] > vocab_size:
    raise ValueError(
      f"Expected allowed_range within the vocabulary of {vocab_size} tokens, found "
      f"{search.allowed_range}"
    )
