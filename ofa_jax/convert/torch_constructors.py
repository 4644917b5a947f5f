"""The closed list of what a pickle of PyTorch's may make, each a function of this file.

Nothing is imported by name, no attribute of a read value is looked up, no method of it is called.
Tensors are described, not made: `torch_archive` makes them of the descriptions.
"""

import argparse
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

MAX_DIMS = 32

# PyTorch's dtype -> NumPy's; None: PyTorch knows it, this reader does not.
DTYPES: dict[str, str | None] = {
  **{name: name for name in ("float16", "bfloat16", "float32", "float64", "bool")},
  **{f"{kind}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
  **dict.fromkeys(("complex32", "complex64", "complex128", "bits8", "bits16")),
  **dict.fromkeys(("quint8", "qint8", "qint32", "quint4x2", "quint2x4")),
  **dict.fromkeys(
    f"float8_{form}" for form in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu")
  ),
  "float4_e2m1fn_x2": None,
}
WIDTHS = {  # bytes of an element of what NumPy or this reader has not
  **{"bfloat16": 2, "complex64": 8, "complex128": 16, "qint8": 1, "quint8": 1, "qint32": 4},
  **{"quint4x2": 1, "quint2x4": 1, "": 1},
}
STORAGES = {
  **{"Half": "float16", "BFloat16": "bfloat16", "Float": "float32", "Double": "float64"},
  **{"Char": "int8", "Byte": "uint8", "Short": "int16", "Int": "int32", "Long": "int64"},
  **{"Bool": "bool", "ComplexFloat": "complex64", "ComplexDouble": "complex128"},
  **{"QInt8": "qint8", "QUInt8": "quint8", "QInt32": "qint32"},
  **{"QUInt4x2": "quint4x2", "QUInt2x4": "quint2x4"},
}


class RefusedError(ValueError):
  """The pickle asks for something that is not on the list."""


class Global(NamedTuple):
  """A name on the list, as "torch.float32"."""

  name: str


class StorageType(NamedTuple):
  """The type of a storage; an empty dtype is bytes, whose dtype the tensor says."""

  dtype: str


class Storage(NamedTuple):
  """Where a tensor's numbers are: elements `start` to `numel` of a record of the file."""

  dtype: str
  key: str
  numel: int
  start: int = 0


class TensorView(NamedTuple):
  """A tensor that is not read yet; strides and offset in elements."""

  storage: Storage
  dtype: str
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class Unsupported(NamedTuple):
  """A tensor that stands in the file and that this reader cannot make."""

  kind: str


class NumpyDtype(NamedTuple):
  """The dtype of a NumPy scalar."""

  code: str


def call(function: Global, arguments: tuple[Any, ...]) -> Any:
  """The value of a constructor on the list, for exactly the arguments that PyTorch gives it."""
  make = FUNCTIONS.get(function.name) or SCRIPT_FUNCTIONS.get(function.name)
  if make is None:
    raise RefusedError(f"a call of {function.name}")
  try:
    return make(*arguments)
  except RefusedError:
    raise
  except (TypeError, ValueError, AttributeError, LookupError, OverflowError) as error:
    raise RefusedError(f"{function.name} with other arguments than PyTorch's") from error


def itemsize(dtype: str) -> int:
  """Bytes of an element of a storage."""
  return WIDTHS.get(dtype) or np.dtype(dtype).itemsize


def _tensor(storage, offset, size, stride, grad=False, hooks=None, metadata=None) -> TensorView:
  return _typed_tensor(storage, offset, size, stride, grad, hooks, None, metadata)


def _typed_tensor(
  storage, offset, size, stride, grad, hooks, dtype, metadata=None
) -> TensorView | Unsupported:
  del grad, hooks
  if type(storage) is not Storage or type(offset) is not int or offset < 0:
    raise TypeError
  if not (is_sizes(size) and is_sizes(stride)) or len(size) != len(stride) or len(size) > MAX_DIMS:
    raise TypeError
  if metadata:
    return Unsupported("a lazily negated or conjugated tensor")
  if dtype is None:
    name = storage.dtype or "uint8"
  elif type(dtype) is Global and dtype.name.startswith("torch."):
    name = dtype.name.removeprefix("torch.")
  else:
    raise TypeError
  if DTYPES.get(name) is None:
    return Unsupported(f"a tensor of {name}")
  return TensorView(storage, name, offset, size, stride)


def _parameter(data, grad, hooks, state=None):
  del grad, hooks, state
  if type(data) not in (TensorView, Unsupported):
    raise TypeError
  return data


def _of_type(function, kind, arguments, state):
  """Tensors with attributes, and classes derived from Tensor, of which the numbers are taken."""
  del kind, state
  if type(function) is not Global or type(arguments) is not tuple:
    raise TypeError
  if not function.name.startswith("torch._utils._rebuild_"):
    raise RefusedError(f"a call of {function.name}")
  return call(function, arguments)


def _of_cpu_tensor(data, dtype, device, grad):
  del device, grad
  if type(data) is not TensorView or type(dtype) is not Global:
    raise TypeError
  same = dtype.name == f"torch.{data.dtype}"
  return data if same else Unsupported(f"a tensor of another device, kept as {data.dtype}")


def _unsupported(kind: str) -> Callable[..., Unsupported]:
  return lambda *_: Unsupported(kind)


def _dict(pairs=()) -> dict[Any, Any]:
  if type(pairs) is dict:
    return dict(pairs)
  return {hashable(key): value for key, value in pairs}


def _encode(text, encoding) -> bytes:
  if encoding != "latin1":  # how protocol 2 keeps bytes
    raise TypeError
  return text.encode("latin1")


def _bytes(data=b"", encoding=None) -> bytes:
  if encoding is not None:
    return _encode(data, encoding.replace("-", ""))
  if type(data) is not bytes:
    raise TypeError
  return data


def _numpy_dtype(code, align=False, copy=True) -> NumpyDtype:
  del align, copy
  if code not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"):
    raise TypeError
  return NumpyDtype(code)


def _numpy_scalar(dtype, data) -> np.generic:
  if type(dtype) is not NumpyDtype or type(data) is not bytes or len(data) != int(dtype.code[1:]):
    raise TypeError
  return np.frombuffer(data, f"<{dtype.code}")[0]


def _set(items=()) -> set[Any]:
  return {hashable(item) for item in items}


def _complex(real, imaginary) -> complex:
  if type(real) is not float or type(imaginary) is not float:
    raise TypeError
  return complex(real, imaginary)


def _text(value, index=None) -> str:
  del index
  if type(value) is not str:
    raise TypeError
  return value


def _tuple(items=()) -> tuple[Any, ...]:
  if type(items) not in (tuple, list):
    raise TypeError
  return tuple(items)


def _path(*parts) -> str:
  if not all(type(part) is str for part in parts):
    raise TypeError
  return "/".join(parts)


def _namespace() -> argparse.Namespace:
  return argparse.Namespace()


def hashable(key: Any) -> Any:
  """A key whose hash is cheap: Python's tuples can be nested until hashing them never ends."""
  parts = key if type(key) is tuple and len(key) < 16 else (key,)
  for part in parts:
    if type(part) is int and not -(2**63) <= part < 2**64:
      raise RefusedError("a key that is a huge number")
    if type(part) not in (str, int, float, bool, bytes, type(None), Global):
      raise RefusedError(f"a key that is a {type(part).__name__}")
  return key


def is_named(state: Any) -> bool:
  """Whether a value is a dict with texts as keys."""
  return type(state) is dict and all(type(key) is str for key in state)


def is_sizes(values: Any) -> bool:
  """Whether a value is a tuple of sizes that a file can have."""
  return type(values) is tuple and all(type(x) is int and 0 <= x < 2**48 for x in values)


_SCALAR = "multiarray.scalar"
FUNCTIONS: dict[str, Callable[..., Any]] = {
  "torch._utils._rebuild_tensor": _tensor,
  "torch._utils._rebuild_tensor_v2": _tensor,
  "torch._utils._rebuild_tensor_v3": _typed_tensor,
  "torch._utils._rebuild_parameter": _parameter,
  "torch._utils._rebuild_parameter_with_state": _parameter,
  "torch._utils._rebuild_device_tensor_from_cpu_tensor": _of_cpu_tensor,
  "torch._utils._rebuild_device_tensor_from_numpy": _unsupported("a tensor of another device"),
  "torch._utils._rebuild_qtensor": _unsupported("a quantised tensor"),
  "torch._utils._rebuild_sparse_tensor": _unsupported("a sparse tensor"),
  "torch._utils._rebuild_nested_tensor": _unsupported("a nested tensor"),
  "torch._utils._rebuild_meta_tensor_no_storage": _unsupported("a tensor without numbers (meta)"),
  "torch._utils._rebuild_wrapper_subclass": _unsupported("a tensor of a class of its own"),
  "torch._tensor._rebuild_from_type_v2": _of_type,
  "torch.serialization._get_layout": _text,
  "torch.Size": _tuple,
  "torch.device": _text,
  "collections.OrderedDict": _dict,
  "collections.Counter": _dict,
  "argparse.Namespace": _namespace,  # the originals' options
  "numpy.dtype": _numpy_dtype,  # the originals' schedulers leave NumPy numbers in the optimizer
  f"numpy._core.{_SCALAR}": _numpy_scalar,
  f"numpy.core.{_SCALAR}": _numpy_scalar,
  "_codecs.encode": _encode,
  "builtins.bytearray": _bytes,
  "builtins.set": _set,
  "builtins.complex": _complex,
  # The options of PyTorch Lightning's checkpoints, and where they were written.
  **dict.fromkeys(
    (
      "pytorch_lightning.utilities.parsing.AttributeDict",
      "lightning_fabric.utilities.data.AttributeDict",
      "lightning.fabric.utilities.data.AttributeDict",
    ),
    _dict,
  ),
  **dict.fromkeys(("pathlib.PosixPath", "pathlib.WindowsPath"), _path),
}
NAMES = frozenset(
  ("torch.Tensor", "torch.nn.parameter.Parameter", *(f"torch.{name}" for name in DTYPES))
) | frozenset(
  f"torch.{name}"
  for name in (
    *("per_tensor_affine", "per_tensor_symmetric", "per_channel_affine"),
    *("per_channel_symmetric", "per_channel_affine_float_qparams"),
  )
)
# Classes that PyTorch Lightning's older checkpoints name their callbacks' states by; only names.
CALLBACKS = re.compile(r"(pytorch_lightning|lightning\.pytorch)\.callbacks\.[\w.]{1,80}")
SCRIPT_FUNCTIONS: dict[str, Callable[..., Any]] = {
  "torch.jit._pickle.restore_type_tag": lambda value, _: value,
  **{
    f"torch.jit._pickle.build_{kind}list": lambda items: list(_tuple(items))
    for kind in ("int", "double", "bool", "tensor")
  },
}
