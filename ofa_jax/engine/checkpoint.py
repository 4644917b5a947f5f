"""Checkpoints of a run: saved in the background, atomic, restored onto any mesh.

One directory per step holds `model` (parameters and running statistics, what evaluation and
conversion read), `train` (optimizer and counters), and where there is a moving average `ema`, that
of the parameters, and `ema_rest`, that of the statistics, which runs made before do not have.
Nothing random and no data position is stored: both are functions of the step.

The newest ones stay, and beside them the best one by a metric.
"""

import contextlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from ofa_jax import checksums, storage
from ofa_jax.engine import bucket_arrays, faults, log
from ofa_jax.engine.best import Best, Keep
from ofa_jax.engine.step import State
from ofa_jax.engine.step_name import BEST, LATEST
from ofa_jax.engine.stored_step import ITEMS, OPTIONAL, Damaged, StoredStep

_SMALL = 2**22  # bytes; one device hands them over in half a millisecond at 8 GB/s


class Checkpoints:
  """The checkpoints under `workdir/checkpoints`; use as a context manager, it waits on exit."""

  def __init__(
    self, workdir: str, *, keep: int = 3, best: Best | None = None, read_only: bool = False
  ):
    """Opens the folder.

    Args:
      workdir: local or bucket path.
      keep: newest checkpoints that stay.
      best: says which one stays beside them; None: none.
      read_only: nothing is made, saved or removed there.
    """
    faults.silence_echoes()
    self.workdir = bucket_arrays.path_of(workdir)
    self.best = best  # may be set later
    self._read_only = read_only
    self._keep = Keep(keep, self.best_step)
    self._manager = ocp.CheckpointManager(
      self.workdir / "checkpoints",
      item_handlers={name: ocp.StandardCheckpointHandler() for name in ITEMS},
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self._keep,
        enable_async_checkpointing=True,
        create=not read_only,
        read_only=read_only,
        **bucket_arrays.options(workdir),
      ),
    )

    self._waiter: threading.Thread | None = None
    self._outcome: bool | Exception = False

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    try:
      self._manager.close()
    except Exception:
      if error is None:  # else it is the same fault again, or what came of it
        raise
    finally:
      if self._waiter is not None:
        self._waiter.join()
      if error is not None and not self._read_only:
        self.remove_partial()  # of a save that was part of the failure, on a full disk say

  @property
  def folder(self) -> epath.Path:
    """Where they lie."""
    return self._manager.directory

  def steps(self) -> list[int]:
    """The complete ones, oldest first; a save cut short by a crash does not count."""
    return sorted(self._manager.all_steps())

  def latest(self) -> int | None:
    """Newest complete step."""
    return self._manager.latest_step()

  def best_step(self, steps: Sequence[int] | None = None) -> int | None:
    """The best one of these, or of all; None where that is not known."""
    return self.best.of(self.steps() if steps is None else steps) if self.best else None

  def listing(self) -> str:
    """What is there, for people: "2, 4, 6 (best: step 4, valid/cider 0.9132)"."""
    text = ", ".join(map(str, self.steps())) or "none"
    best = self.best_step()
    return text if best is None else f"{text} (best: {self.best.describe(best)})"

  def find(self, which: str | None) -> int:
    """The step that "latest" (or None), "best" or a number means.

    Raises:
      ValueError: there is no such checkpoint; those that are there.
    """
    steps = self.steps()
    if not steps:
      raise ValueError(
        f"Expected a finished checkpoint in {self.workdir / 'checkpoints'}, found none"
      )
    if which in (None, LATEST):
      return steps[-1]
    if which != BEST:
      if int(which) in steps:
        return int(which)
      raise ValueError(
        f"{self.workdir}: expected one of the steps kept there, {self.listing()}; found {which}"
      )
    best = self.best_step()
    if best is None:
      why = (
        f"no {self.best.metric} of one of them in its {log.METRICS}"
        if self.best
        else "no best_metric in its config.json"
      )
      raise ValueError(
        f"{self.workdir}: expected a run that knows its best step, found {why}. Name one of the "
        f"steps kept there: {self.listing()}"
      )
    return best

  def save(self, state: State) -> None:
    """Starts saving; the state may be donated to the next step as soon as this returns."""
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    self.wait()
    # An error of the last save, which was told, is raised once more in this thread.
    with contextlib.suppress(Exception):
      self._manager.wait_until_finished()
    items = {name: ocp.args.StandardSave(_once(part)) for name, part in _parts(state).items()}
    self._manager.save(step, args=ocp.args.Composite(**items))
    self._waiter = threading.Thread(
      target=self._watch_save, args=(self._at(step),), name="save-outcome", daemon=True
    )
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

  def remove_surplus(self) -> None:
    """Removes those that need not stay, as every save does.

    A run that was killed after its last save and before that has nothing more to save when it is
    started again.
    """
    steps = self.steps()
    for step in sorted({*steps} - self._keep.of(steps)):
      self._manager.delete(step)

  def remove_partial(self) -> None:
    """Removes what a failed save has left, which takes room; nothing may be being saved."""
    if jax.process_count() == 1:  # elsewhere the next start does
      bucket_arrays.remove_but(self.steps(), self.folder)
      for folder in self.folder.glob("*.orbax-checkpoint-tmp"):
        with contextlib.suppress(OSError):
          folder.rmtree()

  def _watch_save(self, stored: StoredStep) -> None:
    try:
      self._manager.wait_until_finished()
      if jax.process_index() == 0:
        checksums.add(stored.directory)
      self._outcome = True
    except Exception as error:
      self._outcome = error

  def restore(self, step: int, *, abstract: State, shardings: State) -> State:
    """The whole state at a step, laid out by `shardings`.

    Where no average of the statistics was kept it begins with the statistics.

    Raises:
      Damaged: it is not what was written.
      ValueError: the checkpoint holds other parameters than the config's model; all of them.
    """
    return self._state(step, abstract=abstract, shardings=shardings, verify=True)

  def _state(self, step: int, *, abstract: State, shardings: State, verify: bool) -> State:
    parts = _parts(_targets(abstract, shardings))
    if not self._at(step).has("ema_rest"):
      parts.pop("ema_rest", None)
    items = self._restore(step, parts, verify=verify)
    averages = {"ema": None, "ema_rest": None}
    if abstract.ema is not None:
      averages = {"ema": items["ema"], "ema_rest": _average_of_rest(items)}
    return State(**items["model"], **items["train"], **averages)

  def restore_newest(
    self, *, abstract: State, shardings: State, warn: Callable[[str], None]
  ) -> State | None:
    """The whole state at the newest step that is whole; None where nothing was saved yet.

    Damaged ones that are newer are renamed to `STEP.damaged`, so that the steps are done again and
    saved under their own names.

    Args:
      abstract, shardings: as for `restore`.
      warn: takes a line about each damaged one.

    Raises:
      ValueError: as `restore`; or all that were saved are damaged.
    """
    told: dict[int, str] = {}
    for step in reversed(self.steps()):
      fault = self._at(step).fault()
      if fault is None:
        try:
          state = self._state(step, abstract=abstract, shardings=shardings, verify=False)
        except Damaged as error:
          if jax.process_count() > 1:  # the others may have read their parts, and wait
            raise
          fault = str(error)
        else:
          self._add_checksums(step)
          for damaged, text in told.items():
            self._set_aside(damaged)
            warn(f"{text}. Going on from step {step}; it stays as {damaged}.damaged, remove it")
          return state
      told[step] = fault
    if told:
      raise ValueError(
        "Expected a whole checkpoint to go on from, found only damaged ones:\n  "
        + "\n  ".join(told.values())
        + "\nCopy one back from elsewhere, or start anew in another --workdir."
      )
    return None

  def restore_parts(
    self, step: int, *, abstract: State, shardings: State, optimizer: bool
  ) -> dict[str, Any]:
    """Fields of the state at a step of another run, to be put into a fresh one.

    Args:
      step: which one.
      abstract, shardings: as for `restore`.
      optimizer: whether its state and the counters are among them.

    Returns:
      "params", "rest", with `optimizer` "opt", "bad" and "step"; "ema" and "ema_rest", where the
      state is to have them: the stored ones, or copies of the parameters and statistics.

    Raises:
      Damaged, ValueError: as `restore`; the first says which steps are there besides.
    """
    parts = _parts(_targets(abstract, shardings))
    if not optimizer:
      del parts["train"]
    for name in OPTIONAL:
      if not self._at(step).has(name):
        parts.pop(name, None)
    items = self._restore_advised(step, parts)
    fields = {**items["model"], **items.get("train", {})}
    if abstract.ema is not None:
      ema = items["ema"] if "ema" in parts else jax.tree.map(jnp.copy, fields["params"])
      fields |= {"ema": ema, "ema_rest": _average_of_rest(items)}
    return fields

  def restore_weights(
    self, step: int, *, abstract: State, shardings: State, ema: bool
  ) -> tuple[Any, Any]:
    """(params, rest) at a step without the optimizer; `ema`: their moving averages, if kept.

    Raises:
      Damaged, ValueError: as `restore`; the first says which steps are there besides.
    """
    target = _targets(abstract, shardings)
    parts = {"model": {"params": target.params, "rest": target.rest}}
    if ema:
      parts["ema"] = target.params
      if self._at(step).has("ema_rest"):
        parts["ema_rest"] = target.rest
    items = self._restore_advised(step, parts)
    if ema:
      return items["ema"], items.get("ema_rest", items["model"]["rest"])
    return items["model"]["params"], items["model"]["rest"]

  def has_ema(self, step: int) -> bool:
    """Does the checkpoint at this step hold a moving average, or was it written with one?"""
    return self._at(step).has("ema")

  def _at(self, step: int) -> StoredStep:
    return StoredStep(self._manager, self.workdir / "checkpoints" / str(step), step)

  def _add_checksums(self, step: int) -> None:
    """To a whole checkpoint that has none: its run was killed between it and them."""
    stored = self._at(step).directory
    if not self._read_only and jax.process_index() == 0 and not (stored / checksums.NAME).exists():
      checksums.add(stored)

  def _set_aside(self, step: int) -> None:
    if jax.process_index() == 0:
      directory = self._at(step).directory
      aside = directory.with_name(f"{step}.damaged")
      if storage.in_bucket(directory):
        storage.move_folder(directory, aside)
      else:
        if aside.exists():
          aside.rmtree()
        directory.rename(aside)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f"checkpoint {step} set aside")
    self._manager.reload()

  def _restore(
    self, step: int, parts: Mapping[str, Any], *, verify: bool = True
  ) -> Mapping[str, Any]:
    stored = self._at(step)
    fault = stored.fault_of_checksums(parts) if verify else None
    if fault:
      raise Damaged(fault)
    stored.check(parts)
    wanted = {name: ocp.args.StandardRestore(part) for name, part in parts.items()}
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**wanted))
    except jax.errors.JaxRuntimeError:  # memory, or another process
      raise
    except Exception as error:  # Orbax raises bare ones
      raise stored.damaged(faults.unreadable(stored.directory, error)) from error

  def _restore_advised(self, step: int, parts: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
      return self._restore(step, parts)
    except Damaged as error:
      others = [s for s in reversed(self.steps()) if s != step]
      advice = "There is no other one."
      if others:
        advice = (
          f"Others are at {', '.join(map(str, others))}: take one with {self.workdir}@{others[0]}"
        )
      raise Damaged(f"{error}. {advice}") from error


def open_run(workdir: str) -> Checkpoints:
  """The checkpoints of a run, to be read only; it knows the run's best one.

  Raises:
    ValueError: no run there.
  """
  path = bucket_arrays.path_of(workdir)
  if not storage.exists(path / "checkpoints"):
    raise ValueError(
      f"Expected a run of ofa_jax.train with a checkpoints/ folder, found none in {path}"
    )
  described = {}
  with contextlib.suppress(OSError, ValueError):  # told by whoever needs it
    described = json.loads((path / "config.json").read_text())
  metric = described.get("best_metric")
  best = metric and Best(metric, described.get("best_mode", "max"), log.read_metrics(path))
  return Checkpoints(str(path), best=best or None, read_only=True)


def open_weights(
  workdir: str, *, abstract: State, shardings: State, which: str | None = None
) -> tuple[int, Any, Any]:
  """(step, params, rest) of a checkpoint of a run, its moving average where it has one.

  Args:
    workdir: of the run.
    abstract, shardings: what to read, and where it goes.
    which: the step, "best" or "latest", which is what None means.

  Raises:
    ValueError: no such checkpoint there, a damaged one, or one of another model.
  """
  with open_run(workdir) as checkpoints:
    step = checkpoints.find(which)
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


def _once(tree: Any) -> Any:
  """A process that is alone writes small arrays that all of its devices hold from one of them.

  From each device Orbax would take another part, by a program for every shape and part: the first
  save compiled for seconds. Of large arrays that is quicker, and several processes write a part
  each.
  """

  def one(x):
    return x.addressable_data(0) if x.is_fully_replicated and x.nbytes < _SMALL else x

  return tree if jax.process_count() > 1 else jax.tree.map(one, tree)


def _average_of_rest(items: Mapping[str, Any]) -> Any:
  """The statistics' average of a checkpoint; a copy of the statistics where it has none."""
  return items.get("ema_rest") or jax.tree.map(jnp.copy, items["model"]["rest"])


def _targets(abstract: State, shardings: State) -> State:
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
  )
