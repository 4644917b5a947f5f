r"""Trains or fine-tunes a model of any family, on one device or a pod.

  python -m ofa_jax.train --config=configs/quickstart.py --workdir=runs/digits
  python -m ofa_jax.train --config=configs/cnclip_vith14.py --workdir=D --config.optim.lr=2e-5

The workdir receives `config.json`, `log.txt`, `metrics.jsonl`, `curves.png`, `checkpoints/` and
`results/` (predictions, pages of pictures); the same command started again goes on from the newest
checkpoint, bit for bit. `--config.resume=W@STEP` goes on from another run in a new workdir.
SIGTERM or Ctrl-C saves a checkpoint at the step or evaluation that it falls into and ends with
`--interrupted-status`; Ctrl-C twice ends at once.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from ofa_jax import cli, evaluate, first_state, host_calls, outputs, storage
from ofa_jax.config import Config, epoch_end, is_due, mesh_sizes, to_dict
from ofa_jax.data import pipeline
from ofa_jax.data.streams import Streams, unnamed
from ofa_jax.engine import (
  checkpoint,
  cluster,
  config_file,
  faults,
  huge_pages,
  lock,
  log,
  overview,
  processes,
  saving,
  sharding,
  step,
  watchdog,
)
from ofa_jax.engine.best import Best
from ofa_jax.engine.clock import Clock
from ofa_jax.validation import check_best, validate


def train(config: Config, workdir: str, *, stop_status: int = 0) -> dict[str, float]:
  """Runs a config to its end and returns the metrics of its evaluations.

  Args:
    config: what to train.
    workdir: folder of the run; no other process may train in it.
    stop_status: of a process that is told to stop while it compiles, where only its end is left.

  Raises:
    ValueError: the config, the data or the checkpoint do not fit; all found faults, before the
      first compile.
    FloatingPointError: too many non-finite steps in a row.
    pipeline.TooManyBadRows: more undecodable rows than `config.max_bad_rate`.
    lock.HeldError: another process trains in this workdir.
    processes.Stopped: told to stop by SIGTERM or Ctrl-C, it has saved the step that it was at.
  """
  with processes.one_fate(), watchdog.Notice(status=stop_status) as notice:
    validate(config, devices=jax.device_count(), hosts=jax.process_count())
    with contextlib.ExitStack() as opened:
      with notice.nothing_to_save("Told to stop before the first step: nothing is lost"):
        run, state = _open(config, workdir, notice, opened)
      return run.whole(state)


def _open(config, workdir, notice, opened):
  """The run and the state that it goes on from; what they hold is closed with `opened`."""
  note = None
  if jax.process_index() == 0:
    outputs.check_folder(workdir, flag="--workdir")
    note = opened.enter_context(lock.one_writer(workdir))
  mesh = sharding.make_mesh(mesh_sizes(config.mesh, jax.device_count()))
  rows = Streams.of(config.task.examples("train"), config.task.batch_sizes(config.batch_size))
  steps = config.steps
  if steps is None:
    steps = epoch_end(config.epochs, rows=len(rows), batch_size=config.batch_size)
  check_best(config, rows=len(rows), steps=steps)
  program = step.build(config, mesh, steps=steps)
  evaluators = evaluate.evaluators(program)

  opened.enter_context(faults.explained(workdir))
  checkpoints = opened.enter_context(checkpoint.Checkpoints(workdir, keep=config.keep))
  notes = [note] if note else []
  state, origin = first_state.find(program, checkpoints, steps=steps, warn=notes.append)
  start = int(state.step)
  if config.best_metric is not None:
    past = [row for row in log.read_metrics(workdir) if row["step"] <= start]
    checkpoints.best = Best(config.best_metric, config.best_mode, past)
  checkpoints.remove_surplus()
  out = opened.enter_context(
    log.Log(
      workdir,
      steps=steps,
      start=start,
      unit=config.task.unit,
      log_to=config.log_to,
      described=to_dict(config),
    )
  )
  opened.enter_context(processes.one_fate(functools.partial(out.record, level="ERROR")))
  named = overview.rows(
    program, num_rows=rows.num_rows, steps=steps, origin=origin, workdir=workdir
  )
  out.table(config.name or "ofa_jax", named)
  few = [f"Trained: {text}" for name, text in named if name == "trained"]
  out.begun(origin, layout=[*few, *cluster.layout()])
  if checkpoints.steps():
    out.line(f"Checkpoints: {checkpoints.listing()}")
  if jax.process_index() == 0:
    config_file.save(config, workdir, warn=functools.partial(out.line, level="WARNING"))
  for readers in (rows, *evaluators):
    notes += readers.notes
  for text in notes:
    out.line(text, level="WARNING")
  for text in overview.advice(config, backend=jax.default_backend()):
    out.line(text)
  saver = saving.Saver(
    checkpoints, say=functools.partial(out.line, level="WARNING"), before=out.flush
  )
  watch = opened.enter_context(watchdog.Watchdog(config.step_timeout))
  run = _Run(program, rows, evaluators, saver, out, watch, notice, steps=steps)
  return run, state


@dataclasses.dataclass
class _Run:
  """The loop and what it holds on to; an epoch is one of the main stream."""

  program: step.Program
  rows: Streams
  evaluators: list[evaluate.Evaluator]
  saver: saving.Saver
  out: log.Log
  watch: watchdog.Watchdog
  notice: watchdog.Notice
  steps: int
  told_to_stop: bool = False

  def whole(self, state: step.State) -> dict[str, float]:
    """Trains to the end, saves and evaluates.

    Raises:
      processes.Stopped: told to stop; the state is saved.
    """
    with contextlib.closing(self.rows):
      state = self.loop(state)
    self.watch.beat(watchdog.ALLOWANCE)
    self.saver.save(state)
    results = {} if self.told_to_stop else self._evaluate(state, self.evaluators, last=True)
    self.saver.finish(state)
    if self.told_to_stop:
      text = f"Told to stop: saved step {int(state.step)}; the same command goes on from it"
      self.out.line(text)
      raise processes.Stopped(text)
    self._tell_best(results, self.evaluators)
    self.out.curves()
    return results

  def loop(self, state: step.State) -> step.State:
    """Steps until the end: update, log, evaluate, save."""
    config, out = self.program.config, self.out
    start = int(state.step)
    if start >= self.steps:
      out.line(f"nothing left to train: the checkpoint is at step {start} of {self.steps}")
      return state
    self._catch_up(state, start)
    if self.told_to_stop:
      return state
    bad_rows = pipeline.BadRows(config.max_bad_rate, self._warn)
    batches = pipeline.train_batches(
      unnamed(self.rows.rows),
      batch_size=unnamed(self.rows.sizes),
      seed=config.seed,
      start=start,
      host=jax.process_index(),
      hosts=jax.process_count(),
      workers=config.workers,
      bad=bad_rows,
    )
    saved = (
      f"step {start} is saved, the same command goes on from it" if start else "nothing is lost"
    )
    with batches:
      with self.notice.nothing_to_save(f"Told to stop before the first step: {saved}"):
        batch = sharding.to_global(next(batches), self.program.mesh)
        frozen = config.task.frozen(self.program.mesh, precision=config.precision)
        update = self._compile(state, batch, frozen)
      clock = Clock(start)
      before = None
      self.watch.beat(watchdog.ALLOWANCE)
      for done in range(start + 1, self.steps + 1):
        state, metrics = update(state, batch, frozen)
        if done < self.steps:
          with clock.waiting_for_data():
            batch = sharding.to_global(next(batches), self.program.mesh)
        if before is not None:  # one step late, so that the device never waits for the host
          _stop_if_diverged(config, before)
          self.watch.beat()
        before = metrics
        logs = (config.log_every > 0 and done % config.log_every == 0) or done == self.steps
        if logs:
          self._log(jax.device_get(metrics), done, clock)
        else:
          out.progress(done)
        self.told_to_stop = self.notice.reached()
        if not self.told_to_stop and done < self.steps:
          self._periodic(state, done, clock)
        if self.told_to_stop:
          break
        self.saver.poll(state)
    return state

  def _tell_best(self, results: dict[str, float], evaluators: Sequence[evaluate.Evaluator]) -> None:
    """Says which checkpoint is best now; ValueError where no evaluation reports its metric."""
    best = self.saver.checkpoints.best
    if best is None:
      return
    name = best.metric.partition("/")[0]
    if best.metric not in results and any(e.evaluation.name == name for e in evaluators):
      raise ValueError(
        f"best_metric: expected one that evals[{name}] reports ({', '.join(results)}), found "
        f"{best.metric!r}. The same command goes on with another one."
      )
    step = self.saver.checkpoints.best_step()
    if step is not None and results:
      self.out.line(f"Best checkpoint: {best.describe(step)}")

  def _evaluate(
    self, state: step.State, evaluators: list[evaluate.Evaluator], *, last: bool = False
  ) -> dict[str, float]:
    """Metrics of the evaluations at this step, logged; the moving average is used where kept.

    Told to stop, it logs nothing: they are made when the run goes on from this step. The last ones
    are only recorded: they are what `train` returns.
    """
    if not evaluators:
      return {}
    start = time.perf_counter()
    try:
      with self.out.waiting("evaluating"):
        results = evaluate.run_all(
          evaluators,
          *state.evaluated,
          folder=self.out.folder / "results",
          stop=self.notice.reached,
          log=self._warn,
        )
    except processes.Stopped:
      self.told_to_stop = True
      return {}
    done = int(state.step)
    self.out.metrics(done, results)
    if self.saver.checkpoints.best is not None:
      self.saver.checkpoints.best.add(done, results)
    shown = " | ".join(f"{k}: {v:.4f}" for k, v in results.items())
    say = self.out.record if last else self.out.line
    say(f"Evaluation at step {done} ({time.perf_counter() - start:.1f} s) | {shown}")
    position = {"step": done, "epoch": self._epoch(done)}
    for evaluation in (e.evaluation for e in evaluators):
      prefix = f"{evaluation.name}/"
      own = {k.removeprefix(prefix): v for k, v in results.items() if k.startswith(prefix)}
      line = evaluation.task.eval_line({**own, **position})
      if line:
        say(line)
    return results

  def _warn(self, text: str) -> None:
    self.out.line(text, level="WARNING")

  def _epoch(self, done: int) -> int:
    """The pass over the data in which an update reads its first row, from 1."""
    return (max(done, 1) - 1) * self.program.config.batch_size // len(self.rows) + 1

  def _is_due(self, done: int, *, steps: int, epochs: float) -> bool:
    size = {"rows": len(self.rows), "batch_size": self.program.config.batch_size}
    return is_due(done, steps=steps, epochs=epochs, **size)

  def _due(self, done: int) -> list[evaluate.Evaluator]:
    """The evaluations of this step."""
    return [
      e
      for e in self.evaluators
      if self._is_due(done, steps=e.evaluation.every, epochs=e.evaluation.every_epochs)
    ]

  def _periodic(self, state, done, clock):
    config, due = self.program.config, self._due(done)
    saves = self._is_due(done, steps=config.save_every, epochs=config.save_every_epochs)
    if not due and not saves:
      return
    jax.block_until_ready(state.step)
    host_calls.reraise()
    self.watch.beat(watchdog.ALLOWANCE)
    with clock.paused():
      results = self._evaluate(state, due)
      if self.told_to_stop:
        return
      if due:
        self.out.curves()
      if saves:
        self.saver.save(state)
        self.out.line(f"Saving checkpoint at step {done}")
      self._tell_best(results, due)
    self.watch.beat()

  def _catch_up(self, state, start):
    """Makes the evaluations of the step that the run goes on from, if it was stopped before."""
    due = self._due(start) if start else []
    if due and not processes.from_first(lambda: self.out.evaluated(start)):
      self._evaluate(state, due)
      self.out.curves()

  def _compile(self, state, batch, frozen):
    begin = time.perf_counter()
    with self.out.waiting("compiling"):
      compiled = step.train_step(self.program).lower(state, batch, frozen).compile()
    seconds = time.perf_counter() - begin
    text = f"Compiled in {seconds:.1f} s"
    memory = compiled.memory_analysis()
    if memory is not None:
      held, extra = memory.argument_size_in_bytes, memory.temp_size_in_bytes
      text += (
        f"; per device {log.human_bytes(held)} state and batch + {log.human_bytes(extra)} "
        f"gradients and activations = {log.human_bytes(held + extra)}"
      )
    self.out.line(text)
    for text in overview.after_compiling(seconds, cache=jax.config.jax_compilation_cache_dir):
      self.out.line(text)
    return compiled

  def _log(self, metrics, done, clock):
    config = self.program.config
    _stop_if_diverged(config, metrics)
    skipped, _ = metrics.pop("bad")
    batch_time, data_time = clock.lap(done)
    epoch, size = self._epoch(done), {"rows": len(self.rows), "batch_size": config.batch_size}
    begin, end = (epoch_end(e, **size) for e in (epoch - 1, epoch))
    values = {
      **{k: float(v) for k, v in metrics.items()},
      "data_time": data_time,
      "batch_time": batch_time,
      "rows_per_s": config.batch_size / batch_time,
      "skipped_steps": int(skipped),
    }
    position = {
      "step": done,
      "steps": self.steps,
      "epoch": epoch,
      "seen": (done - begin) * config.batch_size,
      "rows": (end - begin) * config.batch_size,
      "percent": 100 * (done - begin) / (end - begin),
      "batch_size": config.batch_size,
    }
    line = config.task.log_line({**values, **position})
    eta = time.strftime("%H:%M:%S", time.gmtime(batch_time * (self.steps - done)))
    line += f" | Rows/s: {values['rows_per_s']:.1f} | ETA: {eta}"
    if skipped:
      line += f" | Skipped non-finite steps: {skipped}"
    self.out.line(line)
    self.out.progress(done, loss=values["loss"], rate=values["rows_per_s"])
    self.out.metrics(done, {f"train/{k}": v for k, v in values.items()})
    advice = config.task.advise(self.out.history)
    if advice:
      self.out.line(advice, level="WARNING")


def _stop_if_diverged(config: Config, metrics: Mapping[str, jax.Array]) -> None:
  _, in_a_row = np.asarray(metrics["bad"])
  host_calls.reraise()  # such a step is not finite either
  if in_a_row > config.optim.max_bad_steps:
    raise FloatingPointError(
      f"{in_a_row} steps in a row had a loss or gradient that is not finite (limit: "
      f"optim.max_bad_steps={config.optim.max_bad_steps}). Their updates were skipped; lower "
      "optim.lr, set optim.clip_norm, or look at the data of these steps."
    )


def main() -> None:
  """The command."""
  config = cli.define_config()
  workdir = cli.define_path(
    "workdir", "Folder of the run, local or in a bucket; resumes what it holds.",
    required=True,
  )  # fmt: skip

  status = cli.define_interrupted_status()
  cli.define_stage()

  def command():
    log.quiet_libraries()
    results = train(config.value, workdir.value, stop_status=status.value)
    if jax.process_index() == 0:
      for name, value in results.items():
        print(f"{name}: {value}")
      if results:
        print(f"These and all before them are in {storage.of(workdir.value) / log.METRICS}")

  cli.run(command)


if __name__ == "__main__":
  huge_pages.restart_with()
  main()
