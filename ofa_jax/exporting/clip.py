"""The parts of a Chinese-CLIP: its towers, apart or as one program."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ofa_jax import hub, numerics
from ofa_jax.data import images
from ofa_jax.exporting.parts import Part, Tensor, chosen
from ofa_jax.losses import normalize
from ofa_jax.models.abstract import abstract
from ofa_jax.models.cnclip import CNCLIPConfig

PARTS = ("image", "text", "both")
OUTPUTS = {
  "image": ("image_features",),
  "text": ("text_features",),
  "both": ("image_features", "text_features", "logits_per_image"),
}


def parts(
  source: hub.Source, names: Sequence[str] | None, *, dtype: str, context_length: int | None = None
) -> tuple[list[Part], dict[str, Any]]:
  """The parts, with the weights read, and what `config.json` says of the model beside its files.

  Args:
    source: the model.
    names: out of `PARTS`; None: both towers, apart.
    dtype: "fp32" or "fp16".
    context_length: tokens of a text; None: the model's own.

  Raises:
    ValueError: an unknown part, or more tokens than the model has positions.
  """
  config: CNCLIPConfig = source.config
  names = chosen(names, PARTS, default=PARTS[:2])
  length = context_length or source.settings["context_length"]
  if not 2 <= length <= config.text.max_positions:
    raise ValueError(
      f"Expected --context-length from 2 to {config.text.max_positions}, the positions that the "
      f"model has, found {length}"
    )
  graph, _, _ = abstract(config)
  params, rest = source.load()
  exact = {"params": params, "rest": rest}
  weights = {"params": numerics.cast(params, dtype), "rest": rest}
  made = []
  for name in names:
    function = functools.partial(_run, graph, name)
    compiled = jax.jit(function)
    made.append(
      Part(
        name=name,
        function=function,
        weights=weights,
        inputs=_inputs(config, name, length),
        outputs=OUTPUTS[name],
        examples=functools.partial(_examples, config, name, length),
        reference=functools.partial(compiled, exact),
      )
    )
  colours = {"mean": list(images.CLIP_MEAN), "std": list(images.CLIP_STD)}
  size = config.vision.image_size
  return made, {
    "embed_dim": config.embed_dim,
    "logit_scale": float(params["logit_scale"]),
    # The picture is resized in its own mode, as the original does.
    "image": {"size": size, **colours, "convert_to_rgb": "last"},
    "text": {"length": length},
  }


def _run(graph: nnx.GraphDef, name: str, weights: Any, inputs: Mapping[str, jax.Array]) -> dict:
  model = nnx.merge(graph, weights["params"], weights["rest"])
  found = {}
  if name != "text":
    found["image_features"] = model.encode_image(inputs["image"])
  if name != "image":
    found["text_features"] = model.encode_text(inputs["tokens"])
  if name == "both":
    image, text = normalize(found["image_features"]), normalize(found["text_features"])
    scale = jnp.exp(numerics.widened(model.logit_scale[...]))
    found["logits_per_image"] = scale * jnp.matmul(image, text.T)
  return found


def _inputs(config: CNCLIPConfig, name: str, length: int) -> tuple[Tensor, ...]:
  size = config.vision.image_size
  image = Tensor(name="image", shape=("N", size, size, 3), dtype=np.float32)
  tokens = Tensor(name="tokens", shape=("M" if name == "both" else "N", length), dtype=np.int32)
  return {"image": (image,), "text": (tokens,), "both": (image, tokens)}[name]


def _examples(config: CNCLIPConfig, name: str, length: int, rows: int, seed: int) -> dict:
  """Random pictures, and texts of random words and lengths; of "both" one text more."""
  rng = np.random.default_rng(seed)
  size, given = config.vision.image_size, {}
  if name != "text":
    given["image"] = rng.standard_normal((rows, size, size, 3), np.float32)
  if name != "image":
    shape = (rows + (name == "both"), length)
    tokens = rng.integers(1, config.text.vocab_size, shape, np.int32)
    ends = rng.integers(2, length + 1, (shape[0], 1))
    given["tokens"] = np.where(np.arange(length) < ends, tokens, np.int32(config.text.pad))
  return given
