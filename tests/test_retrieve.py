"""`retrieve`: the original's predictions and scores, exactness of the search, faults."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from ofa_jax import retrieve
from tests.evaluation_golden import RETRIEVAL

DATA = RETRIEVAL / "dataset"
ANNOTATIONS = {"t2i": DATA / "test_texts.jsonl", "i2t": DATA / "test_texts.tr.jsonl"}
GOLDEN = {"t2i": ("test_predictions", "eval_ir"), "i2t": ("test_tr_predictions", "eval_tr")}


def run(*arguments):
  command = [sys.executable, "-m", "ofa_jax.retrieve", *map(str, arguments)]
  return subprocess.run(command, capture_output=True, text=True, env=os.environ)


@pytest.mark.parametrize("direction", retrieve.DIRECTIONS)
@pytest.mark.parametrize("model", ["vit", "rn50"])
def test_golden(tmp_path, model, direction):
  golden, output = RETRIEVAL / model, tmp_path / "p.jsonl"
  images, texts = golden / "test_imgs.img_feat.jsonl", golden / "test_texts.txt_feat.jsonl"
  retrieve.topk(images, texts, output=output, direction=direction)
  predictions, scores = GOLDEN[direction]
  assert output.read_bytes() == (golden / f"{predictions}.jsonl").read_bytes()
  score = retrieve.recall(ANNOTATIONS[direction], output, direction=direction)
  assert json.dumps(score) == (golden / f"{scores}.json").read_text()


def test_to_tr(tmp_path):
  source = tmp_path / "test_texts.jsonl"
  shutil.copy(DATA / "test_texts.jsonl", source)
  output = retrieve.to_tr(source)
  assert output == f"{tmp_path}/test_texts.tr.jsonl"
  with open(output, "rb") as file:
    assert file.read() == (DATA / "test_texts.tr.jsonl").read_bytes()


def test_commands(tmp_path):
  features = RETRIEVAL / "vit"
  done = run(
    "topk",
    f"--image-feats={features / 'test_imgs.img_feat.jsonl'}",
    f"--text-feats={features / 'test_texts.txt_feat.jsonl'}",
    f"--output={tmp_path / 'p.jsonl'}",
    "--top-k=10",
  )
  assert done.returncode == 0, done.stderr
  flags = f"--annotations={DATA / 'test_texts.jsonl'}", f"--output={tmp_path / 'score.json'}"
  done = run("recall", f"--predictions={tmp_path / 'p.jsonl'}", *flags)
  assert done.returncode == 0, done.stderr
  score = (tmp_path / "score.json").read_bytes()
  assert score == (RETRIEVAL / "vit" / "eval_ir.json").read_bytes()
  bad = RETRIEVAL / "eval_errors" / "short.jsonl"
  done = run("recall", f"--predictions={bad}", *flags)
  assert done.returncode == 1
  assert f"{bad}:1 text 8000 has 9" in done.stderr and "Traceback" not in done.stderr
  score = json.loads((tmp_path / "score.json").read_text())
  assert list(score) == ["errorDetail", "errorMsg", "score", "scoreJson", "success"]
  assert score["success"] is False and score["score"] == 0 and score["scoreJson"] == {}
  assert f"{bad}:1" in score["errorMsg"]
  done = run("top")
  assert done.returncode == 1 and "retrieve topk" in done.stderr


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("bad_json", "line 1 is not JSON"),
    ("dup", "dup.jsonl:1 text 8000 has one twice"),
    ("image_ids_not_list", 'line 1: .* "image_ids" not a list'),
    ("missing_text", "has no line for text 8000; .* has no line for text 8001"),
    ("no_image_ids", 'line 1 lacks .*"image_ids"'),
    ("no_text_id", 'line 1 lacks "text_id"'),
    ("short", "short.jsonl:1 text 8000 has 9"),
    ("str_image_id", 'line 1: "image_ids" of 8000 has ids that are not integers'),
    ("str_text_id", 'line 1: "text_id" is not an integer'),
    ("str_text_id_second", 'line 2: "text_id" is not an integer'),
    ("not_existing", "missing: .*not_existing.jsonl"),
  ],
)
def test_bad_predictions(name, message):
  with pytest.raises(ValueError, match=message):
    retrieve.recall(ANNOTATIONS["t2i"], RETRIEVAL / "eval_errors" / f"{name}.jsonl")


def test_texts_beyond_the_annotations_are_accepted():
  score = retrieve.recall(ANNOTATIONS["t2i"], RETRIEVAL / "eval_errors" / "extra_text.jsonl")
  assert json.dumps(score) == (RETRIEVAL / "vit" / "eval_ir.json").read_text()


def test_whole_floats_and_blank_lines_are_read(tmp_path):
  expected = (RETRIEVAL / "vit" / "eval_ir.json").read_text()
  for name, path in (
    ("a", ANNOTATIONS["t2i"]),
    ("p", RETRIEVAL / "vit" / "test_predictions.jsonl"),
  ):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
      row["text_id"] = float(row["text_id"])
      row["image_ids"] = [*map(float, row["image_ids"])]
    (tmp_path / name).write_text("\n\n".join(map(json.dumps, rows)) + "\n\n")
  assert json.dumps(retrieve.recall(tmp_path / "a", tmp_path / "p")) == expected


def test_bad_annotations(tmp_path):
  lines = ANNOTATIONS["t2i"].read_text().splitlines()
  predictions = RETRIEVAL / "vit" / "test_predictions.jsonl"
  path = tmp_path / "a.jsonl"
  lines[2] = '{"text_id": 8002, "image_ids": []}'
  path.write_text("\n".join(lines))
  with pytest.raises(ValueError, match=r"without labels.*a.jsonl:3 text 8002 has none"):
    retrieve.recall(path, predictions)
  lines[2] = lines[0]
  path.write_text("\n".join(lines))
  with pytest.raises(ValueError, match=r"a.jsonl:3 repeats text_id 8000 of line 1"):
    retrieve.recall(path, predictions)
  path.write_text(lines[0] + "\n{\n")
  with pytest.raises(ValueError, match=r"a.jsonl: .*line 2 is not JSON"):
    retrieve.to_tr(path)
  path.write_text('{"text_id": 1, "image_ids": []}\n')
  with pytest.raises(ValueError, match=r"image_ids in .*a.jsonl, found only empty lists"):
    retrieve.to_tr(path)
  with pytest.raises(ValueError, match='line 1 lacks "image_id"'):
    retrieve.recall(ANNOTATIONS["t2i"], predictions, direction="i2t")


def write(path, vectors, *, kind):
  rows = [{f"{kind}_id": i, "feature": v} for i, v in enumerate(vectors)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def test_topk_faults(tmp_path):
  texts = write(tmp_path / "t.jsonl", [[1.0, 2.0]], kind="text")
  images = write(tmp_path / "i.jsonl", [[1.0, 2.0]] * 9, kind="image")
  wide = write(tmp_path / "w.jsonl", [[1.0, 2.0, 3.0]] * 10, kind="image")
  output = tmp_path / "p.jsonl"
  with pytest.raises(ValueError, match=r"from 1 to 9, the candidates in .*i.jsonl; found 10"):
    retrieve.topk(images, texts, output=output)
  with pytest.raises(ValueError, match=r"found 2 in .*t.jsonl and 3 in .*w.jsonl"):
    retrieve.topk(wide, texts, output=output)
  with pytest.raises(ValueError, match=r"t.jsonl:1 has no field 'image_id'"):
    retrieve.topk(texts, texts, output=output)
  with pytest.raises(ValueError, match=r"none.jsonl"):
    retrieve.topk(tmp_path / "none.jsonl", texts, output=output)
  assert not list(tmp_path.glob("p.jsonl*"))


def expected_rows(queries, candidates, k):
  """The original's way: Python's stable sort of each query's scores."""
  scores = queries.astype(np.float32) @ candidates.astype(np.float32).T
  return [sorted(range(len(row)), key=lambda j: -row[j])[:k] for row in scores.tolist()]


@pytest.mark.parametrize(
  ("num_queries", "num_candidates", "k"),
  [(3, 7, 7), (70, 500, 1), (300, 9000, 10), (40, 9000, 600)],
)
def test_exact_and_stable_with_many_ties(monkeypatch, num_queries, num_candidates, k):
  # Small integers: the products are exact, and most scores are shared by many candidates.
  monkeypatch.setattr(retrieve, "_QUERIES", 16)
  monkeypatch.setattr(retrieve, "_CANDIDATES", 4096)
  rng = np.random.default_rng(0)
  queries = rng.integers(-2, 3, (num_queries, 6)).astype(np.float32)
  candidates = rng.integers(-2, 3, (num_candidates, 6)).astype(np.float32)
  found = np.concatenate(list(retrieve.best_rows(queries, candidates, k=k)))
  assert found.tolist() == expected_rows(queries, candidates, k)


def test_equal_candidates_keep_their_order_wherever_they_stand():
  rng = np.random.default_rng(1)
  candidates = rng.standard_normal((9000, 64)).astype(np.float32)
  twins = [5, 63, 64, 4000, 8191, 8192, 8999]
  candidates[twins] = candidates[5] * 9
  queries = candidates[5] + 0.01 * rng.standard_normal((20, 64)).astype(np.float32)
  (found,) = retrieve.best_rows(queries, candidates, k=10)
  assert (found[:, : len(twins)] == twins).all()


def test_zeros_of_both_signs_tie():
  queries = np.array([[1.0]], np.float32)
  candidates = np.array([[-1.0], [-0.0], [0.0], [-0.0], [2.0]], np.float32)
  (found,) = retrieve.best_rows(queries, candidates, k=5)
  assert found.tolist() == [[4, 1, 2, 3, 0]]


def test_random_features_and_progress():
  rng = np.random.default_rng(2)
  queries, candidates = (rng.standard_normal((n, 32)) for n in (333, 10_000))
  done = []
  found = np.concatenate(list(retrieve.best_rows(queries, candidates, k=5, advance=done.append)))
  exact = np.argsort(-(queries @ candidates.T), axis=1, kind="stable")[:, :5]
  assert (found == exact).mean() > 0.999  # float32 may swap neighbours
  assert len(done) == 2 and sum(done) == pytest.approx(333)


def test_scores_never_stand_whole():
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  merge = retrieve._merge_on(mesh, 10)
  spec = jax.ShapeDtypeStruct
  lowered = merge.lower(
    spec((4096, 10), np.float32),
    spec((4096, 10), np.int32),
    spec((4096, 512), np.float32),
    spec((8192, 512), np.float32),
    0,
    10**6,
  )
  memory = lowered.compile().memory_analysis()
  assert memory.temp_size_in_bytes < 3 * 4 * 4096 * 8192
