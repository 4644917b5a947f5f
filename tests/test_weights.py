"""Where training starts from: weights that are drawn although trained ones are public are told."""

import pytest

from ofa_jax import weights
from ofa_jax.models import cnclip, ofa
from ofa_jax.models.bert import BertConfig
from ofa_jax.models.vit import ViTConfig


def told(model):
  lines = []
  assert weights.from_scratch(model, seed=7, warn=lines.append) == "from scratch, seed 7"
  return lines


@pytest.mark.parametrize(
  ("model", "name"),
  [
    (cnclip.config(*cnclip.MODELS["ViT-H-14"]), "ViT-H-14"),
    (cnclip.config(*cnclip.MODELS["RN50"]), "RN50"),
    (ofa.config("huge"), "OFA-huge"),
    (ofa.config("base", vocab_size=30325), "OFA-CN-base"),
  ],
)
def test_a_released_model_from_scratch(model, name):
  (line,) = told(model)
  assert f"--config.init={name} " in line


def test_a_size_that_is_not_released_in_chinese():
  assert told(ofa.config("huge", vocab_size=30325)) == []


def test_a_model_of_ones_own():
  vision = ViTConfig(image_size=32, patch_size=8, width=64, layers=1, head_width=32)
  text = BertConfig(width=64, layers=1, heads=2, mlp=64, max_positions=64)
  assert told(cnclip.CNCLIPConfig(vision=vision, text=text, embed_dim=32)) == []
