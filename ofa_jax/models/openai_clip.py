"""OpenAI's CLIP (arXiv:2103.00020): an image tower and a causal transformer over a text.

The image towers are those of Chinese-CLIP, which starts from them. Here nothing trains it: it
judges drawn pictures, by the cosine of its features.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jax.sharding import PartitionSpec as P

from ofa_jax.models.clip_resnet import ModifiedResNet, ResNetConfig
from ofa_jax.models.layers import Embed, LayerNorm, Scan, scan_blocks, stack
from ofa_jax.models.vit import EPS, Block, ViT, ViTConfig
from ofa_jax.numerics import wide


@dataclasses.dataclass(kw_only=True)
class CLIPTextConfig:
  """Sizes of the text tower, which reads `max_positions` tokens of `vocab_size`."""

  width: int
  layers: int
  heads: int
  vocab_size: int = 49408
  max_positions: int = 77


@dataclasses.dataclass(kw_only=True)
class OpenAICLIPConfig:
  """A pair of towers and the width of their shared space.

  `logit_scale` is the logarithm that the factor of the logits starts with.
  """

  vision: ViTConfig | ResNetConfig
  text: CLIPTextConfig
  embed_dim: int
  name: str = ""
  logit_scale: float = math.log(1 / 0.07)

  def build(self, *, rngs: nnx.Rngs, remat: str = "none", unroll: int = 1) -> "OpenAICLIP":
    """Makes the model with fresh float32 parameters; the arguments are those of `CNCLIPConfig`.

    Raises:
      ValueError: sizes that do not fit together.
    """
    return OpenAICLIP(self, scan=Scan(remat, unroll), rngs=rngs)

  @property
  def sharding(self) -> tuple[tuple[str, P], ...]:
    """Ordered table (path regex, PartitionSpec of the last axes); it covers every parameter."""
    return ((r".", P()),)

  @property
  def towers(self) -> dict[str, str]:
    """Path regexes of the model's parts, for tables of parameters."""
    return {"image": r"^visual/", "text": r"^text", "scale": r"^logit_scale$"}


class TextTower(nnx.Module):
  """A causal transformer; the state at the end of the text is its feature."""

  def __init__(self, config: CLIPTextConfig, *, scan: Scan, rngs: nnx.Rngs):
    """Makes the parameters, the embeddings as the original's.

    Raises:
      ValueError: a width that is not a multiple of the heads.
    """
    if config.width % config.heads:
      raise ValueError(
        f"CLIPTextConfig: expected width to be a multiple of {config.heads} heads, found "
        f"{config.width}"
      )
    width, init = config.width, normal(0.01)
    self.scan = scan
    self.token = Embed(config.vocab_size, width, init=normal(0.02), rngs=rngs)
    shape = (config.max_positions, width)
    self.positional_embedding = nnx.Param(init(rngs.params(), shape, jnp.float32))
    self.blocks = stack(
      lambda rngs: Block(width, config.heads, rngs=rngs), config.layers, rngs=rngs
    )
    self.ln_final = LayerNorm(width, eps=EPS)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps tokens int32[B, T] to the states at their ends, [B, D].

    The end is the first token with the largest id, as in the original: a text that spells the end
    out ends there. What fills a row up stands behind it, so that nothing has to hide it.
    """
    T = tokens.shape[1]
    x = self.token(tokens) + self.positional_embedding[:T]
    causal = jnp.where(jnp.tril(jnp.ones((T, T), bool)), 0.0, -jnp.inf)
    x = scan_blocks(
      lambda block, x, _: block(x, bias=causal), self.blocks, x, scan=self.scan, separable=True
    )
    end = jnp.argmax(tokens, axis=1)[:, None, None]
    return self.ln_final(jnp.take_along_axis(x, end, axis=1)[:, 0])


class OpenAICLIP(nnx.Module):
  """Images and texts to vectors whose cosines say how well they fit."""

  def __init__(self, config: OpenAICLIPConfig, *, scan: Scan, rngs: nnx.Rngs):
    """Makes the parameters."""
    if isinstance(config.vision, ViTConfig):
      self.visual = ViT(config.vision, config.embed_dim, scan=scan, rngs=rngs)
    else:
      self.visual = ModifiedResNet(config.vision, config.embed_dim, rngs=rngs)
    self.text = TextTower(config.text, scan=scan, rngs=rngs)
    shape = (config.text.width, config.embed_dim)
    init = normal(config.text.width**-0.5)
    self.text_projection = nnx.Param(init(rngs.params(), shape, jnp.float32))
    self.logit_scale = nnx.Param(jnp.float32(config.logit_scale))

  def encode_image(self, image: jax.Array, *, rngs: jax.Array | None = None) -> jax.Array:
    """Maps image float[B, S, S, 3], normalised, to float32[B, E], not normalised."""
    return self.visual(image, rngs=rngs)

  def encode_text(self, tokens: jax.Array, *, rngs: jax.Array | None = None) -> jax.Array:
    """Maps tokens int32[B, T] to float32[B, E], not normalised."""
    del rngs
    x = self.text(tokens)
    return jnp.matmul(x, self.text_projection[...], preferred_element_type=wide(x.dtype))
