"""Safetensors files: a header of JSON, then the numbers, mapped into memory.

The format has no checksum: whether a header and the length of the file are whole can be told, a
changed bit in a number cannot.
"""

import mmap
import pathlib

import ml_dtypes
import numpy as np

from ofa_jax.convert import file_kinds, json_files

MAX_HEADER = 16 << 20  # bytes; a model of 10,000 tensors has 1 MB
DTYPES = {
  **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
  **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
  **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
}


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads the tensors of a file by name, as read-only views of the file.

  Raises:
    ValueError: no safetensors file, one that is cut short, or tensors of a dtype that NumPy has
      not; all faults of its header.
  """
  try:
    return _read(path)
  except (ValueError, OSError) as error:
    raise ValueError(f"{path}: expected a safetensors file, found {error}") from error


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
  size = file_kinds.require_regular(path)
  with path.open("rb") as file:
    start = file_kinds.check(path, file, size=size)
    length = int.from_bytes(start[:8], "little")
    if not file_kinds.is_safetensors(start, size=size):
      raise ValueError(f"{size:,} bytes that do not start with its header")
    if length > MAX_HEADER:
      raise ValueError(f"a header of {length:,} bytes, more than any model's")
    file.seek(8)
    header = json_files.parse(file.read(length))
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  header.pop("__metadata__", None)
  begin, arrays, problems, spans = 8 + length, {}, [], []
  for name, entry in header.items():
    try:
      dtype, shape, (first, last) = _entry(entry)
    except ValueError as error:
      problems.append(f"{name[:80]}: {error}")
      continue
    spans.append((first, last))
    if last > size - begin:
      problems.append(f"{name[:80]}: its bytes end at {last:,} of {size - begin:,}")
    elif first == last:
      arrays[name] = np.zeros(shape, dtype)
    else:
      arrays[name] = np.ndarray(shape, dtype, buffer=mapped, offset=begin + first)
  spans.sort()
  ends = [0, *(last for _, last in spans)]
  whole = all(first == end for (first, _), end in zip(spans, ends, strict=False))
  if not problems and not (whole and ends[-1] == size - begin):
    problems.append(
      f"tensors of {ends[-1]:,} bytes that do not follow each other, in a file with "
      f"{size - begin:,} for them"
    )
  if problems:
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    raise ValueError(f"{'; '.join(problems[:3])}{more}")
  return arrays


def _entry(entry: object) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
  """dtype, shape, and first and last byte of a tensor."""
  fields = entry if isinstance(entry, dict) else {}
  name, shape, span = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
  if not (_is_sizes(shape) and _is_sizes(span) and len(span) == 2 and len(shape) <= 32):
    raise ValueError("expected dtype, shape and data_offsets")
  if not isinstance(name, str) or name not in DTYPES:
    raise ValueError(f"dtype {str(name)[:20]}, expected one of {', '.join(DTYPES)}")
  dtype = np.dtype(ml_dtypes.bfloat16 if name == "BF16" else DTYPES[name])
  count = 1
  for n in shape:
    count *= n
  if span[1] - span[0] != count * dtype.itemsize:
    raise ValueError(f"{span[1] - span[0]:,} bytes for {name} {tuple(shape)}")
  return dtype, tuple(shape), (span[0], span[1])


def _is_sizes(values: object) -> bool:
  return isinstance(values, list) and all(type(x) is int and 0 <= x < 2**48 for x in values)
