"""Chinese-CLIP for `hub`: its releases, its files, and what they say besides the weights."""

import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from ofa_jax.convert import limits, torch_files
from ofa_jax.convert.cnclip import huggingface, model_config, positions
from ofa_jax.convert.cnclip import table as cnclip
from ofa_jax.convert.family import Family, HuggingFace, Tokenizers
from ofa_jax.convert.params import Weights
from ofa_jax.convert.releases import Release
from ofa_jax.models import cnclip as model
from ofa_jax.models.cnclip import CNCLIPConfig
from ofa_jax.tokenizers.bert import CONTEXT_LENGTH, ChineseBertTokenizer

SETTINGS: dict[str, Any] = {"context_length": CONTEXT_LENGTH}  # beside the sizes in config.json
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


def read_settings(described: Mapping[str, Any]) -> dict[str, Any]:
  """What a model directory's `config.json`, or the task of a run's, says besides the sizes."""
  return limits.check_settings({"context_length": described.get("context_length", CONTEXT_LENGTH)})


def infer(
  tensors: Mapping[str, np.ndarray], options: Mapping[str, Any]
) -> tuple[CNCLIPConfig, dict[str, Any]]:
  """Reads sizes and settings off a state dict; ValueError where they are not in it."""
  if torch_files.DESCRIBED in options:
    described = _described(options)
    return model_config.from_json(described), read_settings(described)
  return cnclip.infer_config(tensors), dict(SETTINGS)


def _described(options: Mapping[str, Any]) -> dict[str, Any]:
  """What `save_torch` has written beside the tensors."""
  try:
    return torch_files.described(options)
  except ValueError as error:
    raise ValueError(
      f"Expected the model's sizes as JSON under {torch_files.DESCRIBED!r}, found {error}; give "
      "them by python -m ofa_jax.convert --model-config=JSON"
    ) from error


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
  """Writes a checkpoint that the original loads.

  Where the tensors alone would be read as another model, with heads of 64 as the released ones
  have, or with other settings, it says so beside them.
  """
  tensors = cnclip.to_torch(*weights, config)
  described = {**model_config.to_json(config), **settings}
  if _is_inferred(tensors, config) and settings == SETTINGS:
    described = None
  torch_files.save_checkpoint(path, tensors, name=config.name or "ofa_jax", described=described)


def _is_inferred(tensors: Mapping[str, np.ndarray], config: CNCLIPConfig) -> bool:
  """Whether a model's tensors alone tell its sizes."""
  try:
    inferred = cnclip.infer_config(tensors)
  except ValueError:
    return False
  return (inferred.vision, inferred.text, inferred.embed_dim) == (
    config.vision,
    config.text,
    config.embed_dim,
  )


def save_huggingface(
  directory: pathlib.Path,
  config: CNCLIPConfig,
  weights: Weights,
  *,
  settings: Mapping[str, Any],
  files: pathlib.Path | None,
) -> None:
  """Writes a directory that transformers loads."""
  vocab = read_tokenizer(files, config).vocab
  huggingface.save(
    directory, config, weights[0], context_length=settings["context_length"], vocab=vocab
  )


def read_tokenizer(files: pathlib.Path | None, config: CNCLIPConfig) -> ChineseBertTokenizer:
  """The tokenizer of a folder; without one, that of the released models."""
  del config
  vocab = None if files is None else files / "vocab.txt"
  return ChineseBertTokenizer(vocab if vocab is not None and vocab.is_file() else None)


def save_tokenizer(
  files: pathlib.Path | None, directory: pathlib.Path, config: CNCLIPConfig
) -> dict[str, Any]:
  """Copies the tokenizer's files into a model directory; returns what its `config.json` says."""
  shutil.copyfile(read_tokenizer(files, config).vocab, directory / "vocab.txt")
  return {"tokenizer": "bert"}  # of vocab.txt


FAMILY = Family(
  name="cnclip",
  title="a Chinese-CLIP",
  paper="arXiv 2211.01335",
  config=CNCLIPConfig,
  marks=(r"visual\.", r"bert\."),
  settings=SETTINGS,
  read_settings=read_settings,
  to_json=model_config.to_json,
  from_json=model_config.from_json,
  infer=infer,
  from_torch=cnclip.from_torch,
  save_torch=save_torch,
  image_size=lambda config, settings: config.vision.image_size,
  card={
    "language": "zh",
    "pipeline_tag": "zero-shot-image-classification",
    "tags": ["chinese-clip", "image-text-retrieval"],
  },
  releases=RELEASES,
  released=lambda name: model.config(*model.MODELS[name]),
  huggingface=HuggingFace(
    model_type=huggingface.MODEL_TYPE,
    in_transformers=True,
    infer=infer_huggingface,
    load=load_huggingface,
    save=save_huggingface,
  ),
  # The package has the released vocabulary.
  tokenizers=Tokenizers(read=read_tokenizer, save=save_tokenizer, beside_weights=False),
  fitted=positions.fitted,
)
