"""Where models come from: the public names, the download, and the forms a model is stored in.

`open_model` takes any of them: a public name, a model directory, a run of `ofa_jax.train`, a
Hugging Face directory, or a `.pt` file. It reads the sizes first and the weights on demand, so that
they can go straight to where they are needed.

A model directory is what everything else reads and writes: `config.json`, which describes the model
in full, `params/` (Orbax), and the tokenizer's files. What differs between the families of models
is a `Family` of each (`FAMILIES`).
"""

import dataclasses
import difflib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from ofa_jax import checksums, staging, storage, trees
from ofa_jax.convert import json_files, limits, releases, torch_files
from ofa_jax.convert.families import FAMILIES, RELEASES, family_of, infer
from ofa_jax.convert.family import Family, explain, of_mixture
from ofa_jax.convert.params import ModelConfig, Weights, place, placement
from ofa_jax.engine import bucket_arrays, checkpoint, faults, step_name
from ofa_jax.engine.step import State
from ofa_jax.files import at_home, room_for, written_whole
from ofa_jax.models.abstract import abstract

FORMAT = 1
TOKENIZER = "tokenizer"  # the folder of an OFA's in a workdir
WEIGHTS = ("*.safetensors", "*.bin")  # of Hugging Face directories


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """A stored model whose weights are not read yet.

  Attributes:
    config: its sizes.
    load: `load(shardings=None)` reads the weights, see `load_directory`.
    form: "directory", "run", "huggingface", "torch" or "towers".
    settings: what it says besides the sizes, such as a Chinese-CLIP's "context_length".
    files: the folder of the tokenizer's files; None: there are none beside the model.
    stored: the files and folders that the weights are in, looked up when it is called.
  """

  config: ModelConfig
  load: Callable[..., Weights]
  form: str
  settings: Mapping[str, Any]
  files: pathlib.Path | None = None
  stored: Callable[[], list[pathlib.Path]] = list

  @property
  def family(self) -> Family:
    """Its family."""
    return family_of(self.config)

  @property
  def tokenizer(self) -> Any:
    """The model's tokenizer, read anew; ValueError where an OFA has none, or another's."""
    tokenizers = self.family.tokenizers
    if tokenizers is None:
      raise ValueError(f"Expected a model that reads text, found {self.family.title}")
    return tokenizers.read(self.files, self.config)

  @property
  def image_size(self) -> int:
    """Side in pixels of the images that it was trained with."""
    return self.family.image_size(self.config, self.settings)

  def with_tokenizer(self, folder: str | os.PathLike | None) -> "Source":
    """The same model with the tokenizer of a folder instead; None: its own.

    Raises:
      ValueError: there is none in the folder, or it is another model's.
    """
    if folder is None:
      return self
    source = dataclasses.replace(self, files=staging.tokenizer_files(at_home(folder)))
    source.tokenizer  # noqa: B018 - read here, so that it is told here
    return source


def config_of(name: str) -> ModelConfig:
  """Sizes of a model; those of a public name without its download, where that is possible."""
  return sizes_of(name)[0]


def sizes_of(name: str) -> tuple[ModelConfig, Mapping[str, Any]]:
  """Sizes of a model as `config_of` gives them, and its `Source.settings`."""
  for family in FAMILIES:
    if name in family.releases and family.released is not None:
      return family.released(name), family.settings
  source = open_model(name)
  return source.config, source.settings


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
      a run of `ofa_jax.train`, of which `W@STEP`, `W@best` and `W/checkpoints/STEP` are one
      checkpoint and W the newest; a Hugging Face directory; a `.pt` file.
    download_root: folder for downloads; None is `~/.cache/ofa_jax`.
    config: the sizes of a `.pt` file where they cannot be inferred.
    ema: of a `.pt` file take the moving average of the weights.
    source: where a public name is downloaded from, as for `releases.download`.

  Raises:
    ValueError: none of these, with near names; or the file's own faults.
  """
  path = at_home(name)
  if str(name) in RELEASES:
    root = at_home(download_root or releases.ROOT)
    with room_for(root):
      path = fetch(str(name), root, source=source)
  folder, which = step_name.split_step(str(path))
  if which is not None and storage.is_dir(folder):
    return _open_directory(storage.of(folder), which)
  if storage.is_dir(path):
    return _open_directory(path)
  if storage.is_file(path):
    return _open_torch(staging.local(path), config, ema=ema)
  near = difflib.get_close_matches(str(name), RELEASES, n=2)
  hint = f"; did you mean {' or '.join(near)}?" if near else ""
  pretrained = ", ".join(name for name, release in RELEASES.items() if not release.finetuned)
  raise ValueError(
    f"Expected a model's name ({pretrained}; ofa_jax.available_models() has the fine-tuned ones), "
    "a model directory, a Hugging Face directory or a .pt file; found "
    f"{str(name)!r}, which is none of them{hint}"
  )


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
  if path.suffix == ".pt":
    released = _open_torch(path, ema=RELEASES[name].finetuned and torch_files.holds_average(path))
  else:
    released = _open_directory(path.parent)
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
  return releases.download(release, releases.folder_of(name, release, root), source=source)


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
    "family": family.name,
    "format": FORMAT,
    **family.to_json(config),
    **family.settings,
    **(settings or {}),
  }
  faults.silence_echoes()
  with written_whole(directory) as made:
    made.mkdir()
    if family.tokenizers is not None:
      described |= family.tokenizers.save(files, made, config)
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
  source = _open_directory(storage.of(directory))
  return source.config, *source.load(shardings)


def _open_directory(path: pathlib.Path, which: str | None = None) -> Source:
  """A model in a folder; `which`: the checkpoint of a run, see `checkpoint.Checkpoints.find`."""
  file = path / "config.json"
  try:
    described = json_files.read(file)
  except FileNotFoundError:
    raise ValueError(
      f"{path}: expected a model directory, a Hugging Face directory or a run of ofa_jax.train, "
      "found no config.json in it"
    ) from None
  except ValueError as error:
    run = storage.is_dir(path / "checkpoints")
    cure = ". The command that trained this run writes it anew when started again" if run else ""
    raise ValueError(f"{error}{cure}") from error
  run = described.get("model") if isinstance(described.get("model"), dict) else {}
  if which is not None and not run:
    raise ValueError(
      f"{path}@{which}: expected a run of ofa_jax.train, which has steps, found none"
    )
  for family in FAMILIES:
    if described.get("family") == family.name:
      return _open_own(path, described, family)
    if family.huggingface and described.get("model_type") == family.huggingface.model_type:
      return _open_huggingface(staging.local_folder(path), described, family)
    if str(run.get("_class")).endswith(f".{family.config.__name__}"):
      return _open_run(path, described, family, which)
  says = {k: described[k] for k in ("family", "model_type", "name") if k in described}
  families, types, configs = (
    " or ".join(map(repr, values))
    for values in (
      [family.name for family in FAMILIES],
      [family.huggingface.model_type for family in FAMILIES if family.huggingface],
      [family.config.__name__ for family in FAMILIES],
    )
  )
  raise ValueError(
    f"{file}: expected family {families} (a model directory), model_type {types} (a Hugging Face "
    f"directory) or a run with a {configs}; found {says!s:.200}"
  )


def _open_own(path: pathlib.Path, described: Mapping[str, Any], family: Family) -> Source:
  if described.get("format") != FORMAT:
    raise ValueError(
      f"{path}: expected format {FORMAT}, found {described.get('format')!r:.80}; it was written by "
      "another version of ofa_jax"
    )
  config = explain(path, family.from_json, described)

  def load(shardings=None):
    _, *expected = abstract(config)
    target = jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      tuple(expected),
      placement(expected, shardings),
    )
    target = dict(zip(("params", "rest"), target, strict=True))
    stored = bucket_arrays.path_of(path) / "params"
    checksums.verify(path, under=("params/",))
    with bucket_arrays.reader() as checkpointer:
      metadata = faults.readable(stored, checkpointer.metadata, stored).item_metadata
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
      arrays = faults.readable(stored, checkpointer.restore, stored, target)
    return arrays["params"], arrays["rest"]

  return Source(
    config=config,
    load=load,
    form="directory",
    settings=family.read_settings(described),
    files=staging.tokenizer_files(path),
    stored=lambda: [path / "config.json", path / "params"],
  )


def _open_huggingface(path: pathlib.Path, described: Mapping[str, Any], family: Family) -> Source:
  config, settings = explain(path, family.huggingface.infer, path, described)

  def load(shardings=None):
    checksums.verify(path)  # of a folder that `ofa_jax.convert` has written
    return place(*family.huggingface.load(path, config), shardings)

  return Source(
    config=config,
    load=load,
    form="huggingface",
    settings=settings,
    files=path,
    stored=lambda: [path / "config.json", *sorted(x for s in WEIGHTS for x in path.glob(s))],
  )


def _open_run(
  path: pathlib.Path, described: Mapping[str, Any], family: Family, which: str | None
) -> Source:
  config = explain(path, family.from_json, described["model"])
  task = of_mixture(explain(path, limits.section, described, "task"))
  if which is not None:  # else what is there is seen when it is read, for a run may be under way
    with checkpoint.open_run(str(path)) as checkpoints:
      which = str(checkpoints.find(which))

  def load(shardings=None):
    _, *expected = abstract(config)
    shapes, places = (
      State(step=None, params=params, opt=None, rest=rest, ema=None, bad=None)
      for params, rest in (expected, placement(expected, shardings))
    )
    _, params, rest = checkpoint.open_weights(
      str(path), abstract=shapes, shardings=places, which=which
    )
    return params, rest

  def stored():
    step = which
    if step is None:
      with checkpoint.open_run(str(path)) as checkpoints:
        step = checkpoints.find(None)
    return [path / "config.json", path / "checkpoints" / str(step)]

  return Source(
    config=config,
    load=load,
    form="run",
    settings=family.read_settings(task),
    files=_files_of_run(path, task.get("tokenizer")),
    stored=stored,
  )


def _files_of_run(path: pathlib.Path, tokenizer: str | None) -> pathlib.Path | None:
  """The folder of a run's tokenizer.

  Args:
    path: its workdir, which holds one since runs keep theirs.
    tokenizer: what its task says: a folder, or a model that has one. None: it needs none.
  """
  own = staging.tokenizer_files(path / TOKENIZER)
  if not isinstance(tokenizer, str | None):
    raise ValueError(
      f"{path}: expected the folder of a tokenizer, found {type(tokenizer).__name__}"
    )
  if tokenizer is None or own.is_dir():
    return own if own.is_dir() else None
  if storage.is_dir(tokenizer) and not storage.exists(storage.of(tokenizer) / "config.json"):
    return staging.tokenizer_files(storage.of(tokenizer))
  try:
    return open_model(tokenizer).files
  except ValueError:  # moved, or of another machine: the weights are still to be had
    return own


def _open_torch(
  path: pathlib.Path, config: ModelConfig | None = None, *, ema: bool = False
) -> Source:
  if config is None:
    family, config, settings = infer(path, ema=ema)
  else:
    family = family_of(config)
    settings = family.settings

  def load(shardings=None):
    # Read again: tensors kept since the sizes were read would stand beside the converted ones.
    tensors = torch_files.load_state_dict(path, ema=ema)
    weights = explain(path, family.from_torch, tensors, config)
    del tensors
    return place(*weights, shardings)

  beside = family.tokenizers is not None and family.tokenizers.beside_weights
  files = path.parent if beside else None
  beside = {"settings": settings, "files": files, "stored": lambda: [path]}
  return Source(config=config, load=load, form="torch", **beside)
