"""OFA's training: the original's six updates, and the same ones on any mesh and in any parts."""

import dataclasses
import json

import jax
import numpy as np

from ofa_jax import sharding, step
from ofa_jax.config import Config, Optim, mesh_sizes
from ofa_jax.convert import ofa as convert
from ofa_jax.tasks.seq2seq import Seq2Seq
from tests.ofa_golden import _DIR, golden, golden_json, micro_config, rule_state_dict

SIX = json.loads((_DIR / "training" / "six_steps.json").read_text())
# What no batch of these reads has no gradient in PyTorch, and its optimizer leaves it alone.
UNUSED = (r"^decoder/(code_norm|positions/image)", r"^decoder/blocks/relative/image/")


@dataclasses.dataclass(kw_only=True)
class Given(Seq2Seq):
  """The shared task on batches that the tests give it."""

  fields = ("image",)


def config(**changes):
  base = Config(
    model=micro_config(),
    task=Given(columns=(0,), tokenizer="", image_size=64, smoothing=0.1),
    batch_size=3,
    steps=14,
    precision="fp32",
    optim=Optim(
      adam="fairseq",
      lr=1e-3,
      weight_decay=0.01,
      clip_norm=1.0,
      schedule="polynomial",
      warmup=4,
      freeze=(r"^tokens/", *UNUSED),
    ),
  )
  return dataclasses.replace(base, **changes)


def batch(*, repeat=1):
  """The golden's batch, of which one row has no image."""
  given = golden("micro", "train_mode")
  names = {
    "source": "src_tokens",
    "previous": "prev_output_tokens",
    "target": "target",
    "image_mask": "patch_masks",
  }
  found = {ours: given[theirs] for ours, theirs in names.items()}
  found = {k: v.astype(np.int32) if v.dtype == np.int64 else v for k, v in found.items()}
  noise = np.random.default_rng(int(given["image_seed"])).standard_normal(given["image_shape"])
  found["image"] = np.tanh(noise).astype(np.float32).transpose(0, 2, 3, 1)
  found["weight"] = np.ones(3, np.float32)
  return {k: np.repeat(v, repeat, axis=0) for k, v in found.items()}


def run(config, batch, *, steps, devices=1):
  """Metrics of every step, and the last state; the golden's weights are the first."""
  mesh = sharding.make_mesh(mesh_sizes(config.mesh, devices), devices=jax.devices()[:devices])
  program = step.build(config, mesh, steps=config.steps)
  shapes = {name: shape for name, (shape, _) in golden_json("micro/state_dict").items()}
  params, rest = convert.from_torch(rule_state_dict(shapes), config.model)
  state = jax.jit(lambda p, r: step._state(config, program.optimizer, p, r))(params, rest)
  # The original asks its schedule after the update is counted.
  state = dataclasses.replace(state, step=state.step + 1)
  state = jax.device_put(state, program.shardings)
  update = step.train_step(program)
  batch = sharding.to_global(batch, mesh)
  history = []
  for _ in range(steps):
    state, metrics = update(state, batch)
    history.append(jax.device_get(metrics))
  return history, state


def test_six_updates_are_the_originals():
  history, state = run(config(), batch(), steps=6)
  for found, expected in zip(history, SIX["log"], strict=True):
    np.testing.assert_allclose(found["lr"], expected["lr"], rtol=1e-5)
    loss = expected["loss_sum"] / expected["sample_size"]
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(found["grad_norm"], expected["grad_norm_before_clip"], rtol=1e-4)
  found = convert.to_torch(*jax.device_get((state.params, state.rest)), config().model)
  for name, norm in SIX["param_norms_after"].items():
    np.testing.assert_allclose(np.linalg.norm(found[name]), norm, rtol=1e-5, err_msg=name)
  for name, expected in golden("training", "six_steps").items():
    x = found[name] if found[name].shape == expected.shape else found[name].ravel()[::16]
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5, err_msg=name)
