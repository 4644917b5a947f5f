import collections
import gzip
import json
import math
import os
import pathlib
import pickle

import numpy as np
import pytest

from ofa_jax.scoring.cider import Frequencies, cider, cider_d

GOLDEN = pathlib.Path(__file__).parents[1] / "golden/ofa/scoring"
CASES = json.loads((GOLDEN / "cider.json").read_text())
COCO = json.loads((GOLDEN / "coco_caption.json").read_text())


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
  """The golden's document frequencies, as JSON and as the pickle that the original reads."""
  directory = tmp_path_factory.mktemp("df")
  text = gzip.decompress((GOLDEN / "cider_df.json.gz").read_bytes())
  (directory / "df.json").write_bytes(text)
  table = json.loads(text)
  counts = collections.defaultdict(float)
  counts.update({tuple(k.split(" ")): v for k, v in table["document_frequency"].items()})
  with open(directory / "df.p", "wb") as file:
    pickle.dump({"document_frequency": counts, "ref_len": table["ref_len"]}, file, protocol=2)
  return directory


@pytest.mark.parametrize("name", ["df.json", "df.p"])
def test_cider_d_with_cached_frequencies_equals_the_original(cached, name):
  frequencies = Frequencies.load(cached / name)
  scores = cider_d(CASES["hyps"], CASES["refs"], frequencies=frequencies)
  np.testing.assert_allclose(scores, CASES["ciderD_cached_df"], atol=1e-12)
  assert scores.mean() == pytest.approx(CASES["ciderD_cached_df_mean"], abs=1e-12)


def test_frequencies_of_the_references_themselves():
  scores = cider_d(CASES["hyps"], CASES["refs"])
  np.testing.assert_allclose(scores, CASES["ciderD_corpus_df"], atol=1e-12)
  scores = cider(CASES["hyps"], CASES["refs"])
  np.testing.assert_allclose(scores, CASES["cider_corpus_df"], atol=1e-12)
  scores = cider_d(COCO["hypotheses"], COCO["references"])
  np.testing.assert_allclose(scores, COCO["cider_d"], atol=1e-12)


def plain_cider_d(hypothesis, references, frequencies):
  """The definition, n-gram by n-gram."""

  def weights(words, n):
    counts = collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    df = {g: max(1.0, frequencies.counts.get(g, 0.0)) for g in counts}
    return {g: c * math.log(frequencies.images / df[g]) for g, c in counts.items()}

  total, words = 0.0, hypothesis.split()
  for other in (r.split() for r in references):
    damping = math.exp(-((max(len(words) - 1, 0) - max(len(other) - 1, 0)) ** 2) / 72)
    for n in range(1, 5):
      h, r = weights(words, n), weights(other, n)
      norm = math.sqrt(sum(w * w for w in h.values()) * sum(w * w for w in r.values()))
      dot = sum(min(w, r[g]) * r[g] for g, w in h.items() if g in r)
      total += damping * dot / norm / 4 if norm else 0.0
  return 10 * total / len(references)


def test_random_captions_equal_the_definition():
  rng = np.random.default_rng(0)
  words = np.array([f"w{i}" for i in range(60)])

  def captions(count, most):
    return [" ".join(words[rng.integers(0, most, rng.integers(0, 9))]) for _ in range(count)]

  corpus = [captions(rng.integers(1, 4), 40) for _ in range(50)]
  frequencies = Frequencies.of(corpus)
  hypotheses = captions(40, 60)  # words beyond 40 are unknown to the corpus
  references = [captions(rng.integers(1, 4), 60) for _ in range(40)]
  for i in range(0, 40, 2):  # a good answer
    references[i].append(hypotheses[i])
  expected = [plain_cider_d(h, r, frequencies) for h, r in zip(hypotheses, references, strict=True)]
  scores = cider_d(hypotheses, references, frequencies=frequencies)
  np.testing.assert_allclose(scores, expected, atol=1e-12)
  assert max(expected) > 4


def test_beams_that_share_references_score_as_if_alone():
  hypotheses, references = CASES["hyps"][:6], [CASES["refs"][0]] * 6
  frequencies = Frequencies.of(CASES["refs"])
  together = cider_d(hypotheses, references, frequencies=frequencies)
  alone = [cider_d([h], references[:1], frequencies=frequencies)[0] for h in hypotheses]
  np.testing.assert_allclose(together, alone, atol=1e-12)


def test_nothing_in_common_and_nothing_at_all():
  frequencies = Frequencies.of(CASES["refs"])
  scores = cider_d(["", "", "zzz", "a man"], [["a"], [""], ["a"], [""]], frequencies=frequencies)
  np.testing.assert_array_equal(scores, 0.0)
  assert cider_d([""], [[""]]).tolist() == [0.0]
  assert cider_d([], []).shape == (0,)
  empty = Frequencies({}, 10)
  assert cider_d(["a b c d"], [["a b c d"]], frequencies=empty) == pytest.approx(10.0)


def test_frequencies_are_saved(cached, tmp_path):
  frequencies = Frequencies.load(cached / "df.p")
  frequencies.save(tmp_path / "df.json")
  again = Frequencies.load(tmp_path / "df.json")
  assert (again.counts, again.images) == (frequencies.counts, frequencies.images)


class Hostile:
  def __reduce__(self):
    return os.system, ("exit 1",)


@pytest.mark.parametrize(
  ("content", "what"),
  [
    (pickle.dumps({"document_frequency": Hostile(), "ref_len": 1}), "refused: it asks for posix"),
    (pickle.dumps({"ref_len": 1}), "KeyError: 'document_frequency'"),
    (b"", "EOFError"),
    (b'{"ref_len": 1}', "KeyError"),
    (None, "FileNotFoundError"),
  ],
)
def test_other_files_are_told(tmp_path, content, what):
  path = tmp_path / "df.p"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(ValueError, match=rf"df\.p, .*found .*{what}.*coco-train-words\.p"):
    Frequencies.load(path)


def test_groups_must_fit():
  with pytest.raises(ValueError, match="each of 2 hypotheses, found 1 groups"):
    cider_d(["a", "b"], [["a"]])
  with pytest.raises(ValueError, match="1 of them empty"):
    cider_d(["a", "b"], [["a"], []])
