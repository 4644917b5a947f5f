"""OFA's encoder: the cells of an image, then the tokens of a text, with masks for both.

A second image, for which the original has code but too short a table of types, stands before the
first one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ofa_jax.models.layers import (
  Embed,
  LayerNorm,
  Scan,
  dropout,
  scan_blocks,
  split_rngs,
  stack,
)
from ofa_jax.models.ofa.config import OFAConfig
from ofa_jax.models.ofa.layers import (
  INIT,
  EncoderBlock,
  SelfPositions,
  layer_drops,
  linear,
  make_prompt,
)
from ofa_jax.models.ofa.positions import EPS, MAX_TOKENS, Positions, RelativeBias, grid_cells
from ofa_jax.models.resnet import REDUCTION, ResNet
from ofa_jax.models.vit import random_patches
from ofa_jax.models.vit_trunk import ViTTrunk

TEXT, IMAGE, SECOND_IMAGE = 0, 1, 2  # rows of the table of types
COLOURS = 3  # of an image; its feature map has more numbers in a cell


class Encoded(NamedTuple):
  """What the decoder is given of B inputs.

  Attributes:
    hidden: [B, S, D], image cells before tokens.
    mask: bool[B, S], False for padding and for the cells of rows without an image.
    positions: [1 or B, S, D], normalised position vectors; one row if all inputs share them.
  """

  hidden: jax.Array
  mask: jax.Array
  positions: jax.Array


class Cells(NamedTuple):
  """Which cells of the feature map there are: a whole grid [h, w], or ids int32[B, N] of it."""

  grid: tuple[int, int]
  ids: jax.Array | None


class Encoder(nnx.Module):
  """Images and embedded tokens to hidden states."""

  def __init__(self, config: OFAConfig, *, scan: Scan, rngs: nnx.Rngs):
    """Makes the parameters."""
    width, layers = config.width, config.encoder_layers
    self.scan, self.dropout, self.num = scan, config.dropout, layers
    self.drop_path = config.encoder_drop_path
    self.grid_size = config.image_bucket_size
    self.interpolated = config.interpolate_position
    self.orig_side = config.orig_patch_image_size // REDUCTION
    self.entangled = config.entangle_position_embedding
    self.image = _trunk(config, scan=scan, rngs=rngs)
    self.image_proj = linear(config.channels, width, rngs=rngs)
    self.max_images = config.max_images
    self.type = Embed(1 + config.max_images, width, init=INIT, rngs=rngs)
    self.text_norm = LayerNorm(width, eps=EPS)
    self.image_norm = LayerNorm(width, eps=EPS)
    self.positions = Positions(width, self.grid_size**2, init=INIT, rngs=rngs)
    self.self_positions = SelfPositions(config, rngs=rngs)
    self.prompt = make_prompt(config, config.encoder_prompt, layers=layers, rngs=rngs)
    self.blocks = stack(lambda rngs: EncoderBlock(config, rngs=rngs), layers, rngs=rngs)
    self.norm = LayerNorm(width, eps=EPS)

  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array,
    *,
    image: jax.Array | None = None,
    image_mask: jax.Array | None = None,
    num_patches: int | None = None,
    patch_ids: jax.Array | None = None,
    second_image: jax.Array | None = None,
    rngs: jax.Array | None = None,
  ) -> Encoded:
    """Encodes embedded tokens x [B, T, D] with mask bool[B, T]; for the rest see `OFA.encode`."""
    embed_key, prompt_key, blocks_key = split_rngs(rngs, 3)
    inputs, cells = self.embed(
      x,
      mask,
      image=image,
      image_mask=image_mask,
      num_patches=num_patches,
      patch_ids=patch_ids,
      second_image=second_image,
      rngs=embed_key,
    )
    length, mask = x.shape[1], inputs.mask[:, None, None]
    absolute = self.self_positions(inputs.positions)
    prompt = None if self.prompt is None else self.prompt(batch=x.shape[0], rngs=prompt_key)

    def run(layer, x, key):
      block, drop, prompt = layer
      bias = absolute + relative_bias(block.relative, cells, length=length)
      return block(x, bias=bias, mask=mask, prompt=prompt, drop=drop, rngs=key)

    layers = (self.blocks, layer_drops(self.drop_path, self.num), prompt)
    x = scan_blocks(run, layers, inputs.hidden, scan=self.scan, rngs=blocks_key)
    return inputs._replace(hidden=self.norm(x))

  def embed(
    self,
    x: jax.Array,
    mask: jax.Array,
    *,
    image: jax.Array | None = None,
    image_mask: jax.Array | None = None,
    num_patches: int | None = None,
    patch_ids: jax.Array | None = None,
    second_image: jax.Array | None = None,
    rngs: jax.Array | None = None,
  ) -> tuple[Encoded, tuple[Cells, ...]]:
    """Returns what the first layer is given, and where the cells of its images are, in its order.

    The arguments are those of `__call__`.
    """
    T = x.shape[1]
    if T > MAX_TOKENS:
      raise ValueError(f"Expected texts of at most {MAX_TOKENS} tokens, found {T}")
    text_key, look_key, image_key = split_rngs(rngs, 3)
    raw = self.positions.text.embedding[:T][None]
    positions = self.positions.text_norm(raw)
    x = self._join(x, raw, kind=TEXT, norm=self.text_norm, rngs=text_key)
    cells: tuple[Cells, ...] = ()
    for kind, picture in self._pictures(image, second_image):
      ids, keys = patch_ids, (look_key, image_key)
      if kind != IMAGE:
        ids, keys = None, _folded(*keys)
      y, raw, where = self.look(picture, num_patches=num_patches, patch_ids=ids, rngs=keys[0])
      y = self._join(y, raw, kind=kind, norm=self.image_norm, rngs=keys[1])
      seen = jnp.ones(y.shape[:2], bool)
      seen = seen if image_mask is None else seen & image_mask[:, None]
      x, mask = jnp.concatenate([y, x], axis=1), jnp.concatenate([seen, mask], axis=1)
      rows = self.positions.image_norm(raw), positions
      (batch,) = jnp.broadcast_shapes(*(row.shape[:1] for row in rows))
      rows = [jnp.broadcast_to(row, (batch, *row.shape[1:])) for row in rows]
      positions = jnp.concatenate(rows, axis=1)
      cells = (where, *cells)
    # Once, as in the original: what becomes of padding in the layers is never attended to.
    x = jnp.where(mask[..., None], x, 0)
    return Encoded(hidden=x, mask=mask, positions=positions), cells

  def _pictures(
    self, image: jax.Array | None, second_image: jax.Array | None
  ) -> list[tuple[int, jax.Array]]:
    """The images there are, each with its type, the last one first in the sequence."""
    if second_image is None:
      return [] if image is None else [(IMAGE, image)]
    if image is None:
      raise ValueError("Expected a first image beside the second, found None; give it as image")
    if self.max_images < 2:
      raise ValueError(
        "Expected one image, which is what the model's table of types is for, found a second one; "
        "build the model with OFAConfig.max_images=2"
      )
    return [(IMAGE, image), (SECOND_IMAGE, second_image)]

  def look(
    self,
    image: jax.Array,
    *,
    num_patches: int | None = None,
    patch_ids: jax.Array | None = None,
    rngs: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array, Cells]:
    """Runs the trunk.

    Args:
      image: as for `OFA.encode`, or the trunk's feature map of it, [B, h, w, C].
      num_patches, patch_ids, rngs: as for `OFA.encode`.

    Returns:
      Features [B, I, D], the position vectors [1 or B, I, D] of their cells, and the cells.

    Raises:
      ValueError: the image has more cells in a row or column than there are positions.
    """
    image_key, patch_key = split_rngs(rngs, 2)
    x = image if image.shape[-1] != COLOURS else self.image(image, rngs=image_key)
    B, height, width, _ = x.shape
    if max(height, width) > self.grid_size:
      raise ValueError(
        f"Expected images of at most {self.grid_size * REDUCTION} pixels, found {image.shape}"
      )
    x = x.reshape(B, height * width, -1)
    raw, ids = self._grid(height, width), grid_cells(height, width, self.grid_size)
    if patch_ids is None and num_patches is not None and rngs is not None:
      patch_ids = random_patches(patch_key, x.shape[1], batch=B, keep=num_patches)
    if patch_ids is None:
      return self.image_proj(x), raw[None], Cells((height, width), None)
    x = jnp.take_along_axis(x, patch_ids[..., None], axis=1)
    return self.image_proj(x), raw[patch_ids], Cells((height, width), jnp.asarray(ids)[patch_ids])

  def _grid(self, height: int, width: int) -> jax.Array:
    """Position vectors [height * width, D] of an image's cells."""
    orig = self.orig_side
    if self.interpolated and height * width > orig**2:
      table = self.positions.image(grid_cells(orig, orig, self.grid_size))
      shape = height, width, table.shape[-1]
      table = jax.image.resize(table.reshape(orig, orig, -1), shape, "bilinear", antialias=False)
      return table.reshape(height * width, -1)
    return self.positions.image(grid_cells(height, width, self.grid_size))

  def _join(
    self, x: jax.Array, raw: jax.Array, *, kind: int, norm: LayerNorm, rngs: jax.Array | None
  ) -> jax.Array:
    """Features or words [B, T, D] as the first layer takes them: with their type, normalised."""
    x = x + raw if self.entangled else x
    return dropout(norm(x + self.type.embedding[kind]), self.dropout, rngs=rngs)


def relative_bias(tables: RelativeBias, cells: tuple[Cells, ...], *, length: int) -> jax.Array:
  """Returns a layer's bias by distance [1 or B, H, S, S], of cells and of `length` tokens.

  Between different images there is none, as there is none between an image and the text.
  """
  bias = tables.text(length)[None]
  for grid, ids in reversed(cells):
    image = tables.grid(*grid)[None] if ids is None else tables.cells(ids, ids)
    before, after = image.shape[-1], bias.shape[-1]
    image = jnp.pad(image, ((0, 0), (0, 0), (0, after), (0, after)))
    bias = image + jnp.pad(bias, ((0, 0), (0, 0), (before, 0), (before, 0)))
  return bias


def _trunk(config: OFAConfig, *, scan: Scan, rngs: nnx.Rngs) -> ResNet | ViTTrunk:
  """What makes a feature map of an image."""
  if config.vit is not None:
    return ViTTrunk(config.vit, scan=scan, rngs=rngs)
  return ResNet(
    config.stages,
    drop_path=config.resnet_drop_path,
    eps=config.batch_norm_eps,
    frozen=config.freeze_resnet,
    rngs=rngs,
  )


def _folded(*keys: jax.Array | None) -> tuple[jax.Array | None, ...]:
  """Other keys made of these, so that the draws of a first image stay what they are without it."""
  return tuple(None if key is None else jax.random.fold_in(key, 1) for key in keys)
