"""OFA for `hub`: its releases, its files, and what they say besides the weights."""

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from ofa_jax.convert import limits, torch_files
from ofa_jax.convert.cnclip import huggingface
from ofa_jax.convert.family import Family, HuggingFace, Tokenizers, learns_captions
from ofa_jax.convert.ofa import released
from ofa_jax.convert.ofa import sizes as ofa_sizes
from ofa_jax.convert.ofa import start as ofa_start
from ofa_jax.convert.ofa import table as ofa
from ofa_jax.convert.params import Weights
from ofa_jax.data import images
from ofa_jax.models.ofa.model import OFAConfig
from ofa_jax.tokenizers.ofa import LAYOUTS, OFATokenizer

SETTINGS: dict[str, Any] = ofa_sizes.settings({})  # beside the sizes in config.json


def read_settings(described: Mapping[str, Any]) -> dict[str, Any]:
  """What a model directory's `config.json`, or the task of a run's, says besides the sizes.

  A run's says by its "pixel_mean" what its pixels are normalised with; one that learnt captions, by
  its "search" how they are searched for.
  """
  settings = {name: described.get(name, default) for name, default in SETTINGS.items()}
  mean = described.get("pixel_mean")
  if mean is not None and "imagenet_normalization" not in described:
    settings["imagenet_normalization"] = mean == list(images.IMAGENET_MEAN)
  search = described.get("search")
  if isinstance(search, Mapping) and learns_captions(described):
    known = {name: search.get(name) for name in ofa_sizes.GENERATION.values()}
    settings["generation"] = {k: v for k, v in known.items() if isinstance(v, int | float)}
  return limits.check_settings(settings)


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
  directory.mkdir(parents=True)
  tensors = ofa.to_huggingface(ofa.to_torch(*weights, config))
  safetensors.numpy.save_file(
    {name: x for name, x in tensors.items() if name not in ofa.TIED},
    directory / "model.safetensors",
    metadata={"format": "pt"},
  )
  described = ofa_sizes.to_huggingface(config, settings)
  (directory / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
  save_tokenizer(files, directory, config)


def read_tokenizer(files: pathlib.Path | None, config: OFAConfig) -> OFATokenizer:
  """The tokenizer of a folder.

  Raises:
    ValueError: there are no such files beside the model, or they are another model's.
  """
  if files is None or _files_in(files) is None:
    raise ValueError(
      "Expected the files of OFA's tokenizer beside the model, found none"
      + (f" in {files}" if files else "")
      + "; put "
      + " or ".join(", ".join(names) for names in LAYOUTS.values())
      + " into its folder, or name a folder that has them: --tokenizer=DIR of the commands, "
      "tokenizer= of load_from_name"
    )
  tokenizer = OFATokenizer.from_directory(files)
  if tokenizer.vocab_size != config.vocab_size:
    raise ValueError(
      f"{files}: expected a dictionary of the model's {config.vocab_size} symbols, found "
      f"{tokenizer.vocab_size}; it is another model's. Name the right one by --tokenizer=DIR or "
      "tokenizer=, or take these files out of the model's folder"
    )
  return tokenizer


def save_tokenizer(
  files: pathlib.Path | None, directory: pathlib.Path, config: OFAConfig
) -> dict[str, Any]:
  """Copies the tokenizer's files into a model directory; returns what its `config.json` says.

  Raises:
    ValueError: it is another model's.
  """
  kind = None if files is None else _files_in(files)
  if kind is None:
    return {"tokenizer": None}
  read_tokenizer(files, config)
  for name in LAYOUTS[kind]:
    shutil.copyfile(files / name, directory / name)
  return {"tokenizer": {"kind": kind}}


def _files_in(folder: pathlib.Path) -> str | None:
  """The layout of the tokenizer's files in a folder; None: there are none, or not all of them."""
  for kind, names in LAYOUTS.items():
    if all((folder / name).is_file() for name in names):
      return kind
  return None


FAMILY = Family(
  name="ofa",
  title="an OFA",
  paper="arXiv 2202.03052",
  config=OFAConfig,
  marks=(r"encoder\.token_rel_pos_table_list\.", r"decoder\.cross_pos_q_linear\."),
  settings=SETTINGS,
  read_settings=read_settings,
  to_json=ofa_sizes.to_json,
  from_json=ofa_sizes.from_json,
  infer=infer,
  from_torch=ofa.from_torch,
  save_torch=save_torch,
  image_size=lambda config, settings: settings["image_size"],
  card={"pipeline_tag": "image-to-text", "tags": ["ofa", "image-captioning"]},
  releases=released.RELEASES,
  huggingface=HuggingFace(
    model_type="ofa",
    in_transformers=False,
    infer=infer_huggingface,
    load=load_huggingface,
    save=save_huggingface,
  ),
  tokenizers=Tokenizers(read=read_tokenizer, save=save_tokenizer, beside_weights=True),
  complete=ofa_start.complete,
)
