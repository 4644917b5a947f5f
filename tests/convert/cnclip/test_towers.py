"""Chinese-CLIP started from an OpenAI CLIP and a BERT."""

import dataclasses

import numpy as np
import pytest

from ofa_jax.convert.cnclip import table as convert
from ofa_jax.convert.cnclip import towers
from ofa_jax.convert.cnclip.positions import resize_positions
from tests.cnclip_golden import MICRO, flatten, micro_config, micro_state_dict


def split(model):
  """A CLIP's and a BERT's tensors, with those that only they have."""
  tensors = {k.removeprefix("module."): x for k, x in micro_state_dict(model).items()}
  clip = {k: x for k, x in tensors.items() if k.startswith("visual.") or k == "logit_scale"}
  clip |= {
    "positional_embedding": np.zeros((77, 8), np.float32),
    "text_projection": np.full((8, 8), 7, np.float32),
    "transformer.resblocks.0.ln_1.weight": np.ones(8, np.float32),
  }
  bert = {k: x for k, x in tensors.items() if k.startswith("bert.")}
  bert |= {
    "bert.embeddings.position_ids": np.arange(64)[None],
    "cls.predictions.bias": np.zeros(21128, np.float32),
  }
  return tensors, clip, bert


@pytest.mark.parametrize("model", MICRO)
def test_each_tower_gives_its_part(model):
  tensors, clip, bert = split(model)
  config = micro_config(model)
  merged, found_config = towers.merge(clip, bert, config=config)
  assert found_config == config
  params, rest = convert.from_torch(merged, config)
  expected, expected_rest = convert.from_torch(tensors, config)
  params, expected = flatten(params), flatten(expected)
  projection = params.pop("text_projection")
  assert projection.shape == expected.pop("text_projection").shape
  assert projection.std() == pytest.approx(config.text.width**-0.5, rel=0.1)
  for path, x in {**expected, **flatten(expected_rest)}.items():
    np.testing.assert_array_equal({**params, **flatten(rest)}[path], x)


def test_the_new_projection_follows_the_seed():
  _, clip, bert = split("micro_vit")
  drawn = [
    towers.merge(clip, bert, config=micro_config("micro_vit"), seed=seed)[0]["text_projection"]
    for seed in (0, 0, 1)
  ]
  np.testing.assert_array_equal(drawn[0], drawn[1])
  assert not np.array_equal(drawn[0], drawn[2])


def test_berts_other_names_are_read():
  _, clip, bert = split("micro_vit")
  expected, _ = towers.merge(clip, bert, config=micro_config("micro_vit"))
  bare = {
    k.removeprefix("bert.")
    .replace("LayerNorm.weight", "LayerNorm.gamma")
    .replace("LayerNorm.bias", "LayerNorm.beta"): x
    for k, x in bert.items()
    if k.startswith("bert.")
  }
  found, _ = towers.merge(clip, bare, config=micro_config("micro_vit"))
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_array_equal(found[name], x)


def test_positions_follow_the_image_size():
  _, clip, bert = split("micro_vit")
  config = micro_config("micro_vit")
  config.vision = dataclasses.replace(config.vision, image_size=48)
  merged, _ = towers.merge(clip, bert, config=config)
  params, _ = convert.from_torch(merged, config)
  expected = resize_positions(clip["visual.positional_embedding"], 6)
  np.testing.assert_array_equal(params["visual"]["positional_embedding"], expected)


def test_a_missing_tower_is_named():
  _, clip, bert = split("micro_vit")
  with pytest.raises(ValueError, match=r"found no BERT among \['logit_scale"):
    towers.merge(clip, clip)
  with pytest.raises(ValueError, match=r"found no visual\.\* among .* and no BERT among"):
    towers.merge(bert, clip)
