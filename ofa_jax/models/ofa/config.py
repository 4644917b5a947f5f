"""The sizes and options of an OFA, and where its parameters go on a mesh."""

import dataclasses
from typing import TYPE_CHECKING

from flax import nnx
from jax.sharding import PartitionSpec as P

from ofa_jax.models.layers import Scan
from ofa_jax.models.resnet import CHANNELS, REDUCTION
from ofa_jax.models.vit import ViTConfig

if TYPE_CHECKING:
  from ofa_jax.models.ofa.model import OFA

CODE_PIXELS = 8  # side of the square of pixels that an image code stands for

# As in `cnclip.SHARDING`: heads and feed-forward over `tensor`, the other axis over `fsdp`.
SHARDING: tuple[tuple[str, P], ...] = (
  (r"/(qkv|kv|qk)/kernel$", P("fsdp", None, "tensor", None)),
  (r"/(qkv|kv|qk)/bias$", P(None, "tensor", None)),
  (r"/(q|k)/kernel$", P("fsdp", "tensor", None)),
  (r"/(q|k)/bias$", P("tensor", None)),
  (r"/attn/out/kernel$|/cross/out/kernel$", P("tensor", None, "fsdp")),
  (r"/up/kernel$", P("fsdp", "tensor")),
  (r"/up/bias$", P("tensor")),
  (r"/down/kernel$", P("tensor", "fsdp")),
  (r"/conv[123]?/kernel$|/patch/kernel$", P("fsdp")),
  (r"/image_proj/kernel$", P(None, "fsdp")),
  (r"^tokens/embedding$", P("tensor", "fsdp")),
  (r"/(positions/\w+|prompt/table)/embedding$", P(None, "fsdp")),
  (r"^classifier/", P()),
  # Small ones lie whole on every device: norms, the biases of outputs, factors, tables by distance.
  (r"/(scale|bias|head_scale|residual_scale)$|/relative/\w+/embedding$|/type/embedding$", P()),
  (r"/positional_embedding$", P()),
)

TOWERS: dict[str, str] = {
  "tokens": r"^tokens/",
  "image": r"^encoder/image/",
  "encoder": r"^encoder/(?!image/)",
  "decoder": r"^decoder/",
  "classifier": r"^classifier/",
}


@dataclasses.dataclass(kw_only=True)
class ClassifierConfig:
  """A classification head on the decoder's last state.

  Attributes:
    classes: number of outputs.
    hidden: width of the layer before them; 0: none.
    images: examples that are classified together, their states side by side.
    dropout: rate before each layer.
  """

  classes: int
  hidden: int = 0
  images: int = 1
  dropout: float = 0.0


@dataclasses.dataclass(kw_only=True)
class OFAConfig:
  """Sizes and options of an OFA; the defaults are the released models'.

  Attributes:
    width: D.
    mlp: width of the feed-forward parts.
    encoder_layers, decoder_layers: depths.
    heads: H, on both sides.
    stages: blocks of the three stages of the ResNet that sees images; none if a ViT does.
    vit: the ViT that sees images in its place, see `vit_trunk`; its patches are the cells.
    max_images: images that an input may have, 1 or 2; each has its row in the table of types.
    vocab_size: V: text, then `num_codes` image codes, then `num_bins` coordinates.
    token_bucket_size, image_bucket_size: buckets of distances in text; width of the image grid.
    code_image_size: side in pixels of the images that codes stand for, 8 pixels a code.
    orig_patch_image_size: side in pixels of the images whose absolute positions are interpolated
      for larger ones, if `interpolate_position`.
    dropout, attention_dropout, activation_dropout: rates of states, weights, feed-forward.
    encoder_drop_path, decoder_drop_path, resnet_drop_path: rates of the last layer.
    scale_attn, scale_fc, scale_heads: NormFormer's norms and factors.
    scale_resids: a learnt factor on the residual of the feed-forward part.
    entangle_position_embedding: the encoder adds positions to the states as well.
    disable_entangle: the decoder does not.
    freeze_resnet: BatchNorm uses its statistics in training too, and is not learnt.
    batch_norm_eps: 1e-3 is what the original's --sync-bn has.
    encoder_prompt, decoder_prompt: length of the learnt prefix; 0: none.
    prompt_hidden: width of the layers that make the prefix; 0: a plain table.
    adapter: width of the adapters; 0: none.
    classifier: a classification head, or None.
  """

  width: int
  mlp: int
  encoder_layers: int
  decoder_layers: int
  heads: int
  stages: tuple[int, ...]
  vocab_size: int = 59457
  num_codes: int = 8192
  num_bins: int = 1000
  token_bucket_size: int = 256
  image_bucket_size: int = 42
  code_image_size: int = 128
  orig_patch_image_size: int = 256
  vit: ViTConfig | None = None
  max_images: int = 1
  interpolate_position: bool = False
  dropout: float = 0.0
  attention_dropout: float = 0.0
  activation_dropout: float = 0.0
  encoder_drop_path: float = 0.0
  decoder_drop_path: float = 0.0
  resnet_drop_path: float = 0.0
  scale_attn: bool = True
  scale_fc: bool = True
  scale_heads: bool = True
  scale_resids: bool = False
  entangle_position_embedding: bool = False
  disable_entangle: bool = True
  freeze_resnet: bool = False
  batch_norm_eps: float = 1e-5
  encoder_prompt: int = 0
  decoder_prompt: int = 0
  prompt_hidden: int = 0
  adapter: int = 0
  classifier: ClassifierConfig | None = None
  name: str = ""

  def build(self, *, rngs: nnx.Rngs, remat: str = "none", unroll: int = 1) -> "OFA":
    """Makes the model with fresh float32 parameters.

    Args:
      rngs: the stream `params` draws them.
      remat, unroll: how the transformers' layers are run; see `layers.Scan`.

    Raises:
      ValueError: sizes that do not fit together, all of them.
    """
    from ofa_jax.models.ofa.model import OFA  # which is made of modules that read this config

    return OFA(self, scan=Scan(remat, unroll), rngs=rngs)

  @property
  def head_dims(self) -> tuple[int, int]:
    """(H, K)."""
    return self.heads, self.width // self.heads

  @property
  def code_window(self) -> int:
    """Codes on a side of an image of codes."""
    return self.code_image_size // CODE_PIXELS

  @property
  def first_code(self) -> int:
    """The id of image code 0; the codes stand before the coordinates."""
    return self.vocab_size - self.num_bins - self.num_codes

  @property
  def channels(self) -> int:
    """Of the feature map of an image."""
    return CHANNELS if self.vit is None else self.vit.width

  @property
  def problems(self) -> list[str]:
    """What does not fit together."""
    problems = []
    if self.width % self.heads:
      problems.append(f"expected width to be a multiple of heads {self.heads}, found {self.width}")
    # The image whose positions are interpolated matters only where they are.
    sides = ("code_image_size", "orig_patch_image_size")[: 1 + self.interpolate_position]
    for name in sides:
      side = CODE_PIXELS if name == "code_image_size" else REDUCTION
      largest = side * self.image_bucket_size
      value = getattr(self, name)
      if not 0 < value <= largest or value % side:
        problems.append(
          f"expected {name} to be a multiple of {side} up to {largest} (image_bucket_size "
          f"{self.image_bucket_size}), found {value}"
        )
    problems += self._problems_of_images
    if self.num_codes + self.num_bins >= self.vocab_size:
      problems.append(
        f"expected vocab_size to hold {self.num_codes} codes, {self.num_bins} bins and a text, "
        f"found {self.vocab_size}"
      )
    return problems

  @property
  def _problems_of_images(self) -> list[str]:
    problems = []
    if self.max_images not in (1, 2):
      problems.append(f"expected max_images to be 1 or 2, found {self.max_images}")
    if self.vit is None:
      if len(self.stages) != 3:
        problems.append(f"expected stages of a ResNet, 3 numbers, or a vit, found {self.stages}")
      return problems
    if self.stages:
      problems.append(f"expected stages=() beside a vit, found {self.stages}")
    if self.freeze_resnet or self.resnet_drop_path:
      problems.append("expected no freeze_resnet and no resnet_drop_path with a vit")
    if self.vit.patch_size != REDUCTION:
      problems.append(
        f"expected vit.patch_size to be {REDUCTION}, as all cells, found {self.vit.patch_size}"
      )
    return problems + [f"vit: {line}" for line in self.vit.problems]

  @property
  def sharding(self) -> tuple[tuple[str, P], ...]:
    """Ordered table (path regex, PartitionSpec of the last axes); it covers every parameter."""
    return SHARDING

  @property
  def towers(self) -> dict[str, str]:
    """Path regexes of the model's parts, for tables of parameters."""
    return TOWERS
