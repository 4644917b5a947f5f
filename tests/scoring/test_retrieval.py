import json
import pathlib

import numpy as np
import pytest

from ofa_jax.scoring import retrieval

GOLDEN = pathlib.Path(__file__).parents[1] / "golden/cnclip/retrieval"
ANNOTATIONS = {
  "text": GOLDEN / "dataset/test_texts.jsonl",
  "image": GOLDEN / "dataset/test_texts.tr.jsonl",
}
PREDICTIONS = {
  "text": GOLDEN / "vit/test_predictions.jsonl",
  "image": GOLDEN / "vit/test_tr_predictions.jsonl",
}
SCORES = {"text": GOLDEN / "vit/eval_ir.json", "image": GOLDEN / "vit/eval_tr.json"}


def read_features(name, key):
  lines = (GOLDEN / "vit" / name).read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  return [row[key] for row in rows], np.array([row["feature"] for row in rows], np.float32)


@pytest.fixture(scope="module")
def features():
  return {
    "image": read_features("test_imgs.img_feat.jsonl", "image_id"),
    "text": read_features("test_texts.txt_feat.jsonl", "text_id"),
  }


@pytest.mark.parametrize("query", ["text", "image"])
def test_prediction_files_score_as_in_the_original(query):
  truth = retrieval.read_ids(ANNOTATIONS[query], query=query)
  predictions = retrieval.read_ids(PREDICTIONS[query], query=query)
  values = retrieval.recall_of_predictions(truth, predictions)
  assert retrieval.score_json(values) == json.loads(SCORES[query].read_text())


@pytest.mark.parametrize(("query", "candidate"), [("text", "image"), ("image", "text")])
def test_top_k_equals_the_original(features, query, candidate):
  query_ids, queries = features[query]
  candidate_ids, candidates = features[candidate]
  first = np.array(candidate_ids)[retrieval.top_k(queries, candidates)]
  expected = retrieval.read_ids(PREDICTIONS[query], query=query)
  asked = [i for i, query_id in enumerate(query_ids) if query_id in expected]
  assert {query_ids[i]: first[i].tolist() for i in asked} == expected
  assert len(asked) == len(expected)


def test_recall_both_ways_equals_the_original(features):
  image_ids, images = features["image"]
  text_ids, texts = features["text"]
  truth = retrieval.read_ids(ANNOTATIONS["text"])
  images_of = [{image_ids.index(i) for i in truth[text_id]} for text_id in text_ids]
  values = retrieval.recall_both_ways(images, texts, images_of=images_of)
  for way, query in (("t2i", "text"), ("i2t", "image")):
    expected = json.loads(SCORES[query].read_text())["scoreJson"]
    for name in ("r1", "r5", "r10", "mean_recall"):
      assert values[f"{way}_{name}"] * 100 == expected[name]


def sorted_ranks(scores, truth):
  """The definition: sort all, look for the first right answer."""
  ranks = []
  for row, answers in zip(scores, truth, strict=True):
    order = sorted(range(len(row)), key=lambda j: -row[j])
    places = [place for place, j in enumerate(order) if j in answers]
    ranks.append(min(places, default=retrieval.MISS))
  return ranks


@pytest.mark.parametrize("block_bytes", [1, 4 * 37 * 7, 2**20])
def test_ranks_and_top_k_equal_a_stable_sort_with_many_ties(block_bytes, monkeypatch):
  monkeypatch.setattr(retrieval, "_BLOCK_BYTES", block_bytes)
  rng = np.random.default_rng(0)
  queries = rng.integers(-1, 2, (50, 4)).astype(np.float32)
  candidates = rng.integers(-1, 2, (37, 4)).astype(np.float32)
  truth = [rng.integers(0, 37, rng.integers(0, 4)).tolist() for _ in queries]
  scores = queries @ candidates.T
  ranks = retrieval.rank_truth(queries, candidates, truth=truth)
  assert ranks.tolist() == sorted_ranks(scores, truth)
  assert retrieval.MISS in ranks
  for k in (1, 10, 36, 37, 99):
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(retrieval.top_k(queries, candidates, k=k), expected)


def test_recall_counts_places_and_misses():
  values = retrieval.recall([0, 1, 4, 5, 9, 10, retrieval.MISS, 0])
  assert values == {"r1": 2 / 8, "r5": 4 / 8, "r10": 6 / 8, "mean_recall": 0.5}


def test_an_image_without_text_is_a_candidate_but_no_query():
  images = np.eye(3, dtype=np.float32)
  texts = np.array([[0.1, 0, 1], [0, 1, 0], [0, 1, 0]], np.float32)
  # Text 0 is nearest to image 2, which no text describes; text 2 has no image and is a miss.
  values = retrieval.recall_both_ways(images, texts, images_of=[[0], [1], []])
  assert values["t2i_r1"] == pytest.approx(1 / 3)
  assert values["i2t_r1"] == 1.0
  # Places 2, 1 and, after all three images, 4; the two images that are queries come first.
  assert (values["t2i_median_rank"], values["t2i_mean_rank"]) == (2.0, pytest.approx(7 / 3))
  assert (values["i2t_median_rank"], values["i2t_mean_rank"]) == (1.0, 1.0)


def test_ranks_are_those_of_a_full_sort():
  rng = np.random.default_rng(1)
  images, texts = (rng.standard_normal((n, 8)).astype(np.float32) for n in (41, 60))
  images_of = [[i % 41] for i in range(60)]
  values = retrieval.recall_both_ways(images, texts, images_of=images_of)
  texts_of = [[t for t in range(60) if t % 41 == i] for i in range(41)]
  for way, scores, truth in (
    ("t2i", texts @ images.T, images_of),
    ("i2t", images @ texts.T, texts_of),
  ):
    places = np.array(sorted_ranks(scores, truth)) + 1
    assert values[f"{way}_median_rank"] == np.median(places)
    assert values[f"{way}_mean_rank"] == np.mean(places)


def test_nan_features_find_nothing():
  features = np.full((20, 4), np.nan, np.float32)
  values = retrieval.recall_both_ways(features, features, images_of=[[i] for i in range(20)])
  assert {v for name, v in values.items() if not name.endswith("_rank")} == {0.0}
  assert values["t2i_mean_rank"] == values["i2t_median_rank"] == 21.0
  one = np.ones((20, 4), np.float32)
  one[3] = np.nan
  assert retrieval.rank_truth(one[:1], one, truth=[[0]]).tolist() == [1]
  assert retrieval.top_k(one[:1], one, k=5).tolist() == [[0, 1, 2, 4, 5]]


def test_what_does_not_fit():
  queries, candidates = np.ones((2, 4)), np.ones((3, 4))
  with pytest.raises(ValueError, match="right answers for 2 queries, found 1"):
    retrieval.rank_truth(queries, candidates, truth=[[0]])
  with pytest.raises(
    ValueError, match=r"query 1: expected right answers in 0\.\.2, found \[1, 3\]"
  ):
    retrieval.rank_truth(queries, candidates, truth=[[0], [3, 1]])
  with pytest.raises(ValueError, match=r"same E, found \[2, 4\] and \[3, 5\]"):
    retrieval.top_k(queries, np.ones((3, 5)))
  with pytest.raises(ValueError, match="M > 0"):
    retrieval.top_k(queries, np.ones((0, 4)))
  with pytest.raises(ValueError, match="at least one query"):
    retrieval.recall([])
  with pytest.raises(ValueError, match="at least one query"):
    retrieval.recall_both_ways(queries, candidates, images_of=[[], [], []])


# What the original's evaluation.py makes of the same files: a score, or an error.
@pytest.mark.parametrize(
  ("name", "error"),
  [
    ("extra_text", None),
    ("perfect_first2_shuffled", None),
    ("bad_json", "line 1 is not JSON"),
    ("no_text_id", 'line 1 lacks "text_id" or "image_ids"'),
    ("no_image_ids", 'line 1 lacks "text_id" or "image_ids"'),
    ("str_text_id", 'line 1: "text_id" is not an integer'),
    ("str_text_id_second", 'line 2: "text_id" is not an integer'),
    ("image_ids_not_list", 'or "image_ids" not a list'),
    ("str_image_id", '"image_ids" of 8000 has ids that are not integers'),
    ("missing_text", "query 8000 has no prediction; query 8001 has no prediction"),
    ("short", "query 8000 has 9 predictions"),
    ("dup", "query 8000 has a prediction twice"),
  ],
)
def test_submissions_good_and_bad(name, error):
  truth = retrieval.read_ids(ANNOTATIONS["text"])

  def score():
    predictions = retrieval.read_ids(GOLDEN / f"eval_errors/{name}.jsonl")
    return retrieval.score_json(retrieval.recall_of_predictions(truth, predictions))

  if error is None:
    assert score() == json.loads(SCORES["text"].read_text())
  else:
    with pytest.raises(ValueError) as raised:
      score()
    assert error in str(raised.value)


def test_many_faults_are_one_error(tmp_path):
  path = tmp_path / "predictions.jsonl"
  path.write_text("{\n" * 7)
  with pytest.raises(ValueError, match=r"line 1 is not JSON.*line 5 is not JSON.*and 2 more"):
    retrieval.read_ids(path)


def test_transpose_is_the_original_s_other_direction():
  truth = retrieval.read_ids(ANNOTATIONS["text"])
  turned = retrieval.transpose(truth)
  expected = retrieval.read_ids(ANNOTATIONS["image"], query="image")
  assert list(turned.items()) == list(expected.items())
