"""Checkpoints of a run: saved in the background, atomic, restored onto any mesh.

One directory per step holds `model` (parameters and running statistics, what evaluation and
conversion read), `train` (optimizer and counters), and where there is a moving average `ema`, that
of the parameters, and `ema_rest`, that of the statistics, which runs made before do not have.
Nothing random and no data position is stored: both are functions of the step.

The newest ones stay, and beside them the best one by a metric. `W@8`, `W@best`, `W@latest` and
`W/checkpoints/8` name a step of the run in the folder W.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from ofa_jax import faults, log, trees
from ofa_jax.best import Best, Keep
from ofa_jax.step import State

ITEMS = ("model", "ema", "ema_rest", "train")
OPTIONAL = ("ema", "ema_rest")
LATEST, BEST = "latest", "best"


class Damaged(ValueError):  # noqa: N818 (named after what it reports)
  """A stored checkpoint is not what was written."""


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
    # Orbax reports every array it touches at INFO, warns of defaults that are meant, and repeats
    # what it raises.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    faults.silence_echoes()
    self.workdir = epath.Path(workdir).resolve()
    self.best = best  # may be set later
    self._manager = ocp.CheckpointManager(
      self.workdir / "checkpoints",
      item_handlers={name: ocp.StandardCheckpointHandler() for name in ITEMS},
      options=ocp.CheckpointManagerOptions(
        preservation_policy=Keep(keep, self.best_step),
        enable_async_checkpointing=True,
        create=not read_only,
        read_only=read_only,
      ),
    )

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    try:
      self._manager.close()
    except Exception:
      if error is None:  # else it is the same fault again, or what came of it
        raise

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
      Damaged: it is not what was written.
      ValueError: the checkpoint holds other parameters than the config's model; all of them.
    """
    parts = _parts(_targets(abstract, shardings))
    if not self._has(step, "ema_rest"):
      parts.pop("ema_rest", None)
    items = self._restore(step, parts)
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
      fault = self._agreed_fault(step)
      if fault is None:
        try:
          state = self.restore(step, abstract=abstract, shardings=shardings)
        except Damaged as error:
          if jax.process_count() > 1:  # the others may have read their parts, and wait
            raise
          fault = str(error)
        else:
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
      if not self._has(step, name):
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
      if self._has(step, "ema_rest"):
        parts["ema_rest"] = target.rest
    items = self._restore_advised(step, parts)
    if ema:
      return items["ema"], items.get("ema_rest", items["model"]["rest"])
    return items["model"]["params"], items["model"]["rest"]

  def has_ema(self, step: int) -> bool:
    """Does the checkpoint at this step hold a moving average, or was it written with one?"""
    return self._has(step, "ema")

  def _has(self, step: int, item: str) -> bool:
    if (self._directory(step) / item).exists():
      return True
    try:
      written = json.loads((self._directory(step) / "_CHECKPOINT_METADATA").read_text())
      return item in written["item_handlers"]
    except (OSError, ValueError, KeyError, TypeError):
      return False

  def _directory(self, step: int) -> epath.Path:
    return self.workdir / "checkpoints" / str(step)

  def _damaged(self, step: int, reason: str) -> Damaged:
    return Damaged(f"The checkpoint at step {step} is damaged: {self._directory(step)}/{reason}")

  def _fault(self, step: int) -> str | None:
    """What shows of damage without reading the arrays."""
    try:
      self._metadata(step)
    except Damaged as error:
      return str(error)
    return None

  def _agreed_fault(self, step: int) -> str | None:
    """`_fault` as process 0 sees it, the same on all."""
    if jax.process_count() == 1:
      return self._fault(step)
    fault = self._fault(step) if jax.process_index() == 0 else None
    if multihost_utils.broadcast_one_to_all(np.asarray(fault is not None)):
      return fault or f"The checkpoint at step {step} is damaged (process 0 has the reason)"
    return None

  def _set_aside(self, step: int) -> None:
    if jax.process_index() == 0:
      directory = self._directory(step)
      aside = directory.with_name(f"{step}.damaged")
      if aside.exists():
        aside.rmtree()
      directory.rename(aside)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f"checkpoint {step} set aside")
    self._manager.reload()

  def _metadata(self, step: int) -> Mapping[str, Any]:
    """The items' trees; Damaged where one cannot be read or is gone."""
    try:
      metadata = self._manager.item_metadata(step)
    except (OSError, ValueError, KeyError, TypeError) as error:
      for name in ITEMS:
        if not _is_json(self._directory(step) / name / "_METADATA"):
          raise self._damaged(step, f"{name}/_METADATA cannot be read") from error
      raise self._damaged(step, faults.unreadable(self._directory(step), error)) from error
    for name in ITEMS:
      wanted = name not in OPTIONAL or self._has(step, name)
      if wanted and (metadata.get(name) is None or metadata[name].tree is None):
        raise self._damaged(step, f"{name}/_METADATA is missing; was it copied in part?")
    return metadata

  def _restore(self, step: int, parts: Mapping[str, Any]) -> Mapping[str, Any]:
    self._check(step, parts)
    wanted = {name: ocp.args.StandardRestore(part) for name, part in parts.items()}
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**wanted))
    except jax.errors.JaxRuntimeError:  # memory, or another process
      raise
    except Exception as error:  # Orbax raises bare ones
      raise self._damaged(step, faults.unreadable(self._directory(step), error)) from error

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

  def _check(self, step: int, parts: Mapping[str, Any]) -> None:
    metadata = self._metadata(step)
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


def split_step(name: str) -> tuple[str, str | None]:
  """The folder and the step that a name means: of "W@8" and "W/checkpoints/8" ("W", "8").

  A folder that is called so wins; a name without a step has None.
  """
  path = epath.Path(name)
  if path.parent.name == "checkpoints" and path.name.isdigit():
    return str(path.parent.parent), path.name
  folder, at, step = name.rpartition("@")
  if at and folder and (step.isdigit() or step in (BEST, LATEST)) and not os.path.exists(name):
    return folder, step
  return name, None


def open_run(workdir: str) -> Checkpoints:
  """The checkpoints of a run, to be read only; it knows the run's best one.

  Raises:
    ValueError: no run there.
  """
  path = epath.Path(workdir).resolve()
  if not (path / "checkpoints").exists():
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


def _is_json(path: epath.Path) -> bool:
  try:
    json.loads(path.read_text())
  except (OSError, ValueError):
    return not path.parent.exists()
  return True


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


def _average_of_rest(items: Mapping[str, Any]) -> Any:
  """The statistics' average of a checkpoint; a copy of the statistics where it has none."""
  return items.get("ema_rest") or jax.tree.map(jnp.copy, items["model"]["rest"])


def _targets(abstract: State, shardings: State) -> State:
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
  )
