"""From image codes to pictures, and how well these fit a caption or another picture.

Everything here runs on a device, inside a compiled program. What decodes ("codec") is a VQGAN, what
judges a CLIP of OpenAI's or a Chinese-CLIP: models of their own, which nothing trains.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ofa_jax import hub
from ofa_jax.models import pillow, vqgan
from ofa_jax.models.cnclip import CNCLIPConfig
from ofa_jax.models.inception import SIZE as INCEPTION_SIDE
from ofa_jax.models.openai_clip import OpenAICLIPConfig
from ofa_jax.models.patches import PatchCodecConfig
from ofa_jax.numerics import widened
from ofa_jax.tasks.frozen import Frozen

_INCEPTION_SIZE = (INCEPTION_SIDE, INCEPTION_SIDE)


@functools.cache
def judge_words(name: str) -> tuple[Any, int]:
  """The tokenizer of the model that judges, read once, and how many tokens it reads."""
  return hub.open_model(name).tokenizer, judge_length(name)


@functools.cache
def judge_length(name: str) -> int:
  """How many tokens a judge reads; of a public one nothing is downloaded.

  Raises:
    ValueError: the model is no CLIP.
  """
  config, settings = hub.sizes_of(name)
  if not isinstance(config, OpenAICLIPConfig | CNCLIPConfig):
    raise ValueError(
      f"Expected OpenAI's CLIP or a Chinese-CLIP as judge of pictures, found {name}: "
      f"{hub.family_of(config).title}"
    )
  return settings.get("context_length") or config.text.max_positions


@functools.cache
def judge_size(name: str) -> int:
  """Side in pixels of what a judge sees."""
  return hub.config_of(name).vision.image_size


@functools.cache
def inception_variant(name: str) -> str:
  """Which Inception a stored one is."""
  return hub.config_of(name).variant


def judge_tokens(name: str, texts: Sequence[str]) -> np.ndarray:
  """Texts as a judge reads them, int32[N, T].

  Raises:
    ValueError: OpenAI's CLIP has no room for a text; Chinese-CLIP cuts it.
  """
  tokenizer, length = judge_words(name)
  return tokenizer(list(texts), context_length=length)


def picture_side(codec: vqgan.VQGANConfig, codes: int) -> int:
  """Side in pixels of the pictures that so many codes make.

  Raises:
    ValueError: they make no square.
  """
  side = math.isqrt(codes)
  if side * side != codes:
    raise ValueError(f"Expected the codes of a square, found {codes}")
  return side * codec.reduction


def decoded(codec: nnx.Module, codes: jax.Array, *, batch_size: int) -> jax.Array:
  """Codes int32[..., C] to pictures uint8[..., S, S, 3].

  Args:
    codec: a VQGAN.
    codes: of squares, row by row.
    batch_size: pictures that are decoded at once.
  """
  side = math.isqrt(codes.shape[-1])
  pictures = vqgan.decode_batches(codec, codes.reshape(-1, side, side), batch_size=batch_size)
  return pictures.reshape(*codes.shape[:-1], *pictures.shape[1:])


def image_features(judge: nnx.Module, images: jax.Array, *, size: int) -> jax.Array:
  """Pictures uint8[..., S, S, 3] to a judge's features float32[..., E] of length one.

  They are resized as Pillow does, to `size`, the side of what the judge sees.
  """
  flat = images.reshape(-1, *images.shape[-3:])
  found = judge.encode_image(pillow.clip_input(flat, size=size))
  return unit(found).reshape(*images.shape[:-3], -1)


def text_features(judge: nnx.Module, tokens: jax.Array) -> jax.Array:
  """Texts int32[N, T], from `judge_tokens`, to a judge's features float32[N, E] of length one."""
  return unit(judge.encode_text(tokens))


def unit(features: jax.Array) -> jax.Array:
  """Vectors [..., E] of length one."""
  features = widened(features)
  return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def leave_one_out(scores: jax.Array) -> jax.Array:
  """How much better each of the samples of a row [B, M] is than the mean of the others."""
  others = (jnp.sum(scores, axis=1, keepdims=True) - scores) / (scores.shape[1] - 1)
  return scores - others


def pooled(inception: nnx.Module, images: jax.Array, *, variant: str) -> jax.Array:
  """Pictures uint8[N, S, S, 3] to Inception's features float32[N, 2048] for FID.

  The original resizes as Pillow does before its Inception, torchvision's; pytorch-fid inside.
  """
  if variant == "torchvision":
    images = pillow.resize(images, _INCEPTION_SIZE, kind="bilinear")
  return inception.features(images)


def classes(inception: nnx.Module, images: jax.Array) -> jax.Array:
  """Pictures uint8[N, S, S, 3] to torchvision's Inception's logits float32[N, 1000]."""
  return inception.logits(pillow.resize(images, _INCEPTION_SIZE, kind="bilinear"))


def check_codec(name: str, config: hub.ModelConfig, *, codes: int | None = None) -> None:
  """Raises ValueError where a model is no codec, or one of another number of codes."""
  if not isinstance(config, vqgan.VQGANConfig | PatchCodecConfig):
    title = hub.family_of(config).title
    raise ValueError(f"Expected a VQGAN as codec, found {name}: {title}")
  if codes not in (None, config.num_codes):
    raise ValueError(
      f"Expected a codec of {codes} codes, as the model draws, found {config.num_codes} in {name}"
    )


def load_helpers(
  helpers: Mapping[str, Frozen | None],
  mesh: jax.sharding.Mesh,
  *,
  precision: str,
  load: bool,
) -> dict[str, Any] | None:
  """The weights of helpers by their names; None where there are none."""
  there = {name: helper for name, helper in helpers.items() if helper is not None}
  return {
    name: (helper.load if load else helper.spec)(mesh, precision=precision)
    for name, helper in there.items()
  } or None
