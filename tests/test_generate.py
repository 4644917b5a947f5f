"""The command: files in, predictions out."""

import base64
import io
import json
import os
import subprocess
import sys
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

import ofa_jax
from ofa_jax import evaluate, generate, shards
from ofa_jax.config import Config, Eval
from ofa_jax.data.tsv import BadRow, Table
from ofa_jax.decode.beam import Search
from ofa_jax.inference.rows import TaskRows
from ofa_jax.shards import Shard
from ofa_jax.tasks.caption import Caption
from tests.compiling import QUICK
from tests.ofa_directory import save_micro
from tests.ofa_golden import micro_config

pytestmark = pytest.mark.usefixtures("two_devices")
COLUMNS = {"id": 0, "image": 1, "text": 2}
ROWS = 11
BROKEN = 4


class Model:
  """Stands for an OFA: says what it was given, and counts the batches."""

  image_size = 16
  identity: ClassVar = {"model": "a stand-in"}

  def __init__(self):
    self.batches = 0

  def caption(self, images, *, search, return_scores):
    assert return_scores and search.num_beams == 3
    self.batches += 1
    assert all(x.shape == (16, 16, 3) and x.dtype == np.uint8 for x in images)
    return [f" grey, {x.mean():.0f}!" for x in images], -np.arange(len(images), dtype=np.float32)

  def answer(
    self, images, questions, candidates, *, objects, search, prompt_decoder, return_scores
  ):
    assert candidates == ("yes", "no") and not prompt_decoder
    seen = [" ".join(names) for names in objects or [["yes"]] * len(images)]
    return [f"{x} {names}" for x, names in zip(questions, seen, strict=True)], np.zeros(len(images))

  def ground(self, images, phrases, *, search, return_scores):
    boxes = [np.float32([0, 4, 8, 16])] * len(images)
    scores = np.zeros(len(images))
    if "question 2" in phrases:
      boxes[phrases.index("question 2")] = np.full(4, np.nan)
      scores[phrases.index("question 2")] = -np.inf
    return boxes, scores


OPTIONS = generate.Options(
  search=Search(num_beams=3, max_length=5), candidates=("yes", "no"), prompt_decoder=False
)


@pytest.fixture
def table(tmp_path):
  """Grey images 40 x 20, the fifth of them broken."""
  lines = []
  for i in range(ROWS):
    file = io.BytesIO()
    Image.new("RGB", (40, 20), (i, i, i)).save(file, "PNG")
    image = file.getvalue()[: 30 if i == BROKEN else None]
    lines.append(f"{100 + i}\t{base64.urlsafe_b64encode(image).decode()}\tquestion {i}\n")
  (tmp_path / "in.tsv").write_text("".join(lines))
  return Table([tmp_path / "in.tsv"], columns=COLUMNS)


class Dies(Model):
  """Is killed at its second batch."""

  def caption(self, images, **options):
    if self.batches == 1:
      raise KilledError
    return super().caption(images, **options)


class KilledError(Exception):
  pass


def leave(table, output, lines=None, **options):
  """What is left of a killed run over a table; `lines` in its place if they are given."""
  with pytest.raises(KilledError):
    run(Dies(), "caption", table, output, **options)
  if lines is not None:
    output.with_name(f"{output.name}.partial").write_bytes(lines)


def run(model, task, table, output, *, max_bad_rate=0.2, **options):
  options |= {"options": OPTIONS, "batch_size": 4, "max_bad_rate": max_bad_rate}
  count = generate.predict_file(model, task, table, output=output, **options)
  return count, [json.loads(line) for line in output.read_text().splitlines()]


def test_every_row_has_a_line_in_its_place(table, tmp_path, capsys):
  count, lines = run(Model(), "caption", table, tmp_path / "out" / "caption.jsonl")
  assert count == ROWS - 1
  assert [line["image_id"] for line in lines] == [str(100 + i) for i in range(ROWS)]
  for i, line in enumerate(lines):
    if i == BROKEN:
      assert line.keys() == {"image_id", "error"} and "in.tsv:5 104" in line["error"]
    else:
      assert line["caption"] == f"grey {i}"  # no punctuation, as the original writes it
  assert [line.get("score") for line in lines[4:8]] == [None, 0, -1, -2]
  assert "Skipped a bad row" in capsys.readouterr().out
  assert [x.name for x in (tmp_path / "out").iterdir()] == ["caption.jsonl"]


def test_shares_of_the_rows_make_the_bytes_of_one_job(table, tmp_path):
  def predict(model, name, shard=None):
    return generate.predict_file(
      model, "caption", table, output=tmp_path / name, shard=shard,
      options=OPTIONS, batch_size=2, max_bad_rate=0.5,
    )  # fmt: skip

  for num in (2, 7):  # of six batches
    counts = [predict(Model(), "x.jsonl", Shard(i, num)) for i in range(1, num)]
    if num == 2:
      with pytest.raises(KilledError):
        predict(Dies(), "x.jsonl", Shard(0, num))
    counts.append(predict(Model(), "x.jsonl", Shard(0, num)))
    assert sum(counts) == predict(Model(), "straight.jsonl") == ROWS - 1
    assert shards.merge(tmp_path / "x.jsonl", Shard(None, num)) == num
    assert (tmp_path / "x.jsonl").read_bytes() == (tmp_path / "straight.jsonl").read_bytes()


def test_results_have_the_originals_keys(table, tmp_path):
  _, lines = run(Model(), "vqa", table, tmp_path / "vqa.jsonl")
  assert lines[1] == {"question_id": 101, "answer": "question 1 yes", "score": 0.0}
  seen = Table(table.files, columns={**COLUMNS, "objects": 0})
  _, lines = run(Model(), "vqa", seen, tmp_path / "objects.jsonl")
  assert lines[1]["answer"] == "question 1 101"
  _, lines = run(Model(), "refcoco", table, tmp_path / "box.jsonl")
  assert lines[1] == {"uniq_id": "101", "box": [0, 5, 20, 20], "score": 0.0}
  assert lines[2] == {"uniq_id": "102", "box": None, "score": None}


def test_a_row_without_a_question_is_bad(tmp_path):
  image = base64.b64encode(b"never read").decode()
  (tmp_path / "in.tsv").write_text(f"7\t{image}\t \n8\t{image}\twhat?\n")
  table = Table([tmp_path / "in.tsv"], columns=COLUMNS)
  with pytest.raises(BadRow, match="the text is empty"):
    TaskRows(table, size=16).example(0, None)
  with pytest.raises(BadRow, match="not a JPEG"):
    TaskRows(table, size=16, begin=1).example(0, None)


def test_a_run_that_was_killed_goes_on(table, tmp_path):
  output = tmp_path / "caption.jsonl"
  run(Model(), "caption", table, output)
  whole = output.read_bytes()
  partial = tmp_path / "caption.jsonl.partial"
  # Lines that were written -> batches that are computed, the first once more to compare it.
  for kept, batches in ((0, 3), (2, 3), (4, 3), (6, 3), (9, 2)):
    output.unlink(missing_ok=True)
    lines = whole.splitlines(keepends=True)
    leave(table, output, b"".join(lines[:kept]) + lines[kept][:10])
    model = Model()
    run(model, "caption", table, output)
    assert output.read_bytes() == whole
    assert model.batches == batches
    assert not partial.exists()
  # What the same files give elsewhere, with other digits, is not taken up.
  leave(table, output, b"".join([b'{"image_id": "100", "caption": "black"}\n', *lines[1:9]]))
  run(Model(), "caption", table, output)
  assert output.read_bytes() == whole
  assert {p.name for p in tmp_path.iterdir()} == {"in.tsv", "in.tsv.index.npz", output.name}


def without_the_sixth(lines):
  return lines[:5] + lines[6:]


def two_changed_places(lines):
  return [*lines[:1], lines[2], lines[1], *lines[3:]]  # of the same size as before


def another_at_the_end(lines):
  return [*lines, lines[0].replace(b"100", b"999", 1)]


@pytest.mark.parametrize("edit", [without_the_sixth, two_changed_places, another_at_the_end])
def test_what_was_left_of_an_edited_input_is_not_taken_up(table, tmp_path, edit, capsys):
  file, output = tmp_path / "in.tsv", tmp_path / "caption.jsonl"
  leave(table, output)
  file.write_bytes(b"".join(edit(file.read_bytes().splitlines(keepends=True))))
  table = Table([file], columns=COLUMNS)
  capsys.readouterr()
  run(Model(), "caption", table, output)
  assert "Starting anew" in capsys.readouterr().out
  straight = tmp_path / "straight.jsonl"
  run(Model(), "caption", table, straight)
  assert output.read_bytes() == straight.read_bytes()
  ids = [json.loads(line)["image_id"] for line in output.read_text().splitlines()]
  assert ids == [table.text(i, "id") for i in range(len(table))]


def test_other_options_and_another_model_start_anew(table, tmp_path, capsys):
  output = tmp_path / "caption.jsonl"
  others = Model()
  others.identity = {"model": "another"}
  for change, told in (
    (lambda: run(others, "caption", table, output), "another model"),
    (
      lambda: generate.predict_file(
        Model(), "caption", table, output=output, options=OPTIONS, batch_size=3, max_bad_rate=0.2
      ),
      "another batch size",
    ),
    (lambda: run(Model(), "refcoco", table, output), "another task"),
  ):
    leave(table, output)
    capsys.readouterr()
    change()
    assert told in capsys.readouterr().out


def test_each_row_has_its_own_reason(tmp_path):
  good = io.BytesIO()
  Image.new("RGB", (40, 20)).save(good, "PNG")
  good = base64.b64encode(good.getvalue()).decode()
  images = {0: good[:40], 10: "%", 11: ""}  # lines 1, 11 and 12 begin alike
  rows = [f"7\t{images.get(i, good)}\twhat?\n" for i in range(12)]
  (tmp_path / "in.tsv").write_text("".join(rows))
  table = Table([tmp_path / "in.tsv"], columns=COLUMNS)
  count, lines = run(Model(), "vqa", table, tmp_path / "x.jsonl", max_bad_rate=0.3)
  assert count == 9
  for i, reason in ((0, "not a JPEG"), (10, "broken base64"), (11, "not a JPEG")):
    assert f"in.tsv:{i + 1} 7: {reason}" in lines[i]["error"]


def test_what_an_interrupted_run_left_out_counts(table, tmp_path):
  output = tmp_path / "x.jsonl"
  run(Model(), "caption", table, output)
  lines = output.read_bytes().splitlines(keepends=True)
  output.unlink()
  leave(table, output, b"".join(lines[:8]))  # with the broken one
  with pytest.raises(ValueError, match=f"found 1 among all {ROWS}"):
    run(Model(), "caption", table, output, max_bad_rate=0.01)


def test_too_many_bad_rows_end_the_run(table, tmp_path):
  with pytest.raises(ValueError, match="bad rows"):
    run(Model(), "caption", table, tmp_path / "x.jsonl", max_bad_rate=0.0)
  assert not (tmp_path / "x.jsonl").exists()


def test_an_error_before_the_first_row_leaves_nothing(table, tmp_path, monkeypatch):
  monkeypatch.setattr(generate, "predict", lambda *args, **options: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    run(Model(), "caption", table, tmp_path / "x.jsonl")
  assert not list(tmp_path.glob("x.jsonl*"))


def test_columns_are_given_by_name():
  assert generate._columns("vqa", None) == {"id": 0, "image": 5, "text": 2, "objects": 4}
  assert generate._columns("vqa", ["text:1", "image:0"]) == {"text": 1, "image": 0}
  assert generate._columns("vqa", ["text:question"]) == {"text": "question"}
  for bad in ("words:1", "text", "text:"):
    with pytest.raises(ValueError, match="--columns=name:place"):
      generate._columns("vqa", [bad])


def test_evaluations_and_the_command_give_the_same_captions(tmp_path):
  directory = save_micro(tmp_path)
  rng = np.random.default_rng(0)
  lines = []
  for i in range(9):
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (20 + i, 40, 3), np.uint8)).save(file, "PNG")
    image = base64.b64encode(file.getvalue()[: 30 if i == BROKEN else None]).decode()
    lines.append(f"{i}\timg{i}\tthe dog&&a dog\tdog\t{image}\n")
  (tmp_path / "valid.tsv").write_text("".join(lines))
  files = (str(tmp_path / "valid.tsv"),)
  task = Caption(valid=files, tokenizer=str(directory), image_size=64, page=0)
  config = Config(
    model=micro_config(),
    task=task,
    batch_size=8,
    steps=1,
    precision="fp32",
    max_bad_rate=0.2,
    evals=(Eval(name="valid", task=task),),
  )
  evaluate.run(config, str(directory), results=str(tmp_path))
  evaluated = json.loads((tmp_path / "valid_predict.json").read_text())
  model, _ = ofa_jax.load_from_name(directory)
  table = Table(files, columns=generate.TASKS["caption"].columns)
  generate.predict_file(
    model,
    "caption",
    table,
    output=tmp_path / "captions.jsonl",
    options=generate.Options(search=model.searches["caption"]),
    batch_size=8,
    max_bad_rate=0.2,
  )
  lines = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
  assert "error" in lines.pop(BROKEN)
  assert [line.pop("score") < 0 for line in lines] == [True] * 8
  assert lines == evaluated
  assert evaluated[0].keys() == {"image_id", "caption"} and evaluated[0]["image_id"] == "img0"
  assert len({line["caption"] for line in lines}) > 1


def test_the_command_says_what_it_found_or_what_is_wrong(tmp_path):
  model = save_micro(tmp_path)
  Image.new("RGB", (40, 20), (200, 0, 0)).save(tmp_path / "red.png")
  command = [sys.executable, "-m", "ofa_jax.generate", f"--model={model}", "--task=vqa"]
  inputs = [f"--image={tmp_path / 'red.png'}", "--text=is it red?", "--num-beams=2"]
  environment = os.environ | QUICK
  done = subprocess.run([*command, *inputs], env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout).keys() == {"answer", "score"}
  done = subprocess.run([*command, inputs[1]], env=environment, capture_output=True, text=True)
  assert done.returncode == 1
  assert done.stderr.startswith("error: Expected a list of images, found none")


def test_pictures_in_any_form_are_asked_about(table, tmp_path):
  folder = tmp_path / "photos"
  folder.mkdir()
  lines = ["filepath,question"]
  for i in range(3):
    (folder / f"{i}.png").write_bytes(table.encoded(i))
    lines.append(f"photos/{i}.png,question {i}")
  (tmp_path / "in.csv").write_text("\n".join(lines), encoding="utf-8")
  rows = generate._open_table([str(folder)], task="caption", columns=None)
  count, told = run(Model(), "caption", rows, tmp_path / "photos.jsonl")
  assert count == 3 and [t["caption"] for t in told] == ["grey 0", "grey 1", "grey 2"]
  assert [t["image_id"] for t in told] == [str(folder / f"{i}.png") for i in range(3)]
  files = [str(tmp_path / "in.csv")]
  rows = generate._open_table(files, task="refcoco", columns=["image:filepath", "text:question"])
  count, told = run(Model(), "refcoco", rows, tmp_path / "boxes.jsonl")
  assert [t["box"] for t in told] == [[0, 5, 20, 20], [0, 5, 20, 20], None]
  for given in (None, ["image:filepath"]):
    with pytest.raises(ValueError, match=r"found no text in .*in\.csv.*--columns=text:"):
      generate._open_table(files, task="vqa", columns=given)
