r"""OpenAI CLIP's weights in PyTorch's names and layouts, in both directions.

The image towers are Chinese-CLIP's, which took them over with their names.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from ofa_jax.convert import limits, rules, tables
from ofa_jax.convert.cnclip import model_config
from ofa_jax.convert.cnclip import table as cnclip
from ofa_jax.convert.params import Weights
from ofa_jax.convert.rules import SAME, Rule, norm_rules, vit_block_rules
from ofa_jax.models.openai_clip import CLIPTextConfig, OpenAICLIPConfig
from ofa_jax.models.vit import ViTConfig

HEAD_WIDTH = 64  # of every released model

TEXT: tuple[Rule, ...] = (
  ("token_embedding.weight", "text/token/embedding", SAME),
  ("positional_embedding", "text/positional_embedding", SAME),
  *vit_block_rules(r"transformer.resblocks.(\d+)", "text/blocks"),
  *norm_rules("ln_final", "text/ln_final"),
)
IGNORED: tuple[tuple[str, str], ...] = (
  (r"^(input_resolution|context_length|vocab_size)$", "sizes, which the tensors' shapes tell"),
  (r"\.num_batches_tracked$", "a counter that BatchNorm with a fixed momentum never reads"),
)

# The released models by their sizes: (image size, patch size or None, width, width of the text).
_NAMES = {
  (224, 32, 768, 512): "ViT-B/32",
  (224, 16, 768, 512): "ViT-B/16",
  (224, 14, 1024, 768): "ViT-L/14",
  (336, 14, 1024, 768): "ViT-L/14@336px",
  (224, None, 64, 512): "RN50",
  (288, None, 80, 640): "RN50x4",
  (384, None, 96, 768): "RN50x16",
  (448, None, 128, 1024): "RN50x64",
}


def rules_of(config: OpenAICLIPConfig) -> tuple[Rule, ...]:
  """Returns the table of a model with this image tower."""
  vision = cnclip.VIT if isinstance(config.vision, ViTConfig) else cnclip.RESNET
  return (*cnclip.SHARED, *vision, *TEXT)


def from_torch(tensors: Mapping[str, np.ndarray], config: OpenAICLIPConfig) -> Weights:
  """Makes weights of the original's tensors by name; ValueError as `tables.from_torch`."""
  tensors = rules.plain_names(tensors)
  return tables.from_torch(tensors, config, table=rules_of(config), ignored=IGNORED)


def to_torch(weights: Weights, config: OpenAICLIPConfig) -> dict[str, np.ndarray]:
  """Tensors as the original names them."""
  return tables.to_torch(weights, table=rules_of(config))


def infer_config(tensors: Mapping[str, np.ndarray]) -> OpenAICLIPConfig:
  """Reads the sizes off the tensors; heads are 64 wide. A released model also gets its name.

  Raises:
    ValueError: tensors that CLIP has are missing, or a width is not made of such heads.
  """
  tensors = rules.plain_names(tensors)
  try:
    vision = cnclip.infer_vision(tensors)
    vocab_size, width = tensors["token_embedding.weight"].shape
    text = CLIPTextConfig(
      width=width,
      layers=rules.count_layers(tensors, r"transformer\.resblocks\.(\d+)\."),
      heads=max(1, width // HEAD_WIDTH),
      vocab_size=vocab_size,
      max_positions=len(tensors["positional_embedding"]),
    )
    embed_dim = tensors["text_projection"].shape[1]
  except (KeyError, IndexError, TypeError) as error:
    raise ValueError(
      f"Expected the tensors of an OpenAI CLIP, found none of its {error}; the first names are "
      f"{list(tensors)[:3]}"
    ) from error
  config = OpenAICLIPConfig(vision=vision, text=text, embed_dim=embed_dim)
  return limits.check(dataclasses.replace(config, name=name_of(config)))


def name_of(config: OpenAICLIPConfig) -> str:
  """The name of a released model of these sizes, "" if there is none."""
  vision = config.vision
  patch_size = getattr(vision, "patch_size", None)
  return _NAMES.get((vision.image_size, patch_size, vision.width, config.text.width), "")


def from_json(described: Mapping[str, Any]) -> OpenAICLIPConfig:
  """Makes a config of its own fields; ValueError where they are missing, unknown or impossible."""
  try:
    config = OpenAICLIPConfig(
      vision=model_config.vision_from_json(described),
      text=CLIPTextConfig(**model_config.fields_of(described, "text")),
      **{name: described[name] for name in ("embed_dim", "name", "logit_scale")},
    )
    return limits.check(config)
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"config.json does not describe an OpenAI CLIP: {error}") from error
