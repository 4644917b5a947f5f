"""Inception v3 (arXiv:1512.00567) in the two variants that judge pictures.

"torchvision" is the ImageNet model of PyTorch's users, which OFA's scripts take for the inception
score and for an FID of their own. "pytorch_fid" is TensorFlow's model of 2015 as pytorch-fid has
ported it, whose FID is the one of papers: average pools leave out what pads them, the last block
takes a maximum, pictures come as 2 x - 1. Parts are named as in the stored files of both.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from ofa_jax.data.images import IMAGENET_MEAN, IMAGENET_STD
from ofa_jax.models.convolution import Conv, max_pool
from ofa_jax.models.layers import BatchNorm, Linear, shard_batch
from ofa_jax.numerics import widened

VARIANTS = ("torchvision", "pytorch_fid")
SIZE = 299  # side of the pictures in pixels
WIDTH = 2048  # of the features
DIMS = (64, 192, 768, WIDTH)  # of the features of each block
EPS = 1e-3  # of BatchNorm


@dataclasses.dataclass(kw_only=True)
class InceptionConfig:
  """Which Inception v3: the variant, and the classes of its last layer."""

  variant: str = "torchvision"
  num_classes: int = 1000
  name: str = ""

  def build(self, *, rngs: nnx.Rngs, remat: str = "none", unroll: int = 1) -> "Inception":
    """Makes the model with fresh float32 parameters; there is no stack to run in another way.

    Raises:
      ValueError: no such variant.
    """
    del remat, unroll
    return Inception(self, rngs=rngs)

  @property
  def sharding(self) -> tuple[tuple[str, P], ...]:
    """Ordered table (path regex, PartitionSpec of the last axes); it covers every parameter."""
    return ((r".", P()),)


class Unit(nnx.Module):
  """A convolution without bias, BatchNorm, ReLU."""

  def __init__(
    self,
    inputs: int,
    outputs: int,
    size: int | tuple[int, int] = 1,
    *,
    stride: int = 1,
    pad: bool = True,
    rngs: nnx.Rngs,
  ):
    """Makes the parameters; with `pad` and stride 1 a picture keeps its size."""
    padding = None if pad else ((0, 0), (0, 0))
    self.conv = Conv(inputs, outputs, size=size, stride=stride, padding=padding, rngs=rngs)
    self.bn = BatchNorm(outputs, eps=EPS)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B, h, w, inputs] to [B, h', w', outputs]."""
    return jax.nn.relu(self.bn(self.conv(x)))


# A mixed block: branch -> its units in order (name, outputs, size), each (height, width).
_Units = tuple[tuple[str, int, int | tuple[int, int]], ...]
_WIDE, _TALL = (1, 7), (7, 1)


def _block_a(pool: int) -> dict[str, _Units]:
  return {
    "1x1": (("branch1x1", 64, 1),),
    "5x5": (("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)),
    "3x3dbl": (
      ("branch3x3dbl_1", 64, 1),
      ("branch3x3dbl_2", 96, 3),
      ("branch3x3dbl_3", 96, 3),
    ),
    "pool": (("branch_pool", pool, 1),),
  }


_BLOCK_B: dict[str, _Units] = {
  "3x3": (("branch3x3", 384, 3),),
  "3x3dbl": (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)),
}


def _block_c(c: int) -> dict[str, _Units]:
  return {
    "1x1": (("branch1x1", 192, 1),),
    "7x7": (("branch7x7_1", c, 1), ("branch7x7_2", c, _WIDE), ("branch7x7_3", 192, _TALL)),
    "7x7dbl": (
      ("branch7x7dbl_1", c, 1),
      ("branch7x7dbl_2", c, _TALL),
      ("branch7x7dbl_3", c, _WIDE),
      ("branch7x7dbl_4", c, _TALL),
      ("branch7x7dbl_5", 192, _WIDE),
    ),
    "pool": (("branch_pool", 192, 1),),
  }


_BLOCK_D: dict[str, _Units] = {
  "3x3": (("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)),
  "7x7x3": (
    ("branch7x7x3_1", 192, 1),
    ("branch7x7x3_2", 192, _WIDE),
    ("branch7x7x3_3", 192, _TALL),
    ("branch7x7x3_4", 192, 3),
  ),
}
# The last two units of a forked branch stand side by side.
_BLOCK_E: dict[str, _Units] = {
  "1x1": (("branch1x1", 320, 1),),
  "3x3fork": (
    ("branch3x3_1", 384, 1),
    ("branch3x3_2a", 384, (1, 3)),
    ("branch3x3_2b", 384, (3, 1)),
  ),
  "3x3dblfork": (
    ("branch3x3dbl_1", 448, 1),
    ("branch3x3dbl_2", 384, 3),
    ("branch3x3dbl_3a", 384, (1, 3)),
    ("branch3x3dbl_3b", 384, (3, 1)),
  ),
  "pool": (("branch_pool", 192, 1),),
}

# Name -> (channels in, branches, stride of the last unit of each).
_BLOCKS: dict[str, tuple[int, dict[str, _Units], int]] = {
  "Mixed_5b": (192, _block_a(32), 1),
  "Mixed_5c": (256, _block_a(64), 1),
  "Mixed_5d": (288, _block_a(64), 1),
  "Mixed_6a": (288, _BLOCK_B, 2),
  "Mixed_6b": (768, _block_c(128), 1),
  "Mixed_6c": (768, _block_c(160), 1),
  "Mixed_6d": (768, _block_c(160), 1),
  "Mixed_6e": (768, _block_c(192), 1),
  "Mixed_7a": (768, _BLOCK_D, 2),
  "Mixed_7b": (1280, _BLOCK_E, 1),
  "Mixed_7c": (WIDTH, _BLOCK_E, 1),
}


class Mixed(nnx.Module):
  """A block of branches side by side, whose results are joined along the channels."""

  def __init__(self, name: str, *, variant: str, rngs: nnx.Rngs):
    """Makes the units of a block out of `_BLOCKS`."""
    self.block = name
    # What stands before the 1x1 of the pooling branch.
    self.padded_mean = variant == "torchvision"
    self.maximum = variant == "pytorch_fid" and name == "Mixed_7c"
    channels, branches, stride = _BLOCKS[name]
    for kind, units in branches.items():
      inputs = channels
      for i, (unit, outputs, size) in enumerate(units):
        last = i == len(units) - 1
        options = {"stride": stride, "pad": stride == 1} if last else {}
        setattr(self, unit, Unit(inputs, outputs, size, **options, rngs=rngs))
        if not (kind.endswith("fork") and i >= len(units) - 2):
          inputs = outputs

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B, h, w, D] to [B, h', w', D']."""
    _, branches, stride = _BLOCKS[self.block]
    outputs = []
    for kind, units in branches.items():
      y = self._pooled(x) if kind == "pool" else x
      names = [unit for unit, _, _ in units]
      side_by_side = names[-2:] if kind.endswith("fork") else names[-1:]
      for name in names[: -len(side_by_side)]:
        y = getattr(self, name)(y)
      outputs += [getattr(self, name)(y) for name in side_by_side]
    if stride == 2:
      outputs.append(max_pool(x, stride=2, pad=0))
    return shard_batch(jnp.concatenate(outputs, -1))

  def _pooled(self, x: jax.Array) -> jax.Array:
    if self.maximum:
      return max_pool(x, stride=1, pad=1)
    count = 9 if self.padded_mean else _sum_pool(jnp.ones((1, *x.shape[1:3], 1), x.dtype))
    return _sum_pool(x) / count


class Inception(nnx.Module):
  """Pictures to the features of four depths, and to the logits of classes."""

  def __init__(self, config: InceptionConfig, *, rngs: nnx.Rngs):
    """Makes the parameters.

    Raises:
      ValueError: no such variant.
    """
    if config.variant not in VARIANTS:
      raise ValueError(
        f"InceptionConfig: expected variant {' or '.join(VARIANTS)}, found {config.variant!r}"
      )
    self.variant = config.variant
    self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2, pad=False, rngs=rngs)
    self.Conv2d_2a_3x3 = Unit(32, 32, 3, pad=False, rngs=rngs)
    self.Conv2d_2b_3x3 = Unit(32, 64, 3, rngs=rngs)
    self.Conv2d_3b_1x1 = Unit(64, 80, rngs=rngs)
    self.Conv2d_4a_3x3 = Unit(80, 192, 3, pad=False, rngs=rngs)
    for name in _BLOCKS:
      setattr(self, name, Mixed(name, variant=config.variant, rngs=rngs))
    self.fc = Linear(WIDTH, config.num_classes, rngs=rngs)

  def features(self, image: jax.Array, *, dims: int = WIDTH) -> jax.Array:
    """Maps pictures to what an FID of this variant compares.

    Args:
      image: uint8[B, H, W, 3], or float[B, H, W, 3] from 0 to 1. Other sizes than 299 are resized
        as by the variant's own script: bilinear, without a filter where it makes smaller.
      dims: the width, which tells the block: 64, 192, 768 or 2048.

    Returns:
      float32[B, dims], the means of the block's features over the picture.

    Raises:
      ValueError: no such width.
    """
    if dims not in DIMS:
      raise ValueError(f"Expected features of {', '.join(map(str, DIMS))} dims, found {dims}")
    return self.blocks(self.mapped(image))[DIMS.index(dims)].mean((1, 2))

  def logits(self, image: jax.Array) -> jax.Array:
    """Maps pictures, as `features` takes them, to float32[B, C].

    Values from 0 to 1 go into the network as they are, which is how OFA's script for the inception
    score calls torchvision's model (`transform_input` False).
    """
    image = resize(_unit(image), size=SIZE, corners=self.variant == "torchvision")
    return widened(self.classify(image))

  def classify(self, image: jax.Array) -> jax.Array:
    """Maps pictures float[B, 299, 299, 3], as the network takes them, to the logits [B, C]."""
    return self.fc(self.blocks(image)[-1][:, 0, 0])

  def mapped(self, image: jax.Array) -> jax.Array:
    """Pictures, as `features` takes them, as the network takes them: float32[B, 299, 299, 3]."""
    if self.variant == "pytorch_fid":
      return 2 * resize(_unit(image), size=SIZE, corners=False) - 1
    mean, std = (jnp.asarray(x, jnp.float32) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return resize(_unit(image), size=SIZE, corners=True) * (std / 0.5) + (mean - 0.5) / 0.5

  def blocks(self, image: jax.Array) -> list[jax.Array]:
    """Maps pictures float[B, 299, 299, 3] to the features of four depths.

    Returns:
      float32: [B, 73, 73, 64], [B, 35, 35, 192], [B, 17, 17, 768] and [B, 1, 1, 2048].
    """
    x = shard_batch(image.astype(self.Conv2d_1a_3x3.conv.kernel.dtype))
    x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
    first = max_pool(x, stride=2, pad=0)
    second = max_pool(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(first)), stride=2, pad=0)
    x = second
    for name in _BLOCKS:
      x = getattr(self, name)(x)
      if name == "Mixed_6e":
        third = x
    last = widened(x).mean((1, 2), keepdims=True)
    return [widened(y) for y in (first, second, third, last)]


def resize(image: jax.Array, *, size: int, corners: bool) -> jax.Array:
  """Bilinear resizing to a square as PyTorch's `interpolate` does it, without antialiasing.

  Args:
    image: float32[B, H, W, 3].
    size: side in pixels.
    corners: the corner pixels stay where they are (`align_corners`).

  Returns:
    float32[B, size, size, 3].
  """
  _, height, width, _ = image.shape
  if (height, width) == (size, size):
    return image
  rows, columns = (_interpolation(x, size, corners=corners) for x in (height, width))
  exact = jax.lax.Precision.HIGHEST
  image = jnp.einsum("oh,bhwc->bowc", rows, image, precision=exact)
  return jnp.einsum("pw,bowc->bopc", columns, image, precision=exact)


def _interpolation(old: int, new: int, *, corners: bool) -> np.ndarray:
  """float32[new, old]: each new point as a sum of two old ones."""
  at = np.arange(new, dtype=np.float64)
  at = at * (old - 1) / max(new - 1, 1) if corners else np.maximum((at + 0.5) * old / new - 0.5, 0)
  first = np.minimum(at.astype(int), old - 1)
  second, share = np.minimum(first + 1, old - 1), at - first
  matrix = np.zeros((new, old))
  np.add.at(matrix, (np.arange(new), first), 1 - share)
  np.add.at(matrix, (np.arange(new), second), share)
  return matrix.astype(np.float32)


def _unit(image: jax.Array) -> jax.Array:
  """Pictures as float32 from 0 to 1."""
  return image.astype(jnp.float32) / 255.0 if image.dtype == jnp.uint8 else widened(image)


def _sum_pool(x: jax.Array) -> jax.Array:
  """The sum over windows of 3x3 around every pixel."""
  sides = ((0, 0), (1, 1), (1, 1), (0, 0))
  return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), sides)
