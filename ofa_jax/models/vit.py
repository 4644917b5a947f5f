"""The Vision Transformer of CLIP (arXiv:2010.11929, arXiv:2103.00020) with FLIP's masking.

Pre-norm blocks, QuickGELU, a LayerNorm before the first block, the class token projected to the
shared space. FLIP (arXiv:2212.00794) drops a random part of the patches in training.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal

from ofa_jax.models.attention import SelfAttention, attention_weights
from ofa_jax.models.layers import (
  LayerNorm,
  Linear,
  Mlp,
  Scan,
  quick_gelu,
  scan_blocks,
  stack,
  torch_default,
  xavier_uniform,
)
from ofa_jax.numerics import wide

EPS = 1e-5  # torch.nn.LayerNorm's default


@dataclasses.dataclass(kw_only=True)
class ViTConfig:
  """Sizes of a ViT; the number of heads is width / head_width, images are squares in pixels."""

  image_size: int
  patch_size: int
  width: int
  layers: int
  head_width: int = 64

  @property
  def problems(self) -> list[str]:
    """What does not fit together."""
    problems = []
    if self.image_size % self.patch_size:
      problems.append(
        f"expected image_size to be a multiple of patch_size {self.patch_size}, "
        f"found {self.image_size}"
      )
    if self.width % self.head_width:
      problems.append(
        f"expected width to be a multiple of head_width {self.head_width}, found {self.width}"
      )
    return problems


class Block(nnx.Module):
  """One pre-norm transformer layer, initialised with PyTorch's defaults (nn.MultiheadAttention)."""

  def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
    """Makes the parameters of a layer of `width` with an MLP of 4 * width."""
    self.ln_1 = LayerNorm(width, eps=EPS)
    self.attn = SelfAttention(
      width,
      heads,
      # PyTorch draws the packed [3D, D] matrix at once, so its fan-out is 3D.
      qkv_init=xavier_uniform(width, 3 * width),
      out_init=torch_default(width),
      rngs=rngs,
    )
    self.ln_2 = LayerNorm(width, eps=EPS)
    self.mlp = Mlp(width, 4 * width, activation=quick_gelu, rngs=rngs)

  def __call__(self, x: jax.Array, *, bias: jax.Array | None = None) -> jax.Array:
    """Maps x [B, T, D] to the same shape; `bias` is added to the logits of attention."""
    x = x + self.attn(self.ln_1(x), bias=bias)
    return x + self.mlp(self.ln_2(x))


class ViT(nnx.Module):
  """The image tower: a picture to a vector of the shared space."""

  def __init__(self, config: ViTConfig, embed_dim: int, *, scan: Scan, rngs: nnx.Rngs):
    """Makes the parameters.

    Raises:
      ValueError: the image is not a whole number of patches, or the width of heads.
    """
    if config.problems:
      raise ValueError("ViTConfig: " + "; ".join(config.problems))
    width = config.width
    grid = config.image_size // config.patch_size
    init = normal(width**-0.5)
    self.patch_size, self.scan = config.patch_size, scan
    # A convolution whose stride is its size is a matrix product of the flattened patches.
    self.conv1 = Linear(3 * config.patch_size**2, width, bias=False, rngs=rngs)
    self.class_embedding = nnx.Param(init(rngs.params(), (width,), jnp.float32))
    self.positional_embedding = nnx.Param(init(rngs.params(), (grid**2 + 1, width), jnp.float32))
    self.ln_pre = LayerNorm(width, eps=EPS)
    self.blocks = stack(
      lambda rngs: Block(width, width // config.head_width, rngs=rngs), config.layers, rngs=rngs
    )
    self.ln_post = LayerNorm(width, eps=EPS)
    self.proj = nnx.Param(init(rngs.params(), (width, embed_dim), jnp.float32))

  def __call__(
    self,
    image: jax.Array,
    *,
    mask_ratio: float = 0.0,
    keep: jax.Array | None = None,
    rngs: jax.Array | None = None,
  ) -> jax.Array:
    """Encodes images.

    Args:
      image: float[B, S, S, 3], normalised.
      mask_ratio: share of the patches dropped at random in training, per image.
      keep: int32[B, N], the patches to keep instead (0 = top left, row by row).
      rngs: PRNG key for the choice of patches; None (evaluation) keeps all of them.

    Returns:
      float32[B, E], not normalised.
    """
    if keep is None and mask_ratio and rngs is not None:
      num_patches = self.positional_embedding.shape[0] - 1
      num_kept = int(num_patches * (1 - mask_ratio))
      keep = random_patches(rngs, num_patches, batch=image.shape[0], keep=num_kept)
    x = self.ln_pre(self.embed(image, keep=keep))
    x = scan_blocks(lambda block, x, _: block(x), self.blocks, x, scan=self.scan, separable=True)
    x = self.ln_post(x[:, 0])
    return jnp.matmul(x, self.proj[...], preferred_element_type=wide(x.dtype))

  def class_attention(self, image: jax.Array) -> jax.Array:
    """How much the class token, of which the features are made, attends to each patch at last.

    Args:
      image: float[B, S, S, 3], normalised.

    Returns:
      float32[B, H, G, G], of each head of the last layer its weights over the grid of patches. What
      they lack to one in sum is the class token's attention to itself.
    """
    x = self.ln_pre(self.embed(image))
    first, last = (jax.tree.map(lambda x, i=i: x[i], self.blocks) for i in (slice(-1), -1))
    if len(jax.tree.leaves(first)[0]):
      x = scan_blocks(lambda block, x, _: block(x), first, x, scan=self.scan, separable=True)
    qkv = last.attn.qkv(last.ln_1(x))
    weights = attention_weights(qkv[:, :1, 0], qkv[:, :, 1])[:, :, 0, 1:]
    grid = image.shape[1] // self.patch_size
    return weights.reshape(*weights.shape[:2], grid, grid)

  def embed(self, image: jax.Array, *, keep: jax.Array | None = None) -> jax.Array:
    """Maps image float[B, S, S, 3] to the class token and the patches, [B, 1 + I, D].

    Patches are chosen by `keep` int32[B, N] after their positions were added, so that their order
    does not matter.
    """
    kernel, position = self.conv1.kernel[...], self.positional_embedding[...]
    patches = patchify(image.astype(kernel.dtype), self.patch_size)
    if patches.shape[1] + 1 != len(position):
      raise ValueError(
        f"Expected images of {len(position) - 1} patches of {self.patch_size} pixels, "
        f"found {image.shape}; resize the images or change image_size."
      )
    patches = self.conv1(patches) + position[1:]
    if keep is not None:
      patches = jnp.take_along_axis(patches, keep[..., None], axis=1)
    first = self.class_embedding[...] + position[0]
    first = jnp.broadcast_to(first, (image.shape[0], 1, len(first)))
    return jnp.concatenate([first, patches], axis=1)


def patchify(image: jax.Array, patch_size: int) -> jax.Array:
  """Cuts image [B, S, S, 3] into flattened patches [B, (S / P)^2, P * P * 3], row by row."""
  B, height, width, channels = image.shape
  P = patch_size
  x = image.reshape(B, height // P, P, width // P, P, channels)
  return x.swapaxes(2, 3).reshape(B, -1, P * P * channels)


def random_patches(rngs: jax.Array, num_patches: int, *, batch: int, keep: int) -> jax.Array:
  """Draws different patches to keep, int32[batch, min(keep, num_patches)]."""
  noise = jax.random.uniform(rngs, (batch, num_patches))
  return jnp.argsort(noise, axis=1)[:, :keep]
