"""Checkpoints of a run: saved in the background, atomic, restored onto any mesh.

One directory per step holds three items: `model` (parameters and running statistics, what
evaluation and conversion read), `ema` where there is one, and `train` (optimizer and counters).
Nothing random and no data position is stored: both are functions of the step.
"""

import logging
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from ofa_jax import checksums, trees
from ofa_jax.step import State


class Checkpoints:
  """The checkpoints under `workdir/checkpoints`; use as a context manager, it waits on exit."""

  def __init__(self, workdir: str, *, keep: int = 3):
    """Args: workdir: local or bucket path; keep: newest checkpoints that stay."""
    # Orbax reports every array it touches at INFO and warns of defaults that are meant.
    logging.getLogger("absl").setLevel(logging.ERROR)
    self._manager = ocp.CheckpointManager(
      epath.Path(workdir).resolve() / "checkpoints",
      item_handlers={name: ocp.StandardCheckpointHandler() for name in ("model", "ema", "train")},
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=True, create=True
      ),
    )

    self._sums, self._unsealed = checksums.Background(), None
    self._keep = keep

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._manager.close()
    self._seal(self._unsealed)
    self._sums.join()

  def latest(self) -> int | None:
    """Newest complete step; a save cut short by a crash does not count."""
    return self._manager.latest_step()

  def save(self, state: State) -> None:
    """Starts saving; the state may be donated to the next step as soon as this returns."""
    step = int(state.step)
    if step not in self._manager.all_steps():
      # When this save ends, Orbax removes the oldest step, into which nothing may be written then.
      self._sums.join()
      self._manager.save(step, args=ocp.args.Composite(**_items(state, ocp.args.StandardSave)))
      if self._keep > 1:
        self._seal(self._unsealed)  # the save before, for which this one has waited
      self._unsealed = step

  def wait(self) -> None:
    """Returns when all saves that were started are on disk."""
    self._manager.wait_until_finished()
    self._seal(self._unsealed)
    self._sums.join()

  def restore(self, step: int, *, abstract: State, shardings: State) -> State:
    """The whole state at a step, laid out by `shardings`.

    Raises:
      ValueError: the checkpoint holds other parameters than the config's model; all of them.
    """
    target = _targets(abstract, shardings)
    self._verify(step, _parts(target))
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
    self._verify(step, parts)
    self._check(step, parts)
    items = self._manager.restore(
      step,
      args=ocp.args.Composite(**{k: ocp.args.StandardRestore(v) for k, v in parts.items()}),
    )
    return items["ema"] if ema else items["model"]["params"], items["model"]["rest"]

  def has_ema(self, step: int) -> bool:
    """Does the checkpoint at this step hold a moving average?"""
    return self._manager.item_metadata(step).get("ema") is not None

  def _seal(self, step: int | None) -> None:
    """Begins to write the checksums of a step that is on disk, beside Orbax's items."""
    self._unsealed = None
    directory = None if step is None else self._local(step)
    if directory is not None and jax.process_index() == 0:
      self._sums.start(directory)

  def _verify(self, step: int, parts: Iterable[str]) -> None:
    """Compares the files of these items with their checksums, each process its share of them.

    Raises:
      ValueError: some differ, on every process.
    """
    directory = self._local(step)
    share = jax.process_index(), jax.process_count()
    under = [f"{name}/" for name in parts]
    faults = [] if directory is None else checksums.faults(directory, part=share, under=under)
    if jax.process_count() > 1:
      total = np.sum(multihost_utils.process_allgather(np.asarray(len(faults))))
      if total and not faults:
        faults = ["a file is damaged that another process has read, which names it"]
    checksums.raise_faults(f"The checkpoint at step {step} in {self._manager.directory}", faults)

  def _local(self, step: int) -> pathlib.Path | None:
    """The folder of a step; None if it is in a bucket, whose service has checksums of its own."""
    folder = str(self._manager.directory / str(step))
    return None if "://" in folder else pathlib.Path(folder)

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
