"""Chinese-CLIP for `hub`: its releases, its files, and what they say besides the weights."""

import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ofa_jax.convert import cnclip, huggingface, limits, model_config, rules, torch_files
from ofa_jax.convert.params import Weights
from ofa_jax.convert.releases import Release
from ofa_jax.models.cnclip import CNCLIPConfig
from ofa_jax.tokenizers.bert import CONTEXT_LENGTH, ChineseBertTokenizer

NAME, TITLE, CONFIG = "cnclip", "a Chinese-CLIP", CNCLIPConfig
MODEL_TYPE = huggingface.MODEL_TYPE
SETTINGS: dict[str, Any] = {"context_length": CONTEXT_LENGTH}  # beside the sizes in config.json
FILES_BESIDE_WEIGHTS = False  # the package has the released vocabulary
# What a page on the Hugging Face Hub says of any such model.
CARD: dict[str, Any] = {
  "language": "zh",
  "pipeline_tag": "zero-shot-image-classification",
  "tags": ["chinese-clip", "image-text-retrieval"],
}
PAPER = "arXiv 2211.01335"
_FILES = {
  "ViT-B-16": ("chinese-clip-vit-base-patch16", "clip_cn_vit-b-16.pt"),
  "ViT-L-14": ("chinese-clip-vit-large-patch14", "clip_cn_vit-l-14.pt"),
  "ViT-L-14-336": ("chinese-clip-vit-large-patch14-336px", "clip_cn_vit-l-14-336.pt"),
  "ViT-H-14": ("chinese-clip-vit-huge-patch14", "clip_cn_vit-h-14.pt"),
  "RN50": ("chinese-clip-rn50", "clip_cn_rn50.pt"),
}
RELEASES: dict[str, Release] = {
  name: Release(f"OFA-Sys/{repo}", (file,), modelscope=f"AI-ModelScope/{repo}")
  for name, (repo, file) in _FILES.items()
}

to_json, from_json = model_config.to_json, model_config.from_json
from_torch = cnclip.from_torch


def is_state_dict(names: Iterable[str]) -> bool:
  """Whether a state dict with these names is one of this family, as far as a glance tells."""
  plain = rules.plain_names(dict.fromkeys(names))
  return any(name.startswith(("visual.", "bert.")) for name in plain)


def settings(described: Mapping[str, Any]) -> dict[str, Any]:
  """What a model directory's `config.json`, or the task of a run's, says besides the sizes."""
  return limits.check_settings({"context_length": described.get("context_length", CONTEXT_LENGTH)})


def infer(
  tensors: Mapping[str, np.ndarray], options: Mapping[str, Any]
) -> tuple[CNCLIPConfig, dict[str, Any]]:
  """Reads sizes and settings off a state dict; ValueError where they are not in it."""
  del options
  return cnclip.infer_config(tensors), dict(SETTINGS)


def infer_huggingface(
  directory: pathlib.Path, described: Mapping[str, Any]
) -> tuple[CNCLIPConfig, dict[str, Any]]:
  """Reads sizes and settings of a Hugging Face directory; ValueError if it is of another model."""
  del directory
  return huggingface.config_from_json(described), dict(SETTINGS)


def load_huggingface(directory: pathlib.Path, config: CNCLIPConfig) -> Weights:
  """Reads its weights as nested dicts of NumPy arrays; ValueError if they are not the config's."""
  return huggingface.load(directory, config)


def save_torch(
  path: pathlib.Path, config: CNCLIPConfig, weights: Weights, *, settings: Mapping[str, Any]
) -> None:
  """Writes a checkpoint that the original loads."""
  del settings
  tensors = cnclip.to_torch(*weights, config)
  torch_files.save_checkpoint(path, tensors, name=config.name or "ofa_jax")


def save_huggingface(
  directory: pathlib.Path,
  config: CNCLIPConfig,
  weights: Weights,
  *,
  settings: Mapping[str, Any],
  files: pathlib.Path | None,
) -> None:
  """Writes a directory that transformers loads."""
  vocab = read_tokenizer(files).vocab
  huggingface.save(
    directory, config, weights[0], context_length=settings["context_length"], vocab=vocab
  )


def read_tokenizer(files: pathlib.Path | None) -> ChineseBertTokenizer:
  """The tokenizer of a folder; without one, that of the released models."""
  vocab = None if files is None else files / "vocab.txt"
  return ChineseBertTokenizer(vocab if vocab is not None and vocab.is_file() else None)


def save_tokenizer(files: pathlib.Path | None, directory: pathlib.Path) -> dict[str, Any]:
  """Copies the tokenizer's files into a model directory; returns what its `config.json` says."""
  shutil.copyfile(read_tokenizer(files).vocab, directory / "vocab.txt")
  return {"tokenizer": "bert"}  # of vocab.txt
