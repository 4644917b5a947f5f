"""PyTorch's files, read without PyTorch: the tensors by name, and the options beside them.

This is the only place where a pickle is opened, and never one that runs code (`torch_pickle`).
Tensors are memory-mapped, so that reading a file costs no memory until a tensor is looked at. Only
writing such files needs PyTorch.
"""

import argparse
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ofa_jax.convert import file_kinds, json_files, safetensors_files
from ofa_jax.convert.torch_archive import Archive
from ofa_jax.convert.torch_constructors import RefusedError, TensorView, Unsupported

INSTALL = "PyTorch writes .pt files; install it with: pip install torch"
DESCRIBED = "ofa_jax"  # where a checkpoint says what its tensors do not tell


def load_state_dict(
  path: str | pathlib.Path, *, ema: bool = False, verify: bool = True
) -> dict[str, np.ndarray]:
  """Reads the tensors of a file by name, as read-only views of the file.

  Takes a state dict, a training checkpoint that holds one under "state_dict" or, as fairseq's,
  "model" (its optimizer is not looked at), a TorchScript archive such as OpenAI's CLIP files, or a
  safetensors file whatever its name.

  Args:
    path: the file.
    ema: read the moving average that fairseq keeps of the weights, in float32 if it has that.
    verify: compare the checksums of the tensors with those in the file; without it only names,
      shapes and dtypes should be used. The format of PyTorch before 1.6 has none.

  Raises:
    ValueError: the file is damaged or no PyTorch file, holds no tensors or no average, or such as
      NumPy has not (sparse, quantised, complex, of 8 bits); its pickle asks for more than tensors,
      NumPy scalars and options.
  """
  path = pathlib.Path(path)
  if _is_safetensors(path):
    return safetensors_files.read(path)
  archive = _open(path)
  content = archive.content
  named = content if isinstance(content, Mapping) else {}
  for key in ("state_dict", "model"):
    if isinstance(named.get(key), Mapping):
      named = named[key]
      break
  if ema:
    named = {**named, **_average(path, content)}
  views = {str(k): v for k, v in named.items() if isinstance(v, TensorView | Unsupported)}
  if not views:
    names = sorted(str(k)[:40] for k in named)[:5] or type(content).__name__
    raise ValueError(
      f'{path}: expected tensors by name, or such under "state_dict" or "model"; found {names}'
    )
  others = [f"{name} is {v.kind}" for name, v in views.items() if isinstance(v, Unsupported)]
  if others:
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    raise ValueError(
      f"{path}: expected dense tensors of 16 to 64 bits, found that {', '.join(others[:3])}{more}; "
      "convert them with PyTorch (.to_dense(), .dequantize(), .float()) and save the file again"
    )
  try:
    return archive.tensors(views, verify=verify)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def load_options(path: str | pathlib.Path) -> dict[str, Any]:
  """Reads the options that a fairseq checkpoint was trained with, by name.

  They are under "cfg", in sections of which the model's count most, or in an old `args`. Others
  have none, but for what `save_checkpoint` was told: it is JSON under the name `DESCRIBED`. What is
  nested deeper than numbers and texts by name is left out: of two tuples in each other a file may
  make one that no memory could show.

  Raises:
    ValueError: as `load_state_dict`.
  """
  path = pathlib.Path(path)
  content = {} if _is_safetensors(path) else _open(path).content
  if not isinstance(content, Mapping):
    return {}
  sections = content.get("cfg")
  sections = sections if isinstance(sections, Mapping) else {}
  merged = {}
  for options in (sections.get("task"), sections.get("model"), content.get("args")):
    options = vars(options) if isinstance(options, argparse.Namespace) else options
    merged |= options if isinstance(options, Mapping) else {}
  merged |= {DESCRIBED: content[DESCRIBED]} if DESCRIBED in content else {}
  return {name: value for name, value in merged.items() if _is_flat(value)}


def described(options: Mapping[str, Any]) -> dict[str, Any]:
  """What a file says of itself by `described=`, out of its options; {} where it says nothing.

  Raises:
    ValueError: it is no JSON object.
  """
  text = options.get(DESCRIBED, "{}")
  if not isinstance(text, str):
    raise ValueError(f"{type(text).__name__} in place of JSON")
  return json_files.parse(text.encode("utf-8", "surrogatepass"))


def holds_average(path: str | pathlib.Path) -> bool:
  """Whether a file has a moving average of the weights, which `load_state_dict` reads by `ema`.

  Raises:
    ValueError: as `load_state_dict`.
  """
  path = pathlib.Path(path)
  return not _is_safetensors(path) and bool(_average_in(_open(path).content))


def save_checkpoint(
  path: str | pathlib.Path,
  state_dict: Mapping[str, np.ndarray],
  *,
  name: str,
  epoch: int = 0,
  step: int = 0,
  described: Mapping[str, Any] | None = None,
) -> None:
  """Writes a checkpoint as the original's training does, without an optimizer.

  Args:
    path: the new file.
    state_dict: arrays by name, in the released files' naming; every name gets `module.` before it.
    name: the experiment's name, which the original's scripts print.
    epoch, step: how long it was trained, which they print too.
    described: JSON of what the tensors do not tell, which `load_options` gives back; the original
      passes it over.

  Raises:
    ValueError: PyTorch is missing.
  """
  torch = _torch()
  tensors = {f"module.{k}": torch.from_numpy(v) for k, v in state_dict.items()}
  content = {"epoch": epoch, "step": step, "name": name, "state_dict": tensors}
  if described is not None:
    content[DESCRIBED] = json.dumps(described)
  with open(path, "wb") as file:  # of a path PyTorch would not say why it cannot be written
    torch.save(content, file)


def save_state_dict(
  path: str | pathlib.Path,
  state_dict: Mapping[str, np.ndarray],
  *,
  under: str | None = None,
  described: Mapping[str, Any] | None = None,
) -> None:
  """Writes tensors by name, and nothing else that another reader would have to pass over.

  Args:
    path: the new file.
    state_dict: arrays by name.
    under: the key that the reader looks for, such as "state_dict"; None: the tensors alone.
    described: JSON of what the tensors do not tell, which `load_options` gives back; only `under`
      a key.

  Raises:
    ValueError: PyTorch is missing.
  """
  torch = _torch()
  content = {name: torch.from_numpy(x) for name, x in state_dict.items()}
  if under is not None:
    content = {under: content}
    if described is not None:
      content[DESCRIBED] = json.dumps(described)
  with open(path, "wb") as file:
    torch.save(content, file)


def save_fairseq(
  path: str | pathlib.Path, state_dict: Mapping[str, np.ndarray], *, options: Mapping[str, Any]
) -> None:
  """Writes a checkpoint as fairseq's trainer does, at the start of training.

  Args:
    path: the new file.
    state_dict: arrays by name; one that is there under several names is stored once.
    options: of the model, the "arch" among them, and of the task.

  Raises:
    ValueError: PyTorch is missing.
  """
  torch = _torch()
  tensors, made = {}, {}
  for name, x in state_dict.items():
    made[id(x)] = tensors[name] = made.get(id(x), torch.from_numpy(x))
  started = {"epoch": 1, "iterations_in_epoch": 0, "shuffle": True, "version": 2}
  content = {
    "args": None,
    "cfg": {"model": argparse.Namespace(**options), "task": dict(options)},
    "model": tensors,
    "criterion": None,
    "optimizer_history": [],
    "task_state": {},
    "extra_state": {"train_iterator": started},
  }
  with open(path, "wb") as file:
    torch.save(content, file)


def _average(path: pathlib.Path, content: Any) -> dict[str, Any]:
  """fairseq's moving average of the weights; what it has not, such as buffers, is as trained."""
  average = _average_in(content)
  if not average:
    raise ValueError(
      f"{path}: expected a moving average of the weights, found none; convert it without --ema"
    )
  return average


def _average_in(content: Any) -> dict[str, Any]:
  extra = content.get("extra_state") if isinstance(content, Mapping) else None
  average = {}
  for key in ("ema", "ema_fp32_params"):
    part = extra.get(key) if isinstance(extra, Mapping) else None
    average |= part if isinstance(part, Mapping) else {}
  return average


def _is_flat(value: Any) -> bool:
  """Whether a value is a number or a text, or holds such, so that showing it ends."""
  if isinstance(value, Mapping):
    value = [*value, *value.values()]
  items = value if isinstance(value, list | tuple) else [value]
  return not any(isinstance(x, list | tuple | set | Mapping | argparse.Namespace) for x in items)


def _is_safetensors(path: pathlib.Path) -> bool:
  if not path.is_file():
    return False
  with path.open("rb") as file:
    return file_kinds.is_safetensors(file.read(16), size=path.stat().st_size)


def _open(path: pathlib.Path) -> Archive:
  if not path.exists():
    raise ValueError(f"{path}: expected a PyTorch file, found none")
  try:
    return Archive(path)
  except RefusedError as error:
    raise ValueError(
      f"{path}: expected a pickle of tensors only, found one that may run code when it is opened "
      f"({error}); refused. Get the weights as another file."
    ) from error
  except RecursionError as error:
    raise ValueError(f"{path}: expected a PyTorch file, found one nested without end") from error
  except (ValueError, OSError) as error:
    raise ValueError(f"{path}: expected a whole PyTorch file, found {error}") from error


def _torch() -> Any:
  try:
    import torch
  except ImportError as error:
    raise ValueError(INSTALL) from error
  return torch
