"""A quick part of `fuzz_data`; the whole is run by hand."""

import pytest

from tests import fuzz_data


@pytest.mark.parametrize(
  ("run", "count", "some"),
  [
    (fuzz_data.rows_of_tsv, 120, {"read", "left out"}),
    (fuzz_data.lines_of_jsonl, 60, {"read", "file refused"}),
    (fuzz_data.lines_of_csv, 60, {"read", "file refused"}),
  ],
)
def test_mutated_rows_are_read_left_out_or_refused(tmp_path, run, count, some):
  results = run(tmp_path, count=count, seed=1)
  assert some <= results.keys()
  assert sum(results.values()) >= count * 0.9  # a row may be cut to nothing
