"""OpenAI's CLIP against the original, part by part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ofa_jax.losses import normalize
from ofa_jax.models.abstract import abstract
from ofa_jax.models.openai_clip import CLIPTextConfig, OpenAICLIPConfig
from ofa_jax.models.vit import ViTConfig
from tests.frozen_golden import (
  error,
  golden,
  golden_json,
  images,
  last,
  model,
  of_tensors,
  state_dict,
)


@pytest.fixture(autouse=True)
def _highest_precision():
  with jax.default_matmul_precision("highest"):
    yield


@pytest.fixture(scope="module")
def micro():
  return model("clip"), golden("openai_clip", "micro")


def test_every_part_is_the_originals(micro):
  clip, arrays = micro
  x = clip.visual.ln_pre(clip.visual.embed(jnp.asarray(last(arrays["image"]))))
  assert error(x, arrays["act:visual.ln_pre"]) < 1e-5
  for i in range(2):
    x = jax.tree.map(lambda p, i=i: p[i], clip.visual.blocks)(x)
    assert error(x, arrays[f"act:visual.transformer.resblocks.{i}"]) < 1e-5
  assert error(clip.visual.ln_post(x[:, 0]), arrays["act:visual.ln_post"]) < 1e-5
  text = clip.text
  x = text.token(arrays["text"]) + text.positional_embedding[...]
  causal = jnp.where(jnp.tril(jnp.ones((77, 77), bool)), 0.0, -jnp.inf)
  for i in range(2):
    x = jax.tree.map(lambda p, i=i: p[i], text.blocks)(x, bias=causal)
    assert error(x[:, :24], arrays[f"act:transformer.resblocks.{i}"]) < 1e-5
  assert error(text.ln_final(x)[:, :24], arrays["act:ln_final"]) < 1e-5


def test_features_and_logits_are_the_originals(micro):
  clip, arrays = micro
  image = clip.encode_image(last(arrays["image"]))
  text = clip.encode_text(arrays["text"])
  assert error(image, arrays["image_features"]) < 1e-5
  assert error(text, arrays["text_features"]) < 1e-5
  cosine = normalize(image) @ normalize(text).T
  assert np.abs(cosine - arrays["cosine"]).max() < 1e-5
  scale = jnp.exp(clip.logit_scale[...])
  assert scale == pytest.approx(arrays["logit_scale_exp"], rel=1e-6)
  assert error(scale * cosine, arrays["logits_per_image"]) < 1e-5
  assert error((scale * cosine).T, arrays["logits_per_text"]) < 1e-5


def test_what_stands_behind_the_end_changes_nothing(micro):
  clip, arrays = micro
  tokens = arrays["text"].copy()
  end = tokens.argmax(1)[:, None]
  tokens[np.arange(77) > end] = 4321
  np.testing.assert_allclose(
    clip.encode_text(tokens), clip.encode_text(arrays["text"]), rtol=0, atol=2e-5
  )
  shorter = clip.encode_text(arrays["text"][:, : end.max() + 1])
  assert error(shorter, arrays["text_features"]) < 1e-5


def test_weights_in_half_precision_are_read(micro):
  """As the released file has them: what the original rounds gives its numbers."""
  _, arrays = micro
  listed = golden_json("openai_clip", "state_dict_vit_b_16")["state_dict"]
  half = {name.split(".")[-1] for name, (_, dtype) in listed.items() if dtype == "float16"}
  tensors = {
    k: x.astype(np.float16)
    if k.split(".")[-1] in half and "ln_" not in k and "embedding" not in k
    else x
    for k, x in state_dict("clip").items()
  }
  clip = of_tensors(tensors)
  found = clip.encode_image(last(arrays["image"]))
  assert error(found, arrays["fp16_rounded_weights:image_features"]) < 1e-5
  found = clip.encode_text(arrays["text"])
  assert error(found, arrays["fp16_rounded_weights:text_features"]) < 1e-5


def test_sizes_that_do_not_fit_are_told():
  vision = ViTConfig(image_size=64, patch_size=16, width=128, layers=1)
  text = CLIPTextConfig(width=64, layers=1, heads=3)
  with pytest.raises(ValueError, match="multiple of 3 heads, found 64"):
    abstract(OpenAICLIPConfig(vision=vision, text=text, embed_dim=8))


@pytest.mark.slow  # 150 million weights are drawn
def test_the_released_sizes_are_the_originals():
  clip, arrays = model("clip_b16"), golden("openai_clip", "real_size")
  image = images(int(arrays["image_seed"]), (2, 3, 224, 224))
  assert error(clip.encode_image(image), arrays["image_features"]) < 1e-4
  assert error(clip.encode_text(arrays["text"]), arrays["text_features"]) < 1e-4
