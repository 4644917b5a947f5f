"""PyTorch's files: the only place where a pickle is opened, and never one that runs code.

Tensors are memory-mapped where the file allows it, so that reading a file costs no memory until a
tensor is looked at.
"""

import argparse
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

INSTALL = (
  'PyTorch reads and writes .pt and .bin files; install it with: pip install "ofa-jax[torch]"'
)


def load_state_dict(path: str | pathlib.Path, *, ema: bool = False) -> dict[str, np.ndarray]:
  """Reads the tensors of a file by name, as read-only views of the file where possible.

  Takes a state dict, a training checkpoint that holds one under "state_dict" or, as fairseq's,
  "model" (its optimizer is not looked at), or a TorchScript archive such as OpenAI's CLIP files.

  Args:
    path: the file.
    ema: read the moving average that fairseq keeps of the weights, in float32 if it has that.

  Raises:
    ValueError: PyTorch is missing, the file is damaged or no PyTorch file, holds no tensors or no
      average, or its pickle asks for more than tensors, NumPy scalars and options.
  """
  path = pathlib.Path(path)
  content = _load(path)
  named = content if isinstance(content, Mapping) else {}
  for key in ("state_dict", "model"):
    if isinstance(named.get(key), Mapping):
      named = named[key]
      break
  if ema:
    named = {**named, **_average(path, content)}
  tensors = {k: _to_numpy(v) for k, v in named.items() if hasattr(v, "detach")}
  if not tensors:
    found = sorted(map(str, named))[:5] or type(content).__name__
    raise ValueError(
      f'{path}: expected tensors by name, or such under "state_dict" or "model"; found {found}'
    )
  return tensors


def load_options(path: str | pathlib.Path) -> dict[str, Any]:
  """Reads the options that a fairseq checkpoint was trained with, by name; others have none.

  They are under "cfg", in sections of which the model's count most, or in an old `args`.

  Raises:
    ValueError: as `load_state_dict`.
  """
  content = _load(pathlib.Path(path))
  if not isinstance(content, Mapping):
    return {}
  sections = content.get("cfg") or {}
  found = {}
  for options in (sections.get("task"), sections.get("model"), content.get("args")):
    options = vars(options) if isinstance(options, argparse.Namespace) else options
    found |= options if isinstance(options, Mapping) else {}
  return found


def save_checkpoint(
  path: str | pathlib.Path,
  state_dict: Mapping[str, np.ndarray],
  *,
  name: str,
  epoch: int = 0,
  step: int = 0,
) -> None:
  """Writes a checkpoint as the original's training does, without an optimizer.

  Args:
    path: the new file.
    state_dict: arrays by name, in the released files' naming; every name gets `module.` before it.
    name: the experiment's name, which the original's scripts print.
    epoch, step: how long it was trained, which they print too.

  Raises:
    ValueError: PyTorch is missing.
  """
  torch = _torch()
  tensors = {f"module.{k}": torch.from_numpy(v) for k, v in state_dict.items()}
  torch.save({"epoch": epoch, "step": step, "name": name, "state_dict": tensors}, path)


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
  torch.save(
    {
      "args": None,
      "cfg": {"model": argparse.Namespace(**options), "task": dict(options)},
      "model": tensors,
      "criterion": None,
      "optimizer_history": [],
      "task_state": {},
      "extra_state": {"train_iterator": started},
    },
    path,
  )


def _average(path: pathlib.Path, content: Any) -> dict[str, Any]:
  """fairseq's moving average of the weights; what it has not, such as buffers, is as trained."""
  extra = content.get("extra_state") if isinstance(content, Mapping) else None
  found = {}
  for key in ("ema", "ema_fp32_params"):
    found |= (extra or {}).get(key) or {}
  if not found:
    raise ValueError(
      f"{path}: expected a moving average of the weights, found none; convert it without --ema"
    )
  return found


def _load(path: pathlib.Path) -> Any:
  torch = _torch()
  if not path.is_file():
    raise ValueError(f"{path}: expected a PyTorch file, found none")
  try:
    archive = zipfile.is_zipfile(path)
    if archive and _is_torchscript(path):
      # Its loader is C++ and cannot reach Python; the parameters are all that we take.
      return torch.jit.load(path, map_location="cpu").state_dict()
    with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
      warnings.simplefilter("ignore")  # about the protocol of pickles that are then refused
      return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
  except pickle.UnpicklingError as error:
    asks = re.search(r"(?:GLOBAL|operand) \S+|'\S+' is not", str(error))
    raise ValueError(
      f"{path}: expected a pickle of tensors only, found one that may run code when it is opened "
      f"({asks[0] if asks else type(error).__name__}); refused. Get the weights as another file."
    ) from error
  except Exception as error:  # on damaged bytes the readers raise anything, KeyError included
    reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
    raise ValueError(
      f"{path}: expected a whole PyTorch file, found {path.stat().st_size:,} bytes that cannot be "
      f"read as one ({reason}); was the download cut short?"
    ) from error


def _is_torchscript(path: pathlib.Path) -> bool:
  with zipfile.ZipFile(path) as archive:
    return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _harmless() -> list[Any]:
  """What the originals' checkpoints hold besides tensors, and what runs no code.

  Options in a Namespace, and the learning rate as a NumPy float64 (under the names of NumPy 1 and
  2), which Chinese-CLIP keeps in the optimizer.
  """
  scalar = np.float64().__reduce__()[0]
  return [
    (scalar, "numpy._core.multiarray.scalar"),
    (scalar, "numpy.core.multiarray.scalar"),
    (np.dtype, "numpy.dtype"),
    (np.dtypes.Float64DType, "numpy.dtypes.Float64DType"),
    argparse.Namespace,
  ]


def _to_numpy(tensor: Any) -> np.ndarray:
  tensor = tensor.detach()
  if str(tensor.dtype) == "torch.bfloat16":  # which NumPy has not
    import torch

    return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
  return tensor.numpy()


def _torch() -> Any:
  try:
    import torch
  except ImportError as error:
    raise ValueError(INSTALL) from error
  return torch
