"""Boxes against the original's evaluation."""

import json

import numpy as np

from ofa_jax.data.boxes import from_bins
from tests.ofa_files import GOLDEN


def test_boxes_are_the_originals():
  stored = json.loads((GOLDEN / "generation" / "refcoco_eval.json").read_text())
  ratios = np.stack([stored["w_resize_ratios"], stored["h_resize_ratios"]], axis=1)
  found = from_bins(np.array(stored["bins"]), num_bins=stored["num_bins"], scale=1 / ratios)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, stored["boxes"], rtol=1e-5)
