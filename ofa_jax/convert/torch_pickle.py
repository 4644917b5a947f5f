"""The pickles inside PyTorch's files, read by a machine of our own that can run nothing.

It knows the opcodes that PyTorch and Python write for data, and makes only what is on the closed
list of `torch_constructors`. What a pickle may cost is bounded: in opcodes, and with them in
objects and in time, and in what is copied.
"""

import argparse
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from ofa_jax.convert.torch_constructors import (
  CALLBACKS,
  FUNCTIONS,
  NAMES,
  SCRIPT_FUNCTIONS,
  STORAGES,
  Global,
  NumpyDtype,
  RefusedError,
  Storage,
  StorageType,
  call,
  hashable,
  is_named,
  is_sizes,
)

MAX_OPS = 1_000_000  # a training checkpoint of a billion parameters has 200,000
MAX_INT_BYTES = 64
MAX_OPEN = 1000  # marks that are not closed


class ScriptClass(NamedTuple):
  """A class of a TorchScript archive, of which only the name is taken."""

  name: str


class ScriptObject:
  """An object of a TorchScript archive; `attributes` is None if its own code would make them."""

  __slots__ = ("attributes", "kind")

  def __init__(self, kind: str):
    self.kind = kind
    self.attributes: dict[str, Any] | None = {}


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
      target[hashable(items[i])] = items[i + 1]

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
    elif full in FUNCTIONS or full in NAMES or CALLBACKS.fullmatch(full):
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
      if type(view) is not tuple or len(view) != 3 or not is_sizes(view[1:]):
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
    if kind is argparse.Namespace and is_named(state):
      vars(target).update(state)
    elif kind is ScriptObject:
      named = is_named(state) and target.attributes is not None
      target.attributes = {**target.attributes, **state} if named else None
    elif kind is NumpyDtype and type(state) is tuple and len(state) > 1:
      if state[1] not in ("<", "|"):
        raise RefusedError("NumPy numbers that are not little-endian")
    elif kind is not dict or type(state) is not dict:  # of a dict: attributes such as _metadata
      raise RefusedError(f"a state for a {kind.__name__}")


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
