"""The image trunk of OFA: a ResNet v1.5 (arXiv:1512.03385) without its last stage and its pooling.

Stages 1 to 3 give a feature map of 1024 channels, one cell per 16 pixels. The blocks of a stage
keep their own names, as in `clip_resnet`; rematerialisation does not reach them.
"""

import jax
from flax import nnx
from jax.nn.initializers import variance_scaling

from ofa_jax.models.convolution import Conv, max_pool
from ofa_jax.models.layers import (
  BatchNorm,
  drop_path,
  drop_path_rates,
  shard_batch,
  split_rngs,
)

EXPANSION = 4  # output channels of a bottleneck per inner channel
CHANNELS = 1024  # of the feature map
REDUCTION = 16  # image pixels per cell of the feature map
INIT = variance_scaling(2.0, "fan_out", "normal")  # kaiming_normal_(mode="fan_out"), for ReLU


class Downsample(nnx.Module):
  """The shortcut of a block that changes shape: a strided 1x1 convolution and BatchNorm."""

  def __init__(
    self, inputs: int, outputs: int, *, stride: int, eps: float, frozen: bool, rngs: nnx.Rngs
  ):
    """Makes the parameters."""
    self.conv = Conv(inputs, outputs, size=1, stride=stride, kernel_init=INIT, rngs=rngs)
    self.norm = BatchNorm(outputs, eps=eps, frozen=frozen)

  def __call__(self, x: jax.Array, *, rngs: jax.Array | None = None) -> jax.Array:
    """Maps x [B, S, S, inputs] to [B, S / stride, S / stride, outputs]."""
    return self.norm(self.conv(x), rngs=rngs)


class Bottleneck(nnx.Module):
  """A residual block of 1x1, 3x3, 1x1 convolutions; the 3x3 one has the stride (v1.5)."""

  def __init__(
    self,
    inputs: int,
    planes: int,
    *,
    stride: int,
    drop_path: float,
    eps: float,
    frozen: bool,
    rngs: nnx.Rngs,
  ):
    """Makes the parameters."""
    outputs = EXPANSION * planes
    norm = {"eps": eps, "frozen": frozen}
    self.drop_path = drop_path
    self.conv1 = Conv(inputs, planes, size=1, kernel_init=INIT, rngs=rngs)
    self.bn1 = BatchNorm(planes, **norm)
    self.conv2 = Conv(planes, planes, size=3, stride=stride, kernel_init=INIT, rngs=rngs)
    self.bn2 = BatchNorm(planes, **norm)
    self.conv3 = Conv(planes, outputs, size=1, kernel_init=INIT, rngs=rngs)
    self.bn3 = BatchNorm(outputs, **norm)
    reshapes = stride > 1 or inputs != outputs
    self.downsample = (
      Downsample(inputs, outputs, stride=stride, **norm, rngs=rngs) if reshapes else None
    )

  def __call__(self, x: jax.Array, *, rngs: jax.Array | None = None) -> jax.Array:
    """Maps x [B, S, S, inputs] to [B, S / stride, S / stride, 4 * planes]."""
    y = jax.nn.relu(self.bn1(self.conv1(x), rngs=rngs))
    y = jax.nn.relu(self.bn2(self.conv2(y), rngs=rngs))
    y = drop_path(self.bn3(self.conv3(y), rngs=rngs), self.drop_path, rngs=rngs)
    shortcut = x if self.downsample is None else self.downsample(x, rngs=rngs)
    return jax.nn.relu(y + shortcut)


class Stage(nnx.Module):
  """A run of bottlenecks, `block0`, `block1`, ...; only the first one has the stride."""

  def __init__(
    self,
    inputs: int,
    planes: int,
    *,
    num: int,
    stride: int,
    drop_path: float,
    eps: float,
    frozen: bool,
    rngs: nnx.Rngs,
  ):
    """Makes `num` blocks whose drop-path rates grow from 0 to `drop_path`."""
    self.num = num
    for i, rate in enumerate(drop_path_rates(drop_path, num)):
      block = Bottleneck(
        inputs,
        planes,
        stride=1 if i else stride,
        drop_path=rate,
        eps=eps,
        frozen=frozen,
        rngs=rngs,
      )
      setattr(self, f"block{i}", block)
      inputs = EXPANSION * planes

  def __call__(self, x: jax.Array, *, rngs: jax.Array | None = None) -> jax.Array:
    """Runs the blocks in order, each with its own key."""
    for i, key in enumerate(split_rngs(rngs, self.num)):
      x = shard_batch(getattr(self, f"block{i}")(x, rngs=key))
    return x


class ResNet(nnx.Module):
  """Stem and three stages: a picture to its feature map."""

  def __init__(
    self,
    stages: tuple[int, int, int],
    *,
    drop_path: float = 0.0,
    eps: float = 1e-5,
    frozen: bool = False,
    rngs: nnx.Rngs,
  ):
    """Makes the parameters: convolutions N(0, 2 / fan_out), norms 1 and 0.

    Args:
      stages: blocks of each stage.
      drop_path: rate of the last block of every stage.
      eps: of BatchNorm; torch.nn.BatchNorm2d's default.
      frozen: BatchNorm is a constant map, see `layers.BatchNorm`; convolutions are still trained.
      rngs: the stream `params` draws the parameters.
    """
    shared = {"drop_path": drop_path, "eps": eps, "frozen": frozen, "rngs": rngs}
    num1, num2, num3 = stages
    self.conv1 = Conv(3, 64, size=7, stride=2, kernel_init=INIT, rngs=rngs)
    self.bn1 = BatchNorm(64, eps=eps, frozen=frozen)
    self.layer1 = Stage(64, 64, num=num1, stride=1, **shared)
    self.layer2 = Stage(256, 128, num=num2, stride=2, **shared)
    self.layer3 = Stage(512, 256, num=num3, stride=2, **shared)

  def __call__(self, image: jax.Array, *, rngs: jax.Array | None = None) -> jax.Array:
    """Maps image float[B, h, w, 3], normalised, to its features [B, ceil(h/16), ceil(w/16), 1024].

    With `rngs` (training) BatchNorm uses the batch and updates its running statistics in place.
    """
    x = shard_batch(image.astype(self.conv1.kernel.dtype))
    x = max_pool(jax.nn.relu(self.bn1(self.conv1(x), rngs=rngs)))
    for layer, key in zip(
      (self.layer1, self.layer2, self.layer3), split_rngs(rngs, 3), strict=True
    ):
      x = layer(x, rngs=key)
    return x
