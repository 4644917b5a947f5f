"""BERT against the original, part by part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ofa_jax.models.attention import attention
from ofa_jax.models.bert import Bert, BertConfig
from ofa_jax.models.layers import Scan
from tests.cnclip_golden import MICRO, error, golden, micro_model, micro_split
from tests.models.test_vit import check_initial


@pytest.fixture(autouse=True)
def _highest_precision():
  with jax.default_matmul_precision("highest"):
    yield


@pytest.mark.parametrize("model", MICRO)
def test_every_part_is_the_originals(model):
  bert, arrays = micro_model(model).bert, golden(model, "forward")
  h = {k.removeprefix("h/t."): v for k, v in arrays.items() if k.startswith("h/t.")}
  tokens = jnp.asarray(arrays["token_ids"][:3], jnp.int32)
  bias = bert.padding_bias(tokens)
  x = bert.embed(tokens)
  assert error(x, h.pop("embeddings")) < 1e-5
  for i in range(len(jax.tree.leaves(bert.blocks)[0])):
    block = jax.tree.map(lambda p, i=i: p[i], bert.blocks)
    qkv = block.attn.qkv(x)
    context = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], bias=bias)
    assert error(context.reshape(x.shape), h.pop(f"layer{i}.self")) < 1e-5
    hidden = block.attn_norm(x + block.attn(x, bias=bias))
    assert error(hidden, h.pop(f"layer{i}.attention")) < 1e-5
    x = block(x, bias=bias)
    assert error(x, h.pop(f"layer{i}")) < 1e-5
  assert not h
  assert error(bert(tokens), x) < 1e-6


def test_padding_changes_nothing():
  bert = micro_model("micro_vit").bert
  tokens = jax.random.randint(jax.random.key(0), (2, 10), 1, 21128)
  padded = jnp.pad(tokens, ((0, 0), (0, 6)))
  assert error(bert(padded)[:, :10], bert(tokens)) < 1e-5


def test_a_row_of_padding_is_finite():
  bert = micro_model("micro_vit").bert
  assert bool(jnp.isfinite(bert(jnp.zeros((2, 8), jnp.int32))).all())


def test_dropout_is_drawn_from_the_key_and_only_in_training():
  model = nnx.merge(*micro_split("micro_vit", dropout=0.1))
  tokens = jnp.asarray(golden("micro_vit", "forward")["token_ids"], jnp.int32)
  run = jax.jit(lambda model, rngs: model.bert(tokens, rngs=rngs))
  expected = run(micro_model("micro_vit"), None)
  np.testing.assert_array_equal(run(model, None), expected)
  one, two = run(model, jax.random.key(1)), run(model, jax.random.key(2))
  assert error(one, expected) > 1e-2 and error(one, two) > 1e-2
  np.testing.assert_array_equal(one, run(model, jax.random.key(1)))


def test_sizes_that_do_not_fit_are_errors():
  with pytest.raises(ValueError, match="multiple of heads 5, found 32"):
    Bert(BertConfig(width=32, layers=1, heads=5, mlp=64), scan=Scan(), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="Expected at most 64 tokens, found 65"):
    micro_model("micro_vit").bert(jnp.ones((1, 65), jnp.int32))


def test_initialisation_is_berts():
  key = jax.random.key(0, impl="rbg")  # compiles faster than the default
  config = BertConfig(vocab_size=1000, width=64, layers=2, heads=2, mlp=256, max_positions=32)
  bert = jax.jit(lambda: Bert(config, scan=Scan(), rngs=nnx.Rngs(key)))()
  for path, param in nnx.to_flat_state(nnx.state(bert, nnx.Param)):
    name, x = "/".join(path), param[...]
    if name.endswith(("kernel", "embedding")):
      check_initial(x, "normal", 0.02, path=name)
    else:
      check_initial(x, "constant", 1 if name.endswith("scale") else 0, path=name)
  assert np.abs(bert.word.embedding[0]).max() > 0.02  # the padding's row is drawn like any other
