r"""Evaluates a checkpoint with the evaluations of a config.

  python -m ofa_jax.evaluate --config=configs/quickstart.py --checkpoint=runs/digits

Prints one line per metric, the same numbers that training printed at that step, and writes them to
`--output` as JSON where given; predictions of tasks that generate go to `--results`.
"""

import contextlib
import json
import pathlib
import sys
from collections.abc import Callable

import jax
import numpy as np

from ofa_jax import cli, files, outputs, storage, weights
from ofa_jax.config import Config, Eval, mesh_sizes
from ofa_jax.data import pipeline
from ofa_jax.engine import lock, log, processes, sharding, step
from ofa_jax.trees import Tree
from ofa_jax.validation import validate


class Evaluator:
  """One evaluation of a config, with its data opened once and its step compiled once."""

  def __init__(self, program: step.Program, evaluation: Eval, *, number: int = 0):
    """Opens the data and traces the predictions, before anything is compiled.

    Args:
      program: from `step.build`.
      evaluation: of its config.
      number: its place in the config, for the random numbers of the predictions.

    Raises:
      ValueError: faulty files, or predictions that cannot be made.
    """
    self.evaluation = evaluation
    self._program = program
    self._told = set()  # bad rows that were named
    self._streams = evaluation.task.streams(evaluation.split)
    self._predict = step.predict_step(program, evaluation.task, evaluation=number)
    self._trace()
    task, precision = evaluation.task, program.config.precision
    self._frozen = task.frozen(program.mesh, precision=precision, training=False)

  @property
  def notes(self) -> list[str]:
    """What a person should know of rows that were left out."""
    return [note for rows in self._streams.values() for note in rows.notes]

  def __call__(
    self,
    params: Tree,
    rest: Tree,
    *,
    folder: pathlib.Path | None = None,
    stop: Callable[[], bool] | None = None,
    log: Callable[[str], None] | None = None,
  ) -> dict[str, float]:
    """Metrics as `name/metric`, the same on every host.

    Rows that cannot be read are named once and counted every time; see `pipeline.BadRows`.

    Args:
      params, rest: the model's weights.
      folder: where the task's result files go, as `name_file`; None: nowhere.
      stop: asked after every batch, by every process; True ends the evaluation.
      log: gets the lines on unreadable rows; None: they go to the error output.

    Raises:
      pipeline.TooManyBadRows: more rows are unreadable than `config.max_bad_rate`.
      processes.Stopped: `stop` said so.
      processes.PeerError: on the other processes, what failed while process 0 scored.
    """
    predictions = {
      stream: self._run(stream, params, rest, np.uint32(place), stop, log or _to_stderr)
      for place, stream in enumerate(self._streams)
    }
    scores = processes.from_first(lambda: self._score(predictions, folder))
    return {self.evaluation.called(k): v for k, v in scores.items()}

  def _score(self, predictions, folder):
    task = self.evaluation.task
    name = "_".join(x for x in (self.evaluation.name, self.evaluation.label) if x)
    scores = task.score(predictions, self._streams)
    if folder is not None:
      for file, content in task.results(predictions, self._streams).items():
        storage.make_folder(folder)
        files.write_bytes(folder / f"{name}_{file}", content)
    return {k: float(v) for k, v in scores.items()}

  def _trace(self):
    """Traces the predictions of every stream, so that no fault waits for the first evaluation."""
    name, task, state = self.evaluation.name, self.evaluation.task, self._program.abstract
    frozen = task.frozen(
      self._program.mesh, precision=self._program.config.precision, training=False, load=False
    )
    for place, (stream, rows) in enumerate(self._streams.items()):
      fields = {**rows.blank(), "index": np.int32(0), "weight": np.float32(0)}
      batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((self._batch_size, *x.shape), x.dtype), fields
      )
      where = f"evals[{name}]: {type(task).__name__}.predict of the stream {stream!r}"
      try:
        jax.eval_shape(self._predict, state.params, state.rest, batch, np.uint32(place), frozen)
      except ValueError as e:
        raise ValueError(f"{where}: {e}") from e
      except Exception as e:
        e.add_note(where)
        raise

  @property
  def _batch_size(self):
    return self.evaluation.batch_size or self._program.config.batch_size

  def _run(self, stream, params, rest, number, stop, log):
    """The predictions of a stream, which is the evaluation's `number`-th, on every process."""
    config, rows = self._program.config, self._streams[stream]
    bad = pipeline.BadRows(config.max_bad_rate, log, known=self._told)
    batches = pipeline.eval_batches(
      rows,
      batch_size=self._batch_size,
      host=jax.process_index(),
      hosts=jax.process_count(),
      workers=config.workers,
      bad=bad,
    )
    predictions = {}
    waiting = None
    with batches:
      for batch in batches:
        batch = sharding.to_global(batch, self._program.mesh)
        outputs = self._predict(params, rest, batch, number, self._frozen)
        # One batch late: the device works on this one while the host copies the last.
        if waiting is not None:
          _collect(predictions, waiting, len(rows))
        waiting = outputs
        if stop is not None and stop():
          raise processes.Stopped(f"The evaluation {self.evaluation.name} was told to stop")
    if waiting is not None:
      _collect(predictions, waiting, len(rows))
    unreadable = int(np.sum(~predictions["valid"]))  # of all processes, the same on each
    if unreadable:
      which = f"{self.evaluation.name}: {unreadable} of the {len(rows)} rows of {stream!r}"
      if unreadable == len(rows):
        raise ValueError(
          f"{which} are unreadable, expected some that can be scored: {'; '.join(bad.names[:5])}. "
          "Repair the data."
        )
      log(f"{which} are unreadable and left out of its scores")
    return predictions


def evaluators(program: step.Program) -> list[Evaluator]:
  """All evaluations of the config, their data checked and their predictions traced."""
  return [Evaluator(program, e, number=i) for i, e in enumerate(program.config.evals)]


def run_all(
  pending: list[Evaluator],
  params: Tree,
  rest: Tree,
  *,
  folder: pathlib.Path | None = None,
  stop: Callable[[], bool] | None = None,
  log: Callable[[str], None] | None = None,
) -> dict[str, float]:
  """Metrics of several evaluations, see `Evaluator`; ValueError when two report one name."""
  metrics = {}
  for evaluator in pending:
    more = evaluator(params, rest, folder=folder, stop=stop, log=log)
    twice = sorted(more.keys() & metrics.keys())
    if twice:
      raise ValueError(f"Expected evals with different metrics, found {twice} twice; rename one")
    metrics.update(more)
  return metrics


def set_tokenizer(config: Config, folder: str) -> None:
  """Makes the tasks of a config, and of its evaluations, read another tokenizer.

  Raises:
    ValueError: none of them has one.
  """
  tasks = [config.task, *(evaluation.task for evaluation in config.evals)]
  readers = [task for task in tasks if hasattr(task, "tokenizer")]
  if not readers:
    kinds = ", ".join(sorted({type(task).__name__ for task in tasks}))
    raise ValueError(f"Expected a task with a tokenizer for --tokenizer, found {kinds}")
  for task in readers:
    task.tokenizer = folder


def run(config: Config, name: str, *, results: str | None = None) -> dict[str, float]:
  """Metrics of a stored model by the config's evaluations.

  Args:
    config: with evals.
    name: as for `load_weights`.
    results: folder for the result files of the tasks; None: not written.
  """
  validate(config, devices=jax.device_count(), hosts=jax.process_count())
  if not config.evals:
    raise ValueError("Expected a config with evals, found none")
  mesh = sharding.make_mesh(mesh_sizes(config.mesh, jax.device_count()))
  program = step.build(config, mesh, steps=1)
  pending = evaluators(program)  # faults of the data come before the weights are read
  loaded = weights.load_weights(program, name)
  if jax.process_index() == 0:
    for line in loaded.resized:
      print(f"{name}: {line}", file=sys.stderr)
  folder = None if results is None else storage.of(results)
  return run_all(pending, loaded.params, loaded.rest, folder=folder)


def _to_stderr(line: str) -> None:
  print(line, file=sys.stderr)


def _collect(predictions, outputs, size):
  outputs = {k: np.asarray(v) for k, v in outputs.items()}
  index = outputs.pop("index")
  real = index >= 0
  outputs["valid"] = outputs.pop("weight") > 0
  for name, values in outputs.items():
    if name not in predictions:
      predictions[name] = np.zeros((size, *values.shape[1:]), values.dtype)
    predictions[name][index[real]] = values[real]


def main() -> None:
  """The command."""
  config = cli.define_config()
  directory = cli.define_path(
    "checkpoint",
    "Workdir of a run, whose newest checkpoint is taken (W@STEP and W@best are others); or a model "
    "directory, a released name, a Hugging Face directory, a .pt file.",
    required=True,
  )
  output = cli.define_path("output", "JSON file for the metrics.")
  results = cli.define_path(
    "results", "Folder for the files of the tasks: predictions, pages of pictures."
  )

  tokenizer = cli.define_path(
    "tokenizer", "Folder of an OFA's tokenizer, instead of the one that the config names."
  )
  cli.define_stage()

  def command():
    log.quiet_libraries()
    if tokenizer.value:
      set_tokenizer(config.value, tokenizer.value)
    with contextlib.ExitStack() as held:
      if jax.process_index() == 0:
        if output.value is not None:
          read = (directory.value,)
          held.enter_context(cli.sole_writer(output.value, inputs=read, makes_parents=False))
        if results.value is not None:
          outputs.check_folder(results.value, flag="--results")
          note = held.enter_context(lock.one_writer(results.value))
          held.enter_context(files.room_for(results.value))
          if note:
            _to_stderr(note)
      metrics = run(config.value, directory.value, results=results.value)
      if jax.process_index() == 0:
        for name, value in metrics.items():
          print(f"{name}: {value}")
        if output.value:
          files.write_text(output.value, json.dumps(metrics, indent=2) + "\n")
          print(f"Metrics are in {output.value}")

  cli.run(command)


if __name__ == "__main__":
  main()
