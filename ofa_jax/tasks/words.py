"""The tokenizers of OFA's tasks: a folder of files, or those of a model.

Of a public model that was not downloaded yet only the tokenizer is, for the weights may be another
model's: what is fine-tuned has the tokenizer of what it was fine-tuned from.
"""

import functools
from pathlib import Path
from typing import Any

from ofa_jax import hub, staging, storage
from ofa_jax.convert import releases
from ofa_jax.files import at_home, room_for
from ofa_jax.tokenizers.ofa import LAYOUTS, OFATokenizer


@functools.cache
def load_tokenizer(name: str) -> OFATokenizer:
  """The tokenizer in a folder, or of a model, read once; ValueError where there is none."""
  return OFATokenizer.from_directory(tokenizer_folder(name))


def tokenizer_folder(name: str) -> Path:
  """Where the tokenizer's files are; ValueError where there are none."""
  folder = storage.of(name)
  if storage.is_dir(folder) and not storage.exists(folder / "config.json"):
    return staging.tokenizer_files(folder)
  release, root = hub.RELEASES.get(name), at_home(releases.ROOT)
  if release is not None and not (root / name).exists():
    part = _tokenizer_of(release)
    if part.files:
      with room_for(root):
        return releases.download(part, releases.folder_of(name, release, root)).parent
  source = hub.open_model(name)
  if source.files is None:
    return source.tokenizer  # raises what is missing
  return source.files


def _tokenizer_of(release: releases.Release) -> releases.Release:
  """The files of a release that are its tokenizer's."""
  known = {name for names in LAYOUTS.values() for name in names}
  kept = [i for i, file in enumerate(release.files) if file in known]
  addresses = tuple(release.addresses[i] for i in kept if release.addresses)
  return release._replace(files=tuple(release.files[i] for i in kept), addresses=addresses)


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
