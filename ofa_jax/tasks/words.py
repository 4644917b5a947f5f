"""The tokenizers of OFA's tasks: a folder of files, or those of a model."""

import functools
from pathlib import Path
from typing import Any

from ofa_jax import hub, staging, storage
from ofa_jax.tokenizers.ofa import OFATokenizer


@functools.cache
def load_tokenizer(name: str) -> OFATokenizer:
  """The tokenizer in a folder, or of a model, read once; ValueError where there is none."""
  return OFATokenizer.from_directory(tokenizer_folder(name))


def tokenizer_folder(name: str) -> Path:
  """Where the tokenizer's files are; ValueError where there are none."""
  folder = storage.of(name)
  if storage.is_dir(folder) and not storage.exists(folder / "config.json"):
    return staging.tokenizer_files(folder)
  source = hub.open_model(name)
  if source.files is None:
    return source.tokenizer  # raises what is missing
  return source.files


def check_tokenizer(tokenizer: str, config: Any) -> list[str]:
  """Faults of a tokenizer in a folder that show without data, one line each."""
  if not storage.is_dir(tokenizer):  # a model's, and models are opened with the data
    return []
  try:
    words = load_tokenizer(tokenizer).vocab_size
  except ValueError as e:
    return [f"task.tokenizer: {e}"]
  if words == config.model.vocab_size:
    return []
  return [f"model.vocab_size: expected the {words} of {tokenizer}, found {config.model.vocab_size}"]
