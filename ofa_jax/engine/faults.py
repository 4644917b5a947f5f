"""What goes wrong where checkpoints are stored, as one message that says how to go on."""

import contextlib
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from ofa_jax import files, storage
from ofa_jax.engine import bucket_arrays


class SaveError(OSError):
  """A checkpoint could not be saved, however often it was tried; the text says how to go on."""


@contextlib.contextmanager
def explained(workdir: str) -> Iterator[None]:
  """Makes of what a full disk raises, anywhere in the block, one message.

  Raises:
    ValueError: the disk is full; where the run stands and how to go on.
  """
  try:
    yield
  except SaveError:
    raise
  except Exception as error:
    if files.full_disk(error) is None:
      raise
    folder = bucket_arrays.path_of(workdir) / "checkpoints"
    whole = [] if storage.in_bucket(workdir) else ocp.utils.checkpoint_steps(folder)
    stands, then = "No checkpoint was finished yet", "it starts anew"
    if whole:
      stands = f"The newest whole checkpoint is that of step {max(whole)}"
      then = "it goes on from there"
    raise ValueError(
      f"No space left for {workdir} ({str(error)[:120]}...). {stands}. Free some space, or lower "
      f"`keep`, and start the same command again: {then}."
    ) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
  """An error and what led to it."""
  cause: BaseException | None = error
  while cause is not None:
    yield cause
    cause = cause.__cause__ or cause.__context__


_ECHOES = (
  "Event loop is closed",
  "Encountered error while reading array index",
  "sys.meta_path is None",  # what is dropped only when Python ends
)


def silence_echoes() -> None:
  """Orbax drops what it is doing when a file fails, and each part would print a traceback."""
  # It reports every array it touches at INFO, warns of defaults that are meant, and repeats what it
  # raises.
  logging.getLogger("absl").setLevel(logging.CRITICAL)
  _set_hooks()


@functools.cache
def _set_hooks() -> None:
  uncaught, unraisable = sys.excepthook, sys.unraisablehook

  def on_uncaught(kind, error, trace):
    if not str(error).startswith(_ECHOES):
      uncaught(kind, error, trace)

  def on_unraisable(ignored, echoes=_ECHOES):  # when Python ends, the module may have none
    if not str(ignored.exc_value).startswith(echoes):
      unraisable(ignored)

  sys.excepthook, sys.unraisablehook = on_uncaught, on_unraisable
  logging.getLogger("asyncio").addFilter(
    lambda record: "exception was never retrieved" not in record.getMessage()
  )


def unreadable(directory: epath.Path, error: BaseException) -> str:
  """The file under `directory` that an error of Orbax speaks of, and its reason."""
  texts = [str(cause) for cause in _causes(error)]
  # The innermost speaks of the file: DATA_LOSS: ... local file "DIR/model/d/0f25": ... [details]
  reason = re.sub(r"\s+", " ", texts[-1]).partition(" [tensorstore_spec")[0]
  named = re.findall(re.escape(str(directory)) + r"/([^\"]*[^\"/])/?\"", reason)
  return f"{named[-1] if named else 'model'} cannot be read ({reason.partition(':')[0][:80]})"


def readable(path: os.PathLike, function: Callable[..., Any], *args: Any) -> Any:
  """Calls a function of Orbax, which raises anything on damaged files."""
  try:
    return function(*args)
  except Exception as error:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise ValueError(
      f"{path}: expected the parameters of a model, found files that cannot be read "
      f"({reason:.200}); get the folder again"
    ) from error
