"""The engine of the weight tables."""

import numpy as np
import pytest

from ofa_jax.convert import rules
from ofa_jax.convert.rules import CONV, FLAT, SAME, linear, patches

TABLE = (
  ("head.weight", "head/kernel", linear()),
  ("head.bias", "head/bias", FLAT),
  (r"layers.(\d+).qkv.weight", r"blocks/qkv/kernel[\1]", linear()),
  (r"layers.(\d+).q.bias", r"blocks/qkv/bias[\1, 0]", FLAT),
  (r"layers.(\d+).k.bias", r"blocks/qkv/bias[\1, 1]", FLAT),
  (r"stage(\d+).(\d+).conv.weight", r"stage\1/block\2/conv", CONV),
)
SHAPES = {
  "head/kernel": (3, 5),
  "head/bias": (5,),
  "blocks/qkv/kernel": (2, 4, 2, 2, 2),
  "blocks/qkv/bias": (2, 2, 2, 2),
  "stage1/block0/conv": (3, 3, 2, 4),
}


def _state_dict():
  rng = np.random.default_rng(0)
  shapes = {
    "head.weight": (5, 3),
    "head.bias": (5,),
    "layers.0.qkv.weight": (8, 4),
    "layers.1.qkv.weight": (8, 4),
    "layers.0.q.bias": (4,),
    "layers.1.q.bias": (4,),
    "layers.0.k.bias": (4,),
    "layers.1.k.bias": (4,),
    "stage1.0.conv.weight": (4, 2, 3, 3),
  }
  return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_every_tensor_lands_where_the_rule_says():
  tensors = _state_dict()
  ours = rules.from_torch(tensors, TABLE, shapes=SHAPES)
  np.testing.assert_array_equal(ours["head/kernel"], tensors["head.weight"].T)
  np.testing.assert_array_equal(
    ours["blocks/qkv/kernel"][1].reshape(4, 8), tensors["layers.1.qkv.weight"].T
  )
  np.testing.assert_array_equal(ours["blocks/qkv/bias"][1, 0].ravel(), tensors["layers.1.q.bias"])
  np.testing.assert_array_equal(ours["blocks/qkv/bias"][0, 1].ravel(), tensors["layers.0.k.bias"])
  conv = tensors["stage1.0.conv.weight"]
  assert ours["stage1/block0/conv"][2, 1, 0, 3] == conv[3, 0, 2, 1]


def test_round_trip_is_bit_equal():
  tensors = _state_dict()
  back = rules.to_torch(rules.from_torch(tensors, TABLE, shapes=SHAPES), TABLE)
  assert back.keys() == tensors.keys()
  for name, x in tensors.items():
    np.testing.assert_array_equal(back[name], x, strict=True)
    assert back[name].flags["C_CONTIGUOUS"]


@pytest.mark.parametrize(
  ("transform", "torch_shape", "our_shape"),
  [
    (SAME, (3, 4), (3, 4)),
    (FLAT, (12,), (3, 2, 2)),
    (linear(), (12, 4), (4, 3, 2, 2)),
    (linear(2), (5, 12), (3, 4, 5)),
    (CONV, (5, 2, 3, 3), (3, 3, 2, 5)),
    (patches(), (5, 3, 4, 4), (48, 5)),
    (patches(1), (5, 1, 2, 2), (4, 5)),
  ],
)
def test_transforms_are_inverse(transform, torch_shape, our_shape):
  x = np.arange(np.prod(torch_shape), dtype=np.float32).reshape(torch_shape)
  ours = transform.to_ours(x, our_shape)
  assert ours.shape == our_shape
  np.testing.assert_array_equal(transform.to_torch(ours), x)


def test_half_precision_is_read_as_float32():
  tensors = {name: x.astype(np.float16) for name, x in _state_dict().items()}
  ours = rules.from_torch(tensors, TABLE, shapes=SHAPES)
  assert all(x.dtype == np.float32 for x in ours.values())
  np.testing.assert_array_equal(ours["head/bias"], tensors["head.bias"].astype(np.float32))


def test_one_error_lists_all_differences():
  tensors = _state_dict()
  tensors["head.weight"] = tensors["head.weight"].T
  tensors["layers.2.qkv.weight"] = tensors.pop("layers.1.qkv.weight")
  del tensors["layers.0.q.bias"]
  with pytest.raises(ValueError) as raised:
    rules.from_torch(tensors, TABLE, shapes=SHAPES)
  message = str(raised.value)
  assert "4 differences" in message
  assert "missing: layers.0.q.bias (4,)" in message
  assert "missing: layers.1.qkv.weight (8, 4)" in message
  assert "unexpected: layers.2.qkv.weight (8, 4), like the missing layers.1.qkv.weight" in message
  assert "shape of head.weight: expected (5, 3), found (3, 5)" in message


def test_ignored_tensors_may_be_there():
  tensors = {**_state_dict(), "pooler.weight": np.zeros(3)}
  with pytest.raises(ValueError, match=r"unexpected: pooler.weight"):
    rules.from_torch(tensors, TABLE, shapes=SHAPES)
  rules.from_torch(tensors, TABLE, shapes=SHAPES, ignored=[("^pooler", "not used")])


def test_a_parameter_without_rules_is_an_error():
  with pytest.raises(ValueError, match="blocks/new"):
    rules.needed_tensors(TABLE, {**SHAPES, "blocks/new": (2, 3)})
  with pytest.raises(ValueError, match="blocks/qkv/bias"):  # queries and keys, but no values
    rules.needed_tensors(TABLE, {**SHAPES, "blocks/qkv/bias": (2, 3, 2, 2)})


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.complex64, np.uint8])
def test_numbers_that_are_no_floats_are_refused(dtype):
  tensors = _state_dict()
  for name in ("head.bias", "stage1.0.conv.weight"):
    tensors[name] = tensors[name].astype(dtype)
  with pytest.raises(ValueError) as raised:
    rules.from_torch(tensors, TABLE, shapes=SHAPES)
  message = f"expected floating-point numbers, found {np.dtype(dtype)}"
  assert f"dtype of head.bias: {message}" in str(raised.value)
  assert f"dtype of stage1.0.conv.weight: {message}" in str(raised.value)


def test_all_tensors_with_nan_or_infinity_are_named():
  tensors = _state_dict()
  tensors["layers.1.qkv.weight"][3, 2] = np.nan
  tensors["layers.0.k.bias"][:2] = np.inf, -np.inf
  tensors["head.bias"] = np.full(5, 1e300)  # which float32 has not
  with pytest.raises(ValueError) as raised:
    rules.from_torch(tensors, TABLE, shapes=SHAPES)
  lines = str(raised.value).splitlines()
  assert "found 3 tensors that are not" in lines[0]
  assert [line.strip() for line in lines[1:]] == [
    "head.bias: 5 infinite of 5",
    "layers.1.qkv.weight: 1 NaN of 32",
    "layers.0.k.bias: 2 infinite of 4",
  ]


@pytest.mark.parametrize("prefix", ["module.", "module.module.", "_orig_mod.", "model."])
def test_what_wrappers_put_before_names_is_taken_off(prefix):
  tensors = _state_dict()
  wrapped = {f"{prefix}{name}": x for name, x in tensors.items()}
  assert list(rules.plain_names(wrapped)) == list(tensors)


def test_only_what_is_before_all_names_is_taken_off():
  names = ("model.a", "model.module.b", "c")
  assert list(rules.plain_names(dict.fromkeys(names))) == list(names)
  mixed = {"module.model.visual._orig_mod.a": 1, "module.model._orig_mod.b": 2}
  assert rules.plain_names(mixed) == {"visual.a": 1, "b": 2}
  assert rules.plain_names({}) == {}
  with pytest.raises(ValueError, match=r"found a twice"):
    rules.plain_names({"_orig_mod.a": 1, "a": 2})
