r"""Chinese-CLIP's weights in PyTorch's names and layouts, in both directions.

Reads the released files' naming, the training checkpoints' (`module.` before every name) and that
of models trained with FlashAttention (`Wqkv`); writes the released files' naming.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ofa_jax.convert import rules, tables
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
from ofa_jax.models import cnclip
from ofa_jax.models.bert import BertConfig
from ofa_jax.models.clip_resnet import REDUCTION, ResNetConfig
from ofa_jax.models.cnclip import CNCLIPConfig
from ofa_jax.models.vit import ViTConfig

VIT: tuple[Rule, ...] = (
  ("visual.class_embedding", "visual/class_embedding", SAME),
  ("visual.positional_embedding", "visual/positional_embedding", SAME),
  ("visual.proj", "visual/proj", SAME),
  ("visual.conv1.weight", "visual/conv1/kernel", patches()),
  *norm_rules("visual.ln_pre", "visual/ln_pre"),
  *norm_rules("visual.ln_post", "visual/ln_post"),
  *vit_block_rules(r"visual.transformer.resblocks.(\d+)", "visual/blocks"),
)

_STAGE_BLOCK, _OUR_STAGE_BLOCK = r"visual.layer(\d+).(\d+)", r"visual/layer\1/block\2"
RESNET: tuple[Rule, ...] = (
  (r"visual.conv(\d+).weight", r"visual/conv\1/kernel", CONV),
  *batch_norm_rules(r"visual.bn(\d+)", r"visual/bn\1"),
  (rf"{_STAGE_BLOCK}.conv(\d+).weight", rf"{_OUR_STAGE_BLOCK}/conv\3/kernel", CONV),
  *batch_norm_rules(rf"{_STAGE_BLOCK}.bn(\d+)", rf"{_OUR_STAGE_BLOCK}/bn\3"),
  (rf"{_STAGE_BLOCK}.downsample.0.weight", rf"{_OUR_STAGE_BLOCK}/downsample/conv/kernel", CONV),
  *batch_norm_rules(rf"{_STAGE_BLOCK}.downsample.1", rf"{_OUR_STAGE_BLOCK}/downsample/norm"),
  ("visual.attnpool.positional_embedding", "visual/attnpool/positional_embedding", SAME),
  *linear_rules("visual.attnpool.q_proj", "visual/attnpool/qkv", part=0),
  *linear_rules("visual.attnpool.k_proj", "visual/attnpool/qkv", part=1),
  *linear_rules("visual.attnpool.v_proj", "visual/attnpool/qkv", part=2),
  *linear_rules("visual.attnpool.c_proj", "visual/attnpool/out", inputs=2),
)

_BERT_LAYER = r"bert.encoder.layer.(\d+)"
BERT: tuple[Rule, ...] = (
  ("bert.embeddings.word_embeddings.weight", "bert/word/embedding", SAME),
  ("bert.embeddings.position_embeddings.weight", "bert/position/embedding", SAME),
  ("bert.embeddings.token_type_embeddings.weight", "bert/token_type/embedding", SAME),
  *norm_rules("bert.embeddings.LayerNorm", "bert/embed_norm"),
  *linear_rules(rf"{_BERT_LAYER}.attention.self.query", "bert/blocks/attn/qkv", r"[\1]", part=0),
  *linear_rules(rf"{_BERT_LAYER}.attention.self.key", "bert/blocks/attn/qkv", r"[\1]", part=1),
  *linear_rules(rf"{_BERT_LAYER}.attention.self.value", "bert/blocks/attn/qkv", r"[\1]", part=2),
  *linear_rules(
    rf"{_BERT_LAYER}.attention.output.dense", "bert/blocks/attn/out", r"[\1]", inputs=2
  ),
  *norm_rules(rf"{_BERT_LAYER}.attention.output.LayerNorm", "bert/blocks/attn_norm", r"[\1]"),
  *linear_rules(rf"{_BERT_LAYER}.intermediate.dense", "bert/blocks/mlp/up", r"[\1]"),
  *linear_rules(rf"{_BERT_LAYER}.output.dense", "bert/blocks/mlp/down", r"[\1]"),
  *norm_rules(rf"{_BERT_LAYER}.output.LayerNorm", "bert/blocks/mlp_norm", r"[\1]"),
)

SHARED: tuple[Rule, ...] = (
  ("text_projection", "text_projection", SAME),
  ("logit_scale", "logit_scale", SAME),
)

IGNORED: tuple[tuple[str, str], ...] = (
  (
    r"^bert\.pooler\.",
    "the text feature is the first state itself; some files keep a stale pooler",
  ),
  (r"\.embeddings\.position_ids$", "the numbers 0, 1, 2, ..., which old versions stored"),
  (r"\.embeddings\.token_type_ids$", "zeros, the type of every token, which some versions store"),
  (r"\.num_batches_tracked$", "a counter that BatchNorm with a fixed momentum never reads"),
)


def from_torch(
  state_dict: Mapping[str, np.ndarray], config: CNCLIPConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Makes our parameters of a Chinese-CLIP state dict.

  Args:
    state_dict: arrays by PyTorch name, of any floating precision, in any of the three namings.
    config: the model's sizes; `infer_config` finds them for released models.

  Returns:
    Nested dicts of float32 arrays: the parameters, and BatchNorm's running statistics (empty for
    a ViT), as `nnx.split(model, nnx.Param, ...)` divides them.

  Raises:
    ValueError: all tensors that are missing, unexpected, or of another shape than the config's.
  """
  tensors = standard_names(state_dict)
  return tables.from_torch(tensors, config, table=rules_of(config), ignored=IGNORED)


def to_torch(
  params: Mapping[str, Any], rest: Mapping[str, Any], config: CNCLIPConfig
) -> dict[str, np.ndarray]:
  """Makes a state dict that the original loads strictly, in the released files' naming.

  Args:
    params, rest: nested dicts as `from_torch` returns them.
    config: the model's sizes.

  Returns:
    Arrays by PyTorch name, with the dtype of the parameters. BatchNorm's counters, which we do not
    keep, are 0.
  """
  return tables.to_torch((params, rest), table=rules_of(config))


def infer_config(state_dict: Mapping[str, np.ndarray]) -> CNCLIPConfig:
  """Reads the sizes off the tensors; a known pair of towers also gets its name.

  The number of heads is in no tensor: heads are 64 wide, or 80 in the width 1280 of ViT-H-14.

  Raises:
    ValueError: tensors that Chinese-CLIP has are missing, or a width is not made of such heads.
  """
  tensors = standard_names(state_dict)
  try:
    vision = infer_vision(tensors)
    text = _infer_bert(tensors)
    embed_dim = tensors["text_projection"].shape[1]
  except KeyError as error:
    raise ValueError(
      f"Expected a Chinese-CLIP state dict, found none of its tensors {error}; "
      f"the first names are {list(state_dict)[:3]}."
    ) from error
  config = CNCLIPConfig(vision=vision, text=text, embed_dim=embed_dim)
  image = [name for name, known in cnclip.VISION.items() if known == vision]
  texts = [name for name, known in cnclip.TEXT.items() if known == text]
  if image and texts:
    config.name = f"{image[0]}@{texts[0]}"
  return config


def standard_names(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Renames the tensors of training checkpoints and FlashAttention models to the released names."""
  standard = {}
  for name, tensor in rules.plain_names(state_dict).items():
    name = name.replace("attention.self.out_proj.", "attention.output.dense.")
    packed = re.fullmatch(r"(.*\.attention\.self)\.Wqkv\.(weight|bias)", name)
    if packed:
      for part, x in zip(("query", "key", "value"), np.split(tensor, 3), strict=True):
        standard[f"{packed[1]}.{part}.{packed[2]}"] = x
    else:
      standard[re.sub(r"\.attn\.Wqkv\.", ".attn.in_proj_", name)] = tensor
  return standard


def rules_of(config: CNCLIPConfig) -> tuple[Rule, ...]:
  """Returns the table of a model with these towers."""
  vision = VIT if isinstance(config.vision, ViTConfig) else RESNET
  return (*SHARED, *vision, *BERT)


def infer_vision(tensors: Mapping[str, np.ndarray]) -> ViTConfig | ResNetConfig:
  """Sizes of the image tower, which are those of OpenAI's CLIP, too.

  Raises:
    KeyError: a tensor is missing.
    ValueError: a width is not made of heads as the released models have them.
  """
  return _infer_vit(tensors) if "visual.proj" in tensors else _infer_resnet(tensors)


def _infer_vit(tensors: Mapping[str, np.ndarray]) -> ViTConfig:
  width, _, _, patch_size = tensors["visual.conv1.weight"].shape
  grid = math.isqrt(len(tensors["visual.positional_embedding"]) - 1)
  head_width = 80 if width == 1280 else 64
  _check_heads("visual", width, head_width)
  return ViTConfig(
    image_size=grid * patch_size,
    patch_size=patch_size,
    width=width,
    layers=rules.count_layers(tensors, r"visual\.transformer\.resblocks\.(\d+)\."),
    head_width=head_width,
  )


def _infer_resnet(tensors: Mapping[str, np.ndarray]) -> ResNetConfig:
  width = len(tensors["visual.conv3.weight"])
  _check_heads("visual", REDUCTION * width, 64)
  grid = math.isqrt(len(tensors["visual.attnpool.positional_embedding"]) - 1)
  return ResNetConfig(
    image_size=REDUCTION * grid,
    layers=tuple(
      rules.count_layers(tensors, rf"visual\.layer{stage}\.(\d+)\.") for stage in range(1, 5)
    ),
    width=width,
  )


def _infer_bert(tensors: Mapping[str, np.ndarray]) -> BertConfig:
  vocab_size, width = tensors["bert.embeddings.word_embeddings.weight"].shape
  _check_heads("bert", width, 64)
  return BertConfig(
    vocab_size=vocab_size,
    width=width,
    layers=rules.count_layers(tensors, r"bert\.encoder\.layer\.(\d+)\."),
    heads=width // 64,
    mlp=len(tensors["bert.encoder.layer.0.intermediate.dense.bias"]),
    max_positions=len(tensors["bert.embeddings.position_embeddings.weight"]),
    type_vocab=len(tensors["bert.embeddings.token_type_embeddings.weight"]),
  )


def _check_heads(tower: str, width: int, head_width: int):
  if width % head_width:
    raise ValueError(
      f"Expected {tower} to have heads of {head_width}, found width {width}; "
      "the number of heads cannot be inferred; convert the file with "
      "python -m ofa_jax.convert --model-config=JSON."
    )
