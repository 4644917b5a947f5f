"""Chinese-CLIP (arXiv:2211.01335): an image tower and BERT, compared in one space.

The tables below name the towers as the original does; any image tower goes with any text tower.
"""

import dataclasses
import difflib
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jax.sharding import PartitionSpec as P

from ofa_jax.losses import normalize
from ofa_jax.models.bert import Bert, BertConfig
from ofa_jax.models.clip_resnet import ModifiedResNet, ResNetConfig
from ofa_jax.models.layers import Scan, split_rngs
from ofa_jax.models.vit import ViT, ViTConfig
from ofa_jax.numerics import wide, widened

VISION: dict[str, ViTConfig | ResNetConfig] = {
  "ViT-B-32": ViTConfig(image_size=224, patch_size=32, width=768, layers=12),
  "ViT-B-16": ViTConfig(image_size=224, patch_size=16, width=768, layers=12),
  "ViT-L-14": ViTConfig(image_size=224, patch_size=14, width=1024, layers=24),
  "ViT-L-14-336": ViTConfig(image_size=336, patch_size=14, width=1024, layers=24),
  "ViT-H-14": ViTConfig(image_size=224, patch_size=14, width=1280, layers=32, head_width=80),
  "RN50": ResNetConfig(image_size=224),
}

TEXT: dict[str, BertConfig] = {
  "RBT3-chinese": BertConfig(width=768, layers=3, heads=12, mlp=3072),
  "RoBERTa-wwm-ext-base-chinese": BertConfig(width=768, layers=12, heads=12, mlp=3072),
  "RoBERTa-wwm-ext-large-chinese": BertConfig(width=1024, layers=24, heads=16, mlp=4096),
}

EMBED_DIM: dict[str, int] = {
  "ViT-B-32": 512,
  "ViT-B-16": 512,
  "ViT-L-14": 768,
  "ViT-L-14-336": 768,
  "ViT-H-14": 1024,
  "RN50": 1024,
}

# The released models by their public names: (image tower, text tower).
MODELS: dict[str, tuple[str, str]] = {
  "ViT-B-16": ("ViT-B-16", "RoBERTa-wwm-ext-base-chinese"),
  "ViT-L-14": ("ViT-L-14", "RoBERTa-wwm-ext-base-chinese"),
  "ViT-L-14-336": ("ViT-L-14-336", "RoBERTa-wwm-ext-base-chinese"),
  "ViT-H-14": ("ViT-H-14", "RoBERTa-wwm-ext-large-chinese"),
  "RN50": ("RN50", "RBT3-chinese"),
}

# Megatron's split of a transformer (arXiv:1909.08053) over `tensor`, the other axis over `fsdp`.
# A spec shorter than the array belongs to its last axes: stacked layers are never split.
SHARDING: tuple[tuple[str, P], ...] = (
  (r"/qkv/kernel$", P("fsdp", None, "tensor", None)),
  (r"/qkv/bias$", P(None, "tensor", None)),
  (r"/out/kernel$", P("tensor", None, "fsdp")),
  (r"/up/kernel$", P("fsdp", "tensor")),
  (r"/up/bias$", P("tensor")),
  (r"/down/kernel$", P("tensor", "fsdp")),
  (r"/conv[123]?/kernel$", P("fsdp")),
  (r"^bert/word/embedding$", P("tensor", "fsdp")),
  (r"^bert/position/embedding$", P(None, "fsdp")),
  (r"^(visual/proj|text_projection)$", P("fsdp", None)),
  # Small ones lie whole on every device: norms, the biases of outputs, positions, scalars.
  (r"/(scale|bias)$|(positional|class)_embedding$|token_type/embedding$|^logit_(scale|bias)$", P()),
)

# Norms, biases and the temperature are not decayed.
NO_DECAY: tuple[str, ...] = (r"/(scale|bias)$", r"^logit_(scale|bias)$")

# What the original spares, by its search for "bn", "ln", "bias", "logit_scale" in names: the norms
# of BERT and of the ResNet's shortcuts have other names there, and are decayed.
NO_DECAY_ORIGINAL: tuple[str, ...] = (r"/bias$", r"/(ln|bn)\w+/scale$", r"^logit_scale$")

# After every update logit_scale is clamped to [0, 4.6052], as in the original: factors 1 to 100.
LOGIT_SCALE_BOUNDS: tuple[tuple[str, tuple[float, float]], ...] = (
  (r"^logit_scale$", (0.0, 4.6052)),
)

# Parameters that stored weights may lack: only SigLIP's loss has a bias.
OPTIONAL: tuple[str, ...] = (r"^logit_bias$",)

TOWERS: dict[str, str] = {
  "image": r"^visual/",
  "text": r"^(bert/|text_projection$)",
  "scale": r"^logit_(scale|bias)$",
}


@dataclasses.dataclass(kw_only=True)
class CNCLIPConfig:
  """A pair of towers and the width of their shared space.

  `logit_scale` is its first value, `logit_bias` that of SigLIP's bias; with None there is no bias.
  SigLIP (arXiv 2303.15343) starts with ln 10 and -10.
  """

  vision: ViTConfig | ResNetConfig
  text: BertConfig
  embed_dim: int
  name: str = ""
  logit_scale: float = math.log(1 / 0.07)
  logit_bias: float | None = None

  def build(self, *, rngs: nnx.Rngs, remat: str = "none", unroll: int = 1) -> "CNCLIP":
    """Makes the model with fresh float32 parameters.

    Args:
      rngs: the stream `params` draws them.
      remat, unroll: how the transformers' layers are run; see `layers.Scan`.

    Raises:
      ValueError: sizes that do not fit together.
    """
    return CNCLIP(self, scan=Scan(remat, unroll), rngs=rngs)

  @property
  def sharding(self) -> tuple[tuple[str, P], ...]:
    """Ordered table (path regex, PartitionSpec of the last axes); it covers every parameter."""
    return SHARDING

  @property
  def towers(self) -> dict[str, str]:
    """Path regexes of the model's parts, for tables of parameters."""
    return TOWERS

  @property
  def optional(self) -> tuple[str, ...]:
    """Path regexes of parameters that start afresh where the weights to start from lack them."""
    return OPTIONAL


class CNCLIP(nnx.Module):
  """Chinese-CLIP: images and texts to vectors whose cosines say how well they fit."""

  def __init__(self, config: CNCLIPConfig, *, scan: Scan, rngs: nnx.Rngs):
    """Makes the parameters."""
    if isinstance(config.vision, ViTConfig):
      self.visual = ViT(config.vision, config.embed_dim, scan=scan, rngs=rngs)
    else:
      self.visual = ModifiedResNet(config.vision, config.embed_dim, rngs=rngs)
    self.bert = Bert(config.text, scan=scan, rngs=rngs)
    shape = (config.text.width, config.embed_dim)
    init = normal(config.text.width**-0.5)
    self.text_projection = nnx.Param(init(rngs.params(), shape, jnp.float32))
    self.logit_scale = nnx.Param(jnp.float32(config.logit_scale))
    bias = config.logit_bias
    self.logit_bias = None if bias is None else nnx.Param(jnp.float32(bias))

  def encode_image(
    self,
    image: jax.Array,
    *,
    mask_ratio: float = 0.0,
    keep: jax.Array | None = None,
    rngs: jax.Array | None = None,
  ) -> jax.Array:
    """Maps images to features.

    Args:
      image: float[B, S, S, 3], normalised.
      mask_ratio: share of the patches that a ViT drops in training (FLIP); a ResNet ignores it.
      keep: int32[B, N], the patches a ViT keeps instead.
      rngs: PRNG key, or None in evaluation.

    Returns:
      float32[B, E], not normalised.
    """
    if isinstance(self.visual, ViT):
      return self.visual(image, mask_ratio=mask_ratio, keep=keep, rngs=rngs)
    return self.visual(image, rngs=rngs)

  def encode_text(self, tokens: jax.Array, *, rngs: jax.Array | None = None) -> jax.Array:
    """Maps tokens int32[B, T], [CLS] first, to features float32[B, E], not normalised."""
    x = self.bert(tokens, rngs=rngs)[:, 0]
    return jnp.matmul(x, self.text_projection[...], preferred_element_type=wide(x.dtype))

  def __call__(
    self,
    image: jax.Array,
    tokens: jax.Array,
    *,
    mask_ratio: float = 0.0,
    rngs: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Encodes both sides of a batch.

    Args:
      image: float[B, S, S, 3], normalised.
      tokens: int32[B, T].
      mask_ratio: as in `encode_image`.
      rngs: PRNG key, or None in evaluation.

    Returns:
      Image features float32[B, E] and text features float32[B, E] of unit length, and the factor
      of their products in the logits, float32[].
    """
    image_key, text_key = split_rngs(rngs, 2)
    image_features = self.encode_image(image, mask_ratio=mask_ratio, rngs=image_key)
    text_features = self.encode_text(tokens, rngs=text_key)
    scale = jnp.exp(widened(self.logit_scale[...]))
    return normalize(image_features), normalize(text_features), scale


def config(vision: str, text: str) -> CNCLIPConfig:
  """Returns a new config for two towers named as in `VISION` and `TEXT`.

  Raises:
    ValueError: an unknown name, with near ones.
  """
  problems = [_unknown(vision, VISION, "vision")] if vision not in VISION else []
  problems += [_unknown(text, TEXT, "text")] if text not in TEXT else []
  if problems:
    raise ValueError("\n".join(problems))
  return CNCLIPConfig(
    vision=dataclasses.replace(VISION[vision]),
    text=dataclasses.replace(TEXT[text]),
    embed_dim=EMBED_DIM[vision],
    name=f"{vision}@{text}",
  )


def layer_rates(
  config: CNCLIPConfig, tower: str, *, trained: int | None = None, decay: float = 1.0
) -> tuple[tuple[str, float | tuple[float, ...]], ...]:
  """Learning-rate multipliers of a tower by depth, rows for `Optim.lr_scale`.

  Args:
    config: the model's sizes.
    tower: "image" or "text".
    trained: layers before the output that are trained, with what follows them; 0 freezes the whole
      tower with its projection (locked-image tuning, arXiv 2111.07991), None trains all of it. A
      ResNet has four layers, its stages.
    decay: factor of the rate for every layer further from the output, as in BEiT (arXiv
      2106.08254): 1 for the projection, `decay` for the last layer, `decay ** (layers + 1)` for
      the embeddings.

  Raises:
    ValueError: no such tower, or it has fewer layers.
  """
  resnet = isinstance(config.vision, ResNetConfig)
  depths = {"image": 4 if resnet else config.vision.layers, "text": config.text.layers}
  if tower not in depths:
    raise ValueError(f"Expected a tower out of {', '.join(depths)}, found {tower!r}")
  depth = depths[tower]
  if trained is not None and not 0 <= trained <= depth:
    raise ValueError(f"Expected 0 to {depth} trained layers, found {trained}")
  first = 0 if trained is None else depth - trained
  rates = tuple(decay ** (depth - i) if i >= first else 0.0 for i in range(depth))
  inputs = decay ** (depth + 1) if trained is None else 0.0
  outputs = 0.0 if trained == 0 else 1.0
  if tower == "text":
    return ((r"^bert/blocks/", rates), (r"^bert/", inputs), (r"^text_projection$", outputs))
  if resnet:
    stages = tuple((rf"^visual/layer{i + 1}/", rate) for i, rate in enumerate(rates))
    return (*stages, (r"^visual/attnpool/", outputs), (r"^visual/", inputs))
  return (
    (r"^visual/blocks/", rates),
    (r"^visual/(ln_post/|proj$)", outputs),
    (r"^visual/", inputs),
  )


def _unknown(name: str, known: dict, kind: str) -> str:
  near = difflib.get_close_matches(name, known, n=2)
  hint = f"; did you mean {' or '.join(near)}?" if near else ""
  return f"Expected a {kind} tower out of {', '.join(known)}; found {name!r}{hint}"
