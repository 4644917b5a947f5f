"""Runs an OFA over any number of inputs, on all local devices.

Inputs are cut into batches of 1, 2, 4, ... rows for each device, and their texts filled up to 16,
32, 64, 128, 192, ... tokens, so that little is compiled. A batch is split over the devices, each of
which decodes its rows alone: no search waits for another device's.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ofa_jax import hub, numerics, trees
from ofa_jax.data import images
from ofa_jax.decode import answers, beam, candidates
from ofa_jax.decode.trie import Trie
from ofa_jax.engine import sharding
from ofa_jax.inference import batches
from ofa_jax.inference.batches import bucket
from ofa_jax.inference.inputs import Colours
from ofa_jax.models.abstract import abstract
from ofa_jax.models.ofa.encoder import COLOURS
from ofa_jax.tasks.base import normalized
from ofa_jax.tasks.choice import MAX_POSITIONS
from ofa_jax.tokenizers.special import EOS, PAD

MAX_BATCH = 16  # rows that one device computes at once

# What has one row for each input: "source" int32[N, S]; and perhaps "image" and "second_image",
# "image_mask" bool[N], "decoder" int32[N, T], "code_mask" bool[N], "prefix" and "prompt"
# int32[N, P].
Rows = Mapping[str, np.ndarray]


class Runner:
  """One OFA, or several as an ensemble, on all local devices.

  Attributes:
    config: sizes of the first model.
    colours: how it wants pixels normalised.
    num_params: scalars of all models.
    mesh: the devices.
    looks_once: whether equal pictures of a call go through the image's part of the encoder once,
      and not for each text anew; an ensemble never does. It is another program, whose last bits
      may be others.
  """

  looks_once = False

  def __init__(
    self,
    sources: Sequence[hub.Source],
    *,
    precision: str,
    devices: Sequence[jax.Device] | None = None,
  ):
    """Reads the weights onto the devices; see `ofa.OFAModel`.

    Raises:
      ValueError: the models' vocabularies differ.
    """
    sizes = sorted({source.config.vocab_size for source in sources})
    if len(sizes) > 1:
      raise ValueError(f"Expected an ensemble with one vocabulary, found sizes {sizes}")
    self.config, self.colours = sources[0].config, Colours()
    if sources[0].settings["imagenet_normalization"]:
      self.colours = Colours(images.IMAGENET_MEAN, images.IMAGENET_STD)
    devices = list(devices or jax.local_devices())
    self.mesh = sharding.make_mesh((len(devices), 1, 1), devices=devices)
    self._matmul = numerics.matmul_precision(precision)
    weights = [source.load(sharding.replicated(self.mesh)) for source in sources]
    self.num_params = sum(trees.count(params) for params, _ in weights)
    self._weights = tuple((numerics.cast(params, precision), rest) for params, rest in weights)
    self._graphs = [abstract(source.config)[0] for source in sources]
    self._forward, self._generate, self._score, self._look = (
      self.compiled(function)
      for function in (
        self._forward_rows, self._generate_rows, self._score_rows, self._look_at_rows
      )
    )  # fmt: skip

  def forward(self, rows: Rows) -> np.ndarray:
    """Returns logits float32[N, T, V] of what follows each of the "decoder" tokens.

    Those of an ensemble are the logarithms of the mean probabilities.
    """
    length = rows["decoder"].shape[1]
    if "code_mask" not in rows:  # behind the last code there are no positions
      rows = {**rows, "decoder": widened(rows["decoder"], bucket(length, 8))}
    return self.run(self._forward, rows)[:, :length]

  def generate(
    self, rows: Rows, *, search: beam.Search, trie: Trie | None = None, seed: int | None = None
  ) -> beam.Hypotheses:
    """Returns the hypotheses, NumPy; see `answers.generate`. `seed` is of samples."""
    shared = {} if trie is None else {"trie": trie}
    if seed is not None:
      shared["rngs"] = jax.random.key(seed)
    length = search.max_length + 1
    for name in ("prefix", "prompt"):
      if name in rows:
        rows = {**rows, name: widened(rows[name], bucket(rows[name].shape[1], 8))}
    if "prompt" in rows:
      length += rows["prompt"].shape[1]
    room = MAX_POSITIONS // (search.num_beams * length)
    return self.run(self._generate, rows, shared=shared, static=search, most=room)

  def score(self, rows: Rows, *, plan: candidates.Plan) -> np.ndarray:
    """Returns the scores float32[N, A] of all answers after the prompts "decoder".

    Raises:
      ValueError: the model is an ensemble.
    """
    if len(self._weights) > 1:
      raise ValueError(f"Expected one model to score answers with, found {len(self._weights)}")
    width = bucket(rows["decoder"].shape[1], 8)
    rows = {**rows, "decoder": widened(rows["decoder"], width)}
    room = MAX_POSITIONS // (plan.width * (width + len(plan.levels)))
    return self.run(self._score, rows, shared={"plan": plan}, most=room)[:, : plan.num_answers]

  def _forward_rows(self, weights, rows, shared, static):
    del shared, static
    models = self.models(weights)
    logits = [
      model.decode(self._encode(model, rows), rows["decoder"], code_mask=rows.get("code_mask"))
      for model in models
    ]
    if len(models) == 1:
      return logits[0]
    each = jax.nn.log_softmax(jnp.stack(logits))
    return jax.nn.logsumexp(each, axis=0) - jnp.log(len(models))

  def _generate_rows(self, weights, rows, shared, static):
    models = self.models(weights)
    return answers.generate(
      models,
      [self._encode(model, rows) for model in models],
      search=static,
      batch=len(rows["source"]),
      prompts=rows.get("prompt"),
      prefix_tokens=rows.get("prefix"),
      trie=shared.get("trie"),
      active=rows["active"],
      rngs=answers.row_keys(shared.get("rngs"), rows["index"]),
    )

  def _score_rows(self, weights, rows, shared, static):
    del static
    (model,) = self.models(weights)
    return candidates.score_answers(
      model, self._encode(model, rows), prompts=rows["decoder"], plan=shared["plan"]
    )

  def _look_at_rows(self, weights, rows, shared, static):
    """The feature maps of images."""
    del shared, static
    (model,) = self.models(weights)
    return model.encoder.image(self._pixels(rows)["image"])

  def _looked_at(self, rows):
    """The rows with the feature maps of their images, each different one looked at once."""
    images = rows.get("image")
    if images is None or len(self._weights) > 1:
      return rows
    places = {}  # of the first with the same bytes
    first = [
      places.setdefault(hashlib.sha256(x.tobytes()).digest(), i) for i, x in enumerate(images)
    ]
    once = sorted(places.values())
    if len(once) == len(images):
      return rows
    with jax.default_matmul_precision(self._matmul):
      maps = batches.run(
        lambda batch: self._look(self._weights, batch, {}, static=None),
        {"image": images[once]},
        mesh=self.mesh,
        most=MAX_BATCH,
      )
    return {**rows, "image": maps[np.searchsorted(once, first)]}

  def models(self, weights: Sequence[Any]) -> list[Any]:
    """The models with what a compiled function is given as their weights."""
    return [nnx.merge(graph, *x) for graph, x in zip(self._graphs, weights, strict=True)]

  def _encode(self, model, rows):
    return model.encode(rows["source"], **self._pixels(rows), image_mask=rows.get("image_mask"))

  def _pixels(self, rows):
    """The images of rows, normalised; feature maps as they are."""
    return {
      name: normalized(rows[name], **self.colours._asdict())
      if rows[name].shape[-1] == COLOURS
      else rows[name]
      for name in ("image", "second_image")
      if name in rows
    }

  def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(weights, rows, shared, static)` for `run`, each device with its own rows."""

    def call(weights, rows, shared, *, static):
      each = functools.partial(function, static=static)
      return answers.on_each_device(each, mesh=self.mesh)(weights, rows, shared)

    return jax.jit(call, static_argnames="static")

  def run(
    self,
    function: Callable[..., Any],
    rows: Rows,
    *,
    shared: Mapping[str, Any] | None = None,
    static: Any = None,
    most: int = MAX_BATCH,
  ) -> Any:
    """Calls a function batch by batch; the next is on its way while a result is copied back.

    Args:
      function: from `compiled`.
      rows: of `function`; "active" and "index", the rows' numbers, are added.
      shared, static: as the function takes them.
      most: rows that one device computes at once.
    """
    rows = self._looked_at(rows) if self.looks_once else rows
    number = len(rows["source"])
    length = rows["source"].shape[1]
    length = bucket(length, 16) if length <= 64 else -(-length // 64) * 64
    rows = {**rows, "source": widened(rows["source"], length)}
    rows |= {"active": np.ones(number, bool), "index": np.arange(number, dtype=np.int32)}
    shared = shared or {}
    with jax.default_matmul_precision(self._matmul):
      return batches.run(
        lambda batch: function(self._weights, batch, shared, static=static),
        rows,
        mesh=self.mesh,
        most=min(most, MAX_BATCH),
        filled=_filled,
      )


def as_lists(hypotheses: beam.Hypotheses) -> list[list[dict[str, Any]]]:
  """For each input its hypotheses without padding, see `ofa.OFAModel.generate_tokens`."""
  return [
    [
      {"tokens": tokens[:length], "score": float(score), "positional_scores": positional[:length]}
      for tokens, length, score, positional in zip(*row, strict=True)
      if length
    ]
    for row in zip(*hypotheses, strict=True)
  ]


def widened(tokens: np.ndarray, length: int) -> np.ndarray:
  """Tokens int32[N, T] filled up to `length`."""
  return np.pad(tokens, ((0, 0), (0, length - tokens.shape[1])), constant_values=PAD)


def _filled(rows: Rows, number: int) -> dict[str, np.ndarray]:
  """A batch filled up with rows that are not active; they have the text of an empty sentence."""
  missing = number - len(rows["source"])
  filled = batches.with_zeros(dict(rows), number)
  for name in ("source", "decoder", "prefix", "prompt"):
    if name in rows and missing:
      filled[name][-missing:] = PAD
  if missing:
    filled["source"][-missing:, :2] = 0, EOS
    if "decoder" in rows:
      filled["decoder"][-missing:, 0] = 0
  return filled
