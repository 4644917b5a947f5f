"""What a person sees of a run while it goes on."""

import logging
import math
import re

import pytest
import rich.console
from PIL import Image

from ofa_jax.engine import curves, log
from ofa_jax.tasks.caption import Caption
from ofa_jax.tasks.contrastive import Contrastive

LONG = (
  "Compiled in 21.5 s; per device 45.5 MiB state and batch + 149.9 MiB gradients and activations = "
  "195.5 MiB, kept in /a/folder/whose/name/is/longer/than/a/line/of/a/terminal/has/room/for/indeed"
)


@pytest.fixture
def terminal(monkeypatch):
  monkeypatch.setenv("FORCE_COLOR", "1")
  monkeypatch.setenv("NO_COLOR", "1")
  monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize(("task", "unit"), [(Contrastive, "pairs"), (Caption, "rows")])
def test_the_bar_counts_what_the_rows_of_the_task_are(task, unit, tmp_path, terminal, capsys):
  with log.Log(str(tmp_path), steps=6, start=0, unit=task.unit) as out:
    out.progress(3, loss=1.0, rate=1234.0)
  shown = capsys.readouterr().out
  assert "loss 1.0000" in shown and f"1234 {unit}/s" in shown


def test_what_is_waited_for_stands_where_loss_and_rate_will_be(tmp_path, terminal, capsys):
  with log.Log(str(tmp_path), steps=6, start=0, unit="pairs") as out:
    with out.waiting("compiling"):
      out.line("amid it")
    before = capsys.readouterr().out
    out.progress(3, loss=1.0, rate=10.0)
    out.line("after it")
  after = capsys.readouterr().out
  assert "compiling… 0 s" in before
  assert "nan" not in before + after and "pairs/s" not in before
  assert "compiling" not in after.partition("after it")[2]


def test_lines_on_a_terminal_are_broken_between_words(tmp_path, terminal, capsys):
  with log.Log(str(tmp_path), steps=6, start=0) as out:
    out.table("a run", [("model", LONG), ("data", "8,622 pairs")])
    out.line(LONG)
  words = set(LONG.split())
  shown = re.sub(r"\x1b\[\S*?[a-zA-Z]|\r", "", capsys.readouterr().out).splitlines()
  shown = [line for line in shown if not line.startswith("step 0/6")]
  pieces = [word for line in shown for word in line.split() if "/" in word or "MiB" in word]
  assert pieces and words.issuperset(pieces)
  whole = [line for line in shown if "/a/folder" not in line]
  assert max(map(len, whole)) <= 80
  assert (tmp_path / "log.txt").read_text().endswith(f"| {LONG}\n")  # one line in the file


def test_lines_elsewhere_are_as_they_are():
  console = rich.console.Console(force_terminal=False, width=80)
  assert log.for_terminal(LONG, console) == LONG
  wide = log.for_terminal("一只猫 " * 30, rich.console.Console(force_terminal=True, width=40))
  assert all(rich.cells.cell_len(line) <= 40 for line in wide.splitlines())


def test_parts_that_a_batch_had_nothing_of_are_left_out(tmp_path):
  nan = float("nan")
  with log.Log(str(tmp_path), steps=6, start=0) as out:
    out.metrics(1, {"train/loss": nan, "train/caption/loss": nan, "train/vqa/loss": 0.5})
  (row,) = log.read_metrics(tmp_path)
  assert math.isnan(row.pop("train/loss")) and row == {"step": 1, "train/vqa/loss": 0.5}


def test_what_the_package_warns_of_is_in_the_log(tmp_path):
  with log.Log(str(tmp_path), steps=6, start=0):
    logging.getLogger("ofa_jax.checksums").warning("a file is %s", "odd")
  logging.getLogger("ofa_jax.checksums").warning("afterwards")
  text = (tmp_path / "log.txt").read_text()
  assert "| WARNING | Rank 0 | a file is odd\n" in text and "afterwards" not in text


ROWS = [
  {"step": 1, "train/loss": 4.0, "train/lr": 0.1, "train/rows_per_s": 99.0},
  {"step": 2, "valid/loss": 2.0, "valid/t2i_r1": 0.1, "valid/cider": 0.5, "valid/logit_scale": 4.6},
  {"step": 2, "valid/t2i_mean_rank": 900.0, "valid/i2t_median_rank": 1.0},
  {"step": 4, "valid/loss": 1.0, "valid/t2i_r1": 0.9, "valid/cider": 8.3},
]


def test_every_panel_of_the_curves_has_one_scale(drawn, tmp_path):
  assert curves.panels(ROWS) == {
    "loss": ["train/loss", "valid/loss"],
    "share": ["valid/t2i_r1"],
    "valid/cider": ["valid/cider"],
    "rank": ["valid/i2t_median_rank", "valid/t2i_mean_rank"],
  }
  curves.plot(ROWS, tmp_path / "curves.png")
  curves.plot(ROWS[:1], tmp_path / "one.png")
  with Image.open(tmp_path / "curves.png") as four, Image.open(tmp_path / "one.png") as one:
    assert four.width == 2 * one.width and four.height == 2 * one.height


def test_restarts_are_counted(tmp_path, capsys):
  for number in range(3):
    with log.Log(str(tmp_path), steps=6, start=2 * number) as out:
      out.begun("from scratch, seed 0", layout=["Process 0 on node7"])
    shown = capsys.readouterr().out
    assert (f"Restart {number} of this run, from step {2 * number}" in shown) == (number > 0)
  text = (tmp_path / "log.txt").read_text()
  assert text.count("Weights: from scratch") == text.count("Process 0 on node7") == 3
  assert text.count("Restart 1 of this run") == text.count("Restart 2 of this run") == 1
