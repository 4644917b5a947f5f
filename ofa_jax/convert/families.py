"""All families of models, and which of them a checkpoint is of."""

import pathlib
from typing import Any

from ofa_jax.convert import inception, patches, torch_files, vqgan
from ofa_jax.convert.cnclip import family as cnclip_family
from ofa_jax.convert.family import Family, explain, guess
from ofa_jax.convert.ofa import family as ofa_family
from ofa_jax.convert.openai_clip import family as openai_clip_family
from ofa_jax.convert.params import ModelConfig
from ofa_jax.convert.releases import Release

FAMILIES: tuple[Family, ...] = (
  cnclip_family.FAMILY,
  ofa_family.FAMILY,
  openai_clip_family.FAMILY,
  vqgan.FAMILY,
  inception.FAMILY,
  patches.FAMILY,
)
RELEASES: dict[str, Release] = {
  name: release for family in FAMILIES for name, release in family.releases.items()
}


def family_of(config: ModelConfig) -> Family:
  """The family that a config is of."""
  return next(family for family in FAMILIES if isinstance(config, family.config))


def infer(path: pathlib.Path, *, ema: bool) -> tuple[Family, ModelConfig, dict[str, Any]]:
  """The family, sizes and settings of a PyTorch file, and of what belongs to it in its folder.

  Raises:
    ValueError: it is of no family; or the file's own faults.
  """
  tensors = torch_files.load_state_dict(path, ema=ema, verify=False)
  for family in FAMILIES:
    if family.wrote(tensors):
      options = torch_files.load_options(path)
      options |= {} if family.beside is None else family.beside(path.parent)
      return family, *explain(path, family.infer, tensors, options)
  raise ValueError(
    f"{path}: expected the tensors of {' or '.join(f.title for f in FAMILIES)}, found "
    + (guess(tensors) or f"{len(tensors)} others, first {list(tensors)[:3]}")
  )
