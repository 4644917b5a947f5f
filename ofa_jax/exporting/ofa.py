"""The parts of an OFA: its encoder, and one step of its decoder with a cache.

The encoder gives what each layer of the decoder attends to; a step takes the cache, which begins
with zeros, and gives back what changes. Texts and caches have a fixed length, filled up with
padding, which nothing attends to.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ofa_jax import hub, numerics, trees
from ofa_jax.data import images, prompts
from ofa_jax.exporting.beside.search import Search
from ofa_jax.exporting.parts import Part, Tensor, chosen
from ofa_jax.models.abstract import abstract
from ofa_jax.models.ofa.decoder import Cache
from ofa_jax.models.ofa.layers import DecoderBlock
from ofa_jax.models.ofa.positions import MAX_TOKENS
from ofa_jax.tasks import caption
from ofa_jax.tokenizers.special import BOS, EOS, NUM_SPECIAL, PAD

PARTS = ("encoder", "decoder")
CONTEXT_LENGTH = 64  # tokens of a prompt
MAX_LENGTH = 64  # positions of the decoder
_HYPOTHESES = 2  # at which the decoder is compared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """The lengths that are fixed in an export.

  Attributes:
    image_size: side of the pictures in pixels.
    context_length: tokens of a prompt.
    max_length: positions of the decoder.
  """

  image_size: int
  context_length: int
  max_length: int


def sizes(
  source: hub.Source,
  *,
  image_size: int | None,
  context_length: int | None,
  max_length: int | None,
) -> Sizes:
  """The lengths, defaults filled in.

  Raises:
    ValueError: the model has fewer positions.
  """
  made = Sizes(
    image_size=image_size or source.image_size,
    context_length=context_length or CONTEXT_LENGTH,
    max_length=max_length or MAX_LENGTH,
  )
  for name, value, least, most in (
    ("context-length", made.context_length, 3, MAX_TOKENS),
    ("max-length", made.max_length, 2, MAX_TOKENS + 1),
  ):
    if not least <= value <= most:
      raise ValueError(f"Expected --{name} from {least} to {most}, found {value}")
  return made


class _Programs:
  """The model's functions, and where each array of a cache is."""

  def __init__(self, source: hub.Source, lengths: Sizes):
    self.config, self.lengths = source.config, lengths
    self.layers = source.config.decoder_layers
    self.graph, _, _ = abstract(source.config)
    self.layer_graph, _, _ = trees.split(
      jax.eval_shape(lambda: DecoderBlock(source.config, rngs=nnx.Rngs(0)))
    )

  def encode(self, weights: Any, inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The empty cache of one hypothesis."""
    return self._taken(self._start(weights, inputs))

  def step(self, weights: Any, inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The logits of one more token, and what changed in the cache, by names of its own."""
    model = self._model(weights)
    logits, cache = model.step(self._cache(weights, inputs), inputs["tokens"], inputs["position"])
    found = self._taken(cache)
    return {"logits": logits, **{f"new_{name}": found[name] for name in self.changing}}

  def biases(self, weights: Any, inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The biases of attention by absolute positions, which are the same for all inputs."""
    cache = self._start(weights, inputs)
    return {"bias": cache.bias, "cross_bias": cache.cross_bias}

  @property
  def changing(self) -> tuple[str, ...]:
    """The arrays of a cache that every step changes."""
    return ("mask", *(f"{kind}_{i}" for kind in ("key", "value") for i in range(self.layers)))

  @property
  def filled(self) -> tuple[str, ...]:
    """The arrays that hold something before the first step: keys and values only of a prompt."""
    empty = () if self.config.decoder_prompt else self.changing[1:]
    return tuple(name for name in self.cached if name not in empty)

  @property
  def cached(self) -> tuple[str, ...]:
    """All arrays of a cache."""
    memory = (f"memory_{kind}_{i}" for kind in ("key", "value") for i in range(self.layers))
    return (*self.changing, "memory_mask", *memory)

  def apart(self, params: trees.Tree) -> trees.Tree:
    """The decoder's layers, each by itself: taken off a stack, a step would copy them."""
    blocks = params["decoder"]["blocks"]
    return {str(i): jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(self.layers)}

  def _model(self, weights):
    return nnx.merge(self.graph, weights["params"], weights["rest"])

  def _start(self, weights, inputs) -> Cache:
    model = self._model(weights)
    encoded = model.encode(inputs["tokens"], image=inputs["image"], image_mask=inputs["image_mask"])
    return model.start(encoded, max_length=self.lengths.max_length, hypotheses=1)

  def _taken(self, cache: Cache) -> dict[str, jax.Array]:
    found = {"mask": cache.mask, "memory_mask": cache.memory_mask}
    for i in range(self.layers):
      found |= {f"key_{i}": cache.keys[i], f"value_{i}": cache.values[i]}
      found |= dict(zip((f"memory_key_{i}", f"memory_value_{i}"), cache.memory[i], strict=True))
    return found

  def _cache(self, weights, inputs) -> Cache:
    def all_of(kind):
      return tuple(inputs[f"{kind}_{i}"] for i in range(self.layers))

    layers = (weights["layers"][str(i)] for i in range(self.layers))
    return Cache(
      layers=tuple(nnx.merge(self.layer_graph, layer, {}) for layer in layers),
      keys=all_of("key"),
      values=all_of("value"),
      mask=inputs["mask"],
      memory=tuple(zip(all_of("memory_key"), all_of("memory_value"), strict=True)),
      memory_mask=inputs["memory_mask"],
      bias=weights["bias"],
      cross_bias=weights["cross_bias"],
      code=False,
    )


def parts(
  source: hub.Source, names: Sequence[str] | None, *, dtype: str, lengths: Sizes
) -> tuple[list[Part], dict[str, Any]]:
  """The parts, with the weights read, and what `config.json` says of the model beside its files.

  Args:
    source: the model.
    names: out of `PARTS`; None: both.
    dtype: "fp32" or "fp16".
    lengths: from `sizes`.

  Raises:
    ValueError: an unknown part, or a model without a tokenizer.
  """
  names = chosen(names, PARTS, default=PARTS)
  described = _described(source, lengths)
  programs = _Programs(source, lengths)
  params, rest = source.load()
  exact = {"params": params, "rest": rest}
  blank = jax.tree.map(jnp.asarray, _inputs_of_encoder(source, lengths, 1, 0))
  biases = jax.jit(programs.biases)(exact, blank)
  exact |= {"layers": programs.apart(params), **biases}
  weights = {**exact, **numerics.cast({k: exact[k] for k in ("params", "layers")}, dtype)}
  encode, step = jax.jit(programs.encode), jax.jit(programs.step)
  shapes = {name: x for name, x in jax.eval_shape(encode, weights, blank).items()}
  size = lengths.image_size
  encoder = Part(
    name="encoder",
    function=programs.encode,
    weights=weights,
    inputs=(
      Tensor(name="tokens", shape=("B", lengths.context_length), dtype=np.int32),
      Tensor(name="image", shape=("B", size, size, 3), dtype=np.float32),
      Tensor(name="image_mask", shape=("B",), dtype=np.bool_),
    ),
    outputs=programs.filled,
    examples=functools.partial(_inputs_of_encoder, source, lengths),
    reference=functools.partial(encode, exact),
  )

  def examples(rows, seed):
    """A step amid a sequence, whose cache the model has filled."""
    rng = np.random.default_rng(seed)
    cache = encode(exact, _inputs_of_encoder(source, lengths, rows, seed))
    cache = {
      name: x if name.startswith("memory") else jnp.repeat(x, _HYPOTHESES, axis=1)
      for name, x in cache.items()
    }
    position = 0
    while True:
      words = rng.integers(NUM_SPECIAL, source.config.vocab_size, (rows, _HYPOTHESES), np.int32)
      given = {"tokens": words, "position": np.int32(position), **cache}
      if position == min(2 + seed, lengths.max_length - 1):
        return {name: np.asarray(x).astype(dtypes.get(name, x.dtype)) for name, x in given.items()}
      made = step(exact, given)
      cache |= {name: made[f"new_{name}"] for name in programs.changing}
      position += 1

  dtypes = {name: shapes[name].dtype for name in programs.cached}

  def cached(name):
    shape = shapes[name].shape[1:]
    beams = ("B",) if name.startswith("memory") else ("B", "M")
    return Tensor(
      name=name, shape=(*beams, *shape[len(beams) - 1 :]), dtype=np.dtype(dtypes[name]).type
    )

  decoder = Part(
    name="decoder",
    function=programs.step,
    weights=weights,
    inputs=(
      Tensor(name="tokens", shape=("B", "M"), dtype=np.int32),
      Tensor(name="position", shape=(), dtype=np.int32),
      *(cached(name) for name in programs.cached),
    ),
    outputs=("logits", *(f"new_{name}" for name in programs.changing)),
    examples=examples,
    reference=lambda given: step(exact, _widened(given)),
  )
  made = [part for part in (encoder, decoder) if part.name in names]
  return made, described


def _described(source: hub.Source, lengths: Sizes) -> dict[str, Any]:
  search = dataclasses.asdict(caption.ANSWERING.search) | source.settings["generation"]
  fields = {field.name for field in dataclasses.fields(Search)}
  mean, std = images.HALF_MEAN, images.HALF_STD
  if source.settings["imagenet_normalization"]:
    mean, std = images.IMAGENET_MEAN, images.IMAGENET_STD
  colours = {"mean": list(mean), "std": list(std)}
  return {
    "vocab_size": source.config.vocab_size,
    "image": {"size": lengths.image_size, **colours, "convert_to_rgb": "first"},
    "text": {"length": lengths.context_length},
    "max_length": lengths.max_length,
    "prompts": {"caption": prompts.caption(chinese=source.tokenizer.chinese)},
    "search": {name: value for name, value in search.items() if name in fields},
  }


def _inputs_of_encoder(source: hub.Source, lengths: Sizes, rows: int, seed: int) -> dict:
  """Texts of random words and lengths, random pictures; every third input has none."""
  rng = np.random.default_rng(seed)
  length, size = lengths.context_length, lengths.image_size
  tokens = rng.integers(NUM_SPECIAL, source.config.vocab_size, (rows, length), np.int32)
  ends = rng.integers(2, length, (rows, 1))
  places = np.arange(length)
  tokens = np.where(places < ends, tokens, np.where(places == ends, EOS, PAD))
  tokens[:, 0] = BOS
  return {
    "tokens": tokens.astype(np.int32),
    "image": np.tanh(rng.standard_normal((rows, size, size, 3))).astype(np.float32),
    "image_mask": np.arange(rows) % 3 != 1,
  }


def _widened(given):
  return {
    name: np.asarray(x).astype(np.float32) if x.dtype == np.float16 else x
    for name, x in given.items()
  }
