"""Where models come from: the public names, the download, and the forms a model is stored in.

`open_model` takes any of them: a public name, a model directory, a run of `ofa_jax.train`, a
Hugging Face directory, or a `.pt` file. It reads the sizes first and the weights on demand, so that
they can go straight to where they are needed.

A model directory is what everything else reads and writes: `config.json`, which describes the model
in full, `params/` (Orbax), and the tokenizer's `vocab.txt`.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from ofa_jax import checkpoint, trees
from ofa_jax.convert import cnclip as convert
from ofa_jax.convert import huggingface, model_config, torch_files, towers
from ofa_jax.convert.files import written_whole
from ofa_jax.convert.params import Weights, abstract, place, placement
from ofa_jax.models.cnclip import CNCLIPConfig
from ofa_jax.step import State
from ofa_jax.tokenizers.bert import CONTEXT_LENGTH, ChineseBertTokenizer

FAMILY, FORMAT = "cnclip", 1


class Release(NamedTuple):
  """A released file on the Hugging Face Hub."""

  repo: str
  file: str


RELEASES: dict[str, Release] = {
  "ViT-B-16": Release("OFA-Sys/chinese-clip-vit-base-patch16", "clip_cn_vit-b-16.pt"),
  "ViT-L-14": Release("OFA-Sys/chinese-clip-vit-large-patch14", "clip_cn_vit-l-14.pt"),
  "ViT-L-14-336": Release(
    "OFA-Sys/chinese-clip-vit-large-patch14-336px", "clip_cn_vit-l-14-336.pt"
  ),
  "ViT-H-14": Release("OFA-Sys/chinese-clip-vit-huge-patch14", "clip_cn_vit-h-14.pt"),
  "RN50": Release("OFA-Sys/chinese-clip-rn50", "clip_cn_rn50.pt"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """A stored model whose weights are not read yet.

  Attributes:
    config: its sizes.
    load: `load(shardings=None)` reads the weights, see `load_directory`.
    context_length: tokens of a text that it was made for.
    vocab: the tokenizer's file; None is the released models'.
    form: "directory", "run", "huggingface", "torch" or "towers".
  """

  config: CNCLIPConfig
  load: Callable[..., Weights]
  form: str
  context_length: int = CONTEXT_LENGTH
  vocab: pathlib.Path | None = None


def open_model(
  name: str | os.PathLike,
  *,
  download_root: str | os.PathLike | None = None,
  config: CNCLIPConfig | None = None,
) -> Source:
  """Finds a model and reads its sizes.

  Args:
    name: a public name, which is downloaded and converted once; a model directory; the workdir of
      a run of `ofa_jax.train`; a Hugging Face directory of a `ChineseCLIPModel`; a `.pt` file.
    download_root: folder for downloads; None is `~/.cache/ofa_jax`.
    config: the sizes of a `.pt` file whose number of heads cannot be inferred.

  Raises:
    ValueError: none of these, with near names; or the file's own faults.
  """
  path = pathlib.Path(name)
  if str(name) in RELEASES:
    root = pathlib.Path(download_root or pathlib.Path.home() / ".cache" / "ofa_jax")
    path = fetch(str(name), root)
  if path.is_dir():
    return _open_directory(path)
  if path.is_file():
    return _open_torch(path, config)
  near = difflib.get_close_matches(str(name), RELEASES, n=2)
  hint = f"; did you mean {' or '.join(near)}?" if near else ""
  raise ValueError(
    f"Expected a model's name ({', '.join(RELEASES)}), a model directory, a Hugging Face "
    f"directory or a .pt file; found {str(name)!r}, which is none of them{hint}"
  )


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
    return place(*_explain(clip, convert.from_torch, *read()), shardings)

  _, config = read()
  return Source(config=config, load=load, form="towers")


def fetch(name: str, root: pathlib.Path) -> pathlib.Path:
  """Returns the model directory `root/name`; the first call downloads and converts.

  The released file stays beside it, under the name that the original gives it, and one that is
  there already is used.

  Raises:
    ValueError: PyTorch, which reads the released files, is missing; the download is damaged.
  """
  directory = root / name
  if directory.exists():
    return directory
  source = _open_torch(download(name, root), None)
  try:
    save_directory(directory, source.config, *source.load())
  except ValueError:
    if not directory.exists():  # else another process was faster
      raise
  return directory


def download(name: str, root: pathlib.Path) -> pathlib.Path:
  """Returns the released file of a model in `root`, downloaded if it is not there.

  A download that was cut short goes on where it ended. The file is compared with the SHA-256 that
  the hub keeps of it.

  Raises:
    ValueError: the hub cannot be reached; the file is not the one on the hub and was removed.
  """
  repo, file = RELEASES[name]
  path = root / file
  if path.is_file():
    return path
  import huggingface_hub  # half a second that other uses need not wait for

  try:
    (info,) = huggingface_hub.HfApi().get_paths_info(repo, [file])
    huggingface_hub.hf_hub_download(repo, file, local_dir=root)
  except Exception as error:  # of the system or of whichever HTTP library is under it
    raise ValueError(
      f"Expected to download {file} from {repo}, found: {error}. Start again to go on where it "
      f"ended, or put https://huggingface.co/{repo}/resolve/main/{file} into {root} yourself."
    ) from error
  with path.open("rb") as content:
    found = hashlib.file_digest(content, "sha256").hexdigest()
  if info.lfs is not None and found != info.lfs.sha256:
    path.unlink()
    raise ValueError(
      f"{path}: expected SHA-256 {info.lfs.sha256}, found {found}; the damaged file was removed, "
      "start again"
    )
  return path


def save_directory(
  directory: str | os.PathLike,
  config: CNCLIPConfig,
  params: Mapping[str, Any],
  rest: Mapping[str, Any],
  *,
  context_length: int = CONTEXT_LENGTH,
  vocab: pathlib.Path | None = None,
) -> None:
  """Writes a model directory, which appears whole or not at all.

  Args:
    directory: a new folder.
    config: the model's sizes.
    params, rest: nested dicts of arrays; JAX's take less memory on the way than NumPy's.
    context_length: tokens of a text that the model was made for.
    vocab: the tokenizer's file; None is the released models'.

  Raises:
    ValueError: the folder is there already.
  """
  described = {
    "family": FAMILY,
    "format": FORMAT,
    **model_config.to_json(config),
    "context_length": context_length,
    "tokenizer": "bert",  # of vocab.txt
  }
  with written_whole(directory) as made:
    made.mkdir()
    shutil.copyfile(ChineseBertTokenizer(vocab).vocab, made / "vocab.txt")
    (made / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(made / "params", {"params": params, "rest": rest})


def load_directory(
  directory: str | os.PathLike, *, shardings: Any = None
) -> tuple[CNCLIPConfig, dict[str, Any], dict[str, Any]]:
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
    described = json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise ValueError(
      f"{path}: expected a model directory, a Hugging Face directory or a run of ofa_jax.train, "
      "found no config.json in it"
    ) from None
  except ValueError as error:
    raise ValueError(f"{file}: expected JSON, found: {error}") from error
  if not isinstance(described, dict):
    raise ValueError(f"{file}: expected a JSON object, found {type(described).__name__}")
  if described.get("family") == FAMILY:
    return _open_own(path, described)
  if described.get("model_type") == huggingface.MODEL_TYPE:
    return _open_huggingface(path, described)
  if str(described.get("model", {}).get("_class")).endswith(".CNCLIPConfig"):
    return _open_run(path, described)
  found = {k: described[k] for k in ("family", "model_type", "name") if k in described}
  raise ValueError(
    f"{file}: expected family {FAMILY!r} (a model directory), model_type "
    f"{huggingface.MODEL_TYPE!r} (a Hugging Face directory) or a run with a CNCLIPConfig; "
    f"found {found}"
  )


def _open_own(path: pathlib.Path, described: Mapping[str, Any]) -> Source:
  if described.get("format") != FORMAT:
    raise ValueError(
      f"{path}: expected format {FORMAT}, found {described.get('format')!r}; it was written by "
      "another version of ofa_jax"
    )
  config = _explain(path, model_config.from_json, described)

  def load(shardings=None):
    _, *expected = abstract(config)
    target = jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      tuple(expected),
      placement(expected, shardings),
    )
    target = dict(zip(("params", "rest"), target, strict=True))
    stored = path.resolve() / "params"
    with ocp.StandardCheckpointer() as checkpointer:
      problems = trees.difference(target, checkpointer.metadata(stored).item_metadata.tree)
      if problems:
        raise ValueError(
          f"{stored}: expected the parameters of config.json, found {len(problems)} differences\n  "
          + "\n  ".join(problems[:20])
        )
      found = checkpointer.restore(stored, target)
    return found["params"], found["rest"]

  return Source(
    config=config,
    load=load,
    form="directory",
    context_length=described.get("context_length", CONTEXT_LENGTH),
    vocab=path / "vocab.txt",
  )


def _open_huggingface(path: pathlib.Path, described: Mapping[str, Any]) -> Source:
  config = _explain(path, huggingface.config_from_json, described)
  vocab = path / "vocab.txt"

  def load(shardings=None):
    return place(*huggingface.load(path, config), shardings)

  return Source(
    config=config, load=load, form="huggingface", vocab=vocab if vocab.is_file() else None
  )


def _open_run(path: pathlib.Path, described: Mapping[str, Any]) -> Source:
  config = _explain(path, model_config.from_json, described["model"])

  def load(shardings=None):
    _, *expected = abstract(config)
    shapes, places = (
      State(step=None, params=params, opt=None, rest=rest, ema=None, bad=None)
      for params, rest in (expected, placement(expected, shardings))
    )
    _, params, rest = checkpoint.open_weights(str(path), abstract=shapes, shardings=places)
    return params, rest

  context_length = described.get("task", {}).get("context_length", CONTEXT_LENGTH)
  return Source(config=config, load=load, form="run", context_length=context_length)


def _open_torch(path: pathlib.Path, config: CNCLIPConfig | None) -> Source:
  if config is None:
    config = _explain(path, convert.infer_config, torch_files.load_state_dict(path))

  def load(shardings=None):
    # Read again: tensors kept since the sizes were read would stand beside the converted ones.
    tensors = torch_files.load_state_dict(path)
    weights = _explain(path, convert.from_torch, tensors, config)
    del tensors
    return place(*weights, shardings)

  return Source(config=config, load=load, form="torch")


def _explain(path: pathlib.Path, function: Callable[..., Any], *args: Any) -> Any:
  """Calls a function and puts the file's name before what it complains of."""
  try:
    return function(*args)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
