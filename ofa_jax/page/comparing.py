"""What the tabs of a Chinese-CLIP do: searches, similarities and what the image tower looks at."""

import dataclasses

import numpy as np
from PIL import Image

from ofa_jax import api
from ofa_jax.data.text import normalize_caption
from ofa_jax.models.vit import ViTConfig
from ofa_jax.page import given
from ofa_jax.page.asking import to_look_at
from ofa_jax.page.library import Hit, Library
from ofa_jax.page.words import Words

MOST_HITS = 48
SCALES = (1.0, 100.0)  # of the logits: what the model may learn

_OPACITY = 0.6  # of the attention at its highest


@dataclasses.dataclass(frozen=True)
class Likeness:
  """How well a text fits a picture.

  Attributes:
    text: the text.
    cosine: of both features.
    probability: among all texts that were given.
  """

  text: str
  cosine: float
  probability: float


def tabs(model: api.CNCLIPModel, library: Library | None) -> tuple[str, ...]:
  """What there is a tab for."""
  search = ("search",) if library is not None else ()
  attention = ("attention",) if isinstance(model.config.vision, ViTConfig) else ()
  return (*search, "similarity", *attention)


def by_text(
  model: api.CNCLIPModel, library: Library, text: str, most: float, *, words: Words
) -> list[Hit]:
  """The pictures that fit a text best."""
  text = given.text(text, called=words.search_text, words=words)
  (query,) = model.encode_text(_tokens(model, [text]))
  return library.nearest(query, most=int(most))


def by_picture(
  model: api.CNCLIPModel, library: Library, upload: str | None, most: float, *, words: Words
) -> list[Hit]:
  """The pictures that are most alike another one."""
  (query,) = model.encode_image(_pixels(model, given.picture(upload, words=words)))
  return library.nearest(query, most=int(most))


def similarity(
  model: api.CNCLIPModel, upload: str | None, texts: str, scale: float, *, words: Words
) -> list[Likeness]:
  """How well each of several texts, one a line, fits a picture; the best first.

  Args:
    model: from `load_from_name`.
    upload: the picture's file.
    texts: one a line.
    scale: what the cosines are multiplied by before the softmax over the texts.
    words: of the page.
  """
  picture = given.picture(upload, words=words)
  lines = given.lines(texts, called=words.texts, words=words)
  logits, _ = model.get_similarity(_pixels(model, picture), _tokens(model, lines))
  cosines = logits[0].astype(np.float64) / np.exp(model.logit_scale)
  powers = np.exp(scale * (cosines - cosines.max()))
  probabilities = powers / powers.sum()
  order = np.argsort(-cosines, kind="stable")
  return [Likeness(lines[i], float(cosines[i]), float(probabilities[i])) for i in order]


def attention(
  model: api.CNCLIPModel, upload: str | None, *, words: Words
) -> tuple[np.ndarray, float]:
  """What the class token attends to in the last layer of a ViT.

  Returns:
    The picture with the mean over the heads as colours on it, uint8[H, W, 3], and the share of the
    attention that is on patches.
  """
  picture = given.picture(upload, words=words)
  weights = model.class_attention(_pixels(model, picture))[0].astype(np.float64)
  mean = weights.mean(axis=0)
  return overlay(to_look_at(picture), mean / mean.max()), float(mean.sum())


def overlay(image: np.ndarray, values: np.ndarray) -> np.ndarray:
  """Values from 0 to 1, float[G, G], as colours on a picture uint8[H, W, 3]."""
  from matplotlib import colormaps  # slow to import

  size = image.shape[1::-1]
  grid = Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
  heights = np.clip(np.asarray(grid), 0, 1)
  colours = colormaps["inferno"](heights)[..., :3] * 255
  share = _OPACITY * heights[..., None]
  return np.rint((1 - share) * image + share * colours).astype(np.uint8)


def _pixels(model: api.CNCLIPModel, picture: Image.Image) -> np.ndarray:
  return api.preprocess(picture, size=model.image_size)[None]


def _tokens(model: api.CNCLIPModel, texts: list[str]) -> np.ndarray:
  texts = [normalize_caption(text) for text in texts]
  return model.tokenizer(texts, context_length=model.context_length)
