"""OFA's options: patches, dropout, rematerialisation, meshes, initialisation, errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ofa_jax import numerics, trees
from ofa_jax.config import Optim
from ofa_jax.convert.ofa import table as convert
from ofa_jax.engine import optim, sharding
from ofa_jax.models import ofa
from ofa_jax.models.abstract import abstract
from ofa_jax.models.ofa import ClassifierConfig
from ofa_jax.models.ofa import positions as ofa_positions
from ofa_jax.tokenizers.special import PAD
from tests.ofa_golden import (
  error,
  golden,
  inputs,
  micro_config,
  micro_model,
  micro_split,
  micro_state_dict,
  rule_state_dict,
)

BLOCK, WHOLE = 1e-5, 1e-4


@pytest.fixture(autouse=True)
def exact():
  with jax.default_matmul_precision("highest"):
    yield


@functools.cache
def model(**options):
  return micro_model(**options)


def batch(case="mm_batch"):
  return inputs(golden("micro", case))


@functools.cache
def forward():
  return jax.jit(lambda model, given, rngs: model(**given, rngs=rngs))


@functools.cache
def encode():
  return jax.jit(lambda model, given: model.encode(**given))


HEADS = {
  "cls": ClassifierConfig(classes=3, hidden=24),
  "cls2": ClassifierConfig(classes=2, hidden=32, images=2),
}


@pytest.mark.parametrize("name", HEADS)
def test_classification_heads_read_the_last_token(name):
  expected, config = golden("micro", "classification_head"), micro_config(classifier=HEADS[name])
  inner, outer = HEADS[name].hidden, HEADS[name].classes
  shapes = {"dense.weight": (inner, 32 * HEADS[name].images), "dense.bias": (inner,)}
  shapes |= {"out_proj.weight": (outer, inner), "out_proj.bias": (outer,)}
  head = rule_state_dict({f"classification_heads.{name}.{k}": s for k, s in shapes.items()})
  weights = convert.from_torch({**micro_state_dict(), **head}, config)
  one = nnx.merge(abstract(config)[0], *weights)
  given = inputs(expected)
  given["image"] = jnp.concatenate([given["image"], given["image"][:1, :, ::-1]])
  rows = jnp.array([0, 1, 2, 0]) if HEADS[name].images == 2 else jnp.arange(3)
  for key in ("tokens", "decoder_tokens", "image_mask"):
    given[key] = given[key][rows]
  given["image"] = given["image"][: len(rows)]
  tokens = given.pop("decoder_tokens")

  @jax.jit
  def run(one, given, tokens):
    encoded = one.encode(**given)
    return one.hidden(encoded, tokens), one.classify(encoded, tokens)

  hidden, logits = run(one, given, tokens)
  assert error(hidden[:3], expected["features"]) < WHOLE
  stored = "cls_logits" if name == "cls" else "two_images_logits"
  assert error(logits, expected[stored]) < WHOLE


def test_a_model_without_a_head_says_so():
  with pytest.raises(ValueError, match=r"OFAConfig\.classifier"):
    model().classify(None, None)


def test_all_patches_in_another_order_change_nothing():
  given = batch("rect_image_nopad")
  given.pop("decoder_tokens")
  whole = encode()(model(), given)
  num = 4 * 7
  order = jnp.stack([jax.random.permutation(jax.random.key(i), num) for i in range(2)])
  drawn = encode()(model(), {**given, "patch_ids": order})
  rows = jnp.arange(2)[:, None]
  for found, expected in (
    (drawn.hidden, whole.hidden),
    (drawn.positions, jnp.repeat(whole.positions, 2, axis=0)),
  ):
    assert error(found[:, :num], expected[rows, order]) < BLOCK
    assert error(found[:, num:], expected[:, num:]) < BLOCK


def test_patches_are_drawn_in_training_only():
  given = batch("rect_image_nopad")
  given.pop("decoder_tokens")

  def shape(**options):
    return jax.eval_shape(lambda one, given: one.encode(**given, **options), model(), given)

  assert shape(num_patches=5).hidden.shape[1] == 4 * 7 + 5
  drawn = shape(num_patches=5, rngs=jax.random.key(0))
  assert drawn.hidden.shape[1] == drawn.mask.shape[1] == drawn.positions.shape[1] == 5 + 5
  assert (len(drawn.positions), len(shape(num_patches=5).positions)) == (2, 1)


def relative_bias():
  options = {"token_size": 16, "image_size": 8, "init": nnx.initializers.normal(1.0)}
  return ofa_positions.RelativeBias(3, **options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 7), (8, 8), (1, 2)])
def test_the_bias_of_a_grid_is_its_cells(height, width):
  cells = ofa_positions.grid_cells(height, width, 8)
  found = jax.jit(lambda bias: (bias.grid(height, width), bias.cells(cells, cells)))
  np.testing.assert_array_equal(*found(relative_bias()))


@pytest.mark.parametrize("length", [1, 2, 8, 17])
def test_the_bias_of_codes_is_its_cells_and_its_steps(length):
  cells = ofa_positions.code_cells(length, 4, 8)

  @jax.jit
  def run(bias):
    steps = jax.vmap(lambda i: bias.codes_step(i, length, 4), out_axes=1)
    return bias.codes(length, 4), bias.cells(cells, cells), steps(jnp.arange(length))

  whole, looked_up, steps = run(relative_bias())
  np.testing.assert_array_equal(whole, looked_up)
  np.testing.assert_array_equal(whole, steps)


def test_the_bias_of_a_text_is_its_buckets_and_its_steps():
  buckets = ofa_positions.token_buckets(np.arange(40)[:, None] - np.arange(40), 16)

  @jax.jit
  def run(bias):
    steps = jax.vmap(lambda i: bias.text_step(i, 40), out_axes=1)
    return bias.text(40), steps(jnp.arange(40))

  whole, steps = run(relative_bias())
  table = np.asarray(relative_bias().token.embedding[...])
  np.testing.assert_array_equal(whole, table[buckets].transpose(2, 0, 1))
  np.testing.assert_array_equal(whole, steps)


def test_slices_and_look_ups_have_the_same_gradients():
  graph, params = nnx.split(relative_bias())
  weight = jax.random.normal(jax.random.key(1), (3, 17, 17))
  cells = ofa_positions.code_cells(17, 4, 8)

  @jax.jit
  def gradients(params):
    return [
      jax.grad(lambda p, fn=fn: jnp.sum(fn(nnx.merge(graph, p)) * weight))(params)
      for fn in (lambda bias: bias.codes(17, 4), lambda bias: bias.cells(cells, cells))
    ]

  slices, look_up = (x["image"]["embedding"][...] for x in gradients(params))
  assert error(slices, look_up) < 1e-6


RANDOM = ("dropout", "attention_dropout", "activation_dropout")
RANDOM = (*RANDOM, "encoder_drop_path", "decoder_drop_path")


@pytest.mark.parametrize("name", RANDOM)
def test_randomness_is_of_the_key_and_of_training(name):
  one, given, run = model(**{name: 0.5}), batch("text_only_long"), forward()
  evaluated = run(model(), given, None)
  assert error(run(one, given, None), evaluated) < BLOCK
  assert error(run(model(), given, jax.random.key(0)), evaluated) < BLOCK
  first, same, *others = (run(one, given, jax.random.key(i)) for i in (0, 0, 1, 2, 3))
  np.testing.assert_array_equal(first, same)
  assert np.isfinite(first).all()
  # Two layers and two rows: a key may happen to drop the same, or nothing.
  assert max(error(first, other) for other in others) > 1e-3
  assert max(error(other, evaluated) for other in others) > 1e-3


def test_prompts_have_a_dropout_of_their_own():
  run, given = forward(), batch("text_only_long")
  one = micro_model("prefix_plain")
  first, other = (run(one, given, jax.random.key(i)) for i in (0, 1))
  assert error(first, other) > 1e-3


def gradients(graph, params, rest, given):
  def loss(params, given):
    one = nnx.merge(graph, params, rest)
    return jnp.sum(jnp.sin(one(**given, rngs=jax.random.key(0))))

  return jax.jit(jax.value_and_grad(loss))(params, given)


@functools.cache
def plain():
  """A training step with everything random, run the plain way."""
  return gradients(*micro_split(**dict.fromkeys(RANDOM, 0.2)), batch("text_only_long"))


@pytest.mark.parametrize(("remat", "unroll"), [("full", 1), ("none", 2)])
def test_every_way_to_run_the_layers_computes_the_same(remat, unroll):
  config = micro_config(**dict.fromkeys(RANDOM, 0.2))
  built = jax.eval_shape(lambda: config.build(rngs=nnx.Rngs(0), remat=remat, unroll=unroll))
  graph, _, _ = nnx.split(built, nnx.Param, ...)
  found = gradients(graph, *micro_split()[1:], batch("text_only_long"))
  assert_gradients(found, plain())


def assert_gradients(found, expected):
  """Equal values and gradients.

  What a bias of keys adds to the logits of a query is the same for all keys, so that its gradient
  is 0 and what is found of it is rounding: the absolute tolerance is for these.
  """
  assert abs(float(found[0]) - float(expected[0])) < BLOCK * abs(float(expected[0]))
  expected, found = (trees.flatten(jax.device_get(grads)) for _, grads in (expected, found))
  largest = max(np.abs(x).max() for x in expected.values())
  for path, x in expected.items():
    atol = WHOLE * np.abs(x).max() + 1e-6 * largest
    np.testing.assert_allclose(found[path], x, atol=atol, rtol=0, err_msg=path)


def test_a_mesh_computes_what_one_device_does():
  config = micro_config()
  graph, params, rest = micro_split()
  given = {k: jnp.concatenate([x, x[:1]]) for k, x in batch().items()}
  expected = gradients(graph, params, rest, given)
  mesh = sharding.make_mesh((2, 2, 2))
  split = jax.device_put(params, sharding.params_shardings(params, config.sharding, mesh))
  rows = jax.device_put(given, sharding.batch_sharding(mesh))
  with jax.set_mesh(mesh):
    found = gradients(graph, split, rest, rows)
  assert_gradients(found, expected)
  kernel = split["encoder"]["blocks"]["attn"]["qkv"]["kernel"]
  assert "tensor" in kernel.sharding.spec


@pytest.mark.parametrize("size", ofa.SIZES)
def test_the_sharding_table_and_the_towers_cover_every_parameter(size):
  config = ofa.config(
    size,
    encoder_prompt=3,
    decoder_prompt=3,
    prompt_hidden=8,
    adapter=8,
    scale_resids=True,
    classifier=ClassifierConfig(classes=2, hidden=8),
  )
  _, params, _ = abstract(config)
  for path in trees.flatten(params):
    assert trees.first_match(config.sharding, path) is not None, path
    owners = [t for t in config.towers.values() if trees.first_match(((t, True),), path)]
    assert len(owners) == 1, path
  mesh = sharding.make_mesh((1, 8, 1))
  held = sharding.bytes_per_device(params, sharding.params_shardings(params, config.sharding, mesh))
  # The tables of relative biases, small in the large sizes, and norms are whole everywhere.
  assert held < trees.num_bytes(params) * {"tiny": 0.22, "medium": 0.2}.get(size, 0.18)


def test_everything_starts_as_in_the_original():
  config = micro_config(adapter=8, scale_resids=True)
  built = jax.jit(lambda: nnx.split(config.build(rngs=nnx.Rngs(0)), nnx.Param, ...)[1:])()
  params, rest = (trees.flatten(nnx.to_pure_dict(x)) for x in built)
  for path, x in params.items():
    values = np.asarray(x, np.float64)
    if path.endswith(("scale", "residual_scale")):
      assert set(values.ravel()) == {1.0}, path
    elif path.endswith("bias"):
      assert not values.any(), path
    else:
      conv = path.startswith("encoder/image/")
      std = (2 / (values.shape[0] * values.shape[1] * values.shape[-1])) ** 0.5 if conv else 0.02
      assert abs(values.std() / std - 1) < 5 / values.size**0.5, path
  assert np.any(params["tokens/embedding"][PAD])
  assert all(set(np.ravel(x)) == {float(path.endswith("var"))} for path, x in rest.items())


def test_positions_may_be_added_to_the_states():
  given, run = batch("image_code"), forward()
  one = model(entangle_position_embedding=True, disable_entangle=False)
  assert error(run(one, given, None), run(model(), given, None)) > 1e-2
  tokens, code_mask = given.pop("decoder_tokens")[:, :3], given.pop("code_mask")

  @jax.jit
  def run(one, given, tokens):
    encoded = one.encode(**given)
    cache = one.start(encoded, max_length=3, code=True)
    for position in range(3):
      logits, cache = one.step(cache, tokens[:, position, None], jnp.int32(position))
    return logits[:, 0], one.decode(encoded, tokens, code_mask=code_mask)[:, 2]

  assert error(*run(one, given, tokens)) < BLOCK


def test_bfloat16_stays_near():
  given = batch("text_only_long")
  graph, params, rest = micro_split()
  half = nnx.merge(graph, numerics.cast(params, "bf16"), rest)
  found = forward()(half, given, None)
  assert found.dtype == jnp.float32
  assert error(found, golden("micro", "text_only_long")["logits"]) < 0.05


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"width": 33}, "expected width to be a multiple of heads 2, found 33"),
    ({"code_image_size": 72}, "expected code_image_size to be a multiple of 8 up to 64"),
    (
      {"orig_patch_image_size": 100, "interpolate_position": True},
      "multiple of 16 up to 128 (image_bucket_size 8), found 100",
    ),
    ({"num_codes": 100}, "expected vocab_size to hold 100 codes, 16 bins and a text, found 112"),
  ],
)
def test_sizes_that_do_not_fit_are_told(change, message):
  with pytest.raises(ValueError) as raised:
    abstract(dataclasses.replace(micro_config(), **change))
  assert message in str(raised.value)


def test_inputs_that_are_too_large_are_told():
  tokens = jnp.zeros((1, 1025), jnp.int32)
  with pytest.raises(ValueError, match="at most 1024 tokens, found 1025"):
    model().encode(tokens)
  with pytest.raises(ValueError, match="at most 1025 decoder tokens, found 1026"):
    model().decode(None, jnp.zeros((1, 1026), jnp.int32))
  with pytest.raises(ValueError, match="at most 1025 decoder tokens, found 1026"):
    model().start(None, max_length=1026)
  with pytest.raises(ValueError, match="images of at most 128 pixels"):
    jax.eval_shape(lambda x: model().encode(tokens[:, :4], image=x), jnp.zeros((1, 16, 144, 3)))


def test_unknown_sizes_are_told():
  assert ofa.config("base", dropout=0.1).dropout == 0.1
  with pytest.raises(ValueError, match="found 'hug'; did you mean huge"):
    ofa.config("hug")


@pytest.mark.parametrize("tower", ["encoder", "decoder"])
def test_rates_by_depth_reach_every_parameter_of_a_tower(tower):
  """Three layers and a factor of 1/2: 1/8, 1/4, 1/2 in them, 1 behind them, 1/16 before them."""
  config = micro_config(encoder_layers=3, decoder_layers=3)
  scale = Optim(lr_scale=ofa.layer_rates(config, tower, decay=0.5))
  params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract(config)[1])
  updates = jax.tree.map(np.ones_like, params)
  rates = trees.flatten(optim.apply(scale, params, updates, lr=jnp.float32(-1)))
  for path, x in rates.items():
    if path.startswith(f"{tower}/blocks/"):
      expected = [1 / 8, 1 / 4, 1 / 2]
    elif path.startswith(f"{tower}/"):
      expected = [1 if path.startswith(f"{tower}/norm/") else 1 / 16]
    else:
      expected = [1]
    assert sorted(set(np.ravel(x).tolist())) == expected, path
    if len(expected) == 3:
      assert [float(np.ravel(layer)[0]) for layer in x] == expected, path


def test_towers_without_rates_are_told():
  with pytest.raises(ValueError, match="a tower out of encoder, decoder, found 'image'"):
    ofa.layer_rates(micro_config(), "image", decay=0.5)
