"""The other image trunk of OFA: the first layers of CLIP's ViT, without its class token and end.

The original's `--resnet-type=ViT-B/16` is nine layers of a ViT-B/16. What comes out is a feature
map, one cell per patch, not normalised.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal

from ofa_jax.models.layers import LayerNorm, Linear, Scan, scan_blocks, shard_batch, stack
from ofa_jax.models.vit import EPS, Block, ViTConfig, patchify

VIT_B_16 = ViTConfig(image_size=224, patch_size=16, width=768, layers=9)  # the original's only one


class ViTTrunk(nnx.Module):
  """Patches and pre-norm blocks: a picture to its feature map."""

  def __init__(self, config: ViTConfig, *, scan: Scan, rngs: nnx.Rngs):
    """Makes the parameters, drawn as CLIP's ViT draws them.

    Args:
      config: sizes; `image_size` is that of the pictures whose positions are stored.
      scan: how the layers are run.
      rngs: the stream `params` draws the parameters.
    """
    width, self.grid = config.width, config.image_size // config.patch_size
    self.patch_size, self.scan = config.patch_size, scan
    self.patch = Linear(3 * config.patch_size**2, width, bias=False, rngs=rngs)
    # The first row is the class token's and is read nowhere; stored weights have it.
    shape = self.grid**2 + 1, width
    init = normal(width**-0.5)
    self.positional_embedding = nnx.Param(init(rngs.params(), shape, jnp.float32))
    self.ln_pre = LayerNorm(width, eps=EPS)
    self.blocks = stack(
      lambda rngs: Block(width, width // config.head_width, rngs=rngs), config.layers, rngs=rngs
    )

  def __call__(self, image: jax.Array, *, rngs: jax.Array | None = None) -> jax.Array:
    """Maps image float[B, h, w, 3], normalised, to its features [B, h // P, w // P, D].

    A rest of fewer than P pixels at the bottom or right is left out, as in the original. There is
    nothing random in training: `rngs` is there because the ResNet has it.
    """
    x = self.ln_pre(self.embed(image))
    x = scan_blocks(lambda block, x, _: block(x), self.blocks, x, scan=self.scan, separable=True)
    return x.reshape(x.shape[0], *self._cells(image), x.shape[-1])

  def embed(self, image: jax.Array) -> jax.Array:
    """Maps image float[B, h, w, 3] to its patches with their positions, [B, I, D], row by row.

    Positions of another grid than the stored one are interpolated. (The original does so where the
    height differs, and fails where only the width does.)
    """
    height, width = self._cells(image)
    image = shard_batch(image.astype(self.patch.kernel.dtype))
    image = image[:, : height * self.patch_size, : width * self.patch_size]
    position = self.positional_embedding[1:]
    if (height, width) != (self.grid, self.grid):
      table, shape = position.reshape(self.grid, self.grid, -1), (height, width, len(position.T))
      table = jax.image.resize(table, shape, "bilinear", antialias=False)
      position = table.reshape(height * width, -1)
    return self.patch(patchify(image, self.patch_size)) + position

  def _cells(self, image: jax.Array) -> tuple[int, int]:
    """(rows, columns) of whole patches of images [B, h, w, 3]."""
    return image.shape[1] // self.patch_size, image.shape[2] // self.patch_size
