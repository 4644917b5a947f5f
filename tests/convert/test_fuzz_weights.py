"""A quick part of `fuzz_weights`; the whole is run by hand."""

import pytest

from tests import fuzz_weights

# What opening costs differs: of folders it is Orbax' seconds, of files milliseconds.
COUNTS = {"torch": 60, "torch-pickle": 60, "safetensors": 100, "directory": 12, "huggingface": 12}


@pytest.mark.parametrize("kind", fuzz_weights.KINDS)
def test_mutated_weights_are_refused_or_read(tmp_path, kind):
  pytest.importorskip("torch")
  results = fuzz_weights.run(kind, tmp_path, count=COUNTS[kind])
  assert results["refused"] > COUNTS[kind] // 4
