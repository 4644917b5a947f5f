"""Checkpoints of a run: saved in the background, atomic, restored onto any mesh.

One directory per step holds `model` (parameters and running statistics, what evaluation and
conversion read), `train` (optimizer and counters), and where there is a moving average `ema`, that
of the parameters, and `ema_rest`, that of the statistics, which runs made before do not have.
Nothing random and no data position is stored: both are functions of the step.
"""

import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from ofa_jax import trees
from ofa_jax.step import State

ITEMS = ("model", "ema", "ema_rest", "train")


class Checkpoints:
  """The checkpoints under `workdir/checkpoints`; use as a context manager, it waits on exit."""

  def __init__(self, workdir: str, *, keep: int = 3):
    """Args: workdir: local or bucket path; keep: newest checkpoints that stay."""
    # Orbax reports every array it touches at INFO and warns of defaults that are meant.
    logging.getLogger("absl").setLevel(logging.ERROR)
    self._manager = ocp.CheckpointManager(
      epath.Path(workdir).resolve() / "checkpoints",
      item_handlers={name: ocp.StandardCheckpointHandler() for name in ITEMS},
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=True, create=True
      ),
    )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._manager.close()

  def latest(self) -> int | None:
    """Newest complete step; a save cut short by a crash does not count."""
    return self._manager.latest_step()

  def save(self, state: State) -> None:
    """Starts saving; the state may be donated to the next step as soon as this returns."""
    step = int(state.step)
    if step not in self._manager.all_steps():
      items = {name: ocp.args.StandardSave(part) for name, part in _parts(state).items()}
      self._manager.save(step, args=ocp.args.Composite(**items))

  def wait(self) -> None:
    """Returns when all saves that were started are on disk."""
    self._manager.wait_until_finished()

  def restore(self, step: int, *, abstract: State, shardings: State) -> State:
    """The whole state at a step, laid out by `shardings`.

    Where no average of the statistics was kept it begins with the statistics.

    Raises:
      ValueError: the checkpoint holds other parameters than the config's model; all of them.
    """
    parts = _parts(_targets(abstract, shardings))
    if not self._has(step, "ema_rest"):
      parts.pop("ema_rest", None)
    self._check(step, parts)
    items = self._restore(step, parts)
    averages = {"ema": None, "ema_rest": None}
    if abstract.ema is not None:
      kept = items["ema_rest"] if "ema_rest" in parts else items["model"]["rest"]
      averages = {"ema": items["ema"], "ema_rest": jax.tree.map(jnp.copy, kept)}
    return State(**items["model"], **items["train"], **averages)

  def restore_weights(
    self, step: int, *, abstract: State, shardings: State, ema: bool
  ) -> tuple[Any, Any]:
    """(params, rest) at a step without the optimizer; `ema`: the moving averages, if kept."""
    target = _targets(abstract, shardings)
    parts = {"model": {"params": target.params, "rest": target.rest}}
    if ema:
      parts["ema"] = target.params
      if self._has(step, "ema_rest"):
        parts["ema_rest"] = target.rest
    self._check(step, parts)
    items = self._restore(step, parts)
    params, rest = items["model"]["params"], items["model"]["rest"]
    if not ema:
      return params, rest
    return items["ema"], items["ema_rest"] if "ema_rest" in parts else rest

  def has_ema(self, step: int) -> bool:
    """Does the checkpoint at this step hold a moving average?"""
    return self._has(step, "ema")

  def _has(self, step: int, item: str) -> bool:
    return self._manager.item_metadata(step).get(item) is not None

  def _restore(self, step: int, parts: Mapping[str, Any]) -> Any:
    wanted = {name: ocp.args.StandardRestore(part) for name, part in parts.items()}
    return self._manager.restore(step, args=ocp.args.Composite(**wanted))

  def _check(self, step: int, parts: Mapping[str, Any]) -> None:
    metadata = self._manager.item_metadata(step)
    lines = []
    for name, expected in parts.items():
      if metadata.get(name) is None:
        lines.append(f"no {name} in the checkpoint (the run that wrote it had it switched off)")
        continue
      lines += [f"{name}/{line}" for line in trees.difference(expected, metadata[name].tree)]
    if lines:
      shown = "\n".join(f"  {line}" for line in lines[:20])
      more = f"\n  ... and {len(lines) - 20} more" if len(lines) > 20 else ""
      raise ValueError(
        f"The checkpoint at step {step} in {self._manager.directory} is not of this config:\n"
        f"{shown}{more}\nUse the config that wrote it, or another --workdir."
      )


def open_weights(workdir: str, *, abstract: State, shardings: State) -> tuple[int, Any, Any]:
  """(step, params, rest) of the newest checkpoint of a run, its moving average where it has one.

  Raises:
    ValueError: no checkpoint there, or one of another model.
  """
  path = epath.Path(workdir).resolve()
  if not (path / "checkpoints").exists():
    raise ValueError(
      f"Expected a run of ofa_jax.train with a checkpoints/ folder, found none in {path}"
    )
  with Checkpoints(str(path)) as checkpoints:
    step = checkpoints.latest()
    if step is None:
      raise ValueError(f"Expected a finished checkpoint in {path / 'checkpoints'}, found none")
    params, rest = checkpoints.restore_weights(
      step, abstract=abstract, shardings=shardings, ema=checkpoints.has_ema(step)
    )
  return step, params, rest


def _parts(state: State) -> dict[str, Any]:
  parts = {
    "model": {"params": state.params, "rest": state.rest},
    "train": {"step": state.step, "opt": state.opt, "bad": state.bad},
  }
  if state.ema is not None:
    parts["ema"] = state.ema
    if jax.tree.leaves(state.ema_rest):  # many models have no statistics
      parts["ema_rest"] = state.ema_rest
  return parts


def _targets(abstract: State, shardings: State) -> State:
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
  )
