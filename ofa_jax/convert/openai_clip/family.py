"""OpenAI's CLIP for `hub`: its files, and its tokenizer."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ofa_jax.convert import torch_files
from ofa_jax.convert.family import Family, HuggingFace, Tokenizers
from ofa_jax.convert.openai_clip import huggingface, table
from ofa_jax.convert.params import Weights
from ofa_jax.models.openai_clip import OpenAICLIPConfig
from ofa_jax.tokenizers.clip import FILE, CLIPTokenizer


def infer(
  tensors: Mapping[str, np.ndarray], options: Mapping[str, Any]
) -> tuple[OpenAICLIPConfig, dict[str, Any]]:
  """Reads the sizes off a state dict; ValueError where they are not in it."""
  del options
  return table.infer_config(tensors), {}


def infer_huggingface(
  directory: pathlib.Path, described: Mapping[str, Any]
) -> tuple[OpenAICLIPConfig, dict[str, Any]]:
  """Reads the sizes of a Hugging Face directory; ValueError if it is of another model."""
  del directory
  return huggingface.config_from_json(described), {}


def save_torch(
  path: pathlib.Path, config: OpenAICLIPConfig, weights: Weights, *, settings: Mapping[str, Any]
) -> None:
  """Writes a state dict that the original's `clip.load` takes, in float32."""
  del settings
  torch_files.save_state_dict(path, table.to_torch(weights, config))


def save_huggingface(
  directory: pathlib.Path,
  config: OpenAICLIPConfig,
  weights: Weights,
  *,
  settings: Mapping[str, Any],
  files: pathlib.Path | None,
) -> None:
  """Writes a directory that transformers loads."""
  del settings
  huggingface.save(directory, config, weights, tokenizer=read_tokenizer(files, config))


def read_tokenizer(files: pathlib.Path | None, config: OpenAICLIPConfig) -> CLIPTokenizer:
  """The tokenizer of a folder; without one, that of the released models.

  Raises:
    ValueError: it is of another vocabulary than the model.
  """
  merges = None if files is None or not (files / FILE).is_file() else files / FILE
  tokenizer = CLIPTokenizer(merges)
  if tokenizer.vocab_size != config.text.vocab_size:
    raise ValueError(
      f"{merges or 'The released tokenizer'}: expected merges of the model's "
      f"{config.text.vocab_size} tokens, found {tokenizer.vocab_size}; put the model's own {FILE} "
      "into its folder, or name that folder by --tokenizer=DIR"
    )
  return tokenizer


def save_tokenizer(
  files: pathlib.Path | None, directory: pathlib.Path, config: OpenAICLIPConfig
) -> dict[str, Any]:
  """Copies the tokenizer's file into a model directory; returns what its `config.json` says."""
  tokenizer = read_tokenizer(files, config)
  (directory / FILE).write_bytes(tokenizer.merges.read_bytes())
  return {"tokenizer": "clip"}  # of merges.txt


FAMILY = Family(
  name="openai_clip",
  title="an OpenAI CLIP",
  paper="arXiv 2103.00020",
  config=OpenAICLIPConfig,
  marks=(r"visual\.", r"transformer\.resblocks\.\d+\.", r"token_embedding\.weight$"),
  settings={},
  read_settings=lambda described: {},
  to_json=dataclasses.asdict,
  from_json=table.from_json,
  infer=infer,
  from_torch=table.from_torch,
  save_torch=save_torch,
  image_size=lambda config, settings: config.vision.image_size,
  card={"language": "en", "pipeline_tag": "zero-shot-image-classification", "tags": ["clip"]},
  huggingface=HuggingFace(
    model_type=huggingface.MODEL_TYPE,
    in_transformers=True,
    infer=infer_huggingface,
    load=huggingface.load,
    save=save_huggingface,
  ),
  tokenizers=Tokenizers(read=read_tokenizer, save=save_tokenizer, beside_weights=False),
)
