"""coco-caption's scores, METEOR and SPICE by a stand-in for Java that speaks as they do."""

import pathlib
import sys

import pytest

from ofa_jax.scoring import coco, java
from ofa_jax.scoring.bleu import bleu
from ofa_jax.scoring.cider import cider, cider_d
from ofa_jax.scoring.rouge import rouge_l

TOLD = ["a dogs ball", "two cats"]
WRITTEN = [["A dog's ball.", "The ball, (red)"], ["Two cats!"]]
IN_WORDS = [["a dog 's ball", "the ball -lrb- red -rrb-"], ["two cats"]]

# METEOR counts here the words that a caption shares with its references, SPICE gives their number.
JAVA = """#!{python}
import json, os, sys
assert sys.argv[1] == "-jar" and os.path.isfile(sys.argv[3]), sys.argv
if sys.argv[3].startswith("meteor"):
  assert sys.argv[2:] == ["-Xmx2G", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
  assert os.path.basename(os.getcwd()) == "meteor"
  for line in sys.stdin:
    word, *parts = line.rstrip("\\n").split(" ||| ")
    if word == "SCORE":
      *references, told = parts
      known = set(" ".join(references).split())
      print(sum(x in known for x in told.split()), len(told.split()), flush=True)
    elif word == "EVAL":
      counts = [[int(x) for x in part.split()] for part in parts]
      for same, every in counts:
        print(same / every)
      print(sum(a for a, _ in counts) / sum(b for _, b in counts), flush=True)
else:
  options = dict(zip(sys.argv[5::2], sys.argv[6::2]))
  assert os.path.isdir(options["-cache"]) and sys.argv[-2:] == ["-subset", "-silent"]
  rows = json.load(open(sys.argv[4]))
  told = [{{"image_id": x["image_id"], "scores": {{"All": {{"f": len(x["refs"]) / 10}}}}}}
          for x in reversed(rows)]
  json.dump(told, open(options["-out"], "w"))
"""
BROKEN = """#!/bin/sh
echo "no main manifest" >&2
exit 3
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
  """`(what java is) -> the folder` with archives that are none."""

  def make(script):
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "java"
    command.write_text(script.format(python=sys.executable) if script == JAVA else script)
    command.chmod(0o755)
    data = ("meteor/data/paraphrase-en.gz", "spice/lib/stanford-corenlp-3.6.0.jar")
    for name in (java.METEOR, java.SPICE, *data):
      (tmp_path / name).parent.mkdir(exist_ok=True)
      (tmp_path / name).write_bytes(b"")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    monkeypatch.setenv(java.VARIABLE, str(tmp_path))
    return tmp_path

  return make


def test_all_scores_are_of_the_treebanks_words(programs):
  programs(JAVA)
  assert coco.left_out() is None
  values, lines = coco.scores(TOLD, WRITTEN)
  assert tuple(values) == coco.METRICS and not lines
  assert [values[f"coco_bleu{n}"] for n in (1, 2, 3, 4)] == list(bleu(TOLD, IN_WORDS))
  assert values["coco_rouge_l"] == rouge_l(TOLD, IN_WORDS).mean()
  assert values["coco_cider"] == cider_d(TOLD, IN_WORDS).mean()
  assert values["coco_cider_plain"] == cider(TOLD, IN_WORDS).mean()
  assert values["coco_meteor"] == 4 / 5  # "dogs" is none of the words
  assert values["coco_spice"] == pytest.approx((0.2 + 0.1) / 2)


def test_each_caption_has_its_scores(programs):
  programs(JAVA)
  _, each = java.meteor(["a ||| dog", "cats"], [["a dog"], ["two", "dogs"]])
  assert each.tolist() == [1, 0]
  _, each = java.spice(TOLD, IN_WORDS)
  assert each.tolist() == [0.2, 0.1]


def test_what_is_not_there_is_said_in_one_line(monkeypatch, tmp_path, programs):
  folder = programs(JAVA)
  (folder / java.SPICE).unlink()
  assert coco.left_out() == (
    f"not scored: SPICE (no file {folder / java.SPICE}); see docs/evaluation.md"
  )
  values, lines = coco.scores(TOLD, WRITTEN)
  assert "coco_meteor" in values and "coco_spice" not in values and not lines
  (folder / "meteor" / "data" / "paraphrase-en.gz").unlink()
  assert coco.left_out().startswith(f"not scored: METEOR (no file {folder}/meteor/data/para")
  monkeypatch.delenv(java.VARIABLE)
  monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: None)
  assert coco.left_out().count("no folder of coco-caption's in OFA_JAX_COCO_CAPTION") == 2
  monkeypatch.setenv("PATH", str(tmp_path))
  assert "METEOR (no java on the PATH), SPICE (no java on the PATH)" in coco.left_out()
  values, _ = coco.scores(TOLD, WRITTEN)
  assert values.keys() == set(coco.METRICS) - {"coco_meteor", "coco_spice"}


@pytest.mark.parametrize(
  ("script", "said"),
  [
    (BROKEN, "ended with status 3: no main manifest"),
    ("#!/bin/sh\nwhile read -r line; do echo words; done\n", "meteor-1.5.jar: expected a score"),
    ("#!/bin/sh\nexit 0\n", "ended with status 0: it said nothing"),
  ],
)
def test_a_program_that_fails_costs_its_own_score_only(programs, script, said):
  programs(script)
  values, lines = coco.scores(TOLD, WRITTEN)
  assert "coco_cider" in values and not values.keys() & {"coco_meteor", "coco_spice"}
  assert len(lines) == 2 and lines[0].startswith("METEOR is left out: ") and said in lines[0]
  assert lines[1].startswith("SPICE is left out: ") and all("\n" not in line for line in lines)


def test_nothing_of_the_programs_is_left(programs, tmp_path, monkeypatch):
  programs(JAVA)
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  monkeypatch.setattr(java.tempfile, "tempdir", None)
  before = sorted(pathlib.Path(tmp_path).rglob("*"))
  coco.scores(TOLD, WRITTEN)
  assert sorted(pathlib.Path(tmp_path).rglob("*")) == before
