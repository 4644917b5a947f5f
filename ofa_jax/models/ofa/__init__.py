"""OFA (arXiv 2202.03052): one sequence-to-sequence model of texts, images and boxes."""

from ofa_jax.models.ofa.config import ClassifierConfig, OFAConfig
from ofa_jax.models.ofa.model import FREEZE, OFA, SIZES, config, layer_rates

__all__ = ["FREEZE", "OFA", "SIZES", "ClassifierConfig", "OFAConfig", "config", "layer_rates"]
