"""LoRA: the updates are those of a model whose matrices are W + scale * down @ up."""

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ofa_jax import hub, trees
from ofa_jax.config import Lora, MeshShape, Optim
from ofa_jax.convert.__main__ import convert
from ofa_jax.engine import log, lora, optim, step
from ofa_jax.train import train
from ofa_jax.validation import validate
from tests import tiny
from tests.engine import test_step
from tests.test_train import assert_bit_equal, final_state

PARAMS = {
  "tower": {
    "blocks": {
      "attn": {"qkv": {"kernel": (3, 6, 3, 2, 5)}, "out": {"kernel": (3, 2, 5, 6), "bias": (3, 6)}}
    },
    "proj": (6, 4),
  },
  "logit_scale": (),
}
PARAMS = jax.tree.map(
  lambda shape: jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32),
  PARAMS,
  is_leaf=lambda x: isinstance(x, tuple),
)
LORA = Lora(matrices=(r"attn/\w+/kernel$", "proj"), rank=2, alpha=6.0, also=("logit_scale",))


def loss(params):
  """Something that every parameter has a gradient of, another one at every place."""
  return sum(jnp.sum(jnp.sin(x * (i + 1)) ** 2) for i, x in enumerate(jax.tree.leaves(params)))


def with_product(params, factors):
  """W + scale * down @ up, written out for the matrices of `PARAMS`."""
  scale = 3.0
  attn, proj = factors["tower"]["blocks"]["attn"], factors["tower"]["proj"]
  base = params["tower"]["blocks"]["attn"]
  qkv, out = attn["qkv"]["kernel"], attn["out"]["kernel"]
  added = jnp.einsum("lnr,lrm->lnm", qkv[lora.DOWN], qkv[lora.UP]).reshape(3, 6, 3, 2, 5)
  after = jnp.einsum("lnr,lrm->lnm", out[lora.DOWN], out[lora.UP]).reshape(3, 2, 5, 6)
  return {
    "tower": {
      "blocks": {
        "attn": {
          "qkv": {"kernel": base["qkv"]["kernel"] + scale * added},
          "out": {**base["out"], "kernel": base["out"]["kernel"] + scale * after},
        }
      },
      "proj": params["tower"]["proj"] + scale * proj[lora.DOWN] @ proj[lora.UP],
    },
    "logit_scale": params["logit_scale"],
  }


@pytest.mark.parametrize("adam", ["adamw", "fairseq"])
def test_updates_are_those_of_the_factors(adam):
  config = Optim(lr=0.05, adam=adam, weight_decay=0.1, schedule="constant", eps=1e-4, lora=LORA)
  optimizer = optim.transformation(config, PARAMS)
  params, state = PARAMS, optimizer.init(PARAMS)
  first = state.factors
  # The same with the factors as parameters of their own.
  plain = dataclasses.replace(config, lora=None)
  own = {"factors": first, "logit_scale": PARAMS["logit_scale"]}
  apart = optim.transformation(plain, own)
  apart_state = apart.init(own)
  for _ in range(6):
    tree, grads = optim.seen(config, params, state, jax.grad(loss)(params))
    updates, state = optimizer.update(grads, state, tree)
    tree = optim.apply(config, tree, updates, lr=jnp.float32(0.05))
    params, state = optim.updated(config, params, state, tree)

    def of_factors(own):
      start = {**PARAMS, "logit_scale": own["logit_scale"]}
      return loss(with_product(start, own["factors"]))

    updates, apart_state = apart.update(jax.grad(of_factors)(own), apart_state, own)
    own = optim.apply(plain, own, updates, lr=jnp.float32(0.05))
  expected = with_product({**PARAMS, "logit_scale": own["logit_scale"]}, own["factors"])
  for path, x in trees.flatten(expected).items():
    np.testing.assert_allclose(trees.flatten(params)[path], x, atol=2e-5, err_msg=path)
  np.testing.assert_array_equal(
    params["tower"]["blocks"]["attn"]["out"]["bias"],
    PARAMS["tower"]["blocks"]["attn"]["out"]["bias"],
  )
  assert np.abs(params["tower"]["proj"] - PARAMS["tower"]["proj"]).max() > 0.01
  moments = {x.shape for x in jax.tree.leaves(state.inner) if x.ndim}
  assert moments == {x.shape for x in jax.tree.leaves(state.factors)}


def test_nothing_is_added_at_first():
  factors = lora.init(LORA, PARAMS)
  flat = trees.flatten(factors)
  assert {path.rpartition("/")[2] for path in flat} == {lora.DOWN, lora.UP} and len(flat) == 6
  assert all(np.any(x) == path.endswith(lora.DOWN) for path, x in flat.items())
  again = trees.flatten(lora.init(LORA, PARAMS))
  assert all(np.array_equal(x, again[path]) for path, x in flat.items())
  down = flat[f"tower/blocks/attn/qkv/kernel/{lora.DOWN}"]
  assert down.shape == (3, 6, 2) and not np.array_equal(down[0], down[1])


def test_what_is_trained_is_counted():
  numbers = optim.trained(Optim(lora=LORA), PARAMS)
  assert sum(numbers.values()) == 3 * 2 * (6 + 30) + 3 * 2 * (10 + 6) + 2 * (6 + 4) + 1
  numbers = optim.trained(Optim(freeze=("^tower/blocks/",)), PARAMS)
  assert numbers == {"logit_scale": 1, "tower/proj": 24}
  numbers = optim.trained(Optim(lr_scale=(("qkv", (0.0, 1.0, 2.0)),)), PARAMS)
  assert numbers["tower/blocks/attn/qkv/kernel"] == 2 * 6 * 30


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"matrices": ("attm",)}, "no parameter that matches 'attm'"),
    ({"also": ("nothing",)}, "no parameter that matches 'nothing'"),
    ({"matrices": ("bias",)}, r"no matrix that rank 2 makes smaller: tower/blocks/attn/out/bias"),
    ({"rank": 4}, r"no matrix that rank 4 makes smaller: tower/proj \(6, 4\)"),
  ],
)
def test_patterns_that_are_of_no_matrix_are_told(changes, message):
  config = Optim(lora=dataclasses.replace(LORA, **changes))
  with pytest.raises(ValueError, match=message):
    optim.transformation(config, PARAMS)


@pytest.fixture(scope="module")
def config(digits, two_devices):
  """Few numbers of a Chinese-CLIP, on two devices."""
  tuned = Lora(matrices=(r"/attn/(qkv|out)/kernel$",), rank=2, alpha=4.0, also=("^logit_scale$",))
  config = tiny.config(digits, mesh=MeshShape(data=1, fsdp=2), save_every=2, steps=4)
  return dataclasses.replace(
    config, optim=dataclasses.replace(config.optim, lr=1e-2, lora=tuned), log_every=1
  )


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("lora") / "run"
  train(config, str(workdir))
  return workdir


def test_a_run_changes_its_matrices_by_its_rank_and_nothing_else(config, trained):
  first = trees.flatten(test_step.fresh(_program(config)).params)
  last = final_state(trained)
  for path, start in first.items():
    change = np.asarray(last[f"model/params/{path}"], np.float64) - np.asarray(start, np.float64)
    if re.search(config.optim.lora.matrices[0], path):
      joined = change.reshape(len(change), *((-1, change.shape[-1]) if "/out/" in path else
                                             (change.shape[1], -1)))  # fmt: skip
      sizes = np.linalg.svd(joined, compute_uv=False)
      assert np.all(sizes[:, 1] > 1e-5) and np.all(sizes[:, 2] < 1e-5 * sizes[:, 0]), path
    else:
      assert path == "logit_scale" or not np.any(change), path
  text = (trained / "log.txt").read_text()
  assert re.search(
    r"Trained: [\d,]+ numbers, [\d.]+% of the parameters: .*/lora_down, .*lora_up", text
  )


def _program(config):
  return step.build(config, test_step.make_mesh(), steps=config.steps)


def test_gone_on_with_bit_for_bit(config, trained, tmp_path):
  shutil.copytree(trained, tmp_path / "broken")
  shutil.rmtree(tmp_path / "broken" / "checkpoints" / "4")
  train(config, str(tmp_path / "broken"))
  assert_bit_equal(final_state(trained), final_state(tmp_path / "broken"))


@pytest.mark.parametrize(
  ("shape", "devices"), [(MeshShape(), 1), (MeshShape(data=2, fsdp=2, tensor=2), 8)]
)
def test_one_and_eight_devices_are_two(config, trained, shape, devices):
  alone = dataclasses.replace(config, mesh=shape, evals=())
  history, state = test_step.run(alone, steps=4, of=4, mesh=test_step.make_mesh(shape, devices))
  rows = [row for row in log.read_metrics(trained) if "train/loss" in row]
  losses = [[row["train/loss"], row["train/grad_norm"]] for row in rows]
  np.testing.assert_allclose(losses, history, rtol=1e-4)
  stored = final_state(trained)
  for path, x in trees.flatten(state.params).items():
    np.testing.assert_allclose(stored[f"model/params/{path}"], x, rtol=0, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("form", ["torch", "hf"])
def test_exports_have_the_products_in_their_matrices(config, trained, tmp_path, form):
  params = trees.flatten(hub.open_model(str(trained)).load()[0])
  stored = final_state(trained)
  for path, x in params.items():
    np.testing.assert_array_equal(x, stored[f"model/params/{path}"])
  out = tmp_path / ("model.pt" if form == "torch" else "hf")
  convert(str(trained), str(out), to=form)
  sizes = config.model if form == "torch" else None
  again = trees.flatten(hub.open_model(str(out), config=sizes).load()[0])
  for path, x in params.items():
    np.testing.assert_array_equal(again[path], x, err_msg=path)


def test_faults_of_a_config_are_told_at_once(config):
  wrong = dataclasses.replace(config.optim.lora, matrices=(), rank=0)
  optim_ = dataclasses.replace(config.optim, lora=wrong)
  with pytest.raises(ValueError, match=r"optim.lora: expected patterns .* found \(\), 0 and 4.0"):
    validate(dataclasses.replace(config, optim=optim_), devices=8)
