"""What a run goes on from: its own newest checkpoint, another run, given weights, or nothing."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from ofa_jax import weights
from ofa_jax.engine import checkpoint, step
from ofa_jax.engine.step_name import split_step


def find(
  program: step.Program,
  checkpoints: checkpoint.Checkpoints,
  *,
  steps: int,
  warn: Callable[[str], None],
) -> tuple[step.State, str]:
  """The state to go on from, and a phrase that says where it came from.

  Args:
    program: of the run.
    checkpoints: of its workdir; what is there goes before all else.
    steps: that it is to make, for the phrase.
    warn: takes lines about what a person should look at.

  Raises:
    ValueError: what it shall begin with is not there, or is of another model.
  """
  config = program.config
  layout = {"abstract": program.abstract, "shardings": program.shardings}
  state = checkpoints.restore_newest(**layout, warn=warn)
  if state is not None:
    return state, f"resumed from this workdir at step {int(state.step)}"
  state = step.init(program)
  if config.resume is not None:
    return _resume(program, state, steps=steps)
  if config.init is None:
    return state, weights.from_scratch(config.model, seed=config.seed, warn=warn)
  loaded = weights.load_weights(program, config.init, initial=state.params)
  if loaded.changed:
    warn(f"{config.init} is not the whole of this model: {'; '.join(loaded.changed)}")
  fresh = ", ".join(["optimizer", *loaded.absent])
  averages = step.averages_of(config, loaded.params, loaded.rest)
  return dataclasses.replace(state, params=loaded.params, rest=loaded.rest, **averages), (
    "; ".join([f"of {config.init}", *loaded.resized, f"fresh {fresh}"])
  )


def _resume(program: step.Program, fresh: step.State, *, steps: int) -> tuple[step.State, str]:
  """The state of another run, with what is reset of it taken from a fresh one."""
  config = program.config
  workdir, which = split_step(config.resume)
  with checkpoint.open_run(workdir) as checkpoints:
    at = checkpoints.find(which)
    fields = checkpoints.restore_parts(
      at,
      abstract=program.abstract,
      shardings=program.shardings,
      optimizer=not config.reset_optimizer,
    )
  if config.reset_step:
    fields |= {"step": fresh.step, "bad": fresh.bad}
  else:
    fields["step"] = jax.device_put(np.int32(at), program.shardings.step)
  optimizer = "fresh optimizer" if config.reset_optimizer else "its optimizer"
  begin = "0, with data and schedule from their beginning" if config.reset_step else f"{at}"
  return dataclasses.replace(fresh, **fields), (
    f"of {workdir} at step {at}, {optimizer}; goes on at step {begin} of {steps}"
  )
