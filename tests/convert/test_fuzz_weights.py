"""A quick part of `fuzz_weights` and of `flipped_bits`; the whole is run by hand."""

import pytest

from tests import flipped_bits, fuzz_weights

# What opening costs differs: of folders it is Orbax' seconds, of files milliseconds.
COUNTS = {"torch": 60, "torch-pickle": 60, "safetensors": 100, "directory": 12, "huggingface": 12}


@pytest.mark.parametrize("kind", fuzz_weights.KINDS)
def test_mutated_weights_are_refused_or_read(tmp_path, kind):
  pytest.importorskip("torch")
  results = fuzz_weights.run(kind, tmp_path, count=COUNTS[kind])
  assert results["refused"] > COUNTS[kind] // 4


@pytest.mark.parametrize("form", flipped_bits.FORMS)
def test_a_flipped_bit_is_seen(tmp_path, form):
  outcomes = [x.outcome for x in flipped_bits.run(form, tmp_path, count=2)]
  assert outcomes == ["older taken" if form == "checkpoint" else "refused"] * 2
