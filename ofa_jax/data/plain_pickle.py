"""Pickles of plain values, read without running anything.

The originals keep caption records, answer lists and document frequencies as pickles. A pickle can
only run code through a class or a function that it names; here every name is refused but those
that the caller lists.
"""

import io
import pickle
from collections.abc import Mapping
from typing import Any


def load(
  data: bytes, *, names: Mapping[tuple[str, str], Any] | None = None, encoding: str = "ASCII"
) -> object:
  """What a pickle holds: numbers, texts, bytes, tuples, lists, dicts and sets.

  Args:
    data: the pickle.
    names: (module, name) -> the class that it may name; None: it may name none.
    encoding: of the texts of Python 2.

  Raises:
    ValueError: the pickle is damaged, or asks for another name.
  """
  try:
    return _Plain(io.BytesIO(data), names or {}, encoding).load()
  except Exception as error:  # damaged pickles raise anything from EOFError to IndexError
    raise ValueError(f"not a plain pickle: {type(error).__name__}: {error}") from error


class _Plain(pickle.Unpickler):
  def __init__(self, file, names, encoding):
    super().__init__(file, encoding=encoding)
    self._names = names

  def find_class(self, module: str, name: str):
    if (module, name) not in self._names:
      raise pickle.UnpicklingError(f"refused: it asks for {module}.{name}")
    return self._names[module, name]
