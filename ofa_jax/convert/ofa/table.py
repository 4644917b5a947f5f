r"""OFA's weights in PyTorch's names and layouts, in both directions.

Two layouts: fairseq's, of the original's checkpoints, and that of the `OFA-Sys/OFA-*` repositories
for transformers, which renames attention and norms. Both keep the tied table three times, and
buffers that follow from the sizes.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ofa_jax import trees
from ofa_jax.convert import rules
from ofa_jax.convert.rules import (
  CONV,
  SAME,
  Rule,
  batch_norm_rules,
  linear_rules,
  norm_rules,
  patches,
  vit_block_rules,
)
from ofa_jax.models.abstract import abstract
from ofa_jax.models.ofa.model import OFAConfig
from ofa_jax.models.ofa.positions import (
  AFTER_CODES,
  MAX_TOKENS,
  code_cells,
  image_buckets,
  token_buckets,
)

WORDS = "encoder.embed_tokens.weight"  # the tied table

_STAGE, _BLOCK = r"encoder.embed_images.layer(\d+).(\d+)", r"encoder/image/layer\1/block\2"
RESNET: tuple[Rule, ...] = (
  ("encoder.embed_images.conv1.weight", "encoder/image/conv1/kernel", CONV),
  *batch_norm_rules("encoder.embed_images.bn1", "encoder/image/bn1"),
  (rf"{_STAGE}.conv(\d+).weight", rf"{_BLOCK}/conv\3/kernel", CONV),
  *batch_norm_rules(rf"{_STAGE}.bn(\d+)", rf"{_BLOCK}/bn\3"),
  (rf"{_STAGE}.downsample.0.weight", rf"{_BLOCK}/downsample/conv/kernel", CONV),
  *batch_norm_rules(rf"{_STAGE}.downsample.1", rf"{_BLOCK}/downsample/norm"),
)
# Where the original's `--resnet-type` is a ViT.
VIT: tuple[Rule, ...] = (
  ("encoder.embed_images.conv1.weight", "encoder/image/patch/kernel", patches()),
  (
    "encoder.embed_images.positional_embedding",
    "encoder/image/positional_embedding",
    SAME,
  ),
  *norm_rules("encoder.embed_images.ln_pre", "encoder/image/ln_pre"),
  *vit_block_rules(r"encoder.embed_images.transformer.resblocks.(\d+)", "encoder/image/blocks"),
)


def _attention(torch: str, ours: str, *, norm: str, out_norm: str) -> tuple[Rule, ...]:
  """The rules of an attention branch of one side's layers, all but queries, keys and values."""
  side = torch.partition(".")[0]
  layer = rf"{side}.layers.(\d+)"
  return (
    *norm_rules(f"{layer}.{norm}", f"{ours}/norm", r"[\1]"),
    (rf"{torch}.c_attn", rf"{ours}/head_scale[\1]", SAME),
    *linear_rules(f"{torch}.out_proj", f"{ours}/out", r"[\1]", inputs=2),
    *norm_rules(f"{layer}.{out_norm}", f"{ours}/out_norm", r"[\1]"),
  )


def _side(side: str, *, out_norm: str) -> tuple[Rule, ...]:
  """The rules of what encoder and decoder have in common."""
  layer, ours = rf"{side}.layers.(\d+)", f"{side}/blocks"
  attn, prompt = f"{layer}.self_attn", f"{side}.{side}_prompt_encoder"
  return (
    *norm_rules(f"{side}.layernorm_embedding", f"{side}/text_norm"),
    (f"{side}.embed_positions.weight", f"{side}/positions/text/embedding", SAME),
    (f"{side}.embed_image_positions.weight", f"{side}/positions/image/embedding", SAME),
    *norm_rules(f"{side}.pos_ln", f"{side}/positions/text_norm"),
    *norm_rules(f"{side}.image_pos_ln", f"{side}/positions/image_norm"),
    *norm_rules(f"{side}.layer_norm", f"{side}/norm"),
    (
      rf"{side}.token_rel_pos_table_list.(\d+).weight",
      rf"{ours}/relative/token/embedding[\1]",
      SAME,
    ),
    (
      rf"{side}.image_rel_pos_table_list.(\d+).weight",
      rf"{ours}/relative/image/embedding[\1]",
      SAME,
    ),
    *linear_rules(f"{attn}.q_proj", f"{ours}/attn/qkv", r"[\1]", part=0),
    *linear_rules(f"{attn}.k_proj", f"{ours}/attn/qkv", r"[\1]", part=1),
    *linear_rules(f"{attn}.v_proj", f"{ours}/attn/qkv", r"[\1]", part=2),
    *_attention(attn, f"{ours}/attn", norm="self_attn_layer_norm", out_norm=out_norm),
    *norm_rules(f"{layer}.final_layer_norm", f"{ours}/mlp/norm", r"[\1]"),
    *linear_rules(f"{layer}.fc1", f"{ours}/mlp/up", r"[\1]"),
    *norm_rules(f"{layer}.ffn_layernorm", f"{ours}/mlp/mid_norm", r"[\1]"),
    *linear_rules(f"{layer}.fc2", f"{ours}/mlp/down", r"[\1]"),
    *linear_rules(f"{layer}.adapter.down_proj", f"{ours}/mlp/adapter/up", r"[\1]"),
    *linear_rules(f"{layer}.adapter.up_proj", f"{ours}/mlp/adapter/down", r"[\1]"),
    (rf"{layer}.w_resid", rf"{ours}/mlp/residual_scale[\1]", SAME),
    (f"{prompt}.embedding.weight", f"{side}/prompt/table/embedding", SAME),
    *linear_rules(f"{prompt}.trans.0", f"{side}/prompt/up"),
    *linear_rules(f"{prompt}.trans.2", f"{side}/prompt/down"),
  )


_CROSS, _OURS = r"decoder.layers.(\d+).encoder_attn", "decoder/blocks/cross"
RULES: tuple[Rule, ...] = (
  (WORDS, "tokens/embedding", SAME),
  *RESNET,
  *VIT,
  *linear_rules("encoder.image_proj", "encoder/image_proj"),
  ("encoder.type_embedding.weight", "encoder/type/embedding", SAME),
  *norm_rules("encoder.patch_layernorm_embedding", "encoder/image_norm"),
  *linear_rules("encoder.pos_q_linear", "encoder/self_positions/qk", part=0),
  *linear_rules("encoder.pos_k_linear", "encoder/self_positions/qk", part=1),
  *_side("encoder", out_norm="attn_ln"),
  *norm_rules("decoder.code_layernorm_embedding", "decoder/code_norm"),
  *linear_rules("decoder.self_pos_q_linear", "decoder/self_positions/qk", part=0),
  *linear_rules("decoder.self_pos_k_linear", "decoder/self_positions/qk", part=1),
  *linear_rules("decoder.cross_pos_q_linear", "decoder/cross_positions/q"),
  *linear_rules("decoder.cross_pos_k_linear", "decoder/cross_positions/k"),
  *_side("decoder", out_norm="self_attn_ln"),
  *linear_rules(f"{_CROSS}.q_proj", f"{_OURS}/q", r"[\1]"),
  *linear_rules(f"{_CROSS}.k_proj", f"{_OURS}/kv", r"[\1]", part=0),
  *linear_rules(f"{_CROSS}.v_proj", f"{_OURS}/kv", r"[\1]", part=1),
  *_attention(_CROSS, _OURS, norm="encoder_attn_layer_norm", out_norm="cross_attn_ln"),
  *linear_rules("classification_heads.cls.dense", "classifier/dense"),
  *linear_rules("classification_heads.cls.out_proj", "classifier/out"),
)

CODES_AFTER = 770  # positions of a code sequence besides the codes: its start, and fillers
TIED = ("decoder.embed_tokens.weight", "decoder.output_projection.weight")  # to WORDS
IGNORED: tuple[tuple[str, str], ...] = (
  (r"^(encoder|decoder)\.version$", "fairseq's mark of a format, always 3"),
  (r"_rp_bucket$", "buckets of distances, which follow from the sizes"),
  (r"^decoder\.image_position_idx$", "numbers of cells, which follow from the sizes"),
  (r"\.num_batches_tracked$", "a counter that BatchNorm with a fixed momentum never reads"),
)

# The names of transformers' layout -> fairseq's, inside a layer of one side. BitFit's and the
# prompts' options are fairseq's only.
HUGGINGFACE: dict[str, tuple[tuple[str, str], ...]] = {
  "encoder": (("self_attn_mid_layer_norm", "attn_ln"), ("ffn_layer_norm", "ffn_layernorm")),
  "decoder": (
    ("self_attn_mid_layer_norm", "self_attn_ln"),
    ("cross_attn_mid_layer_norm", "cross_attn_ln"),
    ("cross_attn_layer_norm", "encoder_attn_layer_norm"),
    ("cross_attn", "encoder_attn"),
    ("ffn_layer_norm", "ffn_layernorm"),
  ),
}
# What fairseq called the norms of a layer before it named them.
OLD_NORMS = {
  "encoder": ("self_attn_layer_norm", "final_layer_norm"),
  "decoder": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
}


def from_torch(
  state_dict: Mapping[str, np.ndarray], config: OFAConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Makes our parameters of an OFA state dict.

  Args:
    state_dict: arrays by PyTorch name, of any floating precision, in either layout.
    config: the model's sizes; `ofa_sizes.infer_config` finds them.

  Returns:
    Nested dicts of float32 arrays: the parameters, and BatchNorm's running statistics, as
    `nnx.split(model, nnx.Param, ...)` divides them.

  Raises:
    ValueError: all tensors that are missing, unexpected, or of another shape than the config's;
      copies of the tied table that differ.
  """
  _, params, rest = abstract(config)
  flat = fill(standard_names(state_dict), {**shapes_of(params), **shapes_of(rest)})
  return tuple(
    trees.unflatten({path: flat[path] for path in trees.flatten(tree)}) for tree in (params, rest)
  )


def fill(
  tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
  """Makes parameters of these shapes, float32 by path, of tensors in standard names.

  Raises:
    ValueError: as `from_torch`.
  """
  return rules.from_torch(_untied(tensors), RULES, shapes=shapes, ignored=IGNORED)


def to_torch(
  params: Mapping[str, Any], rest: Mapping[str, Any], config: OFAConfig
) -> dict[str, np.ndarray]:
  """Makes a state dict that the original loads strictly.

  Args:
    params, rest: nested dicts as `from_torch` returns them.
    config: the model's sizes.

  Returns:
    Arrays by PyTorch name, with the dtype of the parameters; the tied table three times, as one
    array. BatchNorm's counters, which we do not keep, are 0.
  """
  tensors = rules.to_torch({**trees.flatten(params), **trees.flatten(rest)}, RULES)
  tensors |= dict.fromkeys(TIED, tensors[WORDS])
  return tensors | buffers(config) | rules.counters(tensors)


def to_huggingface(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Renames a state dict of `to_torch` to transformers' layout.

  Raises:
    ValueError: it has parts that this layout has not.
  """
  renamed = {}
  for name, tensor in tensors.items():
    side, layers, number, rest = _in_layer(name)
    for theirs, fairseq in HUGGINGFACE.get(side, ()) if layers else ():
      if rest.startswith(f"{fairseq}."):
        name = f"{side}.layers.{number}.{theirs}{rest[len(fairseq) :]}"
        break
    renamed[name] = tensor
  extra = [n for n in renamed if re.search(r"\.adapter\.|_prompt_encoder\.|\.w_resid$|^class", n)]
  if extra:
    raise ValueError(
      f"Expected a model as transformers has it, found {extra[0]} and {len(extra) - 1} other "
      "tensors of adapters, prompts, residual factors or heads; use --to=torch"
    )
  return renamed


def standard_names(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Renames the tensors of transformers' layout, of old checkpoints and of heads to fairseq's.

  Old are `in_proj` (queries, keys and values in one) and `layer_norms.0`; a head may have any name.
  """
  standard = {}
  for name, tensor in rules.plain_names(state_dict).items():
    side, layers, number, rest = _in_layer(name)
    if layers:
      for theirs, fairseq in HUGGINGFACE.get(side, ()):
        if rest.startswith(f"{theirs}."):
          rest = fairseq + rest[len(theirs) :]
          break
      old = re.fullmatch(r"layer_norms\.(\d)\.(\w+)", rest)
      if old and side in OLD_NORMS:
        rest = f"{OLD_NORMS[side][int(old[1])]}.{old[2]}"
      name = f"{side}.layers.{number}.{rest}"
    packed = re.fullmatch(r"(.*)\.in_proj_(weight|bias)", name)
    if packed and layers:  # not the trunk's, which always were
      for part, x in zip("qkv", np.split(tensor, 3), strict=True):
        standard[f"{packed[1]}.{part}_proj.{packed[2]}"] = x
    else:
      standard[re.sub(r"^classification_heads\.\w+\.", "classification_heads.cls.", name)] = tensor
  return standard


def buffers(config: OFAConfig) -> dict[str, np.ndarray]:
  """The buffers of the original's state dict, which follow from the sizes."""
  ids = np.arange(MAX_TOKENS)
  token = token_buckets(ids[:, None] - ids, config.token_bucket_size).astype(np.int64)
  cells = np.arange(config.image_bucket_size**2 + 1)
  image = np.asarray(image_buckets(cells, cells, config.image_bucket_size)).astype(np.int64)
  codes = code_cells(
    config.code_window**2 + CODES_AFTER, config.code_window, config.image_bucket_size
  )
  codes[config.code_window**2 + 1 :] = AFTER_CODES  # whatever the size, and then never looked up
  stored = {"decoder.image_position_idx": codes.astype(np.int64)}
  for side in ("encoder", "decoder"):
    stored[f"{side}.version"] = np.full(1, 3, np.float32)
    stored[f"{side}.token_rp_bucket"], stored[f"{side}.image_rp_bucket"] = token, image
  return stored


def shapes_of(tree: Any) -> dict[str, tuple[int, ...]]:
  """Shapes by path."""
  return {path: tuple(x.shape) for path, x in trees.flatten(tree).items()}


def _in_layer(name: str) -> tuple[str, str, str, str]:
  """Cuts "encoder.layers.3.fc1.bias" into its four parts; others have an empty second one."""
  parts = re.fullmatch(r"(encoder|decoder)\.(layers)\.(\d+)\.(.*)", name)
  return parts.groups() if parts else ("", "", "", name)


def _equal(table: np.ndarray, other: np.ndarray) -> bool:
  """Whether tables are the same; NaN, which is told of later, is equal to NaN."""
  return np.array_equal(table, other) or np.array_equal(table, other, equal_nan=True)


def _untied(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The tensors with the tied table once.

  Raises:
    ValueError: its copies differ.
  """
  words = next((tensors[name] for name in (WORDS, *TIED) if name in tensors), None)
  others = [n for n in (WORDS, *TIED) if n in tensors and not _equal(tensors[n], words)]
  if others:
    raise ValueError(
      f"Expected the tables {', '.join((WORDS, *TIED))} to be equal, found that {others[0]} "
      "differs; this model has no separate ones"
    )
  untied = {name: x for name, x in tensors.items() if name not in TIED}
  return untied if words is None else {**untied, WORDS: words}
