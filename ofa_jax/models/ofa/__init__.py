"""OFA (arXiv 2202.03052): one sequence-to-sequence model of texts, images and boxes."""

from ofa_jax.models.ofa.config import ClassifierConfig, OFAConfig
from ofa_jax.models.ofa.model import FREEZE, OFA, SIZES, config, layer_rates
from ofa_jax.models.vit_trunk import VIT_B_16

__all__ = [
  "FREEZE",
  "OFA",
  "SIZES",
  "VIT_B_16",
  "ClassifierConfig",
  "OFAConfig",
  "config",
  "layer_rates",
]
