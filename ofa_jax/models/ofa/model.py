"""OFA (arXiv:2202.03052): one encoder-decoder for images, text, boxes and image codes.

Images become the cells of a trunk's feature map and stand before the text in the encoder. Boxes
and image codes are words of the one vocabulary, whose table is tied to the output.
"""

import dataclasses
import difflib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ofa_jax.models.layers import Embed, Linear, Scan, dropout, split_rngs
from ofa_jax.models.ofa.config import ClassifierConfig, OFAConfig
from ofa_jax.models.ofa.decoder import Cache, Decoder
from ofa_jax.models.ofa.encoder import Encoded, Encoder
from ofa_jax.models.ofa.layers import INIT, read
from ofa_jax.numerics import wide, widened
from ofa_jax.tokenizers.special import NUM_SPECIAL, PAD

# What each way of tuning few parameters leaves as it is, rows for `Optim.freeze`. The original's
# adapters train the whole model but the words; with a prompt only it, and adapters, are trained.
# BitFit (arXiv:2106.10199) trains some biases: of the norms before a branch or at the end, and of
# the feed-forward matrices.
FREEZE: dict[str, tuple[str, ...]] = {
  "embedding": (r"^tokens/",),
  "adapter": (r"^tokens/",),
  "prompt": (r"^(?!.*/(prompt|adapter)/)",),
  "bitfit": (r"^(?!\w+/blocks/(attn/norm|cross/norm|mlp/(norm|up|down))/bias$|\w+/norm/bias$)",),
  "resnet_norms": (r"^encoder/image/.*(bn\d|norm)/",),
}

# Width, layers of encoder and decoder, heads, blocks of the ResNet's stages.
_SIZES = {
  "tiny": (256, (4, 4), 4, (3, 4, 6)),
  "medium": (512, (4, 4), 8, (3, 4, 23)),
  "base": (768, (6, 6), 12, (3, 4, 23)),
  "large": (1024, (12, 12), 16, (3, 8, 36)),
  "huge": (1280, (24, 12), 16, (3, 8, 36)),
}
SIZES: dict[str, OFAConfig] = {
  name: OFAConfig(
    width=width,
    mlp=4 * width,
    encoder_layers=layers[0],
    decoder_layers=layers[1],
    heads=heads,
    stages=stages,
    name=name,
  )
  for name, (width, layers, heads, stages) in _SIZES.items()
}


def config(name: str, **options: Any) -> OFAConfig:
  """Returns a new config of a size in `SIZES`, with some fields replaced.

  Raises:
    ValueError: an unknown name, with near ones.
  """
  if name not in SIZES:
    near = difflib.get_close_matches(name, SIZES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"Expected a size out of {', '.join(SIZES)}; found {name!r}{hint}")
  return dataclasses.replace(SIZES[name], **options)


def layer_rates(
  config: OFAConfig, tower: str, *, decay: float
) -> tuple[tuple[str, float | tuple[float, ...]], ...]:
  """Learning-rate multipliers of a tower by depth, rows for `Optim.lr_scale`.

  Args:
    config: the model's sizes.
    tower: "encoder", which the images' trunk belongs to, or "decoder". The table of tokens belongs
      to neither.
    decay: factor of the rate for every layer further from the tower's output, as in BEiT (arXiv
      2106.08254): 1 for its last norm, `decay` for the last layer, `decay ** (layers + 1)` for what
      its layers read.

  Raises:
    ValueError: no such tower.
  """
  depths = {"encoder": config.encoder_layers, "decoder": config.decoder_layers}
  if tower not in depths:
    raise ValueError(f"Expected a tower out of {', '.join(depths)}, found {tower!r}")
  depth = depths[tower]
  return (
    (rf"^{tower}/blocks/", tuple(decay ** (depth - i) for i in range(depth))),
    (rf"^{tower}/norm/", 1.0),
    (rf"^{tower}/", decay ** (depth + 1)),
  )


class Classifier(nnx.Module):
  """Dropout and linear layers, PyTorch's default initialisation: states to logits of classes."""

  def __init__(self, config: ClassifierConfig, width: int, *, rngs: nnx.Rngs):
    """Makes the parameters."""
    self.images, self.dropout = config.images, config.dropout
    inputs = config.images * width
    self.dense = Linear(inputs, config.hidden, rngs=rngs) if config.hidden else None
    self.out = Linear(config.hidden or inputs, config.classes, rngs=rngs)

  def __call__(self, x: jax.Array, *, rngs: jax.Array | None = None) -> jax.Array:
    """Maps states [B, D] to logits float32[B / images, classes]."""
    first_key, second_key = split_rngs(rngs, 2)
    x = dropout(x.reshape(-1, self.images * x.shape[-1]), self.dropout, rngs=first_key)
    if self.dense is not None:
      x = dropout(jnp.tanh(self.dense(x)), self.dropout, rngs=second_key)
    return widened(self.out(x))


class OFA(nnx.Module):
  """OFA: an image, a text or both to the logits of an answer's tokens."""

  def __init__(self, config: OFAConfig, *, scan: Scan, rngs: nnx.Rngs):
    """Makes the parameters: matrices and tables N(0, 0.02), also the row of padding."""
    if config.problems:
      raise ValueError("OFAConfig: " + "; ".join(config.problems))
    self.first_code, self.num_codes = config.first_code, config.num_codes
    self.tokens = Embed(config.vocab_size, config.width, init=INIT, pad=PAD, rngs=rngs)
    self.encoder = Encoder(config, scan=scan, rngs=rngs)
    self.decoder = Decoder(config, scan=scan, rngs=rngs)
    head = config.classifier
    self.classifier = None if head is None else Classifier(head, config.width, rngs=rngs)

  def __call__(
    self,
    tokens: jax.Array,
    decoder_tokens: jax.Array,
    *,
    image: jax.Array | None = None,
    image_mask: jax.Array | None = None,
    code_mask: jax.Array | None = None,
    num_patches: int | None = None,
    places: jax.Array | None = None,
    second_image: jax.Array | None = None,
    rngs: jax.Array | None = None,
  ) -> jax.Array:
    """Returns logits float32[B, T, V] of the tokens that follow `decoder_tokens`.

    The arguments are those of `encode` and `decode`; of `places` int32[B, N] only the logits behind
    these of the decoder's tokens are computed, float32[B, N, V].
    """
    return self.logits(
      self.states(
        tokens,
        decoder_tokens,
        image=image,
        image_mask=image_mask,
        code_mask=code_mask,
        num_patches=num_patches,
        places=places,
        second_image=second_image,
        rngs=rngs,
      )
    )

  def states(
    self,
    tokens: jax.Array,
    decoder_tokens: jax.Array,
    *,
    code_mask: jax.Array | None = None,
    places: jax.Array | None = None,
    rngs: jax.Array | None = None,
    **images: Any,
  ) -> jax.Array:
    """Returns what the logits are made of, [B, T, D], or [B, N, D]; the arguments are theirs."""
    encode_key, decode_key = split_rngs(rngs, 2)
    encoded = self.encode(tokens, **images, rngs=encode_key)
    hidden = self.hidden(encoded, decoder_tokens, code_mask=code_mask, rngs=decode_key)
    if places is not None:
      hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
    return hidden

  def encode(
    self,
    tokens: jax.Array,
    *,
    image: jax.Array | None = None,
    image_mask: jax.Array | None = None,
    num_patches: int | None = None,
    patch_ids: jax.Array | None = None,
    second_image: jax.Array | None = None,
    rngs: jax.Array | None = None,
  ) -> Encoded:
    """Encodes images and texts.

    Args:
      tokens: int32[B, T], filled up with 1.
      image: float[B, h, w, 3], normalised, or its feature map [B, h, w, C] as `encoder.image` makes
        it; None: text only.
      image_mask: bool[B], False where a row has no image; None: all have one.
      num_patches: cells of the feature map that are kept in training, drawn for every image; in
        evaluation all are.
      patch_ids: int32[B, N], the cells to keep instead (0 = top left, row by row).
      second_image: float[B, h, w, 3], of any size, of a model for two (`OFAConfig.max_images`);
        rows without an image have none of both. Of it, too, `num_patches` are kept, or all cells.
      rngs: PRNG key for dropout, drop path and patches, or None in evaluation.

    Raises:
      ValueError: a text or an image is too long for the tables of positions; a second image where
        there is no first one, or no row of the table of types for it.
    """
    return self.encoder(
      self.tokens(tokens),
      tokens != PAD,
      image=image,
      image_mask=image_mask,
      num_patches=num_patches,
      patch_ids=patch_ids,
      second_image=second_image,
      rngs=rngs,
    )

  def decode(
    self,
    encoded: Encoded,
    tokens: jax.Array,
    *,
    code_mask: jax.Array | None = None,
    rngs: jax.Array | None = None,
  ) -> jax.Array:
    """Returns logits float32[B, T, V] of the token after each of `tokens`.

    Args:
      encoded: from `encode`.
      tokens: int32[B, T], 0 first, filled up with 1.
      code_mask: bool[B], True where the tokens are an image's codes; None: nowhere.
      rngs: PRNG key, or None in evaluation.

    Raises:
      ValueError: there are not that many positions.
    """
    return self.logits(self.hidden(encoded, tokens, code_mask=code_mask, rngs=rngs))

  def hidden(
    self,
    encoded: Encoded,
    tokens: jax.Array,
    *,
    code_mask: jax.Array | None = None,
    rngs: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the decoder's states [B, T, D]; the arguments are those of `decode`."""
    return self.decoder(self.tokens(tokens), tokens != PAD, encoded, code_mask=code_mask, rngs=rngs)

  @jax.named_scope("linear")
  def logits(self, hidden: jax.Array) -> jax.Array:
    """Maps the decoder's states [..., D] to logits float32[..., V] by the table of tokens."""
    dtype = wide(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, self.table, preferred_element_type=dtype)

  @property
  def table(self) -> jax.Array:
    """The table of tokens [V, D], whole, which is tied to the output."""
    return self.tokens.embedding[...]

  @jax.named_scope("linear")
  def code_logits(self, hidden: jax.Array) -> jax.Array:
    """Maps states [..., D] to the logits float32[..., 4 + num_codes] of special tokens and codes.

    They are those of `logits`, a seventh of them in the released models: `code_places` has where
    ids are found in them.
    """
    table, first = self.tokens.embedding[...], self.first_code
    table = jnp.concatenate([table[:NUM_SPECIAL], table[first : first + self.num_codes]])
    return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=wide(hidden.dtype))

  def code_places(self, ids: jax.Array) -> jax.Array:
    """Where ids int32[...] of special tokens and codes are in `code_logits`."""
    return jnp.where(ids < NUM_SPECIAL, ids, ids - self.first_code + NUM_SPECIAL)

  def code_ids(self, places: jax.Array) -> jax.Array:
    """The ids int32[...] that are found at these places of `code_logits`."""
    return jnp.where(places < NUM_SPECIAL, places, places - NUM_SPECIAL + self.first_code)

  def classify(
    self, encoded: Encoded, tokens: jax.Array, *, rngs: jax.Array | None = None
  ) -> jax.Array:
    """Returns the classification head's logits float32[B / images, classes].

    It reads the state of the last token that is not padding; the arguments are those of `decode`.

    Raises:
      ValueError: the model has no such head.
    """
    if self.classifier is None:
      raise ValueError("Expected OFAConfig.classifier, found None; give its number of classes")
    decoder_key, head_key = split_rngs(rngs, 2)
    hidden = self.hidden(encoded, tokens, rngs=decoder_key)
    last = jnp.sum(tokens != PAD, axis=1) - 1
    return self.classifier(hidden[jnp.arange(tokens.shape[0]), last], rngs=head_key)

  def start(
    self, encoded: Encoded, *, max_length: int, hypotheses: int = 1, code: bool = False
  ) -> Cache:
    """Returns an empty cache for `step`.

    Args:
      encoded: from `encode`, of B inputs.
      max_length: T, positions that will be decoded at most.
      hypotheses: M, sequences that are decoded for every input.
      code: they are image codes.

    Raises:
      ValueError: there are not that many positions.
    """
    return self.decoder.start(encoded, max_length=max_length, hypotheses=hypotheses, code=code)

  def step(self, cache: Cache, tokens: jax.Array, position: jax.Array) -> tuple[jax.Array, Cache]:
    """Decodes one more token of every hypothesis.

    Args:
      cache: from `start` or the step before.
      tokens: int32[B, M], the tokens at `position`.
      position: int32[], 0 first; or int32[B], of each input its own.

    Returns:
      Logits float32[B, M, V] of the tokens at `position + 1`, and the cache.
    """
    x, cache = self.step_hidden(cache, tokens, position)
    return self.logits(x), cache

  def code_step(
    self, cache: Cache, tokens: jax.Array, position: jax.Array
  ) -> tuple[jax.Array, Cache]:
    """As `step`, with the logits of `code_logits`."""
    x, cache = self.step_hidden(cache, tokens, position)
    return self.code_logits(x), cache

  def step_hidden(
    self, cache: Cache, tokens: jax.Array, position: jax.Array
  ) -> tuple[jax.Array, Cache]:
    """Returns the decoder's states [B, M, D] and the cache, as `step` has them."""
    return self.decoder.step(cache, self.tokens(tokens), tokens != PAD, position=position)

  def prefill(self, cache: Cache, tokens: jax.Array) -> tuple[jax.Array, Cache]:
    """Decodes what every input begins with, in one pass.

    The next token of an input with n tokens here is at position n, whatever follows them in its
    row: `step` with positions int32[B] writes over the padding.

    Args:
      cache: from `start`, of one hypothesis.
      tokens: int32[B, P], 0 first, filled up with 1.

    Returns:
      The decoder's state [B, 1, D] at each input's last token, and the cache.
    """
    mask = tokens != PAD
    x, cache = self.decoder.prefill(cache, self.tokens(tokens), mask)
    return read(x, jnp.sum(mask, axis=1) - 1, axis=1), cache

  def reorder(self, cache: Cache, parents: jax.Array) -> Cache:
    """Returns the cache of other hypotheses: int32[B, M'] says which old one each continues."""
    return cache.reorder(parents)
