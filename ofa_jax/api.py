"""The models from Python, and Chinese-CLIP's names that its users know, NumPy in and out.

  model, preprocess = load_from_name("ViT-B-16")
  image = preprocess(Image.open("pokemon.jpeg"))[None]
  per_image, per_text = model.get_similarity(image, tokenize(["杰尼龟", "皮卡丘"]))

What the models give is in `ofa_jax.inference.cnclip` and `ofa_jax.inference.ofa`.

Unlike the original's `load_from_name`, this one does not round fp32 weights to fp16 on the way (a
file stored in fp16 gives that one's very numbers), and there is no training mode to leave: nothing
here is random.
"""

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ofa_jax import hub, numerics
from ofa_jax.config import PRECISIONS
from ofa_jax.convert import releases
from ofa_jax.convert.cnclip import family as cnclip_family
from ofa_jax.convert.ofa import family as ofa_family
from ofa_jax.data import given
from ofa_jax.inference import devices
from ofa_jax.inference.cnclip import CNCLIPModel, preprocess
from ofa_jax.inference.ofa import OFAModel
from ofa_jax.tokenizers.bert import CONTEXT_LENGTH, ChineseBertTokenizer

_HERE = (cnclip_family.FAMILY, ofa_family.FAMILY)


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
) -> tuple[CNCLIPModel | OFAModel, Callable[[given.Picture], np.ndarray]]:
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
  strange = [source.family.title for source in sources if source.family not in _HERE]
  if strange:
    raise ValueError(
      f"Expected a Chinese-CLIP or OFAs, found {strange[0]}. A codec or a judge of pictures is for "
      "codec= or judge= of `draw`"
    )
  if len(sources) != 1 or image_size is not None:
    raise ValueError(
      f"Expected one Chinese-CLIP with its own image size, or OFAs; found {len(sources)} models, "
      f"image_size {image_size}"
    )
  model = CNCLIPModel(sources[0], precision=precision, devices=chosen)
  return model, image_transform(model.image_size)


def load_clip(name: str, *, precision: str) -> CNCLIPModel:
  """`load_from_name` where only a Chinese-CLIP will do; ValueError for another family."""
  model, _ = load_from_name(name, precision=precision)
  if not isinstance(model, CNCLIPModel):
    raise ValueError(f"Expected a Chinese-CLIP, found an OFA in {name}; see ofa_jax.generate")
  return model


def image_transform(image_size: int = 224) -> Callable[[given.Picture], np.ndarray]:
  """The function that makes a picture float32[S, S, 3] for a Chinese-CLIP of this size."""
  return functools.partial(preprocess, size=image_size)


@functools.cache
def _tokenizer() -> ChineseBertTokenizer:
  return ChineseBertTokenizer()
