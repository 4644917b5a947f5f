"""From the inputs of a batch to their answers: what evaluations and inference do alike.

A search goes on until its last input is done. So that no device waits for the inputs of another,
each searches for the answers of its own rows alone (`on_each_device`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ofa_jax.decode import beam
from ofa_jax.decode.beam import PAD, Hypotheses, Search
from ofa_jax.decode.trie import Trie
from ofa_jax.trees import BATCH_AXES


class Decodes(Protocol):
  """What a model needs to answer: see `models.ofa.OFA`."""

  def start(self, encoded: Any, *, max_length: int, hypotheses: int = 1, code: bool = False) -> Any:
    """An empty cache."""

  def step(self, cache: Any, tokens: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
    """Logits of what follows one more token of every hypothesis, and the cache."""

  def reorder(self, cache: Any, parents: jax.Array) -> Any:
    """The cache of other hypotheses."""


def generate(
  models: Sequence[Decodes],
  encoded: Sequence[Any],
  *,
  search: Search,
  batch: int,
  prompts: jax.Array | None = None,
  prefix_tokens: jax.Array | None = None,
  trie: Trie | None = None,
  active: jax.Array | None = None,
  rngs: jax.Array | None = None,
) -> Hypotheses:
  """Searches with one model, or with several as an ensemble; see `beam.generate`.

  Args:
    models: the probabilities of several are averaged.
    encoded: of each model, what its `encode` gave for the batch.
    search: its `max_length` is of each answer, behind a prompt of whatever length.
    prompts: int32[B, P], filled up with `PAD`: what the decoder reads before it answers, without
      bos. They are left out of what comes back, whose score is then the sum of the answer's
      log-probabilities, not divided by lengths.
    prefix_tokens: what the answers themselves begin with.
    batch, trie, active, rngs: as for `beam.generate`.

  Raises:
    ValueError: prompts and a prefix, too many positions for the model, or as `beam.generate`.
  """
  limits = None
  if prompts is not None:
    if prefix_tokens is not None:
      raise ValueError("Expected prompts or prefix_tokens, found both")
    prefix_tokens = prompts
    limits = search.max_length + jnp.sum(prompts != PAD, axis=1, dtype=jnp.int32)
    search = dataclasses.replace(search, max_length=search.max_length + prompts.shape[1])
  caches = tuple(
    model.start(
      inputs,
      max_length=search.max_length + 1,
      hypotheses=search.num_beams,
      code=search.gen_code,
    )
    for model, inputs in zip(models, encoded, strict=True)
  )
  functions = [(model.step, model.reorder) for model in models]
  step, reorder = beam.ensemble(functions) if len(models) > 1 else functions[0]
  hypotheses = beam.generate(
    step,
    caches if len(models) > 1 else caches[0],
    reorder=reorder,
    search=search,
    batch=batch,
    prefix_tokens=prefix_tokens,
    trie=trie,
    limits=limits,
    active=active,
    rngs=rngs,
  )
  return hypotheses if prompts is None else _behind(hypotheses, prompts)


def row_keys(rngs: jax.Array | None, index: jax.Array) -> jax.Array | None:
  """PRNG keys [B] of rows by their numbers int32[B]: the same on any mesh and in any batch."""
  return None if rngs is None else jax.vmap(jax.random.fold_in, (None, 0))(rngs, index)


def on_each_device(
  function: Callable[[Any, Any, Any], Any], *, mesh: jax.sharding.Mesh | None = None
) -> Callable[[Any, Any, Any], Any]:
  """`function(weights, rows, shared)`, called by each device for its own rows alone.

  Rows are split over the mesh's batch axes, which must divide them. Weights and what is shared are
  whole on every device: parameters that lie split over `fsdp` or `tensor` are gathered for the
  call, so that it needs the memory of all of them, in the compute dtype.

  Args:
    function: gives arrays with one row for each of the rows.
    mesh: None: that of the context (`jax.set_mesh`); without one the function is called as it is.
  """
  axes = jax.sharding.get_abstract_mesh().axis_names if mesh is None else mesh.axis_names
  if not axes:
    return function
  return jax.shard_map(
    function,
    mesh=mesh,
    in_specs=(P(), P(BATCH_AXES), P()),
    out_specs=P(BATCH_AXES),
    check_vma=False,
  )


def _behind(hypotheses: Hypotheses, prompts: jax.Array) -> Hypotheses:
  """The hypotheses without the prompts that they begin with."""
  begin = jnp.sum(prompts != PAD, axis=1)
  places = begin[:, None, None] + jnp.arange(hypotheses.tokens.shape[2])
  places = jnp.broadcast_to(places, hypotheses.tokens.shape)
  tokens, positional = (
    jnp.take_along_axis(x, places, axis=2, mode="fill", fill_value=fill)
    for x, fill in ((hypotheses.tokens, PAD), (hypotheses.positional_scores, 0))
  )
  there = hypotheses.lengths > 0
  return Hypotheses(
    tokens=tokens,
    lengths=jnp.where(there, hypotheses.lengths - begin[:, None], 0),
    scores=jnp.where(there, jnp.sum(positional, axis=2), -jnp.inf),
    positional_scores=positional,
  )
