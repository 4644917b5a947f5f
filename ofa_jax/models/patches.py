"""A codec that is a table: a picture is a mosaic of patches, and a code says which.

What a VQGAN learns is here given, such as the middles of clusters (k-means) of patches. For small
worlds, whose pictures are made of few edges and colours.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import uniform
from jax.sharding import PartitionSpec as P

from ofa_jax.models.layers import Embed
from ofa_jax.numerics import widened

COLOURS = 3


@dataclasses.dataclass(kw_only=True)
class PatchCodecConfig:
  """Sizes of a table of patches.

  Attributes:
    image_size: side in pixels of the pictures that it is for.
    patch_size: pixels a side of a patch.
    num_codes: patches.
    name: of known sizes.
  """

  image_size: int
  patch_size: int
  num_codes: int
  name: str = ""

  def build(self, *, rngs: nnx.Rngs, remat: str = "none", unroll: int = 1) -> "PatchCodec":
    """Makes a table of noise; there is no stack to run in another way."""
    del remat, unroll
    return PatchCodec(self, rngs=rngs)

  @property
  def reduction(self) -> int:
    """Pixels a side for each code."""
    return self.patch_size

  @property
  def sharding(self) -> tuple[tuple[str, P], ...]:
    """Ordered table (path regex, PartitionSpec of the last axes); it covers every parameter."""
    return ((r"^patches/", P()),)

  @property
  def towers(self) -> dict[str, str]:
    """Path regexes of the model's parts, for tables of parameters."""
    return {"patches": r"^patches/"}


class PatchCodec(nnx.Module):
  """Pictures to codes and back, as `vqgan.VQGAN` does it."""

  def __init__(self, config: PatchCodecConfig, *, rngs: nnx.Rngs):
    """Makes the table [N, P * P * 3], of values from -1 to 1."""
    self.reduction, self.num_codes = config.patch_size, config.num_codes
    length = config.patch_size**2 * COLOURS
    self.patches = Embed(config.num_codes, length, init=uniform(1.0), rngs=rngs)

  def encode(self, image: jax.Array, *, rngs: jax.Array | None = None) -> jax.Array:
    """Maps pictures float[B, H, W, 3] from -1 to 1 to their nearest codes int32[B, h, w].

    Nothing is drawn, with or without a key.
    """
    del rngs
    B, H, W, _ = image.shape
    side = self.reduction
    x = image.reshape(B, H // side, side, W // side, side, COLOURS).swapaxes(2, 3)
    x = widened(x.reshape(B, H // side, W // side, -1))
    table = widened(self.patches.embedding[...])
    near = jnp.einsum("bhwd,nd->bhwn", x, table) - jnp.sum(jnp.square(table), axis=1) / 2
    return jnp.argmax(near, axis=-1).astype(jnp.int32)

  def decode(self, codes: jax.Array) -> jax.Array:
    """Maps codes int32[B, h, w] to pictures float32[B, H, W, 3]."""
    B, h, w = codes.shape
    side = self.reduction
    x = self.patches(codes).reshape(B, h, w, side, side, COLOURS).swapaxes(2, 3)
    return widened(x.reshape(B, h * side, w * side, COLOURS))
