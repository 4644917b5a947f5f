"""What a person sees of a run: lines, a progress bar, `metrics.jsonl` and curves.

Only process 0 prints and writes; the other processes hold the same object and it does nothing.
"""

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import rich.console
import rich.progress
import rich.table
from etils import epath

from ofa_jax import files
from ofa_jax.engine import writers

METRICS = "metrics.jsonl"
CURVES = "curves.png"


class Log:
  """Console, `log.txt` and `metrics.jsonl` of one run; use as a context manager.

  Lines are `2026-01-31,12:00:00 | INFO | Rank 0 | text`. The bar shows only on a terminal.

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
    self.folder = epath.Path(workdir)
    self._console = rich.console.Console(quiet=not self._main, highlight=False, soft_wrap=True)
    self._bar = rich.progress.Progress(
      rich.progress.TextColumn("step"),
      rich.progress.MofNCompleteColumn(),
      rich.progress.BarColumn(),
      rich.progress.TextColumn("loss {task.fields[loss]:.4f}"),
      rich.progress.TextColumn("{task.fields[rate]:.0f} " + unit + "/s"),
      rich.progress.TimeRemainingColumn(),
      console=self._console,
      disable=not (self._main and self._console.is_terminal),
      transient=True,
    )
    self._task = self._bar.add_task("train", total=steps, completed=start, loss=math.nan, rate=0.0)
    self._start = start
    self._rows: list[dict[str, float]] = []
    self._log_to, self._described = log_to, described or {}
    self._writers: list[writers.Writer] = []

  def __enter__(self):
    if self._main:
      self.folder.mkdir(parents=True, exist_ok=True)
      self._rows = [r for r in read_metrics(self.folder) if r["step"] <= self._start]
      files.write_text(self.folder / METRICS, "".join(json.dumps(r) + "\n" for r in self._rows))
      self._writers = writers.open_writers(
        self._log_to, self.folder, start=self._start, described=self._described
      )
    self._bar.start()
    return self

  def __exit__(self, error, *_):
    self._bar.stop()
    for writer in self._writers:
      writer.close(failed=error is not None)

  @property
  def history(self) -> list[dict[str, float]]:
    """Rows of `metrics.jsonl` so far, those of earlier starts included (process 0 only)."""
    return self._rows

  def line(self, text: str, *, level: str = "INFO") -> None:
    """One line on the console and in `log.txt`."""
    if self._main:
      self._console.print(_stamped(text, level), markup=False)
      self.record(text, level=level)

  def record(self, text: str, *, level: str = "INFO") -> None:
    """One line in `log.txt` alone."""
    if self._main:
      append(self.folder / "log.txt", _stamped(text, level) + "\n")

  def evaluated(self, step: int) -> bool:
    """Are there metrics of an evaluation at this step (process 0 only)?"""
    names = {name for row in self._rows if row["step"] == step for name in row}
    return any(name != "step" and not name.startswith("train/") for name in names)

  def show(self, renderable: rich.console.RenderableType) -> None:
    """A table or picture for the console."""
    self._console.print(renderable)

  def metrics(self, step: int, values: Mapping[str, float]) -> None:
    """One row of `metrics.jsonl`; floats read back bit-equal.

    A row that is there already, from a run that was started again after its end, is not repeated.
    """
    row = {"step": step, **{k: float(v) for k, v in values.items()}}
    if not self._main or row in self._rows:
      return
    self._rows.append(row)
    append(self.folder / METRICS, json.dumps(row) + "\n")
    for writer in self._writers:
      writer.row(step, {k: v for k, v in row.items() if k != "step"})

  def progress(self, step: int, *, loss: float | None = None, rate: float | None = None) -> None:
    """Moves the bar to a step."""
    fields = {k: v for k, v in (("loss", loss), ("rate", rate)) if v is not None}
    self._bar.update(self._task, completed=step, **fields)

  def curves(self) -> None:
    """Redraws `curves.png` from the metrics so far."""
    if self._main and self._rows:
      plot(self._rows, self.folder / CURVES)


def _stamped(text: str, level: str) -> str:
  stamp = time.strftime("%Y-%m-%d,%H:%M:%S")
  return f"{stamp} | {level} | Rank {jax.process_index()} | {text}"


def read_metrics(workdir: epath.PathLike) -> list[dict[str, float]]:
  """Rows of a run's `metrics.jsonl`; lines that a crash or a full disk spoiled are dropped."""
  path = epath.Path(workdir) / METRICS
  rows = []
  for line in path.read_bytes().splitlines() if path.exists() else ():
    try:
      row = json.loads(line)
      if isinstance(row["step"], int):
        rows.append(row)
    except (ValueError, TypeError, KeyError):
      continue
  return rows


def append(path: epath.Path, text: str) -> None:
  """Appends to a local file, or rewrites one in a bucket, where files cannot grow."""
  if "://" in str(path):
    path.write_text((path.read_text() if path.exists() else "") + text)
    return
  with open(path, "a", encoding="utf-8") as f:
    f.write(text)


def quiet_libraries() -> None:
  """Keeps the libraries' own progress notes off the console; their warnings stay."""
  for name in ("absl", "jax._src.xla_bridge", "orbax"):
    logging.getLogger(name).setLevel(logging.WARNING)


def table(title: str, rows: Sequence[tuple[str, str]]) -> rich.table.Table:
  """Two columns, what and how much."""
  result = rich.table.Table(title=title, show_header=False, title_justify="left", min_width=60)
  result.add_column(style="bold", no_wrap=True)
  result.add_column(overflow="fold")
  for name, value in rows:
    result.add_row(name, value)
  return result


def plot(rows: Sequence[Mapping[str, float]], path: epath.PathLike) -> None:
  """Losses on the left, the other metrics of evaluations on the right, as PNG."""
  import matplotlib.figure  # slow to import, and needed once a run

  names = sorted({k for r in rows for k in r if k != "step"})
  losses = [n for n in names if n.endswith("loss")]
  # Ranks go to thousands, and the scale of the logits to 4.6, where the others are shares.
  scores = [
    n
    for n in names
    if not n.startswith("train/") and not n.endswith(("loss", "_rank", "logit_scale"))
  ]
  figure = matplotlib.figure.Figure(figsize=(12, 4), layout="constrained")
  panels = ((losses, "loss"), (scores, "evaluation"))
  for axes, (group, title) in zip(figure.subplots(1, 2), panels, strict=True):
    for name in group:
      points = [(r["step"], r[name]) for r in rows if name in r]
      marker = "o" if len(points) < 30 else None
      axes.plot(*zip(*points, strict=True), label=name, marker=marker, markersize=3, linewidth=1.2)
    axes.set(title=title, xlabel="step")
    axes.grid(alpha=0.3)
    if group:  # beside the curves, never on them
      axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
  with epath.Path(path).open("wb") as f:
    figure.savefig(f, format="png", dpi=120)


def human_bytes(size: float) -> str:
  """1536 -> "1.5 KiB"."""
  for unit in ("B", "KiB", "MiB", "GiB"):
    if size < 1024:
      return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
    size /= 1024
  return f"{size:.1f} TiB"
