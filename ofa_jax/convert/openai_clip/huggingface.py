"""OpenAI's CLIP as Hugging Face's `CLIPModel`: a directory in and out, without transformers."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import safetensors.numpy

from ofa_jax.convert import limits, rules, tables
from ofa_jax.convert.cnclip.huggingface import VISION, VISION_RULES, layer_rules, read_tensors
from ofa_jax.convert.openai_clip.table import name_of
from ofa_jax.convert.params import Weights
from ofa_jax.convert.rules import SAME, Rule, norm_rules
from ofa_jax.data.images import CLIP_MEAN, CLIP_STD
from ofa_jax.models.openai_clip import CLIPTextConfig, OpenAICLIPConfig
from ofa_jax.models.vit import ViTConfig
from ofa_jax.tokenizers.clip import END, FILE, START, CLIPTokenizer

MODEL_TYPE = "clip"

RULES: tuple[Rule, ...] = (
  *VISION_RULES,
  ("text_model.embeddings.token_embedding.weight", "text/token/embedding", SAME),
  ("text_model.embeddings.position_embedding.weight", "text/positional_embedding", SAME),
  *layer_rules(r"text_model.encoder.layers.(\d+)", "text/blocks"),
  *norm_rules("text_model.final_layer_norm", "text/ln_final"),
)
IGNORED: tuple[tuple[str, str], ...] = (
  (r"\.embeddings\.position_ids$", "the numbers 0, 1, 2, ..., which old versions stored"),
)

# Field -> (ours, transformers' default, which its files leave out).
TEXT = {
  "vocab_size": ("vocab_size", 49408),
  "hidden_size": ("width", 512),
  "num_hidden_layers": ("layers", 12),
  "num_attention_heads": ("heads", 8),
  "max_position_embeddings": ("max_positions", 77),
}
# What the model is built with; another value would be another model.
FIXED = (("hidden_act", "quick_gelu"), ("layer_norm_eps", 1e-5))


def config_from_json(described: Mapping[str, Any]) -> OpenAICLIPConfig:
  """Reads the sizes from a `config.json`.

  Raises:
    ValueError: all settings that this model does not have.
  """
  towers = {tower: limits.section(described, f"{tower}_config") for tower in ("text", "vision")}
  problems = [
    f"{tower}_config.{name}: expected {value!r}, found {fields[name]!r:.80}"
    for tower, fields in towers.items()
    for name, value in FIXED
    if fields.get(name, value) != value
  ]
  text = {ours: towers["text"].get(name, default) for name, (ours, default) in TEXT.items()}
  vision = {ours: towers["vision"].get(name, default) for name, (ours, default) in VISION.items()}
  heads = towers["vision"].get("num_attention_heads", 12)
  for tower, width, number, default in (
    ("text", text["width"], text["heads"], 2048),
    ("vision", vision["width"], heads, 3072),
  ):
    if not (type(width) is int and type(number) is int and width > 0 and number > 0):
      problems.append(f"{tower}_config: expected hidden_size and num_attention_heads above 0")
    elif width % number or towers[tower].get("intermediate_size", default) != 4 * width:
      problems.append(
        f"{tower}_config: expected hidden_size {width} to be a multiple of {number} heads, and "
        f"intermediate_size to be {4 * width}"
      )
  if problems:
    raise ValueError("config.json is not of an OpenAI CLIP: " + "; ".join(problems))
  config = OpenAICLIPConfig(
    vision=ViTConfig(head_width=vision["width"] // heads, **vision),
    text=CLIPTextConfig(**text),
    embed_dim=described.get("projection_dim", 512),
  )
  limits.check(config)
  config.name = name_of(config)
  return config


def load(directory: pathlib.Path, config: OpenAICLIPConfig) -> Weights:
  """Reads the weights, NumPy; ValueError for none, damaged ones, or all that are not the config's.

  Files and shards are those that `read_tensors` reads.
  """
  try:
    tensors = rules.plain_names(read_tensors(directory))
    return tables.from_torch(tensors, config, table=RULES, ignored=IGNORED)
  except ValueError as error:
    raise ValueError(f"{directory}: {error}") from error


def save(
  directory: pathlib.Path,
  config: OpenAICLIPConfig,
  weights: Weights,
  *,
  tokenizer: CLIPTokenizer,
) -> None:
  """Writes a directory that `CLIPModel` and `CLIPProcessor` load.

  Args:
    directory: a new folder.
    config: sizes of a model with a ViT.
    weights: nested dicts of float32 arrays.
    tokenizer: the model's.

  Raises:
    ValueError: the model has a ResNet.
  """
  if not isinstance(config.vision, ViTConfig):
    raise ValueError(
      "Expected a model with a ViT: Hugging Face's CLIPModel has no ResNet; use --to=torch"
    )
  directory.mkdir(parents=True)
  tensors = tables.to_torch(weights, table=RULES)
  safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
  size = config.vision.image_size
  described = {
    "config.json": _config_to_json(config, float(weights[0]["logit_scale"]), tokenizer),
    "preprocessor_config.json": {
      "image_processor_type": "CLIPImageProcessor",
      "do_convert_rgb": True,
      "do_resize": True,
      "size": {"shortest_edge": size},
      "resample": 3,  # bicubic
      "do_center_crop": True,
      "crop_size": {"height": size, "width": size},
      "do_rescale": True,
      "do_normalize": True,
      "image_mean": CLIP_MEAN,
      "image_std": CLIP_STD,
    },
    "tokenizer_config.json": {
      "tokenizer_class": "CLIPTokenizer",
      "do_lower_case": True,
      "bos_token": START,
      "eos_token": END,
      "unk_token": END,
      "pad_token": END,
      "model_max_length": config.text.max_positions,
    },
    "vocab.json": tokenizer.vocab,
  }
  for name, content in described.items():
    text = json.dumps(content, indent=None if name == "vocab.json" else 2, ensure_ascii=False)
    (directory / name).write_text(text + "\n", encoding="utf-8")
  (directory / FILE).write_bytes(tokenizer.merges.read_bytes())


def _config_to_json(
  config: OpenAICLIPConfig, logit_scale: float, tokenizer: CLIPTokenizer
) -> dict[str, Any]:
  text = {name: getattr(config.text, ours) for name, (ours, _) in TEXT.items()}
  vision = {name: getattr(config.vision, ours) for name, (ours, _) in VISION.items()}
  for fields, width in ((text, config.text.width), (vision, config.vision.width)):
    fields |= {**dict(FIXED), "intermediate_size": 4 * width, "projection_dim": config.embed_dim}
  vision["num_attention_heads"] = config.vision.width // config.vision.head_width
  text |= {
    "model_type": "clip_text_model",
    "bos_token_id": tokenizer.start,
    # By its place it finds the end of a text; behind it no token counts.
    "eos_token_id": tokenizer.end,
    "pad_token_id": tokenizer.end,
  }
  return {
    "architectures": ["CLIPModel"],
    "model_type": MODEL_TYPE,
    "dtype": "float32",
    "projection_dim": config.embed_dim,
    "logit_scale_init_value": logit_scale,
    "text_config": text,
    "vision_config": {**vision, "model_type": "clip_vision_model"},
  }
