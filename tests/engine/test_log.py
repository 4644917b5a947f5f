"""What a person sees of a run while it goes on."""

import pytest

from ofa_jax.engine import log
from ofa_jax.tasks.caption import Caption
from ofa_jax.tasks.contrastive import Contrastive


@pytest.mark.parametrize(("task", "unit"), [(Contrastive, "pairs"), (Caption, "rows")])
def test_the_bar_counts_what_the_rows_of_the_task_are(task, unit, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
  monkeypatch.setenv("COLUMNS", "120")
  with log.Log(str(tmp_path), steps=6, start=0, unit=task.unit) as out:
    out.progress(3, loss=1.0, rate=1234.0)
  assert f"1234 {unit}/s" in capsys.readouterr().out
