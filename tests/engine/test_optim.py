import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ofa_jax import trees
from ofa_jax.config import Optim
from ofa_jax.engine import optim

GOLDEN = Path(__file__).parent.parent / "golden" / "ofa" / "training"
POLYNOMIAL = json.loads((GOLDEN / "polynomial_decay.json").read_text())
PARAMS = {
  "visual": {"kernel": jnp.linspace(-1, 1, 12).reshape(3, 4), "bias": jnp.ones(4)},
  "text": {"kernel": jnp.linspace(2, -1, 6).reshape(2, 3)},
  "logit_scale": jnp.float32(4.6),
}


def gradients(step):
  rng = np.random.default_rng(step)
  return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), PARAMS)


def run(config, *, steps=5):
  transformation = optim.transformation(config, PARAMS)
  learning_rate = optim.schedule(config, steps=steps)
  params, state = PARAMS, transformation.init(PARAMS)
  for step in range(steps):
    updates, state = transformation.update(gradients(step), state, params)
    params = optim.apply(config, params, updates, lr=learning_rate(step))
  return params, state


def test_adamw_is_pytorchs():
  torch = pytest.importorskip("torch")
  config = Optim(
    lr=0.01, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.2, warmup=2,
    no_decay=("bias", "logit_scale"),
  )  # fmt: skip
  found, _ = run(config)
  leaves = [torch.tensor(np.asarray(p), requires_grad=True) for p in jax.tree.leaves(PARAMS)]
  names = ["logit_scale", "text/kernel", "visual/bias", "visual/kernel"]
  groups = [
    {"params": [p], "weight_decay": 0.2 if "kernel" in n else 0.0}
    for n, p in zip(names, leaves, strict=True)
  ]
  adam = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.98), eps=1e-6)
  for step in range(5):
    for group in adam.param_groups:
      group["lr"] = float(optim.schedule(config, steps=5)(step))
    for p, g in zip(leaves, jax.tree.leaves(gradients(step)), strict=True):
      p.grad = torch.tensor(np.asarray(g))
    adam.step()
  for ours, theirs in zip(jax.tree.leaves(found), leaves, strict=True):
    np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-6, atol=1e-6)


def test_cosine_schedule_is_chinese_clips():
  rate = optim.schedule(Optim(lr=5e-5, warmup=100), steps=735)
  assert rate(0) == pytest.approx(5e-7)
  assert rate(99) == pytest.approx(5e-5)
  for step in (100, 400, 734):
    expected = 0.5 * (1 + np.cos(np.pi * (step - 100) / 635)) * 5e-5
    assert float(rate(step)) == pytest.approx(expected, rel=1e-4, abs=1e-10)


def test_linear_and_constant_schedules():
  linear = optim.schedule(Optim(lr=1.0, schedule="linear", warmup=10), steps=110)
  assert [float(linear(s)) for s in (4, 10, 60, 110)] == pytest.approx([0.5, 1.0, 0.5, 0.0])
  assert float(optim.schedule(Optim(lr=0.5, schedule="constant"), steps=10)(9)) == 0.5


@pytest.mark.parametrize("name", POLYNOMIAL)
def test_polynomial_decay_is_fairseqs(name):
  case = POLYNOMIAL[name]["cfg"]
  config = Optim(
    lr=case["lr"][0],
    schedule="polynomial",
    warmup=case["warmup_updates"],
    warmup_ratio=max(0.0, case["warmup_ratio"]),
    power=case["power"],
    end_lr=case["end_learning_rate"],
  )
  expected = POLYNOMIAL[name]["lr_at_num_updates"]
  rate = optim.schedule(config, steps=int(case["total_num_update"]))
  np.testing.assert_allclose(
    [rate(n) for n in range(len(expected))], expected, rtol=1e-5, atol=1e-9
  )


def test_fairseqs_eps_is_outside_the_bias_correction():
  config = Optim(lr=0.01, adam="fairseq", eps=1e-2, weight_decay=0.1, schedule="constant")
  found, _ = run(config, steps=3)
  for path, p in trees.flatten(PARAMS).items():
    p, m, v = np.asarray(p, np.float64), 0.0, 0.0
    for step in range(3):
      g = np.asarray(trees.flatten(gradients(step))[path], np.float64)
      m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
      rate = 0.01 * np.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
      p = p - 0.01 * 0.1 * p - rate * m / (np.sqrt(v) + 1e-2)
    np.testing.assert_allclose(trees.flatten(found)[path], p, rtol=1e-5, atol=1e-6, err_msg=path)


def test_frozen_parameters_stay_and_have_no_state():
  params, state = run(Optim(lr=0.1, weight_decay=0.1, freeze=("^visual/",)))
  np.testing.assert_array_equal(params["visual"]["kernel"], PARAMS["visual"]["kernel"])
  assert np.any(params["text"]["kernel"] != PARAMS["text"]["kernel"])
  held = sum(x.size for x in jax.tree.leaves(state))
  assert held == 2 * (6 + 1) + 1


def test_frozen_parameters_get_no_gradient():
  config = Optim(freeze=("^visual/",))

  def loss(params):
    params = optim.stop_frozen(config, params)
    return jnp.sum(params["visual"]["bias"]) * jnp.sum(params["text"]["kernel"])

  grads = jax.grad(loss)(PARAMS)
  assert not np.any(grads["visual"]["bias"])
  np.testing.assert_array_equal(grads["text"]["kernel"], jnp.full((2, 3), 4.0))


def test_learning_rate_multipliers_and_bounds():
  config = Optim(
    lr=0.1,
    schedule="constant",
    lr_scale=(("kernel", 0.5), ("bias", 0.0)),
    clamp=(("logit_scale", (0.0, 4.6052)),),
  )
  plain, _ = run(Optim(lr=0.1, schedule="constant"), steps=1)
  scaled, _ = run(config, steps=1)
  moved = plain["text"]["kernel"] - PARAMS["text"]["kernel"]
  np.testing.assert_allclose(
    scaled["text"]["kernel"] - PARAMS["text"]["kernel"], moved / 2, atol=1e-7
  )
  np.testing.assert_array_equal(scaled["visual"]["bias"], PARAMS["visual"]["bias"])
  assert float(scaled["logit_scale"]) == pytest.approx(min(float(plain["logit_scale"]), 4.6052))


def test_layers_of_a_stack_have_their_own_rates():
  config = Optim(
    lr=0.1, schedule="constant", weight_decay=0.1, lr_scale=(("^v.*kernel", (0, 0.5, 1)),)
  )
  plain, _ = run(dataclasses.replace(config, lr_scale=()), steps=1)
  found, _ = run(config, steps=1)
  start = np.asarray(PARAMS["visual"]["kernel"])
  moved = np.asarray(plain["visual"]["kernel"]) - start
  np.testing.assert_array_equal(found["visual"]["kernel"][0], start[0])
  np.testing.assert_allclose(found["visual"]["kernel"][1], start[1] + moved[1] / 2, atol=1e-7)
  np.testing.assert_array_equal(found["visual"]["kernel"][2], plain["visual"]["kernel"][2])
  grads = jax.grad(lambda p: jnp.sum(optim.stop_frozen(config, p)["visual"]["kernel"]))(PARAMS)
  np.testing.assert_array_equal(grads["visual"]["kernel"], np.repeat([[0], [1], [1]], 4, axis=1))


def test_a_rate_for_every_layer_is_needed():
  config = Optim(lr_scale=(("^visual/kernel", (0.0, 1.0)),))
  with pytest.raises(ValueError, match=r"layers of visual/kernel \(3, 4\), found 2"):
    optim.transformation(config, PARAMS)


def test_a_pattern_that_matches_nothing_is_an_error():
  config = Optim(freeze=("^visaul/",), lr_scale=(("txt", 2.0),))
  with pytest.raises(ValueError) as e:
    optim.transformation(config, PARAMS)
  assert "optim.freeze: '^visaul/'" in str(e.value) and "optim.lr_scale: 'txt'" in str(e.value)


def test_clip():
  grads = gradients(0)
  norm = optax.global_norm(grads)
  clipped = optim.clip(grads, norm, limit=0.5)
  assert float(optax.global_norm(clipped)) == pytest.approx(0.5, rel=1e-5)
  assert optim.clip(grads, norm, limit=None) is grads
