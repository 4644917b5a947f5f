"""OFA for `hub`: its releases, its files, and what they say besides the weights."""

import json
import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from ofa_jax.convert import huggingface, limits, ofa, ofa_sizes, rules, torch_files
from ofa_jax.convert.params import Weights
from ofa_jax.convert.releases import Release
from ofa_jax.models.ofa import SIZES, OFAConfig
from ofa_jax.tokenizers.ofa import LAYOUTS, OFATokenizer

NAME, TITLE, CONFIG = "ofa", "an OFA", OFAConfig
MODEL_TYPE = "ofa"
SETTINGS: dict[str, Any] = ofa_sizes.settings({})  # beside the sizes in config.json
FILES_BESIDE_WEIGHTS = True  # of the tokenizer, in the folder of a .pt
# What a page on the Hugging Face Hub says of any such model.
CARD: dict[str, Any] = {"pipeline_tag": "image-to-text", "tags": ["ofa", "image-captioning"]}
PAPER = "arXiv 2202.03052"
RELEASES: dict[str, Release] = {
  f"OFA-{size}": Release(
    f"OFA-Sys/OFA-{size}", ("pytorch_model.bin", "config.json", *LAYOUTS["huggingface"])
  )
  for size in SIZES
}

to_json, from_json = ofa_sizes.to_json, ofa_sizes.from_json
from_torch = ofa.from_torch


def is_state_dict(names: Iterable[str]) -> bool:
  """Whether a state dict with these names is one of this family, as far as a glance tells."""
  return any(
    name.startswith(("encoder.", "decoder.")) for name in rules.plain_names(dict.fromkeys(names))
  )


def settings(described: Mapping[str, Any]) -> dict[str, Any]:
  """What a model directory's `config.json`, or the task of a run's, says besides the sizes."""
  return limits.check_settings(
    {name: described.get(name, default) for name, default in SETTINGS.items()}
  )


def infer(
  tensors: Mapping[str, np.ndarray], options: Mapping[str, Any]
) -> tuple[OFAConfig, dict[str, Any]]:
  """Reads sizes and settings off a state dict and the options beside it.

  Raises:
    ValueError: it is no OFA, or one with parts that this model has not.
  """
  return ofa_sizes.infer_config(tensors, options), ofa_sizes.settings(options)


def infer_huggingface(
  directory: pathlib.Path, described: Mapping[str, Any]
) -> tuple[OFAConfig, dict[str, Any]]:
  """Reads sizes and settings of a Hugging Face directory; ValueError if it is of another model."""
  return infer(huggingface.read_tensors(directory, verify=False), described)


def load_huggingface(directory: pathlib.Path, config: OFAConfig) -> Weights:
  """Reads its weights as nested dicts of NumPy arrays; ValueError if they are not the config's."""
  return ofa.from_torch(huggingface.read_tensors(directory), config)


def save_torch(
  path: pathlib.Path, config: OFAConfig, weights: Weights, *, settings: Mapping[str, Any]
) -> None:
  """Writes a checkpoint that the original loads."""
  options = ofa_sizes.to_options(config, settings)
  torch_files.save_fairseq(path, ofa.to_torch(*weights, config), options=options)


def save_huggingface(
  directory: pathlib.Path,
  config: OFAConfig,
  weights: Weights,
  *,
  settings: Mapping[str, Any],
  files: pathlib.Path | None,
) -> None:
  """Writes a directory as the `OFA-Sys/OFA-*` repositories are, with safetensors.

  Raises:
    ValueError: the model has parts that transformers' OFA has not.
  """
  del settings
  directory.mkdir(parents=True)
  tensors = ofa.to_huggingface(ofa.to_torch(*weights, config))
  safetensors.numpy.save_file(
    {name: x for name, x in tensors.items() if name not in ofa.TIED},
    directory / "model.safetensors",
    metadata={"format": "pt"},
  )
  described = ofa_sizes.to_huggingface(config)
  (directory / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
  save_tokenizer(files, directory)


def read_tokenizer(files: pathlib.Path | None) -> OFATokenizer:
  """The tokenizer of a folder.

  Raises:
    ValueError: there are no such files beside the model.
  """
  if files is None:
    raise ValueError(
      "Expected the files of OFA's tokenizer beside the model, found none; put "
      + " or ".join(", ".join(names) for names in LAYOUTS.values())
      + " into its folder"
    )
  return OFATokenizer.from_directory(files)


def save_tokenizer(files: pathlib.Path | None, directory: pathlib.Path) -> dict[str, Any]:
  """Copies the tokenizer's files into a model directory; returns what its `config.json` says."""
  for kind, names in LAYOUTS.items():
    paths = [files / name for name in names] if files else []
    if paths and all(path.is_file() for path in paths):
      for path in paths:
        shutil.copyfile(path, directory / path.name)
      return {"tokenizer": {"kind": kind}}
  return {"tokenizer": None}
