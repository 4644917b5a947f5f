"""Where models come from: the public names, the download, and the forms a model is stored in.

`open_model` takes any of them: a public name, a model directory, a run of `ofa_jax.train`, a
Hugging Face directory, or a `.pt` file. It reads the sizes first and the weights on demand, so that
they can go straight to where they are needed.

A model directory is what everything else reads and writes: `config.json`, which describes the model
in full, `params/` (Orbax), and the tokenizer's files. What differs between the families of models
is in one module for each, with the same names (`FAMILIES`).
"""

import dataclasses
import difflib
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax
import orbax.checkpoint as ocp

from ofa_jax import checkpoint, checksums, trees
from ofa_jax.convert import (
  cnclip,
  cnclip_family,
  huggingface,
  json_files,
  limits,
  ofa,
  ofa_family,
  ofa_start,
  releases,
  torch_files,
  towers,
)
from ofa_jax.convert.files import written_whole
from ofa_jax.convert.params import ModelConfig, Weights, abstract, place, placement
from ofa_jax.convert.releases import Release
from ofa_jax.models.cnclip import CNCLIPConfig
from ofa_jax.models.ofa import OFAConfig
from ofa_jax.step import State

FORMAT = 1
FAMILIES: dict[str, ModuleType] = {family.NAME: family for family in (cnclip_family, ofa_family)}
RELEASES: dict[str, Release] = {
  name: release for family in FAMILIES.values() for name, release in family.RELEASES.items()
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """A stored model whose weights are not read yet.

  Attributes:
    config: its sizes.
    load: `load(shardings=None)` reads the weights, see `load_directory`.
    form: "directory", "run", "huggingface", "torch" or "towers".
    settings: what it says besides the sizes, such as a Chinese-CLIP's "context_length".
    files: the folder of the tokenizer's files; None: there are none beside the model.
  """

  config: ModelConfig
  load: Callable[..., Weights]
  form: str
  settings: Mapping[str, Any]
  files: pathlib.Path | None = None

  @property
  def family(self) -> ModuleType:
    """The module of its family."""
    return family_of(self.config)

  @property
  def tokenizer(self) -> Any:
    """The model's tokenizer, read anew; ValueError where an OFA's files are missing."""
    return self.family.read_tokenizer(self.files)

  @property
  def image_size(self) -> int:
    """Side in pixels of the images that it was trained with."""
    if isinstance(self.config, CNCLIPConfig):
      return self.config.vision.image_size
    return self.settings["image_size"]


def family_of(config: ModelConfig) -> ModuleType:
  """The module of the family that a config is of."""
  return next(family for family in FAMILIES.values() if isinstance(config, family.CONFIG))


def open_model(
  name: str | os.PathLike,
  *,
  download_root: str | os.PathLike | None = None,
  config: ModelConfig | None = None,
  ema: bool = False,
  source: str | None = None,
) -> Source:
  """Finds a model and reads its sizes.

  Args:
    name: a public name, which is downloaded and converted once; a model directory; the workdir of
      a run of `ofa_jax.train`; a Hugging Face directory; a `.pt` file.
    download_root: folder for downloads; None is `~/.cache/ofa_jax`.
    config: the sizes of a `.pt` file where they cannot be inferred.
    ema: of a `.pt` file take the moving average of the weights.
    source: where a public name is downloaded from, as for `releases.download`.

  Raises:
    ValueError: none of these, with near names; or the file's own faults.
  """
  path = pathlib.Path(name)
  if str(name) in RELEASES:
    root = pathlib.Path(download_root or pathlib.Path.home() / ".cache" / "ofa_jax")
    path = fetch(str(name), root, source=source)
  if path.is_dir():
    return _open_directory(path)
  if path.is_file():
    return _open_torch(path, config, ema=ema)
  near = difflib.get_close_matches(str(name), RELEASES, n=2)
  hint = f"; did you mean {' or '.join(near)}?" if near else ""
  raise ValueError(
    f"Expected a model's name ({', '.join(RELEASES)}), a model directory, a Hugging Face "
    f"directory or a .pt file; found {str(name)!r}, which is none of them{hint}"
  )


def open_start(
  name: str | os.PathLike,
  *,
  config: ModelConfig,
  seed: int,
  download_root: str | os.PathLike | None = None,
) -> Source:
  """Finds the weights that a model starts training from.

  An OFA may start from one that lacks parts of it, such as adapters or new tokens, and from BART's
  `.pt`; see `ofa_start.complete`. Other models start from the same one only.

  Args:
    name: as for `open_model`.
    config: the model that is trained.
    seed: draws what is new.
    download_root: as for `open_model`.

  Raises:
    ValueError: as `open_model`; the weights are of other sizes.
  """
  if not isinstance(config, OFAConfig):
    return open_model(name, download_root=download_root)
  path = pathlib.Path(name)
  if path.is_file():
    form, settings, files = "torch", ofa_family.SETTINGS, path.parent
    read = functools.partial(torch_files.load_state_dict, path)
  else:
    stored = open_model(name, download_root=download_root)
    if not isinstance(stored.config, OFAConfig):
      raise ValueError(f"{name}: expected an OFA to start from, found a Chinese-CLIP")
    if not trees.difference(abstract(config)[1:], abstract(stored.config)[1:]):
      return dataclasses.replace(stored, config=config)
    form, settings, files = stored.form, stored.settings, stored.files

    def read():
      return ofa.to_torch(*jax.device_get(stored.load()), stored.config)

  def load(shardings=None):
    complete = functools.partial(ofa_start.complete, seed=seed)
    tensors = _explain(path, complete, read(), config)
    return place(*_explain(path, ofa.from_torch, tensors, config), shardings)

  return Source(config=config, load=load, form=form, settings=settings, files=files)


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
  clip, bert = pathlib.Path(clip), pathlib.Path(bert)

  def read():
    read_bert = huggingface.read_tensors if bert.is_dir() else torch_files.load_state_dict
    return towers.merge(torch_files.load_state_dict(clip), read_bert(bert), config=config)

  def load(shardings=None):
    return place(*_explain(clip, cnclip.from_torch, *read()), shardings)

  _, config = read()
  return Source(config=config, load=load, form="towers", settings=cnclip_family.SETTINGS)


def fetch(name: str, root: pathlib.Path, *, source: str | None = None) -> pathlib.Path:
  """Returns the model directory `root/name`; the first call downloads and converts.

  The released files stay beside it, and those that are there already are used.

  Raises:
    ValueError: as `download`; the file is damaged.
  """
  directory = root / name
  if directory.exists():
    return directory
  path = download(name, root, source=source)
  released = _open_torch(path) if len(RELEASES[name].files) == 1 else _open_directory(path.parent)
  stored = {"settings": released.settings, "files": released.files}
  try:
    save_directory(directory, released.config, *released.load(), **stored)
  except ValueError:
    if not directory.exists():  # else another process was faster
      raise
  return directory


def download(name: str, root: pathlib.Path, *, source: str | None = None) -> pathlib.Path:
  """Returns the file of a released model's weights in `root`, downloaded if it is not there.

  It is in `root` itself under the name that the original gives it; of a model that is several files
  all are downloaded, to the folder `<name>-released`.

  Raises:
    ValueError: as `releases.download`, which takes `source`.
  """
  release = RELEASES[name]
  folder = root if len(release.files) == 1 else root / f"{name}-released"
  return releases.download(release, folder, source=source)


def save_directory(
  directory: str | os.PathLike,
  config: ModelConfig,
  params: Mapping[str, Any],
  rest: Mapping[str, Any],
  *,
  settings: Mapping[str, Any] | None = None,
  files: pathlib.Path | None = None,
) -> None:
  """Writes a model directory, which appears whole or not at all.

  Args:
    directory: a new folder.
    config: the model's sizes.
    params, rest: nested dicts of arrays; JAX's take less memory on the way than NumPy's.
    settings: as `Source.settings`; what is left out is as in the released models.
    files: the folder of the tokenizer's files; None: a Chinese-CLIP gets the released models'.

  Raises:
    ValueError: the folder is there already.
  """
  family = family_of(config)
  described = {
    "family": family.NAME,
    "format": FORMAT,
    **family.to_json(config),
    **family.SETTINGS,
    **(settings or {}),
  }
  with written_whole(directory) as made:
    made.mkdir()
    described |= family.save_tokenizer(files, made)
    (made / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(made / "params", {"params": params, "rest": rest})
    checksums.write(made)


def load_directory(
  directory: str | os.PathLike, *, shardings: Any = None
) -> tuple[ModelConfig, dict[str, Any], dict[str, Any]]:
  """Reads a model directory.

  Args:
    directory: as `save_directory` writes it.
    shardings: where the arrays go: one sharding for all, or (params, rest) trees of them; None is
      this process's first device.

  Returns:
    The sizes, and nested dicts of float32 arrays: the parameters and BatchNorm's statistics.

  Raises:
    ValueError: no model directory, or its parameters are not those of its `config.json`.
  """
  source = _open_directory(pathlib.Path(directory))
  return source.config, *source.load(shardings)


def _open_directory(path: pathlib.Path) -> Source:
  file = path / "config.json"
  try:
    described = json_files.read(file)
  except FileNotFoundError:
    raise ValueError(
      f"{path}: expected a model directory, a Hugging Face directory or a run of ofa_jax.train, "
      "found no config.json in it"
    ) from None
  run = described.get("model") if isinstance(described.get("model"), dict) else {}
  for family in FAMILIES.values():
    if described.get("family") == family.NAME:
      return _open_own(path, described, family)
    if described.get("model_type") == family.MODEL_TYPE:
      return _open_huggingface(path, described, family)
    if str(run.get("_class")).endswith(f".{family.CONFIG.__name__}"):
      return _open_run(path, described, family)
  found = {k: described[k] for k in ("family", "model_type", "name") if k in described}
  families, types, configs = (
    " or ".join(repr(getattr(value, "__name__", value)) for value in values)
    for values in zip(*((f.NAME, f.MODEL_TYPE, f.CONFIG) for f in FAMILIES.values()), strict=True)
  )
  raise ValueError(
    f"{file}: expected family {families} (a model directory), model_type {types} (a Hugging Face "
    f"directory) or a run with a {configs}; found {found!s:.200}"
  )


def _open_own(path: pathlib.Path, described: Mapping[str, Any], family: ModuleType) -> Source:
  if described.get("format") != FORMAT:
    raise ValueError(
      f"{path}: expected format {FORMAT}, found {described.get('format')!r:.80}; it was written by "
      "another version of ofa_jax"
    )
  config = _explain(path, family.from_json, described)

  def load(shardings=None):
    _, *expected = abstract(config)
    target = jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      tuple(expected),
      placement(expected, shardings),
    )
    target = dict(zip(("params", "rest"), target, strict=True))
    stored = path.resolve() / "params"
    checksums.verify(path, under=("params/",))
    with ocp.StandardCheckpointer() as checkpointer:
      metadata = _whole(stored, checkpointer.metadata, stored).item_metadata
      if metadata is None or metadata.tree is None:
        raise ValueError(f"{stored}: expected the parameters, found no checkpoint of them")
      problems = trees.difference(target, metadata.tree)
      if problems:
        raise ValueError(
          f"{stored}: expected the parameters of config.json, found {len(problems)} differences\n  "
          + "\n  ".join(problems[:20])
        )
      # After the differences, which tell more of a config.json that was edited.
      checksums.verify(path, but=("params/",))
      found = _whole(stored, checkpointer.restore, stored, target)
    return found["params"], found["rest"]

  return Source(
    config=config, load=load, form="directory", settings=family.settings(described), files=path
  )


def _open_huggingface(
  path: pathlib.Path, described: Mapping[str, Any], family: ModuleType
) -> Source:
  config, settings = _explain(path, family.infer_huggingface, path, described)

  def load(shardings=None):
    return place(*family.load_huggingface(path, config), shardings)

  return Source(config=config, load=load, form="huggingface", settings=settings, files=path)


def _open_run(path: pathlib.Path, described: Mapping[str, Any], family: ModuleType) -> Source:
  config = _explain(path, family.from_json, described["model"])
  task = _explain(path, limits.section, described, "task")

  def load(shardings=None):
    _, *expected = abstract(config)
    shapes, places = (
      State(step=None, params=params, opt=None, rest=rest, ema=None, bad=None)
      for params, rest in (expected, placement(expected, shardings))
    )
    _, params, rest = checkpoint.open_weights(str(path), abstract=shapes, shardings=places)
    return params, rest

  files = task.get("tokenizer")  # a folder, or a model that has one
  if not isinstance(files, str | None):
    raise ValueError(f"{path}: expected the folder of a tokenizer, found {type(files).__name__}")
  if files is not None:
    files = pathlib.Path(files) if pathlib.Path(files).is_dir() else open_model(files).files
  return Source(config=config, load=load, form="run", settings=family.settings(task), files=files)


def _open_torch(
  path: pathlib.Path, config: ModelConfig | None = None, *, ema: bool = False
) -> Source:
  if config is None:
    family, config, settings = _infer(path, ema=ema)
  else:
    family = family_of(config)
    settings = family.SETTINGS

  def load(shardings=None):
    # Read again: tensors kept since the sizes were read would stand beside the converted ones.
    tensors = torch_files.load_state_dict(path, ema=ema)
    weights = _explain(path, family.from_torch, tensors, config)
    del tensors
    return place(*weights, shardings)

  files = path.parent if family.FILES_BESIDE_WEIGHTS else None
  return Source(config=config, load=load, form="torch", settings=settings, files=files)


def _infer(path: pathlib.Path, *, ema: bool) -> tuple[ModuleType, ModelConfig, dict[str, Any]]:
  """The family, sizes and settings of a PyTorch file."""
  tensors = torch_files.load_state_dict(path, ema=ema, verify=False)
  for family in FAMILIES.values():
    if family.is_state_dict(tensors):
      options = torch_files.load_options(path)
      return family, *_explain(path, family.infer, tensors, options)
  raise ValueError(
    f"{path}: expected the tensors of {' or '.join(f.TITLE for f in FAMILIES.values())}, found "
    f"{len(tensors)} others, first {list(tensors)[:3]}"
  )


def _whole(path: pathlib.Path, function: Callable[..., Any], *args: Any) -> Any:
  """Calls a function of Orbax, which raises anything on damaged files."""
  try:
    return function(*args)
  except Exception as error:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise ValueError(
      f"{path}: expected the parameters of a model, found files that cannot be read "
      f"({reason:.200}); get the folder again"
    ) from error


def _explain(path: pathlib.Path, function: Callable[..., Any], *args: Any) -> Any:
  """Calls a function and puts the file's name before what it complains of."""
  try:
    return function(*args)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
