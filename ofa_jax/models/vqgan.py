"""A VQGAN with Gumbel-softmax (arXiv:2012.09841): a picture as codes, and codes as a picture.

Text to image draws codes, one for every 8 x 8 pixels of a picture in the released model, which
nothing trains any more; all the same it can be trained here (`VQGAN.reconstruct`). Normalisation
is over 32 groups of channels, so that every width is a multiple of 32.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jax.sharding import PartitionSpec as P

from ofa_jax.models.attention import SelfAttention
from ofa_jax.models.convolution import Conv
from ofa_jax.models.layers import Embed, Linear, shard_batch, torch_default
from ofa_jax.numerics import widened
from ofa_jax.trees import join_batch, split_batch

GROUPS = 32
EPS = 1e-6  # of the original's GroupNorm

# A codec is small beside what draws its codes: it lies whole on every device.
SHARDING: tuple[tuple[str, P], ...] = ((r".", P()),)


@dataclasses.dataclass(kw_only=True)
class VQGANConfig:
  """Sizes of a VQGAN; the defaults are those of the released one (f = 8, 8192 codes).

  Attributes:
    image_size: side in pixels of the pictures that it was trained with; others work, too.
    num_codes: entries of the codebook.
    embed_dim: width of an entry; the original needs it equal to `z_channels`.
    z_channels: width of what the encoder gives.
    width: channels at full size.
    multipliers: of `width`, one for each level, each of half the size of the one before.
    blocks: residual blocks of a level of the encoder; those of the decoder have one more.
    attention: levels with attention after every block, 0 being full size.
    name: of known sizes.
  """

  image_size: int = 256
  num_codes: int = 8192
  embed_dim: int = 256
  z_channels: int = 256
  width: int = 128
  multipliers: tuple[int, ...] = (1, 1, 2, 4)
  blocks: int = 2
  attention: tuple[int, ...] = (3,)
  name: str = ""

  def build(self, *, rngs: nnx.Rngs, remat: str = "none", unroll: int = 1) -> "VQGAN":
    """Makes the model with fresh float32 parameters; there is no stack to run in another way.

    Raises:
      ValueError: sizes that do not fit together.
    """
    del remat, unroll
    return VQGAN(self, rngs=rngs)

  @property
  def reduction(self) -> int:
    """Pixels a side for each code."""
    return 1 << (len(self.multipliers) - 1)

  @property
  def sharding(self) -> tuple[tuple[str, P], ...]:
    """Ordered table (path regex, PartitionSpec of the last axes); it covers every parameter."""
    return SHARDING

  @property
  def towers(self) -> dict[str, str]:
    """Path regexes of the model's parts, for tables of parameters."""
    return {
      "encoder": r"^(encoder|quant_conv)/",
      "codes": r"^(proj|embed)/",
      "decoder": r"^(decoder|post_quant_conv)/",
    }

  @property
  def problems(self) -> list[str]:
    """What does not fit together."""
    widths = [self.width, *(self.width * m for m in self.multipliers)]
    problems = [
      f"expected widths that are multiples of {GROUPS}, found {width}"
      for width in sorted(set(widths))
      if width % GROUPS
    ]
    if self.embed_dim != self.z_channels:
      problems.append(
        f"expected embed_dim equal to z_channels {self.z_channels}, found {self.embed_dim}"
      )
    if not set(self.attention) <= set(range(len(self.multipliers))):
      problems.append(
        f"expected levels with attention out of 0 to {len(self.multipliers) - 1}, found "
        f"{self.attention}"
      )
    return problems


class VQGAN(nnx.Module):
  """Encoder, codebook and decoder."""

  def __init__(self, config: VQGANConfig, *, rngs: nnx.Rngs):
    """Makes the parameters with PyTorch's defaults.

    Raises:
      ValueError: sizes that do not fit together.
    """
    if config.problems:
      raise ValueError("VQGANConfig: " + "; ".join(config.problems))
    self.reduction, self.num_codes = config.reduction, config.num_codes
    self.encoder = Encoder(config, rngs=rngs)
    self.quant_conv = Linear(config.z_channels, config.embed_dim, rngs=rngs)
    self.proj = Linear(config.embed_dim, config.num_codes, rngs=rngs)
    self.embed = Embed(config.num_codes, config.embed_dim, init=normal(1.0), rngs=rngs)
    self.post_quant_conv = Linear(config.embed_dim, config.z_channels, rngs=rngs)
    self.decoder = Decoder(config, rngs=rngs)

  def logits(self, image: jax.Array) -> jax.Array:
    """Maps image float[B, H, W, 3] from -1 to 1 to the logits of its codes, float32[B, h, w, N].

    Raises:
      ValueError: sides that are no multiples of the pixels of a code.
    """
    if image.shape[1] % self.reduction or image.shape[2] % self.reduction:
      raise ValueError(
        f"Expected pictures whose sides are multiples of {self.reduction} pixels, found "
        f"{image.shape[1]} x {image.shape[2]}; resize or crop them"
      )
    return widened(self.proj(self.quant_conv(self.encoder(image))))

  def encode(self, image: jax.Array, *, rngs: jax.Array | None = None) -> jax.Array:
    """Turns pictures into codes.

    Args:
      image: float[B, H, W, 3] from -1 to 1.
      rngs: a PRNG key, or one for each row, of the Gumbel noise that the original adds whenever it
        encodes, so that codes are drawn; None: the likeliest codes.

    Returns:
      int32[B, h, w].
    """
    logits = self.logits(image)
    if rngs is not None:
      logits = logits + gumbel(rngs, logits.shape)
    return jnp.argmax(logits, -1).astype(jnp.int32)

  def decode(self, codes: jax.Array) -> jax.Array:
    """Maps codes int32[B, h, w] to pictures float32[B, H, W, 3] of about -1 to 1.

    Codes that are not in the codebook give NaN.
    """
    return widened(self.decoder(self.post_quant_conv(self.embed(codes))))

  def reconstruct(
    self, image: jax.Array, *, temperature: float | jax.Array = 1.0, rngs: jax.Array | None
  ) -> tuple[jax.Array, jax.Array]:
    """Encodes and decodes, for training: codes in one direction, their probabilities backwards.

    Args:
      image: float[B, H, W, 3] from -1 to 1.
      temperature: of the Gumbel-softmax (arXiv:1611.01144).
      rngs: a PRNG key, or one for each row; None: no noise.

    Returns:
      The pictures float32[B, H, W, 3]; and the divergence of the codes' probabilities from even
      ones, float32[], which the original weighs by 1e-8.
    """
    logits = self.logits(image)
    noise = 0.0 if rngs is None else gumbel(rngs, logits.shape)
    soft = jax.nn.softmax((logits + noise) / temperature)
    hard = jax.nn.one_hot(jnp.argmax(soft, -1), self.num_codes, dtype=soft.dtype)
    chosen = hard + soft - jax.lax.stop_gradient(soft)
    x = chosen.astype(self.embed.embedding.dtype) @ self.embed.embedding[...]
    even = jax.nn.softmax(logits)
    divergence = jnp.sum(even * jnp.log(even * self.num_codes + 1e-10), -1).mean()
    return widened(self.decoder(self.post_quant_conv(x))), divergence


class Encoder(nnx.Module):
  """A picture to one vector for each code."""

  def __init__(self, config: VQGANConfig, *, rngs: nnx.Rngs):
    """Makes the parameters."""
    self.levels = len(config.multipliers)
    width = config.width
    self.conv_in = Conv(3, width, size=3, bias=True, rngs=rngs)
    for i, multiplier in enumerate(config.multipliers):
      level = Level(
        width,
        config.width * multiplier,
        blocks=config.blocks,
        attention=i in config.attention,
        resample="down" if i + 1 < self.levels else None,
        rngs=rngs,
      )
      setattr(self, f"down{i}", level)
      width = config.width * multiplier
    self.mid = Middle(width, rngs=rngs)
    self.norm_out = GroupNorm(width)
    self.conv_out = Conv(width, config.z_channels, size=3, bias=True, rngs=rngs)

  def __call__(self, image: jax.Array) -> jax.Array:
    """Maps image float[B, H, W, 3] to [B, h, w, z_channels]."""
    x = self.conv_in(shard_batch(image.astype(self.conv_in.kernel.dtype)))
    for i in range(self.levels):
      x = getattr(self, f"down{i}")(x)
    return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
  """One vector for each code to a picture."""

  def __init__(self, config: VQGANConfig, *, rngs: nnx.Rngs):
    """Makes the parameters."""
    self.levels = len(config.multipliers)
    width = config.width * config.multipliers[-1]
    self.conv_in = Conv(config.z_channels, width, size=3, bias=True, rngs=rngs)
    self.mid = Middle(width, rngs=rngs)
    for i in reversed(range(self.levels)):
      level = Level(
        width,
        config.width * config.multipliers[i],
        blocks=config.blocks + 1,
        attention=i in config.attention,
        resample="up" if i else None,
        rngs=rngs,
      )
      setattr(self, f"up{i}", level)
      width = config.width * config.multipliers[i]
    self.norm_out = GroupNorm(width)
    self.conv_out = Conv(width, 3, size=3, bias=True, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B, h, w, z_channels] to [B, H, W, 3]."""
    x = self.mid(self.conv_in(shard_batch(x)))
    for i in reversed(range(self.levels)):
      x = getattr(self, f"up{i}")(x)
    return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Level(nnx.Module):
  """Residual blocks of one size, perhaps each with attention, and a change of the size."""

  def __init__(
    self,
    inputs: int,
    outputs: int,
    *,
    blocks: int,
    attention: bool,
    resample: str | None,
    rngs: nnx.Rngs,
  ):
    """Makes `block0`, `attn0`, `block1`, ...; `resample` is "down", "up" or None."""
    self.blocks, self.attention, self.direction = blocks, attention, resample
    for i in range(blocks):
      setattr(self, f"block{i}", Block(inputs, outputs, rngs=rngs))
      if attention:
        setattr(self, f"attn{i}", Attention(outputs, rngs=rngs))
      inputs = outputs
    # A smaller picture begins at the first pixel: only the far sides are padded.
    padding = ((0, 1), (0, 1)) if resample == "down" else None
    stride = 2 if resample == "down" else 1
    self.resample = (
      Conv(outputs, outputs, size=3, stride=stride, padding=padding, bias=True, rngs=rngs)
      if resample
      else None
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B, h, w, inputs] to [B, h', w', outputs]."""
    for i in range(self.blocks):
      x = getattr(self, f"block{i}")(x)
      if self.attention:
        x = getattr(self, f"attn{i}")(x)
    if self.direction == "up":
      x = x.repeat(2, axis=1).repeat(2, axis=2)
    return shard_batch(x if self.resample is None else self.resample(x))


class Middle(nnx.Module):
  """What stands between both halves: a block, attention, a block."""

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    """Makes the parameters."""
    self.block1 = Block(width, width, rngs=rngs)
    self.attn1 = Attention(width, rngs=rngs)
    self.block2 = Block(width, width, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B, h, w, D] to the same shape."""
    return self.block2(self.attn1(self.block1(x)))


class Block(nnx.Module):
  """A pre-norm residual block of two convolutions; a new width comes by a 1x1 shortcut."""

  def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
    """Makes the parameters."""
    self.norm1 = GroupNorm(inputs)
    self.conv1 = Conv(inputs, outputs, size=3, bias=True, rngs=rngs)
    self.norm2 = GroupNorm(outputs)
    self.conv2 = Conv(outputs, outputs, size=3, bias=True, rngs=rngs)
    self.shortcut = Linear(inputs, outputs, rngs=rngs) if inputs != outputs else None

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B, h, w, inputs] to [B, h, w, outputs]."""
    y = self.conv1(jax.nn.silu(self.norm1(x)))
    y = self.conv2(jax.nn.silu(self.norm2(y)))
    return y + (x if self.shortcut is None else self.shortcut(x))


class Attention(nnx.Module):
  """Attention of one head over all pixels, as a residual."""

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    """Makes the parameters."""
    init = torch_default(width)
    self.norm = GroupNorm(width)
    self.attn = SelfAttention(width, 1, qkv_init=init, out_init=init, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B, h, w, D] to the same shape."""
    B, h, w, D = x.shape
    return x + self.attn(self.norm(x).reshape(B, h * w, D)).reshape(x.shape)


class GroupNorm(nnx.Module):
  """Normalisation over the pixels and a group of channels (arXiv:1803.08494), in float32."""

  def __init__(self, dim: int):
    """Makes scale [dim] = 1 and bias [dim] = 0."""
    self.scale = nnx.Param(jnp.ones(dim, jnp.float32))
    self.bias = nnx.Param(jnp.zeros(dim, jnp.float32))

  @jax.named_scope("norm")
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises x [B, h, w, dim] and returns its dtype."""
    B, h, w, D = x.shape
    y = widened(x).reshape(B, h * w, GROUPS, D // GROUPS)
    y = y - y.mean((1, 3), keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean((1, 3), keepdims=True) + EPS)
    return (y.reshape(x.shape) * self.scale[...] + self.bias[...]).astype(x.dtype)


def gumbel(rngs: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Gumbel noise float32[shape] of one key, or of one for each row."""
  if not rngs.ndim:
    return jax.random.gumbel(rngs, shape)
  return jax.vmap(lambda key: jax.random.gumbel(key, shape[1:]))(rngs)


def to_uint8(image: jax.Array) -> jax.Array:
  """Pictures float[...] of -1 to 1 as uint8[...]; the original cuts off, it does not round."""
  image = (jnp.clip(widened(image), -1.0, 1.0) + 1.0) / 2.0
  return (255.0 * image).astype(jnp.uint8)


def decode_batches(model: VQGAN, codes: jax.Array, *, batch_size: int) -> jax.Array:
  """Decodes many pictures in parts, one after the other, so that the memory of one part is taken.

  Args:
    model: what decodes.
    codes: int32[B, h, w].
    batch_size: pictures of a part, over all devices, of which every part has rows; fewer where
      they do not divide B.

  Returns:
    uint8[B, H, W, 3].
  """
  parts = next(n for n in range(-(-len(codes) // batch_size), len(codes) + 1) if not len(codes) % n)
  if parts == 1:
    return to_uint8(model.decode(codes))
  return join_batch(
    jax.lax.map(lambda part: to_uint8(model.decode(part)), split_batch(codes, parts))
  )
