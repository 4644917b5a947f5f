"""The models from Python, and Chinese-CLIP's names that its users know, NumPy in and out.

  model, preprocess = load_from_name("ViT-B-16")
  image = preprocess(Image.open("pokemon.jpeg"))[None]
  per_image, per_text = model.get_similarity(image, tokenize(["杰尼龟", "皮卡丘"]))

What an OFA gives is in `ofa_jax.inference.ofa`.

Unlike the original's `load_from_name`, this one does not round fp32 weights to fp16 on the way (a
file stored in fp16 gives that one's very numbers), and there is no training mode to leave: nothing
here is random.
"""

import collections
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from PIL import Image

from ofa_jax import hub, numerics, trees
from ofa_jax.config import PRECISIONS
from ofa_jax.convert import releases
from ofa_jax.convert.ofa import family as ofa_family
from ofa_jax.data import images
from ofa_jax.engine import sharding
from ofa_jax.inference import devices
from ofa_jax.inference.devices import itself
from ofa_jax.inference.ofa import OFAModel
from ofa_jax.models.abstract import abstract
from ofa_jax.models.cnclip import CNCLIPConfig
from ofa_jax.tasks.base import normalized
from ofa_jax.tokenizers.bert import CONTEXT_LENGTH, ChineseBertTokenizer

MAX_BATCH = 256  # rows that one device computes at once
_AHEAD = 2  # chunks on their way to the device before the first result is awaited


def available_models() -> list[str]:
  """The names that `load_from_name` downloads."""
  return list(hub.RELEASES)


def tokenize(texts: str | Iterable[str], context_length: int = CONTEXT_LENGTH) -> np.ndarray:
  """Returns the released models' token ids, int32[N, context_length], of a text or several.

  Raises:
    TypeError: a text is not a string.
    ValueError: `context_length` leaves no room for [CLS] and [SEP].
  """
  return _tokenizer()(texts, context_length=context_length)


def load_from_name(
  name: str | os.PathLike | Sequence[str | os.PathLike],
  device: Any = None,
  *,
  download_root: str | os.PathLike | None = None,
  precision: str = "fp32",
  image_size: int | None = None,
  use_modelscope: bool = False,
  tokenizer: str | os.PathLike | None = None,
) -> tuple["CNCLIPModel | OFAModel", Callable[[Image.Image], np.ndarray]]:
  """Loads a model on the devices of this machine.

  Args:
    name: one of `available_models()`, which is downloaded and converted once; or a model directory,
      a workdir of `ofa_jax.train`, a Hugging Face directory, or a `.pt` file. A list of several
      OFAs is an ensemble.
    device: "cpu", "cuda", "gpu" or "tpu", perhaps with a number ("cuda:0"), where JAX has it; None:
      all that JAX finds.
    download_root: folder for downloads; None is `~/.cache/ofa_jax`.
    precision: "fp32", the original's numbers; "bf16", for accelerators: half the memory, and
      features that differ in the third digit; or "fp64", to compare numbers without
      float32's rounding, which needs `jax.config.update("jax_enable_x64", True)` first. What is
      given as float32 below is float64 then.
    use_modelscope: download from ModelScope, not the Hugging Face Hub; `releases` has other ways.
    image_size: side in pixels that an OFA's images are resized to; None: what it was trained with.
    tokenizer: folder of the tokenizer's files; None: those beside the model. An OFA without any
      does what needs no text, `forward` and `generate_tokens`.

  Returns:
    The model, and a function that makes a Pillow image float32[S, S, 3], ready for `encode_image`
    or the methods of an OFA.

  Raises:
    ValueError: an unknown name or precision, with what there is; a faulty file; an ensemble or
      another image size of Chinese-CLIPs.
  """
  if precision not in PRECISIONS:
    raise ValueError(f"Expected precision {' or '.join(PRECISIONS)}, found {precision!r}")
  names = [name] if isinstance(name, str | os.PathLike) else list(name)
  source = releases.MODELSCOPE if use_modelscope else None
  sources = [hub.open_model(x, download_root=download_root, source=source) for x in names]
  sources = [source.with_tokenizer(tokenizer) for source in sources]
  chosen = devices.choose(device)
  numerics.check(precision, platform=chosen[0].platform)
  if sources and all(source.family is ofa_family.FAMILY for source in sources):
    model = OFAModel(*sources, precision=precision, image_size=image_size, devices=chosen)
    return model, model.preprocess
  if len(sources) != 1 or image_size is not None:
    raise ValueError(
      f"Expected one Chinese-CLIP with its own image size, or OFAs; found {len(sources)} models, "
      f"image_size {image_size}"
    )
  model = CNCLIPModel(sources[0], precision=precision, devices=chosen)
  return model, image_transform(model.image_size)


def load_clip(name: str, *, precision: str) -> "CNCLIPModel":
  """`load_from_name` where only a Chinese-CLIP will do; ValueError for another family."""
  model, _ = load_from_name(name, precision=precision)
  if not isinstance(model, CNCLIPModel):
    raise ValueError(f"Expected a Chinese-CLIP, found an OFA in {name}; see ofa_jax.generate")
  return model


def image_transform(image_size: int = 224) -> Callable[[Image.Image], np.ndarray]:
  """The function that makes a Pillow image float32[S, S, 3] for a Chinese-CLIP of this size."""
  return functools.partial(preprocess, size=image_size)


def preprocess(image: Image.Image, *, size: int) -> np.ndarray:
  """Resizes and normalises an image as the original does, float32[size, size, 3].

  The whole image is squashed to a square in its own mode, and then converted to RGB.
  """
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
    image = np.asarray(image)
    shape = (self.image_size, self.image_size, 3)
    if image.ndim != 4 or image.shape[1:] != shape or image.dtype not in (np.uint8, np.float32):
      raise ValueError(
        f"Expected images uint8 or float32 {('N', *shape)}, found {image.dtype} {image.shape}"
      )
    if self.precision == "fp64" and image.dtype == np.uint8:
      image = images.normalize(image)  # on a device its last digit could be another
    return self._run(self._encode_image, image)

  def encode_text(self, tokens: np.ndarray) -> np.ndarray:
    """Returns features float32[N, E], not normalised, of tokens int32[N, T].

    Raises:
      ValueError: another shape or type, or ids that are not in the vocabulary.
    """
    tokens = np.asarray(tokens)
    size, longest = self.config.text.vocab_size, self.config.text.max_positions
    if tokens.ndim != 2 or tokens.shape[1] > longest or tokens.dtype.kind not in "iu":
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
    features = [_normalize(x) for x in (self.encode_image(image), self.encode_text(text))]
    logits = np.exp(features[0].dtype.type(self.logit_scale)) * (features[0] @ features[1].T)
    return logits, logits.T

  def _model(self, weights):
    return nnx.merge(self._graph, *weights)

  def _image_features(self, weights, image):
    image = normalized(image, mean=images.CLIP_MEAN, std=images.CLIP_STD)
    return self._model(weights).encode_image(image)

  def _run(self, encode, rows: np.ndarray) -> np.ndarray:
    """Encodes rows in chunks; the next one is on its way while a result is copied back."""
    if not len(rows):
      return np.empty((0, self.config.embed_dim), np.float32)
    devices = self._mesh.size
    place = sharding.batch_sharding(self._mesh)
    waiting, found = collections.deque(), []
    with jax.set_mesh(self._mesh), jax.default_matmul_precision(self._matmul):
      for start in range(0, len(rows), MAX_BATCH * devices):
        chunk = rows[start : start + MAX_BATCH * devices]
        padded = _bucket(len(chunk), devices)
        if padded > len(chunk):
          chunk = np.concatenate(
            [chunk, np.zeros((padded - len(chunk), *rows.shape[1:]), rows.dtype)]
          )
        waiting.append(encode(self._weights, jax.device_put(chunk, place)))
        if len(waiting) > _AHEAD:
          found.append(np.asarray(waiting.popleft()))
    found += [np.asarray(x) for x in waiting]
    return np.concatenate(found)[: len(rows)]

  eval = float = to = itself  # last, so that the types above are not meant


def _bucket(rows: int, devices: int) -> int:
  """Rows after padding: a power of two for each device."""
  return devices << (-(-rows // devices) - 1).bit_length()


def _normalize(features: np.ndarray) -> np.ndarray:
  return features / np.linalg.norm(features, axis=1, keepdims=True)


@functools.cache
def _tokenizer() -> ChineseBertTokenizer:
  return ChineseBertTokenizer()
