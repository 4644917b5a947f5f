"""What a person sees of a run: lines, a progress bar, `metrics.jsonl` and curves.

Only process 0 prints and writes; the other processes hold the same object and it does nothing.
"""

import contextlib
import json
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import rich.cells
import rich.console
import rich.progress
import rich.text
from etils import epath

from ofa_jax import files, storage
from ofa_jax.engine import curves, growing, writers

METRICS = "metrics.jsonl"
CURVES = "curves.png"
TEXT = "log.txt"
_WEIGHTS = "Weights: "  # begins a line that each start of a run writes
_INDENT = "  "  # of the later lines of a text


class Log:
  """Console, `log.txt` and `metrics.jsonl` of one run; use as a context manager.

  Lines are `2026-01-31,12:00:00 | INFO | Rank 0 | text`. On a terminal they are broken between
  words, and a bar below them shows the step, or what is being waited for.

  Attributes:
    folder: the workdir.
  """

  def __init__(
    self,
    workdir: str,
    *,
    steps: int,
    start: int,
    unit: str = "rows",
    log_to: Sequence[str] = (),
    described: Mapping[str, Any] | None = None,
  ):
    """Opens the run's files.

    Args:
      workdir: local or bucket path.
      steps: updates of the whole run.
      start: updates already done; metrics of later ones, left by a killed run, are removed.
      unit: what a row of the batch is, for the rate.
      log_to: where metrics go besides, see `ofa_jax.engine.writers`.
      described: the config as JSON-able data, for those.
    """
    self._main = jax.process_index() == 0
    self.folder = storage.of(workdir)
    self._lines, self._metrics = (
      growing.Growing(str(self.folder / name)) for name in (TEXT, METRICS)
    )
    self._console = rich.console.Console(quiet=not self._main, highlight=False, soft_wrap=True)
    self._bar = rich.progress.Progress(
      rich.progress.TextColumn("step"),
      rich.progress.MofNCompleteColumn(),
      rich.progress.BarColumn(),
      _Now(unit),
      rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
      console=self._console,
      disable=not (self._main and self._console.is_terminal),
      transient=True,
    )
    self._task = self._bar.add_task("train", total=steps, completed=start)
    self._start = start
    self._rows: list[dict[str, float]] = []
    self._log_to, self._described = log_to, described or {}
    self._writers: list[writers.Writer] = []
    self._heard: _Warnings | None = None

  def __enter__(self):
    if self._main:
      storage.make_folder(self.folder)
      self._rows = [r for r in read_metrics(self.folder) if r["step"] <= self._start]
      files.write_text(self.folder / METRICS, "".join(json.dumps(r) + "\n" for r in self._rows))
      self._writers = writers.open_writers(
        self._log_to, self.folder, start=self._start, described=self._described
      )
      self._heard = _Warnings(self)
      self._heard.begin()
    self._bar.start()
    return self

  def __exit__(self, error, *_):
    self._bar.stop()
    if self._heard is not None:
      self._heard.end()
    for writer in self._writers:
      writer.close(failed=error is not None)
    for file in (self._lines, self._metrics):
      try:
        file.close()
      except OSError:
        if error is None:  # else it is what came of it
          raise

  def flush(self) -> None:
    """Returns when `log.txt` and `metrics.jsonl` have everything; OSError where they cannot."""
    for file in (self._lines, self._metrics):
      file.flush()

  @property
  def history(self) -> list[dict[str, float]]:
    """Rows of `metrics.jsonl` so far, those of earlier starts included (process 0 only)."""
    return self._rows

  def begun(self, origin: str, *, layout: Sequence[str] = ()) -> None:
    """Notes where the weights came from, and says so when the run was started before.

    Args:
      origin: of the weights.
      layout: lines on the processes of the job.
    """
    if not self._main:
      return
    path = self.folder / TEXT
    text = storage.read_bytes(path) if storage.exists(path) else b""
    before = text.count(f" | {_WEIGHTS}".encode())
    for text in (f"{_WEIGHTS}{origin}", *layout):
      self.record(text)
    if before:
      self.line(f"Restart {before} of this run, from step {self._start}")

  def line(self, text: str, *, level: str = "INFO") -> None:
    """One line on the console and in `log.txt`."""
    if self._main:
      self._console.print(for_terminal(_stamped(text, level), self._console), markup=False)
      self.record(text, level=level)

  def record(self, text: str, *, level: str = "INFO") -> None:
    """One line in `log.txt` alone."""
    if self._main:
      self._lines.append(_stamped(text, level) + "\n")

  def evaluated(self, step: int) -> bool:
    """Are there metrics of an evaluation at this step (process 0 only)?"""
    names = {name for row in self._rows if row["step"] == step for name in row}
    return any(name != "step" and not name.startswith("train/") for name in names)

  def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
    """What and how much, in two columns, on the console."""
    width = max(len(name) for name, _ in rows) + 2
    self._console.print(rich.text.Text(title, style="bold"))
    for name, value in rows:
      line = for_terminal(name.ljust(width) + value, self._console, indent=" " * width)
      shown = rich.text.Text(line)
      shown.stylize("bold", 0, len(name))
      self._console.print(shown)

  def metrics(self, step: int, values: Mapping[str, float]) -> None:
    """One row of `metrics.jsonl`; floats read back bit-equal.

    A row that is there already, from a run that was started again after its end, is not repeated.
    Of a part of a batch, such as "train/caption/loss", NaN says that the batch had none of it: it
    is left out.
    """
    there = {k: float(v) for k, v in values.items() if k.count("/") < 2 or not math.isnan(v)}
    row = {"step": step, **there}
    if not self._main or row in self._rows:
      return
    self._rows.append(row)
    self._metrics.append(json.dumps(row) + "\n")
    for writer in self._writers:
      writer.row(step, {k: v for k, v in row.items() if k != "step"})

  def progress(self, step: int, *, loss: float | None = None, rate: float | None = None) -> None:
    """Moves the bar to a step."""
    fields = {k: v for k, v in (("loss", loss), ("rate", rate)) if v is not None}
    self._bar.update(self._task, completed=step, **fields)

  @contextlib.contextmanager
  def waiting(self, text: str) -> Iterator[None]:
    """Shows `text… 23 s` in place of loss and rate while the block runs, on a terminal."""
    self._bar.update(self._task, refresh=True, doing=text, since=time.monotonic())
    try:
      yield
    finally:
      self._bar.update(self._task, refresh=True, doing=None)

  def curves(self) -> None:
    """Redraws `curves.png` from the metrics so far."""
    if self._main and self._rows:
      curves.plot(self._rows, self.folder / CURVES)


class _Warnings(logging.Handler):
  """What the package warns of while a run is on becomes lines of it."""

  _logger = logging.getLogger("ofa_jax")

  def __init__(self, out: Log):
    super().__init__(logging.WARNING)
    self._out = out

  def begin(self) -> None:
    self._before = self._logger.propagate
    self._logger.addHandler(self)
    self._logger.propagate = False

  def end(self) -> None:
    self._logger.removeHandler(self)
    self._logger.propagate = self._before

  def emit(self, record: logging.LogRecord) -> None:
    self._out.line(record.getMessage(), level=record.levelname)


class _Now(rich.progress.ProgressColumn):
  """What is being waited for, and for how long; else the loss and the rate, once there are any."""

  max_refresh = None

  def __init__(self, unit: str):
    super().__init__()
    self._unit = unit

  def render(self, task: rich.progress.Task) -> rich.text.Text:
    fields = task.fields
    if fields.get("doing"):
      return rich.text.Text(f"{fields['doing']}… {time.monotonic() - fields['since']:.0f} s")
    shown = [f"loss {fields['loss']:.4f}"] if "loss" in fields else []
    shown += [f"{fields['rate']:.0f} {self._unit}/s"] if "rate" in fields else []
    return rich.text.Text("  ".join(shown))


def for_terminal(text: str, console: rich.console.Console, *, indent: str = _INDENT) -> str:
  """The text in lines of the terminal's width, broken between words; elsewhere as it is.

  A word that is longer than a line, such as a path, stays whole, so that it can be copied.

  Args:
    text: perhaps of several lines.
    console: where it will be shown.
    indent: before all lines but the first of a line of the text.
  """
  if not console.is_terminal:
    return text
  return "\n".join(
    line for whole in text.split("\n") for line in _broken(whole, console.width, indent)
  )


def _broken(text: str, width: int, indent: str) -> list[str]:
  lines = [""]
  for word in re.findall(r"\s*\S+", text):
    if len(lines[-1]) > len(indent) and rich.cells.cell_len(lines[-1] + word) > width:
      lines.append(indent + word.lstrip())
    else:
      lines[-1] += word
  return lines


def _stamped(text: str, level: str) -> str:
  stamp = time.strftime("%Y-%m-%d,%H:%M:%S")
  return f"{stamp} | {level} | Rank {jax.process_index()} | {text}"


def read_metrics(workdir: epath.PathLike) -> list[dict[str, float]]:
  """Rows of a run's `metrics.jsonl`; lines that a crash or a full disk spoiled are dropped."""
  path = storage.of(workdir) / METRICS
  rows = []
  for line in storage.read_bytes(path).splitlines() if storage.exists(path) else ():
    try:
      row = json.loads(line)
      if isinstance(row["step"], int):
        rows.append(row)
    except (ValueError, TypeError, KeyError):
      continue
  return rows


def quiet_libraries() -> None:
  """Keeps the libraries' own progress notes off the console; their warnings stay."""
  for name in ("absl", "jax._src.xla_bridge", "orbax"):
    logging.getLogger(name).setLevel(logging.WARNING)


def human_bytes(size: float) -> str:
  """1536 -> "1.5 KiB"."""
  for unit in ("B", "KiB", "MiB", "GiB"):
    if size < 1024:
      return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
    size /= 1024
  return f"{size:.1f} TiB"
