"""Pickles that want to run code, or to fill memory or time, drawn from a seed."""

import pickle
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# Names that run something, each with arguments that would leave a file at `{target}`.
CALLS = (
  ("os", "system", ("touch {target}",)),
  ("posix", "system", ("touch {target}",)),
  ("subprocess", "check_output", (["touch", "{target}"],)),
  ("builtins", "eval", ("open({target!r}, 'w')",)),
  ("builtins", "exec", ("open({target!r}, 'w')",)),
  ("__builtin__", "eval", ("open({target!r}, 'w')",)),
  ("builtins", "open", ("{target}", "w")),
  ("builtins", "__import__", ("os",)),
  ("builtins", "getattr", ("x", "format")),
  ("builtins", "compile", ("1", "x", "eval")),
  ("io", "open", ("{target}", "w")),
  ("pathlib", "Path", ("{target}",)),
  ("shutil", "rmtree", ("{target}",)),
  ("numpy", "load", ("{target}", None, True)),
  ("numpy", "savetxt", ("{target}", [1.0])),
  ("torch", "load", ("{target}",)),
  ("torch.serialization", "load", ("{target}",)),
  ("torch.jit", "load", ("{target}",)),
  ("torch.utils.cpp_extension", "load", ("x", "{target}")),
  ("torch._utils", "_import_dotted_name", ("os.system",)),
  ("pickle", "loads", (b"cos\nsystem\n.",)),
  ("functools", "partial", ("x",)),
  ("operator", "attrgetter", ("system",)),
  ("importlib", "import_module", ("os",)),
  ("ctypes", "CDLL", ("libc.so.6",)),
  ("webbrowser", "open", ("file://{target}",)),
  ("runpy", "run_path", ("{target}",)),
  ("code", "interact", ()),
  ("argparse", "Namespace.__init__.__globals__", ()),
  ("collections", "OrderedDict.fromkeys", ("ab",)),
  ("torch", "Size.__class__", ()),
  ("torch.FloatStorage", "from_file", ("{target}", True, 100)),
  ("torch.storage", "_load_from_bytes", (b"x",)),
  ("ofa_jax.hub", "download", ("RN50", "{target}")),
)


class Hostile(NamedTuple):
  """A pickle and what it tries."""

  name: str
  data: bytes


def generate(count: int, *, target: str, seed: int = 0) -> Iterator[Hostile]:
  """Yields `count` different ones; if one of them is obeyed, a file appears at `target`."""
  rng = np.random.default_rng(seed)
  fixed = list(_bombs()) + list(_tricks(target))
  for i in range(count):
    if i < len(fixed):
      yield fixed[i]
      continue
    module, name, arguments = CALLS[rng.integers(len(CALLS))] if i % 2 else CALLS[i % len(CALLS)]
    way = _WAYS[rng.integers(len(_WAYS))]
    values = tuple(x.format(target=target) if isinstance(x, str) else x for x in arguments)
    body = way(module.encode(), name.encode(), _plain(values))
    yield Hostile(f"{way.__name__} {module}.{name}", _wrapped(body, rng))


def _plain(value) -> bytes:
  """The opcodes of a plain value."""
  return pickle.dumps(value, 2)[2:-1]


def _reduce(module, name, arguments):
  return b"c" + module + b"\n" + name + b"\n" + arguments + b"R"


def _stack_global(module, name, arguments):
  text = b"".join(b"\x8c" + bytes([len(x)]) + x for x in (module, name))
  return text + b"\x93" + arguments + b"R"


def _new_object(module, name, arguments):
  return b"c" + module + b"\n" + name + b"\n" + arguments + b"\x81"


def _new_object_ex(module, name, arguments):
  return b"c" + module + b"\n" + name + b"\n" + arguments + b"}\x92"


def _instance(module, name, arguments):
  del arguments
  return b"(S'x'\ni" + module + b"\n" + name + b"\n"


def _object(module, name, arguments):
  return b"(c" + module + b"\n" + name + b"\n" + arguments + b"o"


def _build(module, name, arguments):
  return b"cargparse\nNamespace\n)\x81}X\x01\x00\x00\x00xc" + module + b"\n" + name + b"\nsb"


def _extension(module, name, arguments):
  return b"\x82\x01" + arguments + b"R"


def _persistent(module, name, arguments):
  return b"(X\x06\x00\x00\x00modulec" + module + b"\n" + name + b"\n" + arguments + b"tQ"


def _through_a_tensor(module, name, arguments):
  function = b"ctorch._tensor\n_rebuild_from_type_v2\n"
  return function + b"(c" + module + b"\n" + name + b"\nctorch\nTensor\n" + arguments + b"NtR"


_WAYS = (
  *(_reduce, _stack_global, _new_object, _new_object_ex, _instance, _object, _build),
  *(_extension, _persistent, _through_a_tensor),
)


def _wrapped(body: bytes, rng: np.random.Generator) -> bytes:
  """Puts it somewhere into a state dict."""
  key = b"X\x01\x00\x00\x00k"
  inner = (body, b"]" + body + b"a", b"}" + key + body + b"s", b"(" + body + b"t", body + b"0N")
  return b"\x80\x02}X\x0a\x00\x00\x00state_dict" + inner[rng.integers(len(inner))] + b"s."


def _bombs() -> Iterator[Hostile]:
  yield Hostile("a huge index of the memo", b"\x80\x02Nr\xff\xff\xff\xff]j\xff\xff\xff\x7f.")
  yield Hostile(
    "a huge integer", b"\x80\x02\x8b" + struct.pack("<I", 50_000_000) + bytes(50_000_000)
  )
  yield Hostile("a length beyond the end", b"\x80\x02B\xff\xff\xff\xff.")
  yield Hostile("a text beyond the end", b"\x80\x02X\xff\xff\xff\x7f.")
  yield Hostile("nothing but marks", b"\x80\x02" + b"(" * 1_100_000 + b".")
  yield Hostile("lists without end", b"\x80\x02" + b"]" * 1_100_000 + b"a" * 10 + b".")
  nested = b"".join(b"q" + bytes([i % 2]) + b"h" + bytes([i % 2]) + b"\x86" for i in range(100))
  yield Hostile("a key whose hash never ends", b"\x80\x02}N" + nested + b"Ns.")
  yield Hostile("a list in itself as a key", b"\x80\x02}]q\x00h\x00ah\x00Ns.")
  copies = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R0"
  text = b"X" + struct.pack("<I", 1_000_000) + b"a" * 1_000_000
  yield Hostile("one text copied a thousand times", b"\x80\x02" + text + b"q\x00" + copies * 1000)
  lists = b"ccollections\nOrderedDict\nh\x00\x85R0"
  pairs = b"](" + b"K\x01K\x02\x86" * 200_000 + b"eq\x00"
  yield Hostile("one dict copied a thousand times", b"\x80\x02" + pairs + lists * 1000)
  yield Hostile("deep tuples", b"\x80\x02N" + b"\x85" * 999_000 + b".")
  yield Hostile(
    "a set of huge numbers", b"\x80\x02cbuiltins\nset\n](\x8a\xff" + b"\x7f" * 255 + b"e\x85R."
  )


def _tricks(target: str) -> Iterator[Hostile]:
  size = b"ctorch\nSize\n"
  yield Hostile("a class as an argument", b"\x80\x02" + size + size + b"\x85R" + b"N\x85R.")
  yield Hostile("a state for a text", b"\x80\x02X\x01\x00\x00\x00x}b.")
  yield Hostile("a state for a class", b"\x80\x02" + size + b"}b.")
  yield Hostile(
    "a call of a text", b"\x80\x02X\x09\x00\x00\x00os.system" + _plain((target,)) + b"R."
  )
  yield Hostile("a call of a list", b"\x80\x02])R.")
  callback = b"cpytorch_lightning.callbacks.os\nsystem\n"
  yield Hostile("a callback that is called", b"\x80\x02" + callback + _plain((target,)) + b"R.")
  yield Hostile("a callback that is made", b"\x80\x02" + callback + _plain((target,)) + b"\x81.")
  yield Hostile("a state for a callback", b"\x80\x02" + callback + b"}b.")
  yield Hostile("nothing to take", b"\x80\x02R.")
  yield Hostile("nothing to close", b"\x80\x02tu.")
  yield Hostile("items for a tensor", b"\x80\x02ctorch\nfloat32\nK\x01K\x02s.")
  yield Hostile("a name of bytes", b"\x80\x02C\x02osC\x06system\x93" + _plain((target,)) + b"R.")
  yield Hostile("a name without an end", b"\x80\x02c" + b"os" * 10_000)
  yield Hostile("protocol 0", b"cos\nsystem\n(S'touch " + target.encode() + b"'\ntR.")
  yield Hostile(
    "a byte array of a huge number", b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."
  )
  scalar = b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n"
  yield Hostile(
    "a NumPy object", b"\x80\x02" + scalar + _plain(("O8", False, True)) + b"RC\x01.\x86R."
  )
  yield Hostile("a tensor of no storage", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.")
