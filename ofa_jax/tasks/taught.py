"""What a sequence-to-sequence model is given of a batch, and what it is to say."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ofa_jax.losses_vocabulary import InBlocks
from ofa_jax.models.ofa import OFA
from ofa_jax.tokenizers.special import PAD


class Taught(NamedTuple):
  """A batch as the model takes it, and what is to come of it.

  Attributes:
    inputs: arguments of the model by name, each with the rows of the batch; with R-Drop every row
      is there twice.
    targets: int32[B, T], padding where nothing is learnt; T as in the logits.
  """

  inputs: dict[str, jax.Array]
  targets: jax.Array


def filled(ids: Sequence[int], length: int) -> np.ndarray:
  """int32[length], the ids and then padding."""
  array = np.full(length, PAD, np.int32)
  array[: len(ids)] = ids
  return array


def cut(name: str, ids: Sequence[int], room: int, *, warn: bool) -> list[int]:
  """The first `room` ids; says, perhaps, that a longer `task.{name}_length` would keep them all."""
  if warn and len(ids) > room:
    warnings.warn(f"Cut a {name} of {len(ids)} tokens to {room}; task.{name}_length would keep it")
  return list(ids[:room])


def twice(arrays: Any) -> Any:
  """Every row two times, one behind the other."""
  return jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), arrays)


def learnt_places(
  targets: jax.Array, number: int, *, ignore_prefix: int
) -> tuple[jax.Array, jax.Array]:
  """The places int32[B, N] behind the prompts, and the targets there; padding if there is none."""
  begin = jnp.sum(jnp.cumprod(targets == PAD, axis=1), axis=1, keepdims=True)
  places, last = begin + jnp.arange(number), targets.shape[1] - 1
  inside = (places <= last) & (places >= ignore_prefix)
  places = jnp.minimum(places, last)
  return places, jnp.where(inside, jnp.take_along_axis(targets, places, axis=1), PAD)


def logits(
  model: OFA, inputs: Mapping[str, jax.Array], *, blocks: int = 1, **options: Any
) -> jax.Array | InBlocks:
  """The logits float32[B, T, V] of a model's inputs, as a whole or in blocks of words."""
  if blocks == 1:
    return model(**inputs, **options)
  return InBlocks(model.states(**inputs, **options), model.table, blocks)


def join(batches: Sequence[Taught]) -> dict[str, jax.Array]:
  """The inputs of several batches as those of one, filled up to common lengths.

  The rows are dealt out (`deal`), so that a device of a mesh keeps those that it has. Of pictures
  either all batches have some, of one size, or none has.
  """
  inputs = [dict(batch.inputs) for batch in batches]
  if any("places" in x for x in inputs):
    for x in inputs:
      rows, length = x["decoder_tokens"].shape
      x.setdefault("places", jnp.broadcast_to(jnp.arange(length), (rows, length)))
  for name, others in (("image_mask", True), ("code_mask", False)):
    if any(name in x for x in inputs):
      for x in inputs:
        x.setdefault(name, jnp.full(len(x["tokens"]), others))
  fills = {"tokens": PAD, "decoder_tokens": PAD, "places": 0}
  for name, value in fills.items():
    if name in inputs[0]:
      longest = max(x[name].shape[1] for x in inputs)
      for x in inputs:
        wide = ((0, 0), (0, longest - x[name].shape[1]))
        x[name] = jnp.pad(x[name], wide, constant_values=value)
  return {name: deal([x[name] for x in inputs]) for name in inputs[0]}


def joint_logits(
  model: OFA, batches: Sequence[Taught], *, blocks: Sequence[int], **options: Any
) -> list[jax.Array | InBlocks]:
  """The logits of several batches that go through the model as one, float32[B, T, V] of each.

  Args:
    model: an OFA.
    batches: as of `join`.
    blocks: of each, those of the vocabulary; 1: its logits are whole.
    options: more arguments of the model.
  """
  inputs = join(batches)
  if max(blocks) == 1:  # one product for all
    return part(model(**inputs, **options), batches)
  states = part(model.states(**inputs, **options), batches)
  return [InBlocks(own, model.table, number) for own, number in zip(states, blocks, strict=True)]


def part(outputs: jax.Array, batches: Sequence[Taught]) -> list[jax.Array]:
  """The inverse of `join` for what came of it, [rows, N, ...]: of each batch [B, T, ...]."""
  sizes = [len(batch.targets) for batch in batches]
  deals = math.gcd(*sizes)
  outputs = outputs.reshape(deals, -1, *outputs.shape[1:])
  parts, begin = [], 0
  for batch, size in zip(batches, sizes, strict=True):
    end = begin + size // deals
    own = outputs[:, begin:end].reshape(size, *outputs.shape[2:])
    parts.append(own[:, : batch.targets.shape[1]])
    begin = end
  return parts


def deal(arrays: Sequence[jax.Array]) -> jax.Array:
  """Rows [B_i, ...] of several batches in one, [sum of B_i, ...]: some of each, again and again.

  They are dealt in as many turns as divide all B_i. The devices that split each batch divide the
  turns, so that each keeps its own rows and nothing is moved; and the order is that of any mesh.
  """
  deals = math.gcd(*(len(x) for x in arrays))
  whole = [x.reshape(deals, len(x) // deals, *x.shape[1:]) for x in arrays]
  whole = jnp.concatenate(whole, axis=1)
  return whole.reshape(-1, *whole.shape[2:])
