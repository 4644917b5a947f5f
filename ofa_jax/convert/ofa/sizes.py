"""The sizes and options of an OFA: of its tensors and the original's options, as JSON and back."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ofa_jax.convert import json_files, limits, rules
from ofa_jax.convert.ofa.table import CODES_AFTER, WORDS, standard_names
from ofa_jax.models.ofa.config import CODE_PIXELS
from ofa_jax.models.ofa.model import SIZES, ClassifierConfig, OFAConfig
from ofa_jax.models.ofa.positions import MAX_TOKENS
from ofa_jax.models.vit import ViTConfig
from ofa_jax.models.vit_trunk import VIT_B_16
from ofa_jax.tokenizers.special import BOS, EOS, PAD

# The original's options that no tensor shows -> our fields.
OPTIONS = {
  "code_dict_size": "num_codes",
  "num_bins": "num_bins",
  "orig_patch_image_size": "orig_patch_image_size",
  "interpolate_position": "interpolate_position",
  "dropout": "dropout",
  "attention_dropout": "attention_dropout",
  "activation_dropout": "activation_dropout",
  "encoder_drop_path_rate": "encoder_drop_path",
  "decoder_drop_path_rate": "decoder_drop_path",
  "resnet_drop_path_rate": "resnet_drop_path",
  "entangle_position_embedding": "entangle_position_embedding",
  "disable_entangle": "disable_entangle",
  "freeze_resnet": "freeze_resnet",
}
RESNET_OPTIONS = ("resnet_drop_path", "freeze_resnet")  # which mean nothing to a ViT
VIT_MARK = "encoder.embed_images.positional_embedding"  # which no ResNet has
VIT_HEAD_WIDTH = 64  # of every CLIP's ViT that is a trunk of the original
# What the model is always built with; another value would be another model.
FIXED = {
  "encoder_normalize_before": True,
  "decoder_normalize_before": True,
  "layernorm_embedding": True,
  "patch_layernorm_embedding": True,
  "code_layernorm_embedding": True,
  "add_type_embedding": True,
  "share_all_embeddings": True,
  "share_decoder_input_output_embed": True,
  "no_scale_embedding": True,
  "scale_embedding": False,
  "attn_scale_factor": 2,
  "activation_fn": "gelu",
  "activation_function": "gelu",
  "encoder_prompt_type": "prefix",
  "decoder_prompt_type": "prefix",
}
SYNC_BN_EPS = 1e-3  # the original's BatchNorm with --sync-bn
# The original's options of its generator -> ours.
GENERATION = {
  "beam": "num_beams",
  "max_len_b": "max_length",
  "min_len": "min_length",
  "lenpen": "length_penalty",
  "no_repeat_ngram_size": "no_repeat_ngram_size",
  "temperature": "temperature",
  "unkpen": "unk_penalty",
}
DEFAULT_GENERATION = {"num_beams": 5, "max_length": 16, "no_repeat_ngram_size": 3}


def to_json(config: OFAConfig) -> dict[str, Any]:
  """Returns the config's own fields."""
  return dataclasses.asdict(config)


def from_json(described: Mapping[str, Any]) -> OFAConfig:
  """Makes a config of its own fields, as `to_json` or a run's `config.json` has them.

  Raises:
    ValueError: fields are missing or of a wrong type.
  """
  known = {field.name for field in dataclasses.fields(OFAConfig)}
  fields = {k: v for k, v in described.items() if k in known}
  try:
    head = fields.get("classifier")
    if head is not None:
      head = limits.section(fields, "classifier")
      head = ClassifierConfig(**{k: v for k, v in head.items() if k != "_class"})
    vit = fields.get("vit")
    if vit is not None:
      vit = limits.section(fields, "vit")
      vit = ViTConfig(**{k: v for k, v in vit.items() if k != "_class"})
    stages = tuple(int(num) for num in fields["stages"])
    return limits.check(OFAConfig(**{**fields, "stages": stages, "classifier": head, "vit": vit}))
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"config.json does not describe an OFA: {error!r}") from error


def infer_config(
  state_dict: Mapping[str, np.ndarray], options: Mapping[str, Any] | None = None
) -> OFAConfig:
  """Reads the sizes off the tensors and the rest off the original's options.

  Args:
    state_dict: arrays by PyTorch name, in either layout.
    options: of the original's `cfg` or `args`, or of transformers' `config.json`; what is not there
      is as in the released models. A known size also gets its name.

  Raises:
    ValueError: tensors that every OFA has are missing, or an option is of another model.
  """
  tensors, options = standard_names(state_dict), options or {}
  problems = [
    f"{name}: expected {value!r}, found {options[name]!r}"
    for name, value in FIXED.items()
    if options.get(name, value) != value
  ]
  if problems:
    raise ValueError("Expected the options of an OFA, found " + "; ".join(problems))
  try:
    sizes = _sizes(tensors)
  except KeyError as error:
    raise ValueError(
      f"Expected an OFA's state dict, found none of its tensors {error}; "
      f"the first names are {list(state_dict)[:3]}"
    ) from error
  vit = _vit(tensors, options)
  for name, ours in OPTIONS.items():
    if options.get(name) is not None and not (vit and ours in RESNET_OPTIONS):
      sizes[ours] = options[name]
  if not vit and options.get("sync_bn") and not options.get("freeze_resnet"):
    sizes["batch_norm_eps"] = SYNC_BN_EPS
  size = {f.name for f in dataclasses.fields(OFAConfig) if f.default is dataclasses.MISSING}
  names = [n for n, known in SIZES.items() if all(getattr(known, f) == sizes[f] for f in size)]
  return limits.check(OFAConfig(**sizes, vit=vit, name=names[0] if names else ""))


def settings(options: Mapping[str, Any]) -> dict[str, Any]:
  """What else a model directory says: how to prepare images, and the defaults of generation."""
  given = options.get("eval_args") or {}
  try:
    given = json_files.parse(given.encode()) if isinstance(given, str) else given
  except ValueError as error:
    raise ValueError(f"eval_args: expected a JSON object, found {error}") from error
  if not isinstance(given, Mapping):
    raise ValueError(f"eval_args: expected a JSON object, found {type(given).__name__}")
  generation = {ours: given[name] for name, ours in GENERATION.items() if name in given}
  return limits.check_settings(
    {
      "image_size": options.get("patch_image_size") or 384,
      "imagenet_normalization": bool(options.get("imagenet_default_mean_and_std")),
      "generation": {**DEFAULT_GENERATION, **generation},
    }
  )


def _shown_by_no_tensor(config: OFAConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
  """The original's options that `infer_config` and `settings` need beside the tensors."""
  generation = {
    theirs: settings["generation"][ours]
    for theirs, ours in GENERATION.items()
    if ours in settings["generation"]
  }
  return {
    **{name: getattr(config, ours) for name, ours in OPTIONS.items()},
    "sync_bn": config.batch_norm_eps == SYNC_BN_EPS,
    # Not the original's, whose only ViT has its width; told of others.
    **({} if config.vit is None else {"vit_head_width": config.vit.head_width}),
    "patch_image_size": settings["image_size"],
    "imagenet_default_mean_and_std": settings["imagenet_normalization"],
    "eval_args": json.dumps(generation),
  }


def to_options(config: OFAConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the options of the original's model and task; `infer_config` and `settings` invert it.

  Args:
    config: the model's sizes.
    settings: what else a model directory says.
  """
  options = _shown_by_no_tensor(config, settings)
  for side in ("encoder", "decoder"):
    prompt = getattr(config, f"{side}_prompt")
    options |= {
      f"{side}_embed_dim": config.width,
      f"{side}_ffn_embed_dim": config.mlp,
      f"{side}_layers": getattr(config, f"{side}_layers"),
      f"{side}_attention_heads": config.heads,
      f"{side}_prompt": prompt > 0,
      f"{side}_prompt_length": prompt,
      f"{side}_prompt_projection": config.prompt_hidden > 0,
      f"{side}_prompt_dim": config.prompt_hidden,
    }
  return {
    **{k: v for k, v in FIXED.items() if k not in ("scale_embedding", "activation_function")},
    **options,
    "_name": f"ofa_{config.name or 'base'}",
    "arch": f"ofa_{config.name or 'base'}",
    "resnet_type": resnet_type(config),
    "scale_attn": config.scale_attn,
    "scale_fc": config.scale_fc,
    "scale_heads": config.scale_heads,
    "scale_resids": config.scale_resids,
    "adapter": config.adapter > 0,
    "adapter_dim": config.adapter,
    "token_bucket_size": config.token_bucket_size,
    "image_bucket_size": config.image_bucket_size,
    "code_image_size": config.code_image_size,
    "max_source_positions": MAX_TOKENS,
    "max_target_positions": MAX_TOKENS,
  }


def to_huggingface(config: OFAConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the `config.json` of the `OFA-Sys/OFA-*` repositories, and what else describes it.

  transformers keeps options that it does not know; `infer_config` and `settings` read them.
  """
  sides = {}
  for side in ("encoder", "decoder"):
    sides |= {
      f"{side}_layers": getattr(config, f"{side}_layers"),
      f"{side}_ffn_dim": config.mlp,
      f"{side}_attention_heads": config.heads,
      f"{side}_normalize_before": True,
      f"{side}_drop_path_rate": getattr(config, f"{side}_drop_path"),
    }
  return {
    **_shown_by_no_tensor(config, settings),
    "architectures": ["OFAModel"],
    "model_type": "ofa",
    "dtype": "float32",
    "d_model": config.width,
    "vocab_size": config.vocab_size,
    "max_position_embeddings": MAX_TOKENS,
    **sides,
    "activation_function": "gelu",
    "normformer": config.scale_attn,
    "resnet_type": resnet_type(config),
    "token_bucket_size": config.token_bucket_size,
    "image_bucket_size": config.image_bucket_size,
    "code_image_size": config.code_image_size,
    "attn_scale_factor": 2.0,
    "layernorm_embedding": True,
    "patch_layernorm_embedding": True,
    "code_layernorm_embedding": True,
    "add_type_embedding": True,
    "share_decoder_input_output_embed": True,
    "scale_embedding": False,
    "is_encoder_decoder": True,
    "bos_token_id": BOS,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "decoder_start_token_id": BOS,
    "forced_eos_token_id": EOS,
  }


def resnet_type(config: OFAConfig) -> str:
  """The original's name of an image trunk of these sizes; "" if it has none."""
  if config.vit is not None:
    return "ViT-B/16" if config.vit == VIT_B_16 else ""
  types = {(3, 4, 6): "resnet50", (3, 4, 23): "resnet101", (3, 8, 36): "resnet152"}
  return types.get(tuple(config.stages), "")


def _sizes(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  vocab_size, width = tensors[WORDS].shape
  token_rows, heads = tensors["encoder.token_rel_pos_table_list.0.weight"].shape
  image_rows = len(tensors["encoder.image_rel_pos_table_list.0.weight"])
  sizes = {
    "width": width,
    "mlp": len(tensors["encoder.layers.0.fc1.bias"]),
    "encoder_layers": rules.count_layers(tensors, r"encoder\.layers\.(\d+)\."),
    "decoder_layers": rules.count_layers(tensors, r"decoder\.layers\.(\d+)\."),
    "heads": heads,
    "stages": _stages(tensors),
    "max_images": len(tensors["encoder.type_embedding.weight"]) - 1,
    "vocab_size": vocab_size,
    "token_bucket_size": (token_rows + 1) // 2,
    "image_bucket_size": (math.isqrt(image_rows - 3) + 1) // 2,
    "scale_attn": "encoder.layers.0.attn_ln.weight" in tensors,
    "scale_fc": "encoder.layers.0.ffn_layernorm.weight" in tensors,
    "scale_heads": "encoder.layers.0.self_attn.c_attn" in tensors,
    "scale_resids": "encoder.layers.0.w_resid" in tensors,
    "adapter": len(tensors.get("encoder.layers.0.adapter.down_proj.bias", ())),
    "prompt_hidden": max(
      len(tensors.get(f"{side}.{side}_prompt_encoder.trans.0.bias", ()))
      for side in ("encoder", "decoder")
    ),
    "classifier": _classifier(tensors, width),
  }
  for side in ("encoder", "decoder"):
    sizes[f"{side}_prompt"] = len(tensors.get(f"{side}.{side}_prompt_encoder.embedding.weight", ()))
  if "decoder.image_position_idx" in tensors:
    window = math.isqrt(len(tensors["decoder.image_position_idx"]) - CODES_AFTER)
    sizes["code_image_size"] = CODE_PIXELS * window
  return sizes


def _stages(tensors: Mapping[str, np.ndarray]) -> tuple[int, ...]:
  """Blocks of the ResNet's stages; () if the trunk is a ViT."""
  if VIT_MARK in tensors:
    return ()
  pattern = r"encoder\.embed_images\.layer{}\.(\d+)\."
  return tuple(rules.count_layers(tensors, pattern.format(stage)) for stage in (1, 2, 3))


def _vit(tensors: Mapping[str, np.ndarray], options: Mapping[str, Any]) -> ViTConfig | None:
  """The trunk if it is a ViT; no tensor shows the number of its heads."""
  if VIT_MARK not in tensors:
    return None
  width, _, _, patch_size = tensors["encoder.embed_images.conv1.weight"].shape
  head_width = options.get("vit_head_width", VIT_HEAD_WIDTH)
  return ViTConfig(
    image_size=patch_size * math.isqrt(len(tensors[VIT_MARK]) - 1),
    patch_size=patch_size,
    width=width,
    layers=rules.count_layers(tensors, r"encoder\.embed_images\.transformer\.resblocks\.(\d+)\."),
    head_width=head_width,
  )


def _classifier(tensors: Mapping[str, np.ndarray], width: int) -> ClassifierConfig | None:
  out = tensors.get("classification_heads.cls.out_proj.weight")
  if out is None:
    return None
  dense = tensors.get("classification_heads.cls.dense.weight")
  inputs = out.shape[1] if dense is None else dense.shape[1]
  hidden = 0 if dense is None else len(dense)
  return ClassifierConfig(classes=len(out), hidden=hidden, images=inputs // width)
