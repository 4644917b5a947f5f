"""Chinese-CLIP as Hugging Face's `ChineseCLIPModel`: a directory in and out, without transformers.

Its text tower has the original's names, its image tower its own. It has no ResNet. It takes padding
from an `attention_mask` that its tokenizer makes, where the original looks at the tokens.
"""

import functools
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from ofa_jax.convert import json_files, limits, rules, safetensors_files, torch_files
from ofa_jax.convert.cnclip.table import BERT, IGNORED
from ofa_jax.convert.params import Weights
from ofa_jax.convert.rules import SAME, Rule, linear, linear_rules, norm_rules, patches
from ofa_jax.data.images import CLIP_MEAN, CLIP_STD
from ofa_jax.models.abstract import abstract
from ofa_jax.models.bert import BertConfig
from ofa_jax.models.cnclip import CNCLIPConfig
from ofa_jax.models.vit import ViTConfig
from ofa_jax.tokenizers.bert import ChineseBertTokenizer
from ofa_jax.trees import flatten, unflatten

MODEL_TYPE = "chinese_clip"


def layer_rules(theirs: str, ours: str) -> tuple[Rule, ...]:
  r"""The rules of the layers of a CLIP's tower; their name has the number as `(\d+)`."""
  return (
    *norm_rules(f"{theirs}.layer_norm1", f"{ours}/ln_1", r"[\1]"),
    *linear_rules(f"{theirs}.self_attn.q_proj", f"{ours}/attn/qkv", r"[\1]", part=0),
    *linear_rules(f"{theirs}.self_attn.k_proj", f"{ours}/attn/qkv", r"[\1]", part=1),
    *linear_rules(f"{theirs}.self_attn.v_proj", f"{ours}/attn/qkv", r"[\1]", part=2),
    *linear_rules(f"{theirs}.self_attn.out_proj", f"{ours}/attn/out", r"[\1]", inputs=2),
    *norm_rules(f"{theirs}.layer_norm2", f"{ours}/ln_2", r"[\1]"),
    *linear_rules(f"{theirs}.mlp.fc1", f"{ours}/mlp/up", r"[\1]"),
    *linear_rules(f"{theirs}.mlp.fc2", f"{ours}/mlp/down", r"[\1]"),
  )


# The image tower of every CLIP of transformers, and what it shares with the text tower.
VISION_RULES: tuple[Rule, ...] = (
  ("logit_scale", "logit_scale", SAME),
  ("text_projection.weight", "text_projection", linear()),
  ("visual_projection.weight", "visual/proj", linear()),
  ("vision_model.embeddings.class_embedding", "visual/class_embedding", SAME),
  ("vision_model.embeddings.patch_embedding.weight", "visual/conv1/kernel", patches()),
  ("vision_model.embeddings.position_embedding.weight", "visual/positional_embedding", SAME),
  *norm_rules("vision_model.pre_layrnorm", "visual/ln_pre"),  # their spelling
  *norm_rules("vision_model.post_layernorm", "visual/ln_post"),
  *layer_rules(r"vision_model.encoder.layers.(\d+)", "visual/blocks"),
)
RULES: tuple[Rule, ...] = (
  *VISION_RULES,
  *((f"text_model.{name.removeprefix('bert.')}", path, change) for name, path, change in BERT),
)

HF_IGNORED: tuple[tuple[str, str], ...] = ((r"^text_model\.pooler\.", IGNORED[0][1]), IGNORED[1])

# Field -> (ours, transformers' default, which its files leave out).
TEXT = {
  "vocab_size": ("vocab_size", 30522),
  "hidden_size": ("width", 768),
  "num_hidden_layers": ("layers", 12),
  "num_attention_heads": ("heads", 12),
  "intermediate_size": ("mlp", 3072),
  "max_position_embeddings": ("max_positions", 512),
  "type_vocab_size": ("type_vocab", 2),
  "hidden_dropout_prob": ("dropout", 0.1),
  "attention_probs_dropout_prob": ("attention_dropout", 0.1),
  "pad_token_id": ("pad", 0),
}
VISION = {
  "image_size": ("image_size", 224),
  "patch_size": ("patch_size", 32),
  "hidden_size": ("width", 768),
  "num_hidden_layers": ("layers", 12),
}
# What the model is built with; another value would be another model.
FIXED = (
  ("text_config", "hidden_act", "gelu"),
  ("text_config", "layer_norm_eps", 1e-12),
  ("vision_config", "hidden_act", "quick_gelu"),
  ("vision_config", "layer_norm_eps", 1e-5),
  ("vision_config", "num_channels", 3),
)


def config_from_json(described: Mapping[str, Any]) -> CNCLIPConfig:
  """Reads the sizes from a `config.json`.

  Raises:
    ValueError: all settings that this model does not have.
  """
  towers = {tower: limits.section(described, tower) for tower in ("text_config", "vision_config")}
  text, vision = towers.values()
  width, heads = vision.get("hidden_size", 768), vision.get("num_attention_heads", 12)
  if not (type(width) is int and type(heads) is int and width > 0 and heads > 0):
    raise ValueError(
      "vision_config: expected hidden_size and num_attention_heads as numbers above 0, found "
      f"{width!r:.40} and {heads!r:.40}"
    )
  problems = [
    f"{tower}.{name}: expected {value!r}, found {towers[tower][name]!r:.80}"
    for tower, name, value in FIXED
    if towers[tower].get(name, value) != value
  ]
  if vision.get("intermediate_size", 3072) != 4 * width:
    problems.append(
      f"vision_config.intermediate_size: expected 4 * hidden_size = {4 * width}, "
      f"found {vision.get('intermediate_size', 3072)!r:.40}"
    )
  if width % heads:
    problems.append(
      f"vision_config.hidden_size: expected a multiple of {heads} heads, found {width}"
    )
  if problems:
    raise ValueError("config.json is not of a Chinese-CLIP: " + "; ".join(problems))
  return limits.check(
    CNCLIPConfig(
      vision=ViTConfig(
        head_width=width // heads,
        **{ours: vision.get(name, default) for name, (ours, default) in VISION.items()},
      ),
      text=BertConfig(**{ours: text.get(name, default) for name, (ours, default) in TEXT.items()}),
      embed_dim=described.get("projection_dim", 512),
    )
  )


def load(directory: pathlib.Path, config: CNCLIPConfig) -> Weights:
  """Reads the weights, safetensors or `.bin`, in one file or in shards with an index.

  Returns:
    Nested dicts of float32 arrays as `convert.cnclip.from_torch`.

  Raises:
    ValueError: no weights, damaged ones, or all that differ from the config.
  """
  _, params, _ = abstract(config)
  shapes = {path: x.shape for path, x in flatten(params).items()}
  tensors = read_tensors(directory)
  try:
    tensors = rules.plain_names(tensors)
    flat = rules.from_torch(tensors, RULES, shapes=shapes, ignored=HF_IGNORED)
  except ValueError as error:
    raise ValueError(f"{directory}: {error}") from error
  return unflatten(flat), {}


def read_tensors(directory: pathlib.Path, *, verify: bool = True) -> dict[str, np.ndarray]:
  """Reads the tensors of any model that transformers saved, by name; `verify` as for a `.pt`.

  Raises:
    ValueError: there are none, or a file is damaged.
  """
  for name, read in (
    ("model.safetensors", safetensors_files.read),
    ("pytorch_model.bin", functools.partial(torch_files.load_state_dict, verify=verify)),
  ):
    if (directory / name).is_file():
      return read(directory / name)
    index = directory / f"{name}.index.json"
    if index.is_file():
      weights = json_files.read(index).get("weight_map")
      shards = set(weights.values()) if isinstance(weights, dict) else {None}
      # Only files of the folder itself: an index is anybody's text.
      if not all(isinstance(s, str) and pathlib.PurePath(s).name == s for s in shards):
        raise ValueError(f"{index}: expected an index of shards, found no names of files in it")
      return {k: v for shard in sorted(shards) for k, v in read(directory / shard).items()}
  raise ValueError(
    f"{directory}: expected model.safetensors or pytorch_model.bin, or an index of such, found none"
  )


def save(
  directory: pathlib.Path,
  config: CNCLIPConfig,
  params: Mapping[str, Any],
  *,
  context_length: int,
  vocab: pathlib.Path | None = None,
) -> None:
  """Writes a directory that `ChineseCLIPModel` and `ChineseCLIPProcessor` load.

  Args:
    directory: a new folder.
    config: sizes of a model with a ViT.
    params: nested dicts of float32 arrays.
    context_length: tokens of a text that the model was made for.
    vocab: the tokenizer's file; None is the released models'.

  Raises:
    ValueError: the model has a ResNet.
  """
  if not isinstance(config.vision, ViTConfig):
    raise ValueError(
      "Expected a model with a ViT: Hugging Face's ChineseCLIPModel has no ResNet; use --to=torch"
    )
  directory.mkdir(parents=True)
  tensors = rules.to_torch(flatten(params), RULES)
  safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
  shutil.copyfile(ChineseBertTokenizer(vocab).vocab, directory / "vocab.txt")
  size = config.vision.image_size
  _write(directory / "config.json", _config_to_json(config, float(params["logit_scale"])))
  _write(
    directory / "preprocessor_config.json",
    {
      "image_processor_type": "ChineseCLIPImageProcessor",
      "do_convert_rgb": True,
      "do_resize": True,
      "size": {"height": size, "width": size},
      "resample": 3,  # bicubic
      "do_center_crop": False,
      "do_rescale": True,
      "do_normalize": True,
      "image_mean": CLIP_MEAN,
      "image_std": CLIP_STD,
    },
  )
  _write(
    directory / "tokenizer_config.json",
    {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": context_length},
  )


def _config_to_json(config: CNCLIPConfig, logit_scale: float) -> dict[str, Any]:
  text = {name: getattr(config.text, ours) for name, (ours, _) in TEXT.items()}
  vision = {name: getattr(config.vision, ours) for name, (ours, _) in VISION.items()}
  towers = {"text_config": text, "vision_config": vision}
  for tower, name, value in FIXED:
    towers[tower][name] = value
  vision["num_attention_heads"] = config.vision.width // config.vision.head_width
  vision["intermediate_size"] = 4 * config.vision.width
  text["model_type"], vision["model_type"] = "chinese_clip_text_model", "chinese_clip_vision_model"
  return {
    "architectures": ["ChineseCLIPModel"],
    "model_type": MODEL_TYPE,
    "dtype": "float32",
    "projection_dim": config.embed_dim,
    "logit_scale_init_value": logit_scale,
    **towers,
  }


def _write(path: pathlib.Path, content: Any) -> None:
  path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
