"""Chinese-CLIP from Python: images and texts in, features and similarities out.

model, preprocess = load_from_name("ViT-B-16")
model.get_similarity(image, text)
"""

import functools
import warnings
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from PIL import Image

from ofa_jax import hub, numerics, trees
from ofa_jax.data import given, images
from ofa_jax.engine import sharding
from ofa_jax.inference import batches
from ofa_jax.inference.devices import itself
from ofa_jax.inference.identity import identity
from ofa_jax.models.abstract import abstract
from ofa_jax.models.cnclip import CNCLIPConfig
from ofa_jax.models.vit import ViTConfig
from ofa_jax.tasks.base import normalized

MAX_BATCH = 256  # rows that one device computes at once


def preprocess(image: given.Picture, *, size: int) -> np.ndarray:
  """Resizes and normalises an image as the original does, float32[size, size, 3].

  The whole image is squashed to a square in its own mode, and then converted to RGB.

  Args:
    image: a path, a Pillow image or an array; see `data.given.picture`.
    size: pixels a side.

  Raises:
    ValueError: no picture.
  """
  image = given.picture(image)
  pixels = image.resize((size, size), Image.Resampling.BICUBIC).convert("RGB")
  return images.normalize(np.asarray(pixels))


class CNCLIPModel:
  """A Chinese-CLIP on all local devices, compiled for batches of 1, 2, 4, ... rows.

  Attributes:
    config: sizes of both towers.
    image_size: side of the images in pixels.
    context_length: tokens of a text that the model was made for; others work too.
    tokenizer: the model's own.
    logit_scale: logarithm of the factor of the logits, as the original keeps it.
    num_params, num_visual_params: scalars of the whole model and of the image tower.
    precision: what it computes in.
    identity: what else its features depend on, see `inference.identity`.
  """

  def __init__(
    self,
    source: hub.Source,
    *,
    precision: str = "fp32",
    devices: Sequence[jax.Device] | None = None,
  ):
    """Reads the weights onto the devices.

    Args:
      source: from `hub.open_model`.
      precision: as for `load_from_name`.
      devices: of this machine; None: all.
    """
    self.identity = identity([source], precision=precision)
    self.config: CNCLIPConfig = source.config
    self.image_size = source.config.vision.image_size
    self.context_length = source.settings["context_length"]
    self.tokenizer = source.tokenizer
    devices = list(devices or jax.local_devices())
    self._mesh = sharding.make_mesh((len(devices), 1, 1), devices=devices)
    self.precision = precision
    self._matmul = numerics.matmul_precision(precision)
    params, rest = source.load(sharding.replicated(self._mesh))
    self.logit_scale = float(params["logit_scale"])
    self.num_params = trees.count(params)
    self.num_visual_params = trees.count(params["visual"])
    self._weights = numerics.cast(params, precision), rest
    self._graph, _, _ = abstract(source.config)
    self._encode_image = jax.jit(self._image_features)
    self._attend = jax.jit(self._class_attention)
    self._encode_text = jax.jit(lambda weights, x: self._model(weights).encode_text(x))

  def __repr__(self) -> str:
    return (
      f"{type(self).__name__}(num_params={self.num_params:_}, image_size={self.image_size}, "
      f"context_length={self.context_length}, embed_dim={self.config.embed_dim}, "
      f"precision={self.precision!r})"
    )

  def encode_image(self, image: np.ndarray) -> np.ndarray:
    """Returns features float32[N, E], not normalised.

    Args:
      image: float32[N, S, S, 3] as from `preprocess`, or uint8[N, S, S, 3], RGB, which is
        normalised on the device.

    Raises:
      ValueError: another shape or type.
    """
    return self._run(self._encode_image, self._checked(image))

  def class_attention(self, image: np.ndarray) -> np.ndarray:
    """Returns how much a ViT's class token attends to each patch in the last layer.

    Args:
      image: as for `encode_image`.

    Returns:
      float32[N, H, G, G], see `models.vit.ViT.class_attention`.

    Raises:
      ValueError: another shape or type, or a ResNet, which has no class token.
    """
    sizes = self.config.vision
    if not isinstance(sizes, ViTConfig):
      raise ValueError(f"Expected a ViT, which has a class token, found {type(sizes).__name__}")
    image = self._checked(image)
    if not len(image):
      grid = sizes.image_size // sizes.patch_size
      return np.empty((0, sizes.width // sizes.head_width, grid, grid), np.float32)
    return self._run(self._attend, image)

  def _checked(self, image):
    image = given.as_array(image)
    shape = (self.image_size, self.image_size, 3)
    if image.ndim != 4 or image.shape[1:] != shape or image.dtype not in (np.uint8, np.float32):
      raise ValueError(
        f"Expected images uint8 or float32 {('N', *shape)}, found {image.dtype} {image.shape}. "
        "`preprocess` makes one of a picture; colours stand last."
      )
    if image.dtype == np.float32 and image.size:
      low, high = image.min(), image.max()
      if not np.isfinite([low, high]).all():
        raise ValueError(f"Expected finite images, found numbers from {low} to {high}")
      if low >= 0 and high <= 1:
        warnings.warn(
          "Took images float32 from 0 to 1 as made by `preprocess`; give uint8 if these are pixels"
        )
    if self.precision == "fp64" and image.dtype == np.uint8:
      image = images.normalize(image)  # on a device its last digit could be another
    return image

  def encode_text(self, tokens: np.ndarray) -> np.ndarray:
    """Returns features float32[N, E], not normalised, of tokens int32[N, T].

    Raises:
      ValueError: another shape or type, or ids that are not in the vocabulary.
    """
    try:
      tokens = np.asarray(tokens)
    except ValueError as error:
      raise ValueError("Expected tokens ('N', T), found lists of several lengths") from error
    size, longest = self.config.text.vocab_size, self.config.text.max_positions
    if tokens.ndim == 2 and tokens.shape[1] > longest:
      raise ValueError(
        f"Expected at most {longest} tokens of a text, the positions that the model has, found "
        f"{tokens.shape[1]}. Give a smaller context length."
      )
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
      raise ValueError(
        f"Expected tokens of a whole-number type ('N', T <= {longest}), "
        f"found {tokens.dtype} {tokens.shape}"
      )
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < size:
      raise ValueError(f"Expected token ids 0 to {size - 1}, found {tokens.min()}, {tokens.max()}")
    return self._run(self._encode_text, tokens.astype(np.int32))

  def get_similarity(self, image: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (logits_per_image float32[N, M], logits_per_text float32[M, N]).

    Args:
      image: N images as for `encode_image`.
      text: M token rows as for `encode_text`.
    """
    return self.logits(self.encode_image(image), self.encode_text(text))

  def logits(
    self, image_features: np.ndarray, text_features: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns (logits_per_image float[N, M], logits_per_text float[M, N]) of features.

    Args:
      image_features: float[N, E] from `encode_image`.
      text_features: float[M, E] from `encode_text`.
    """
    features = [_normalize(x) for x in (image_features, text_features)]
    logits = np.exp(features[0].dtype.type(self.logit_scale)) * (features[0] @ features[1].T)
    return logits, logits.T

  def _model(self, weights):
    return nnx.merge(self._graph, *weights)

  def _image_features(self, weights, image):
    image = normalized(image, mean=images.CLIP_MEAN, std=images.CLIP_STD)
    return self._model(weights).encode_image(image)

  def _class_attention(self, weights, image):
    image = normalized(image, mean=images.CLIP_MEAN, std=images.CLIP_STD)
    return self._model(weights).visual.class_attention(image)

  def _run(self, encode, rows: np.ndarray) -> np.ndarray:
    """Encodes rows batch by batch."""
    if not len(rows):
      return np.empty((0, self.config.embed_dim), np.float32)
    with jax.default_matmul_precision(self._matmul):
      return batches.run(
        functools.partial(encode, self._weights), rows, mesh=self._mesh, most=MAX_BATCH
      )

  eval = float = to = itself  # last, so that the types above are not meant


def _normalize(features: np.ndarray) -> np.ndarray:
  return features / np.linalg.norm(features, axis=1, keepdims=True)
