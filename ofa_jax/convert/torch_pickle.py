"""The pickles inside PyTorch's files, read by a machine of our own that can run nothing.

It knows the opcodes that PyTorch and Python write for data and a closed list of constructors, each
a function of this file: nothing is imported, no attribute is looked up, no method of a read value
is called. Tensors are described, not made: `torch_archive` makes them of the descriptions.

What a pickle may cost is bounded: in opcodes, and with them in objects and in time.
"""

import argparse
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

MAX_OPS = 1_000_000  # a training checkpoint of a billion parameters has 200,000
MAX_INT_BYTES = 64
MAX_OPEN = 1000  # marks that are not closed
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


class ScriptClass(NamedTuple):
  """A class of a TorchScript archive, of which only the name is taken."""

  name: str


class ScriptObject:
  """An object of a TorchScript archive; `attributes` is None if its own code would make them."""

  __slots__ = ("attributes", "kind")

  def __init__(self, kind: str):
    self.kind = kind
    self.attributes: dict[str, Any] | None = {}


class NumpyDtype(NamedTuple):
  """The dtype of a NumPy scalar."""

  code: str


def load(
  data: bytes, at: int = 0, *, script: bool = False, storages: dict[str, str] | None = None
) -> tuple[Any, int]:
  """Reads one pickle.

  Args:
    data: bytes that hold it.
    at: its first byte.
    script: it is of a TorchScript archive.
    storages: gets the dtype of every storage that it refers to, by key.

  Returns:
    Its value, of None, bool, int, float, complex, str, bytes, tuple, list, dict, set, Namespace,
    NumPy scalars and the classes of this file; and the position after it.

  Raises:
    RefusedError: it asks for another constructor or uses one in another way than PyTorch does.
    ValueError: it is damaged, or larger than any checkpoint's.
  """
  machine = _Machine(data, at, script=script)
  value, end = machine.run()
  if storages is not None:
    storages |= machine.storages
  return value, end


class _Machine:
  """A stack machine for pickle's opcodes (Python's `pickletools` documents them)."""

  def __init__(self, data: bytes, at: int, *, script: bool):
    self.data, self.at, self.script = data, at, script
    self.stack: list[Any] = []
    self.marks: list[list[Any]] = []
    self.memo: dict[int, Any] = {}
    self.copied = 0
    self.storages: dict[str, str] = {}

  def run(self) -> tuple[Any, int]:
    for _ in range(MAX_OPS):
      code = self.take(1)[0]
      if code == 0x2E:  # STOP
        return self.pop(), self.at
      operation = OPERATIONS.get(code)
      if operation is None:
        raise RefusedError(f"opcode {bytes([code])!r}")
      operation(self)
    raise ValueError(f"its pickle has more than {MAX_OPS:,} operations")

  def take(self, size: int) -> bytes:
    end = self.at + size
    if end > len(self.data):
      raise ValueError("its pickle ends too early")
    part = self.data[self.at : end]
    self.at = end
    return part

  def number(self, form: str) -> int:
    return struct.unpack(form, self.take(struct.calcsize(form)))[0]

  def line(self) -> str:
    end = self.data.find(b"\n", self.at, self.at + 1000)
    if end < 0:
      raise ValueError("its pickle has a name without an end")
    return self.take(end + 1 - self.at)[:-1].decode("utf-8", "replace")

  def text(self, size: int) -> str:
    return self.take(size).decode("utf-8", "surrogatepass")

  def push(self, value: Any) -> None:
    self.stack.append(value)

  def pop(self) -> Any:
    if not self.stack:
      raise ValueError("its pickle takes more than it has put")
    return self.stack.pop()

  def top(self, kind: type) -> Any:
    if not self.stack or type(self.stack[-1]) is not kind:
      raise RefusedError(
        f"items put into a {type(self.stack[-1]).__name__ if self.stack else 'nothing'}"
      )
    return self.stack[-1]

  def pop_mark(self) -> list[Any]:
    if not self.marks:
      raise ValueError("its pickle closes what it has not opened")
    items, self.stack = self.stack, self.marks.pop()
    return items

  def mark(self) -> None:
    if len(self.marks) >= MAX_OPEN:
      raise ValueError("its pickle is nested deeper than any checkpoint's")
    self.marks.append(self.stack)
    self.stack = []

  def tuple_of(self, size: int) -> None:
    items = [self.pop() for _ in range(size)]
    self.push(tuple(reversed(items)))

  def set_items(self, items: list[Any]) -> None:
    target = self.top(dict)
    if len(items) % 2:
      raise ValueError("its pickle has a key without a value")
    for i in range(0, len(items), 2):
      target[_hashable(items[i])] = items[i + 1]

  def append(self, items: list[Any]) -> None:
    self.top(list).extend(items)

  def get(self, index: int) -> None:
    if index not in self.memo:
      raise ValueError("its pickle refers to what it has not kept")
    self.push(self.memo[index])

  def put(self, index: int) -> None:
    if not self.stack:
      raise ValueError("its pickle keeps what it has not got")
    self.memo[index] = self.stack[-1]

  def spend(self, *values: Any) -> None:
    """Counts what a constructor copies, so that one large value is not copied a million times."""
    self.copied += sum(len(x) for x in values if isinstance(x, str | bytes | list | tuple | dict))
    if self.copied > MAX_OPS:
      raise ValueError("its pickle copies more than any checkpoint's")

  def integer(self, size: int) -> None:
    if size > MAX_INT_BYTES:
      raise RefusedError(f"an integer of {size:,} bytes")
    self.push(int.from_bytes(self.take(size), "little", signed=True))

  def find(self, module: Any, name: Any) -> None:
    if type(module) is not str or type(name) is not str:
      raise RefusedError("a name that is no text")
    module = "builtins" if module == "__builtin__" else module
    full = f"{module}.{name}"
    if self.script and (module == "__torch__" or module.startswith("__torch__.")):
      self.push(ScriptClass(full))
    elif full in SCRIPT_FUNCTIONS and self.script:
      self.push(Global(full))
    elif module in ("torch", "torch.cuda", "torch.storage") and name.endswith("Storage"):
      kind = name.removesuffix("Storage")
      if kind not in STORAGES and kind not in ("Untyped", "_Untyped"):
        raise RefusedError(full)
      self.push(StorageType(STORAGES.get(kind, "")))
    elif full in FUNCTIONS or full in NAMES:
      self.push(Global(full))
    else:
      raise RefusedError(full[:100])

  def persistent(self) -> None:
    key = self.pop()
    if type(key) is not tuple or len(key) not in (5, 6) or key[0] != "storage":
      raise RefusedError("a persistent object that is no storage")
    kind, name, place, numel = key[1:5]
    types = tuple(map(type, (kind, name, place, numel)))
    if types != (StorageType, str, str, int) or not 0 <= numel < 2**48:
      raise RefusedError("a storage with other fields than PyTorch's")
    start = 0
    if len(key) == 6 and key[5] is not None:  # a part of another storage, in the old format
      view = key[5]
      if type(view) is not tuple or len(view) != 3 or not _sizes(view[1:]):
        raise RefusedError("a part of a storage with other fields than PyTorch's")
      start, numel = view[1], view[1] + view[2]
    self.storages[name] = kind.dtype
    self.push(Storage(kind.dtype, name, numel, start))

  def reduce(self) -> None:
    arguments, function = self.pop(), self.pop()
    if type(arguments) is not tuple or type(function) is not Global:
      raise RefusedError(f"a call of a {type(function).__name__}")
    self.spend(*arguments)
    self.push(call(function, arguments))

  def new_object(self) -> None:
    arguments, kind = self.pop(), self.pop()
    if type(arguments) is not tuple:
      raise RefusedError("an object made of no tuple")
    if type(kind) is ScriptClass and not arguments:
      self.push(ScriptObject(kind.name))
    elif type(kind) is Global:
      self.spend(*arguments)
      self.push(call(kind, arguments))
    else:
      raise RefusedError(f"an object of a {type(kind).__name__}")

  def build(self) -> None:
    state = self.pop()
    target = self.stack[-1] if self.stack else None
    kind = type(target)
    self.spend(state, getattr(target, "attributes", None))
    if kind is argparse.Namespace and _is_named(state):
      vars(target).update(state)
    elif kind is ScriptObject:
      named = _is_named(state) and target.attributes is not None
      target.attributes = {**target.attributes, **state} if named else None
    elif kind is NumpyDtype and type(state) is tuple and len(state) > 1:
      if state[1] not in ("<", "|"):
        raise RefusedError("NumPy numbers that are not little-endian")
    elif kind is not dict or type(state) is not dict:  # of a dict: attributes such as _metadata
      raise RefusedError(f"a state for a {kind.__name__}")


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
  if not (_sizes(size) and _sizes(stride)) or len(size) != len(stride) or len(size) > MAX_DIMS:
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
  return {_hashable(key): value for key, value in pairs}


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
  return {_hashable(item) for item in items}


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


def _namespace() -> argparse.Namespace:
  return argparse.Namespace()


def _hashable(key: Any) -> Any:
  """A key whose hash is cheap: Python's tuples can be nested until hashing them never ends."""
  parts = key if type(key) is tuple and len(key) < 16 else (key,)
  for part in parts:
    if type(part) is int and not -(2**63) <= part < 2**64:
      raise RefusedError("a key that is a huge number")
    if type(part) not in (str, int, float, bool, bytes, type(None), Global):
      raise RefusedError(f"a key that is a {type(part).__name__}")
  return key


def _is_named(state: Any) -> bool:
  return type(state) is dict and all(type(key) is str for key in state)


def _sizes(values: Any) -> bool:
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
SCRIPT_FUNCTIONS: dict[str, Callable[..., Any]] = {
  "torch.jit._pickle.restore_type_tag": lambda value, _: value,
  **{
    f"torch.jit._pickle.build_{kind}list": lambda items: list(_tuple(items))
    for kind in ("int", "double", "bool", "tensor")
  },
}

OPERATIONS: dict[int, Callable[[_Machine], None]] = {
  ord(code): operation
  for code, operation in {
    "\x80": lambda m: m.take(1),  # PROTO
    "\x95": lambda m: m.take(8),  # FRAME
    "(": _Machine.mark,
    "N": lambda m: m.push(None),
    "\x88": lambda m: m.push(True),
    "\x89": lambda m: m.push(False),
    "J": lambda m: m.push(m.number("<i")),
    "K": lambda m: m.push(m.number("<B")),
    "M": lambda m: m.push(m.number("<H")),
    "\x8a": lambda m: m.integer(m.number("<B")),
    "\x8b": lambda m: m.integer(m.number("<I")),
    "G": lambda m: m.push(m.number(">d")),
    "X": lambda m: m.push(m.text(m.number("<I"))),
    "\x8c": lambda m: m.push(m.text(m.number("<B"))),
    "U": lambda m: m.push(m.text(m.number("<B"))),  # text of Python 2
    "T": lambda m: m.push(m.text(m.number("<I"))),
    "C": lambda m: m.push(m.take(m.number("<B"))),
    "B": lambda m: m.push(m.take(m.number("<I"))),
    ")": lambda m: m.push(()),
    "]": lambda m: m.push([]),
    "}": lambda m: m.push({}),
    "\x85": lambda m: m.tuple_of(1),
    "\x86": lambda m: m.tuple_of(2),
    "\x87": lambda m: m.tuple_of(3),
    "t": lambda m: m.push(tuple(m.pop_mark())),
    "a": lambda m: m.append([m.pop()]),
    "e": lambda m: m.append(m.pop_mark()),
    "s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    "u": lambda m: m.set_items(m.pop_mark()),
    "h": lambda m: m.get(m.number("<B")),
    "j": lambda m: m.get(m.number("<I")),
    "q": lambda m: m.put(m.number("<B")),
    "r": lambda m: m.put(m.number("<I")),
    "\x94": lambda m: m.put(len(m.memo)),
    "c": lambda m: m.find(m.line(), m.line()),
    "\x93": lambda m: m.find(*[m.pop(), m.pop()][::-1]),
    "Q": _Machine.persistent,
    "R": _Machine.reduce,
    "\x81": _Machine.new_object,
    "b": _Machine.build,
  }.items()
}
