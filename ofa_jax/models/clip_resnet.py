"""CLIP's ModifiedResNet (arXiv:2103.00020, section 2.4): three-convolution stem, anti-aliased
strides (average pooling before a stride-1 convolution) and attention instead of global pooling.

The blocks of a stage keep their own names instead of being stacked: block 0 has another shape, the
other one to five are few, and BatchNorm's running statistics can then be assigned in place.
Rematerialisation (`Scan`) is for transformers and does not reach this tower, as in the original.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal

from ofa_jax.models.attention import attention
from ofa_jax.models.convolution import Conv
from ofa_jax.models.layers import BatchNorm, Linear, shard_batch
from ofa_jax.numerics import wide

EXPANSION = 4  # output channels of a bottleneck per inner channel
REDUCTION = 32  # image pixels per cell of the last feature map


@dataclasses.dataclass(kw_only=True)
class ResNetConfig:
  """Sizes of a ModifiedResNet: `layers` blocks in four stages, `width` channels after the stem.

  The attention pool works on 32 * width channels, in heads of head_width.
  """

  image_size: int
  layers: tuple[int, int, int, int] = (3, 4, 6, 3)
  width: int = 64
  head_width: int = 64


class Downsample(nnx.Module):
  """The shortcut of a block that changes shape: average pooling, 1x1 convolution, BatchNorm.

  Called `norm`, not `bn`: the original decays its scale, which its rule for names misses.
  """

  def __init__(self, inputs: int, outputs: int, *, stride: int, rngs: nnx.Rngs):
    """Makes the parameters."""
    self.stride = stride
    self.conv = Conv(inputs, outputs, size=1, rngs=rngs)
    self.norm = BatchNorm(outputs)

  def __call__(self, x: jax.Array, *, rngs: jax.Array | None = None) -> jax.Array:
    """Maps x [B, S, S, inputs] to [B, S / stride, S / stride, outputs]."""
    return self.norm(self.conv(avg_pool(x, self.stride)), rngs=rngs)


class Bottleneck(nnx.Module):
  """A residual block of 1x1, 3x3, 1x1 convolutions, its stride done by average pooling."""

  def __init__(self, inputs: int, planes: int, *, stride: int, rngs: nnx.Rngs):
    """Makes the parameters; the last norm starts at 0, so that the block starts as its shortcut."""
    outputs = EXPANSION * planes
    self.stride = stride
    self.conv1 = Conv(inputs, planes, size=1, rngs=rngs)
    self.bn1 = BatchNorm(planes)
    self.conv2 = Conv(planes, planes, size=3, rngs=rngs)
    self.bn2 = BatchNorm(planes)
    self.conv3 = Conv(planes, outputs, size=1, rngs=rngs)
    self.bn3 = BatchNorm(outputs, zero_scale=True)
    reshapes = stride > 1 or inputs != outputs
    self.downsample = Downsample(inputs, outputs, stride=stride, rngs=rngs) if reshapes else None

  def __call__(self, x: jax.Array, *, rngs: jax.Array | None = None) -> jax.Array:
    """Maps x [B, S, S, inputs] to [B, S / stride, S / stride, 4 * planes]."""
    y = jax.nn.relu(self.bn1(self.conv1(x), rngs=rngs))
    y = jax.nn.relu(self.bn2(self.conv2(y), rngs=rngs))
    y = self.bn3(self.conv3(avg_pool(y, self.stride)), rngs=rngs)
    shortcut = x if self.downsample is None else self.downsample(x, rngs=rngs)
    return jax.nn.relu(y + shortcut)


class Stage(nnx.Module):
  """A run of bottlenecks, `block0`, `block1`, ...; only the first one has the stride."""

  def __init__(self, inputs: int, planes: int, *, num: int, stride: int, rngs: nnx.Rngs):
    """Makes `num` blocks."""
    self.num = num
    for i in range(num):
      block = Bottleneck(inputs, planes, stride=1 if i else stride, rngs=rngs)
      setattr(self, f"block{i}", block)
      inputs = EXPANSION * planes

  def __call__(self, x: jax.Array, *, rngs: jax.Array | None = None) -> jax.Array:
    """Runs the blocks in order."""
    for i in range(self.num):
      x = shard_batch(getattr(self, f"block{i}")(x, rngs=rngs))
    return x


class AttentionPool(nnx.Module):
  """One query, the mean of the feature map, attends to the mean and to every cell."""

  def __init__(self, cells: int, width: int, embed_dim: int, *, heads: int, rngs: nnx.Rngs):
    """Makes qkv [D, 3, H, K], out [H, K, E] and positions [cells + 1, D].

    Weights and positions are N(0, 1/D), biases PyTorch's default.
    """
    head_dims = (heads, width // heads)
    init = normal(width**-0.5)
    self.positional_embedding = nnx.Param(init(rngs.params(), (cells + 1, width), jnp.float32))
    self.qkv = Linear(width, (3, *head_dims), kernel_init=init, rngs=rngs)
    self.out = Linear(head_dims, embed_dim, kernel_init=init, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps the feature map x [B, G, G, D] to float32[B, E]."""
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1) + self.positional_embedding[...]
    kernel, bias = self.qkv.kernel[...], self.qkv.bias[...]
    q = jnp.tensordot(x[:, :1], kernel[:, 0], axes=1) + bias[0]
    kv = jnp.tensordot(x, kernel[:, 1:], axes=1) + bias[1:]
    x = attention(q, kv[:, :, 0], kv[:, :, 1])[:, 0]
    out = jnp.einsum("bhk,hke->be", x, self.out.kernel[...], preferred_element_type=wide(x.dtype))
    return out + self.out.bias[...]


class ModifiedResNet(nnx.Module):
  """The image tower of RN50: a picture to a vector of the shared space."""

  def __init__(self, config: ResNetConfig, embed_dim: int, *, rngs: nnx.Rngs):
    """Makes the parameters, the convolutions with PyTorch's defaults.

    Raises:
      ValueError: the image is not a multiple of 32 pixels, or the channels of the heads.
    """
    width, channels = config.width, REDUCTION * config.width
    problems = []
    if config.image_size % REDUCTION:
      problems.append(
        f"expected image_size to be a multiple of {REDUCTION}, found {config.image_size}"
      )
    if channels % config.head_width:
      problems.append(
        f"expected 32 * width to be a multiple of head_width {config.head_width}, found {channels}"
      )
    if problems:
      raise ValueError("ResNetConfig: " + "; ".join(problems))
    self.conv1 = Conv(3, width // 2, size=3, stride=2, rngs=rngs)
    self.bn1 = BatchNorm(width // 2)
    self.conv2 = Conv(width // 2, width // 2, size=3, rngs=rngs)
    self.bn2 = BatchNorm(width // 2)
    self.conv3 = Conv(width // 2, width, size=3, rngs=rngs)
    self.bn3 = BatchNorm(width)
    num1, num2, num3, num4 = config.layers
    self.layer1 = Stage(width, width, num=num1, stride=1, rngs=rngs)
    self.layer2 = Stage(4 * width, 2 * width, num=num2, stride=2, rngs=rngs)
    self.layer3 = Stage(8 * width, 4 * width, num=num3, stride=2, rngs=rngs)
    self.layer4 = Stage(16 * width, 8 * width, num=num4, stride=2, rngs=rngs)
    self.attnpool = AttentionPool(
      (config.image_size // REDUCTION) ** 2,
      channels,
      embed_dim,
      heads=channels // config.head_width,
      rngs=rngs,
    )

  def __call__(self, image: jax.Array, *, rngs: jax.Array | None = None) -> jax.Array:
    """Maps image float[B, S, S, 3], normalised, to float32[B, E], not normalised.

    With `rngs` (training) BatchNorm uses the batch and updates its running statistics in place.
    """
    x = self.stem(shard_batch(image.astype(self.conv1.kernel.dtype)), rngs=rngs)
    for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
      x = layer(x, rngs=rngs)
    return self.attnpool(x)

  def stem(self, image: jax.Array, *, rngs: jax.Array | None = None) -> jax.Array:
    """Maps image [B, S, S, 3] to [B, S / 4, S / 4, width]."""
    x = jax.nn.relu(self.bn1(self.conv1(image), rngs=rngs))
    x = jax.nn.relu(self.bn2(self.conv2(x), rngs=rngs))
    x = jax.nn.relu(self.bn3(self.conv3(x), rngs=rngs))
    return avg_pool(x, 2)


def avg_pool(x: jax.Array, size: int) -> jax.Array:
  """Averages x [B, S, S, D] over tiles of `size` by `size`."""
  if size == 1:
    return x
  B, height, width, D = x.shape
  x = x.reshape(B, height // size, size, width // size, size, D)
  return x.mean((2, 4))
