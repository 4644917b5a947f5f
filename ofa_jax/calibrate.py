r"""Makes the probabilities of an OFA's answers right, by answers whose rightness is known.

  python -m ofa_jax.calibrate --config=configs/ofa_vqa.py:large --checkpoint=runs/vqa@best

Answers the rows of the config's evaluations, as `evaluate` does, and fits to each of them one
number, the temperature, so that of the answers that get a probability of 0.7, 70 % are right. It is
stored with the model, in `calibration.json`: from then on `generate`, the API
(`return_probabilities=True`) and `evaluate` give each answer its probability, and say so.

What is right is what the task's metric counts: VQA's score of an answer, a box that overlaps the
right one by half, the label, the exact text that was read; of captions and summaries ROUGE-L, which
their probability then is a guess of. The expected calibration error (15 bins) is printed before and
after: after is measured crosswise, on each half of the rows with the temperature of the other half.

Take rows that the model was not trained on, and on which its best checkpoint was not chosen if you
have others: --config.evals[0].split=test.
"""

import dataclasses

import jax
from absl import flags

from ofa_jax import calibrations, cli, evaluate, hub
from ofa_jax.calibrations import Calibration
from ofa_jax.config import Config
from ofa_jax.engine import log
from ofa_jax.files import room_for
from ofa_jax.scoring.calibration import TEMPERATURES, Fit
from ofa_jax.validation import validate


def run(config: Config, name: str, *, only: tuple[str, ...] = ()) -> dict[str, Fit]:
  """Fits the temperatures of a stored model and stores them with it.

  Args:
    config: with evals.
    name: the model, as `hub.open_model` takes it; of a run the step that is taken now.
    only: names of the evals to fit to; (): all whose answers have probabilities.

  Returns:
    What was fitted, by the names of the calibrations.

  Raises:
    ValueError: no evaluation, or two of one kind of answers; a model that is a single file; or all
      are as `calibration.fit` refuses them. Where it takes some, the others are told.
  """
  validate(config, devices=jax.device_count(), hosts=jax.process_count())
  chosen = _chosen(config, only)
  source = hub.open_model(name)
  place = calibrations.place_of(source)
  if place is None:
    raise ValueError(
      f"Expected a model directory or a run of ofa_jax.train in {name}, which a calibration is "
      "kept with, found a single file; convert it first: python -m ofa_jax.convert FILE.pt DIR"
    )
  if source.form == "run":  # newer checkpoints may come meanwhile
    name = f"{place.parent.parent}@{place.name}"
  evals = tuple(evaluate.with_temperatures(e, TEMPERATURES) for e in chosen.values())
  config = dataclasses.replace(config, evals=evals)
  pending, loaded = evaluate.opened(config, name)
  fits, left_out = _fitted(dict(zip(chosen, pending, strict=True)), loaded)
  if jax.process_index() == 0:
    made = {known: _made(fits[known], chosen[known].task) for known in fits}
    with room_for(place):
      stored = calibrations.store(place, made)
    for known, fit in fits.items():
      for line in _lines(chosen[known].title, known, fit):
        print(line)
    for fault in left_out:
      print(f"not calibrated: {fault}")
    print(f"Stored in {stored}")
  return fits


def _chosen(config, only):
  """The evaluations to fit to, by the names of their calibrations."""
  named = [e for e in config.evals if not only or {e.name, e.title} & set(only)]
  unknown = sorted(set(only) - {name for e in named for name in (e.name, e.title)})
  if unknown:
    known = ", ".join(e.title for e in config.evals) or "none"
    raise ValueError(f"Expected names out of {known} in --evals, found {', '.join(unknown)}")
  chosen = {}
  for evaluation in named:
    known = getattr(evaluation.task, "calibrated_as", None)
    if known is None:
      continue
    if known in chosen:
      raise ValueError(
        f"Expected one evaluation of {known}, found {chosen[known].title} and {evaluation.title}. "
        f"Choose one: --evals={evaluation.title}"
      )
    chosen[known] = evaluation
  if not chosen:
    raise ValueError(
      "Expected a config with an evaluation of an OFA's answers, found "
      f"{', '.join(type(e.task).__name__ for e in named) or 'none'}"
    )
  return chosen


def _fitted(pending, loaded):
  """The fits by name, and why others are not among them; ValueError where there is none."""
  fits, faults = {}, []
  for known, evaluator in pending.items():
    try:
      fits[known] = evaluator.fit(loaded.params, loaded.rest)
    except ValueError as error:  # on all processes alike
      faults.append(str(error))
  if not fits:
    raise ValueError("\n".join(faults))
  return fits, faults


def _made(fit, task):
  kept = {k: v for k, v in fit._asdict().items() if not k.startswith("nll")}
  generated = task.calibrated_as.endswith("/generated")
  return Calibration(**kept, search=calibrations.searched(task.search) if generated else None)


def _lines(name, known, fit):
  yield (
    f"{name}: {known}: temperature {fit.temperature:.4g}, fitted to {fit.rows:,} answers, of which "
    f"{fit.right:.1%} are right"
  )
  yield (
    f"{name}: expected calibration error {fit.ece_before:.4f} before, {fit.ece_after:.4f} after; "
    f"cross-entropy {fit.nll_before:.4f} before, {fit.nll_after:.4f} after"
  )
  if fit.at_edge:
    yield (
      f"{name}: {fit.temperature:g} is the last temperature that is tried: no temperature makes "
      "these probabilities right; look at the data and the weights"
    )


def main() -> None:
  """The command."""
  config = cli.define_config()
  directory = cli.define_path(
    "checkpoint",
    "Workdir of a run, whose newest checkpoint is taken (W@STEP and W@best are others); or a model "
    "directory, a released name, a Hugging Face directory. The calibration is stored in it.",
    required=True,
  )
  only = flags.DEFINE_list(
    "evals",
    [],
    "Names of the config's evaluations to fit to, NAME or NAME/LABEL; default: all that can be.",
  )
  tokenizer = cli.define_path(
    "tokenizer", "Folder of an OFA's tokenizer, instead of the one that the config names."
  )
  cli.define_stage()

  def command():
    log.quiet_libraries()
    if tokenizer.value:
      evaluate.set_tokenizer(config.value, tokenizer.value)
    run(config.value, directory.value, only=tuple(only.value))

  cli.run(command)


if __name__ == "__main__":
  main()
