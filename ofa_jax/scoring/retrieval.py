"""Recall of cross-modal retrieval, as Chinese-CLIP's evaluation scripts count it.

Recall@k is the share of queries with at least one of their right answers among the first k
candidates; a query without any right answer is a miss. Candidates are ordered by falling score and
equal scores keep the candidates' order. From features the place of the best right answer is found
by counting what stands before it, without sorting; from prediction files it is looked up.
"""

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np

from ofa_jax import text_files
from ofa_jax.data import values

KS = (1, 5, 10)
METRICS = (*(f"r{k}" for k in KS), "mean_recall", "median_rank", "mean_rank")
MISS = np.iinfo(np.int64).max  # the rank of a query without right answers

_BLOCK_BYTES = 64 * 2**20  # of scores at a time


def recall(ranks: Sequence[int] | np.ndarray) -> dict[str, float]:
  """Returns "r1", "r5", "r10" and their mean "mean_recall" as fractions.

  Args:
    ranks: int[N], for each query the place (from 0) of its first right answer, or `MISS`.

  Raises:
    ValueError: there are no queries.
  """
  ranks = np.asarray(ranks)
  if not ranks.size:
    raise ValueError("recall needs at least one query: expected N > 0 ranks, found none")
  values = {f"r{k}": np.count_nonzero(ranks < k) / ranks.size for k in KS}
  return values | {"mean_recall": sum(values.values()) / len(KS)}


def rank_summary(ranks: np.ndarray, *, candidates: int) -> dict[str, float]:
  """Returns "median_rank" and "mean_rank", counted from 1; a `MISS` comes after all candidates.

  Args:
    ranks: int[N], as for `recall`.
    candidates: how many there are.
  """
  places = np.minimum(ranks, candidates) + 1
  return {"median_rank": float(np.median(places)), "mean_rank": float(np.mean(places))}


def recall_both_ways(
  image_features: np.ndarray,
  text_features: np.ndarray,
  *,
  images_of: Sequence[Collection[int]],
  readable: np.ndarray | None = None,
) -> dict[str, float]:
  """Returns `recall` and `rank_summary` of both directions: "t2i_r1", ..., "i2t_mean_rank".

  All images and all texts are candidates. As in the original, every text is a query, but an image
  is one only where it belongs to some text.

  Args:
    image_features: float[N, E], normalised.
    text_features: float[M, E], normalised.
    images_of: for each text the rows of `image_features` that it describes.
    readable: bool[N]; an image for which it is False is no candidate, and finds nothing. None: all.

  Raises:
    ValueError: shapes and indices do not fit, or no text has an image.
  """
  image_features = np.asarray(image_features)
  pool = np.arange(len(image_features)) if readable is None else np.flatnonzero(readable)
  place = dict(zip(pool.tolist(), range(len(pool)), strict=True))
  images_at = [[place[i] for i in images if i in place] for images in images_of]
  t2i = rank_truth(text_features, image_features[pool], truth=images_at)
  texts_of = transpose(dict(enumerate(images_of)))
  queries = [i for i in texts_of if i in place]
  i2t = np.full(len(texts_of), MISS)
  i2t[: len(queries)] = rank_truth(
    image_features[queries], text_features, truth=[texts_of[i] for i in queries]
  )
  values = {}
  for way, ranks, candidates in (("t2i", t2i, image_features), ("i2t", i2t, text_features)):
    metrics = recall(ranks) | rank_summary(ranks, candidates=len(candidates))
    values |= {f"{way}_{name}": value for name, value in metrics.items()}
  return values


def rank_truth(
  queries: np.ndarray, candidates: np.ndarray, *, truth: Sequence[Collection[int]]
) -> np.ndarray:
  """Returns int64[N]: the place (from 0) of each query's best right answer, or `MISS`.

  Args:
    queries: float[N, E].
    candidates: float[M, E].
    truth: for each query the rows of `candidates` that are right answers.

  Raises:
    ValueError: shapes do not fit, no candidates, or a right answer that is not one of them.
  """
  if len(truth) != len(queries):
    raise ValueError(f"expected right answers for {len(queries)} queries, found {len(truth)}")
  ranks = np.full(len(queries), MISS)
  for i, scores in enumerate(_scores(queries, candidates)):
    answers = np.unique(np.fromiter(truth[i], np.int64))
    if not answers.size:
      continue
    if answers[0] < 0 or answers[-1] >= len(scores):
      raise ValueError(
        f"query {i}: expected right answers in 0..{len(scores) - 1}, found {answers.tolist()}"
      )
    best = answers[np.argmax(scores[answers])]
    # "Not lower or equal" and not "higher": what is NaN must not help a diverged model.
    before = np.count_nonzero(~(scores <= scores[best]))
    ranks[i] = before + np.count_nonzero(scores[:best] == scores[best])
  return ranks


def top_k(queries: np.ndarray, candidates: np.ndarray, *, k: int = KS[-1]) -> np.ndarray:
  """Returns int64[N, min(k, M)]: the rows of each query's first candidates, best first.

  Args:
    queries: float[N, E].
    candidates: float[M, E].
    k: how many, at least 1.

  Raises:
    ValueError: shapes do not fit, or no candidates.
  """
  k = min(k, len(candidates))
  first = np.empty((len(queries), k), np.int64)
  for i, scores in enumerate(_scores(queries, candidates)):
    falling = -scores
    # With all that tie for the last place, in the candidates' order. NaN sorts behind everything.
    rivals = np.flatnonzero(~(falling > np.partition(falling, k - 1)[k - 1]))
    first[i] = rivals[np.argsort(falling[rivals], kind="stable")[:k]]
  return first


def recall_of_predictions(
  truth: Mapping[int, Collection[int]], predictions: Mapping[int, Sequence[int]]
) -> dict[str, float]:
  """Returns `recall` of ranked lists, under the conditions of the original's evaluation.py.

  Args:
    truth: for each query's id the ids of its right answers.
    predictions: for each query's id the ids of 10 candidates, best first. Queries that `truth` does
      not have are ignored, but must be well-formed.

  Raises:
    ValueError: a query has no prediction, not exactly 10, or one twice.
  """
  faults = [f"query {query} has no prediction" for query in truth if query not in predictions]
  for query, ids in predictions.items():
    if len(ids) != KS[-1]:
      faults.append(f"query {query} has {len(ids)} predictions")
    elif len(set(ids)) != len(ids):
      faults.append(f"query {query} has a prediction twice")
  _raise(faults, f"expected {KS[-1]} different predictions for every query")
  ranks = []
  for query, answers in truth.items():
    answers = set(answers)
    ranks.append(next((i for i, p in enumerate(predictions[query]) if p in answers), MISS))
  return recall(ranks)


def read_ids(path: str | os.PathLike, *, query: str = "text") -> dict[int, list[int]]:
  """Reads annotations or predictions, which have the same form: {"text_id": 1, "image_ids": [7]}.

  Where an id stands on two lines, the later one counts, as in the original. 7.0 is 7.

  Args:
    path: a JSONL file; other fields of a line are ignored.
    query: "text", or "image" for files of the other direction ("image_id", "text_ids").

  Raises:
    ValueError: lines that are not of this form, with their numbers.
  """
  one, many = {"text": ("text_id", "image_ids"), "image": ("image_id", "text_ids")}[query]
  ids, faults = {}, []
  for number, line in text_files.lines(path):
    text = text_files.decode(line, path)
    if not text.strip():
      continue
    try:
      row = json.loads(text)
    except (ValueError, RecursionError) as error:
      faults.append(f"line {number} is not JSON ({error})")
      continue
    if not isinstance(row, dict) or not {one, many} <= row.keys():
      faults.append(f'line {number} lacks "{one}" or "{many}"')
    elif (key := values.whole(row[one])) is None or not isinstance(row[many], list):
      faults.append(f'line {number}: "{one}" is not an integer or "{many}" not a list')
    elif None in (answers := [values.whole(i) for i in row[many]]):
      faults.append(f'line {number}: "{many}" of {key} has ids that are not integers')
    else:
      ids[key] = answers
  _raise(faults, f'{path}: expected lines like {{"{one}": 1, "{many}": [7, 8]}}')
  return ids


def transpose(truth: Mapping[int, Iterable[int]]) -> dict[int, list[int]]:
  """Returns the queries of each answer, answers in the order of their first appearance."""
  queries_of = {}
  for query, answers in truth.items():
    for answer in answers:
      queries_of.setdefault(answer, []).append(query)
  return queries_of


def score_json(values: Mapping[str, float]) -> dict:
  """Returns what the original's evaluation.py writes for `recall`'s values: percentages."""
  percent = {name: values[name] * 100 for name in ("mean_recall", *(f"r{k}" for k in KS))}
  score = {"score": percent["mean_recall"]}
  return {"success": True} | score | {"scoreJson": score | percent}


def _scores(queries: np.ndarray, candidates: np.ndarray) -> Iterator[np.ndarray]:
  """Yields float32[M] for each query, never holding more than a block of them."""
  queries, candidates = np.asarray(queries, np.float32), np.asarray(candidates, np.float32)
  if queries.ndim != 2 or candidates.ndim != 2 or queries.shape[1] != candidates.shape[1]:
    raise ValueError(
      "expected queries [N, E] and candidates [M, E] with the same E, "
      f"found {list(queries.shape)} and {list(candidates.shape)}"
    )
  if not len(candidates):
    raise ValueError("expected candidates [M, E] with M > 0, found none")
  rows = max(1, _BLOCK_BYTES // (4 * len(candidates)))
  for start in range(0, len(queries), rows):
    yield from queries[start : start + rows] @ candidates.T


def _raise(faults: Sequence[str], expected: str) -> None:
  if faults:
    more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
    raise ValueError(f"{expected}; found: {'; '.join(faults[:5])}{more}")
