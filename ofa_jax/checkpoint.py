"""Checkpoints of a run: saved in the background, atomic, restored onto any mesh.

One directory per step holds three items: `model` (parameters and running statistics, what
evaluation and conversion read), `ema` where there is one, and `train` (optimizer and counters).
Nothing random and no data position is stored: both are functions of the step.
"""

import contextlib
import logging
import threading
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from ofa_jax import trees
from ofa_jax.step import State


class Checkpoints:
  """The checkpoints under `workdir/checkpoints`; use as a context manager, it waits on exit."""

  def __init__(self, workdir: str, *, keep: int = 3):
    """Args: workdir: local or bucket path; keep: newest checkpoints that stay."""
    # Orbax reports every array it touches at INFO, warns of defaults that are meant, and shows
    # the traceback of every error besides raising it.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    self._manager = ocp.CheckpointManager(
      epath.Path(workdir).resolve() / "checkpoints",
      item_handlers={name: ocp.StandardCheckpointHandler() for name in ("model", "ema", "train")},
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=True, create=True
      ),
    )

    self._waiter: threading.Thread | None = None
    self._outcome: bool | Exception = False

  def __enter__(self):
    return self

  def __exit__(self, error, *_):
    with contextlib.suppress(Exception) if error else contextlib.nullcontext():
      self._manager.close()

  @property
  def folder(self) -> epath.Path:
    """Where they lie."""
    return self._manager.directory

  def latest(self) -> int | None:
    """Newest complete step; a save cut short by a crash does not count."""
    return self._manager.latest_step()

  def save(self, state: State) -> None:
    """Starts saving; the state may be donated to the next step as soon as this returns."""
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    self.wait()
    # An error of the last save, which was told, is raised once more in this thread.
    with contextlib.suppress(Exception):
      self._manager.wait_until_finished()
    self._manager.save(step, args=ocp.args.Composite(**_items(state, ocp.args.StandardSave)))
    self._waiter = threading.Thread(target=self._watch_save, name="save-outcome", daemon=True)
    self._waiter.start()

  def wait(self) -> None:
    """Returns when the save that was started last is on disk; raises what it failed with."""
    outcome = self.outcome(wait=True)
    if isinstance(outcome, Exception):
      raise outcome

  def outcome(self, *, wait: bool = False) -> bool | Exception:
    """What became of the last save, told once: True, the error, or False where nothing is new.

    Args:
      wait: until it has ended; without it nothing is waited for.
    """
    if self._waiter is None or (self._waiter.is_alive() and not wait):
      return False
    self._waiter.join()
    self._waiter = None
    return self._outcome

  def remove_partial(self) -> None:
    """Removes what a failed save has left, which takes room; nothing may be being saved."""
    if jax.process_count() == 1:  # elsewhere the next start does
      for folder in self.folder.glob("*.orbax-checkpoint-tmp"):
        with contextlib.suppress(OSError):
          folder.rmtree()

  def _watch_save(self) -> None:
    try:
      self._manager.wait_until_finished()
      self._outcome = True
    except Exception as error:
      self._outcome = error

  def restore(self, step: int, *, abstract: State, shardings: State) -> State:
    """The whole state at a step, laid out by `shardings`.

    Raises:
      ValueError: the checkpoint holds other parameters than the config's model; all of them.
    """
    target = _targets(abstract, shardings)
    self._check(step, _parts(target))
    items = self._manager.restore(
      step, args=ocp.args.Composite(**_items(target, ocp.args.StandardRestore))
    )
    return State(
      **items["model"], **items["train"], ema=items["ema"] if abstract.ema is not None else None
    )

  def restore_weights(
    self, step: int, *, abstract: State, shardings: State, ema: bool
  ) -> tuple[Any, Any]:
    """(params, rest) at a step without the optimizer; `ema`: the moving average as params."""
    target = _targets(abstract, shardings)
    parts = {"model": {"params": target.params, "rest": target.rest}}
    if ema:
      parts["ema"] = target.params
    self._check(step, parts)
    items = self._manager.restore(
      step,
      args=ocp.args.Composite(**{k: ocp.args.StandardRestore(v) for k, v in parts.items()}),
    )
    return items["ema"] if ema else items["model"]["params"], items["model"]["rest"]

  def has_ema(self, step: int) -> bool:
    """Does the checkpoint at this step hold a moving average?"""
    return self._manager.item_metadata(step).get("ema") is not None

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
  return parts if state.ema is None else {**parts, "ema": state.ema}


def _items(state: State, wrap: Any) -> dict[str, Any]:
  return {name: wrap(part) for name, part in _parts(state).items()}


def _targets(abstract: State, shardings: State) -> State:
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
  )
