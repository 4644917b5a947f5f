"""Positions for images of another size."""

import numpy as np
import pytest

from ofa_jax.convert.cnclip.positions import resize_positions
from tests.cnclip_golden import golden


@pytest.mark.parametrize("grid", [3, 6, 7])
def test_the_originals_interpolation(grid):
  arrays = golden("micro_vit", "resize_pos_embed")
  found = resize_positions(arrays["pos"], grid)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, arrays[f"to{grid}x{grid}"], atol=1e-6)


@pytest.mark.parametrize("old, new", [(7, 14), (16, 24), (24, 16), (1, 3), (5, 1)])
def test_other_sizes_against_pytorch(old, new):
  torch = pytest.importorskip("torch")
  positions = np.random.default_rng(0).standard_normal((1 + old**2, 8), np.float32)
  image = torch.from_numpy(positions[1:].reshape(1, old, old, 8)).permute(0, 3, 1, 2)
  expected = torch.nn.functional.interpolate(
    image, size=(new, new), mode="bicubic", align_corners=True
  )
  found = resize_positions(positions, new)
  np.testing.assert_array_equal(found[0], positions[0])
  np.testing.assert_allclose(
    found[1:].reshape(new, new, 8), expected[0].permute(1, 2, 0).numpy(), atol=2e-5
  )


def test_the_same_grid_changes_nothing():
  positions = golden("micro_vit", "resize_pos_embed")["pos"]
  np.testing.assert_array_equal(resize_positions(positions, 4), positions)


def test_positions_that_are_no_square_are_an_error():
  for rows in (0, 1, 4, 18):
    with pytest.raises(ValueError, match="square grid"):
      resize_positions(np.zeros((rows, 4), np.float32), 3)
