"""The weights that training starts from: of a model that is stored, or of parts of others."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import jax

from ofa_jax import staging, storage, trees
from ofa_jax.convert import torch_files
from ofa_jax.convert.cnclip import family as cnclip_family
from ofa_jax.convert.cnclip import huggingface, towers
from ofa_jax.convert.cnclip import table as cnclip
from ofa_jax.convert.family import explain
from ofa_jax.convert.ofa import released
from ofa_jax.convert.ofa import table as ofa
from ofa_jax.convert.params import ModelConfig, place
from ofa_jax.engine import step
from ofa_jax.hub import RELEASES, Source, family_of, open_model
from ofa_jax.models.abstract import abstract
from ofa_jax.models.cnclip import CNCLIPConfig
from ofa_jax.models.ofa import OFAConfig
from ofa_jax.trees import Tree


def from_scratch(model: ModelConfig, *, seed: int, warn: Callable[[str], None]) -> str:
  """A phrase for weights that are drawn; `warn` is told where trained ones of the model are public.

  Args:
    model: that is trained.
    seed: that they are drawn by.
    warn: takes a line.
  """
  if isinstance(model, OFAConfig) and model.vocab_size == released.CHINESE_WORDS:
    named = {f"OFA-CN-{model.name}"}
  else:
    name = getattr(model, "name", "")  # a model of one's own needs none
    named = {name.partition("@")[0], f"OFA-{name}"}
  for name in named & RELEASES.keys():
    warn(
      f"All weights are drawn at random, though those of {name} are public: --config.init={name} "
      "or the path of a copy starts from them, which takes far less data and time"
    )
  return f"from scratch, seed {seed}"


def open_start(
  name: str | os.PathLike,
  *,
  config: ModelConfig,
  seed: int,
  download_root: str | os.PathLike | None = None,
  say: Callable[[str], None] = lambda line: None,
) -> Source:
  """Finds the weights that a model starts training from.

  An OFA may start from one that lacks parts of it, such as adapters or new tokens, and from BART's
  `.pt`; see `Family.complete`. Other models start from the same one only.

  Args:
    name: as for `open_model`.
    config: the model that is trained.
    seed: draws what is new.
    download_root: as for `open_model`.
    say: takes a line on each part that is not the stored one, when the weights are loaded.

  Raises:
    ValueError: as `open_model`; the weights are of other sizes.
  """
  family = family_of(config)
  if family.complete is None:
    return open_model(name, download_root=download_root)
  in_bucket = storage.in_bucket(name)
  path = staging.local(name) if in_bucket and storage.is_file(name) else storage.of(name)
  if storage.is_file(path):
    form, settings, files = "torch", family.settings, path.parent
    read = functools.partial(torch_files.load_state_dict, path)
  else:
    stored = open_model(name, download_root=download_root)
    if stored.family is not family:
      raise ValueError(
        f"{name}: expected {family.title} to start from, found {stored.family.title}"
      )
    if not trees.difference(abstract(config)[1:], abstract(stored.config)[1:]):
      return dataclasses.replace(stored, config=config)
    form, settings, files = stored.form, stored.settings, stored.files

    def read():
      return ofa.to_torch(*jax.device_get(stored.load()), stored.config)

  def load(shardings=None):
    complete = functools.partial(family.complete, seed=seed, say=say)
    tensors = explain(path, complete, read(), config)
    return place(*explain(path, family.from_torch, tensors, config), shardings)

  return Source(config=config, load=load, form=form, settings=settings, files=files)


def fitted(source: Source, config: ModelConfig) -> tuple[Source, list[str]]:
  """The same model for images and texts of the sizes that another config has.

  Returns:
    The model, and a line on each parameter that changes; whatever else differs stays as it is.
  """
  family = source.family
  if family.fitted is None or family_of(config) is not family:
    return source, []
  return family.fitted(source, config)


def open_towers(
  clip: str | os.PathLike,
  bert: str | os.PathLike,
  *,
  config: CNCLIPConfig | None = None,
) -> Source:
  """Starts a Chinese-CLIP from an OpenAI CLIP's image tower and a BERT, as the original's training.

  Args:
    clip: OpenAI's file (TorchScript) or the state dict in it.
    bert: a Hugging Face directory of a BERT, or its `pytorch_model.bin`.
    config: the sizes where they cannot be inferred; positions are interpolated to its image size.

  Raises:
    ValueError: a tower is missing, or not of these sizes.
  """
  clip = staging.local(clip)
  bert = staging.local_folder(bert) if storage.is_dir(bert) else staging.local(bert)

  def read():
    read_bert = huggingface.read_tensors if bert.is_dir() else torch_files.load_state_dict
    return towers.merge(torch_files.load_state_dict(clip), read_bert(bert), config=config)

  def load(shardings=None):
    return place(*explain(clip, cnclip.from_torch, *read()), shardings)

  _, config = read()
  return Source(config=config, load=load, form="towers", settings=cnclip_family.FAMILY.settings)


class Loaded(NamedTuple):
  """Weights that were stored, laid out for a program.

  Attributes:
    params, rest: nested dicts of arrays.
    absent: paths of the parameters that were not stored.
    resized: a line on each that was made for another image size or text length.
    changed: a line on each part of an OFA that is not the stored one: drawn anew, left out.
  """

  params: Tree
  rest: Tree
  absent: list[str]
  resized: list[str]
  changed: list[str]


def load_weights(program: step.Program, name: str, *, initial: Tree | None = None) -> Loaded:
  """The weights of a stored model.

  Args:
    program: from `step.build`.
    name: whatever `hub.open_model` takes: a run or a step of it, a model directory, a released
      name, a file; also of another image size, see `fitted`.
    initial: parameters of a fresh model that starts training from it. What the stored one lacks and
      the config's model calls optional is taken from these; of an OFA see `open_start`.
      None: all must be there.

  Raises:
    ValueError: there is no such model, or it has other parameters than the config's; all of them.
  """
  config = program.config
  changed: list[str] = []
  if initial is None:
    source = open_model(name)
  else:
    source = open_start(name, config=config.model, seed=config.seed, say=changed.append)
  source, resized = fitted(source, config.model)
  _, params, rest = abstract(source.config)
  wanted, stored = trees.flatten(program.abstract.params), trees.flatten(params)
  may = () if initial is None else getattr(config.model, "optional", ())
  absent = [p for p in wanted if p not in stored and any(re.search(o, p) for o in may)]
  lines = trees.difference({p: x for p, x in wanted.items() if p not in absent}, stored)
  lines += trees.difference(program.abstract.rest, rest)
  if lines:
    raise ValueError(
      f"{name} is not of this config, {len(lines)} differences:\n  "
      + "\n  ".join(lines[:20])
      + "\nChange config.model, or take other weights."
    )
  places = {p: s for p, s in trees.flatten(program.shardings.params).items() if p in stored}
  params, rest = source.load((trees.unflatten(places), program.shardings.rest))
  if absent:
    fresh = trees.flatten(initial)
    params = trees.unflatten(trees.flatten(params) | {p: fresh[p] for p in absent})
  return Loaded(params, rest, absent, resized, changed)
