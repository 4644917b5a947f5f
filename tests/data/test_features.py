"""Feature files: the digits of Python's json, faults by file and line."""

import json

import numpy as np
import pytest

from ofa_jax.data.features import FeatureWriter, read_features


def test_jsonl_has_the_digits_of_json(tmp_path):
  rng = np.random.default_rng(0)
  vectors = rng.standard_normal((64, 50)) * 10.0 ** rng.integers(-40, 12, (64, 50))
  vectors = vectors.astype(np.float32)
  vectors[0, :8] = [0.0, -0.0, 1e-4, 9.9999e-5, 1e-5, 1.5e-7, -2e-10, 110.00001]
  ids = [*range(-3, 61)]
  rows = FeatureWriter(tmp_path / "a.jsonl", kind="image", width=50).encode(ids, vectors)
  expected = [
    json.dumps({"image_id": i, "feature": v}) + "\n"
    for i, v in zip(ids, vectors.tolist(), strict=True)
  ]
  assert b"".join(rows).decode() == "".join(expected)
  (tmp_path / "a.jsonl").write_bytes(b"".join(rows))
  found = read_features(tmp_path / "a.jsonl", kind="image")
  np.testing.assert_array_equal(found.ids, ids)
  np.testing.assert_array_equal(found.vectors, vectors)


GOOD = '{"text_id": 1, "feature": [0.5, 1]}'


@pytest.mark.parametrize(
  ("lines", "message"),
  [
    ([GOOD, '{"text_id": 2, "feature": [0.5'], r"a.jsonl:2 is not JSON"),
    ([GOOD, "", GOOD], r"a.jsonl:2 is not JSON"),
    ([GOOD, '{"image_id": 2, "feature": [0.5, 1]}'], r"a.jsonl:2 has no field 'text_id'"),
    ([GOOD, '{"text_id": 2, "feature": [0.5]}'], r"a.jsonl:2 has 1 numbers, the lines before 2"),
    ([GOOD, '{"text_id": "2", "feature": [0.5, 1]}'], r"a.jsonl:2 has the id '2', not an integer"),
    ([GOOD, '{"text_id": 2, "feature": [0.5, "x"]}'], r"a.jsonl:2 could not convert string"),
    ([GOOD, '{"text_id": 2, "feature": 3}'], r"a.jsonl:2 "),
    ([GOOD, "[1]"], r"a.jsonl:2 "),
    ([GOOD, '{"text_id": 2, "feature": [0.5, 1e99]}'], r"a.jsonl:2 has NaN or infinity"),
    (['{"text_id": 2, "feature": [3, 1]}', GOOD, GOOD], r"a.jsonl:3 repeats the id 1 of row 2"),
    ([], "a.jsonl has no rows"),
    (["x"] * 9, r"found 9 faults: .*a.jsonl:5 is not JSON.*; \.\.\.$"),
  ],
)
def test_faults_name_file_and_line(tmp_path, lines, message):
  path = tmp_path / "a.jsonl"
  path.write_text("".join(line + "\n" for line in lines))
  with pytest.raises(ValueError, match=message):
    read_features(path, kind="text")


def test_npy(tmp_path):
  vectors = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float16)
  np.save(tmp_path / "plain.npy", vectors)
  found = read_features(tmp_path / "plain.npy", kind="text")
  assert found.ids.tolist() == [0, 1, 2, 3, 4]
  np.testing.assert_array_equal(found.vectors, vectors)
  rows = np.zeros(3, [("id", "<i8"), ("feature", "<f4", (2,))])
  rows["id"] = [4, 7, 4]
  np.save(tmp_path / "twice.npy", rows)
  np.save(tmp_path / "flat.npy", np.zeros(3))
  np.save(tmp_path / "object.npy", np.array([{}], object))
  (tmp_path / "text.npy").write_text("hello")
  (tmp_path / "a.txt").write_text("hello")
  for name, message in {
    "twice.npy": "row 3 repeats the id 4 of row 1",
    "flat.npy": r"found float64\[3\]",
    "object.npy": "Python objects",
    "text.npy": "NumPy array",
    "none.npy": "missing",
    "a.txt": r"\.jsonl or \.npy",
  }.items():
    with pytest.raises(ValueError, match=message):
      read_features(tmp_path / name, kind="text")
