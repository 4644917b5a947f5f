"""OFA at its released sizes against parts of the PyTorch original's outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ofa_golden import error, golden, images, realsize_model

WHOLE = 1e-4
FIRST_CODE, FIRST_BIN = 50265, 58457


def tokens(arrays, name):
  return jnp.asarray(arrays[name].astype(np.int32))


@pytest.mark.parametrize(
  "size",
  ["tiny", pytest.param("base", marks=pytest.mark.slow)],  # half a minute and 3 GB
)
def test_outputs_are_the_originals(size):
  expected, model = golden("realsize", size), realsize_model(size)
  image = images(expected["images_seed"], expected["images_shape"])
  target = tokens(expected, "target")

  @jax.jit
  def run(model, image, source, previous):
    encoded = model.encode(source, image=image)
    return model.encoder.image(image), encoded, model.decode(encoded, previous)

  @jax.jit
  def decode_codes(model, source, codes):
    return model.decode(model.encode(source), codes, code_mask=jnp.ones(len(codes), bool))

  with jax.default_matmul_precision("highest"):
    source = tokens(expected, "src_tokens")
    features, encoded, logits = run(model, image, source, tokens(expected, "prev_output_tokens"))
    codes = decode_codes(model, source[:1], tokens(expected, "code_prev"))
    long = jax.jit(lambda model, x: model.encode(x))(model, tokens(expected, "long_text_src"))
  found = {
    "resnet_out_sub": features.transpose(0, 3, 1, 2)[:, ::16, ::4, ::4],
    "resnet_out_mean_abs": jnp.abs(features).mean((1, 2)),
    "encoder_out_sub": encoded.hidden[:, ::12],
    "encoder_out_text": encoded.hidden[:, -source.shape[1] :],
    "position_embeddings_sub": jnp.repeat(encoded.positions, 2, axis=0)[:, ::24],
    "logits_sub": logits[..., expected["logits_columns"]],
    "logits_logsumexp": jax.nn.logsumexp(logits, axis=-1),
    "logits_top5_values": jax.lax.top_k(logits, 5)[0],
    "target_log_probs": jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], -1)[
      ..., 0
    ],
    "code_logits_sub": codes[:, ::8, FIRST_CODE:FIRST_BIN:64],
    "long_text_encoder_out_sub": long.hidden[:, ::10],
  }
  for name, x in found.items():
    assert error(x, expected[name]) < WHOLE, name
  np.testing.assert_array_equal(jax.lax.top_k(logits, 5)[1], expected["logits_top5"])
