"""Functions of the host inside a program of the devices, such as a score of texts.

Each device calls for its own rows, so that no text travels between hosts. What such a function
raises must not reach the program: the other devices would wait for this one in a collective that
never ends. It is kept instead, the results are NaN, by which the step changes nothing, and the loop
raises it at its next look (`reraise`).

A program with such a call is compiled at every start: JAX keeps none in its cache.
"""

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

_raised: list[Exception] = []
_one_at_a_time = threading.Lock()
_left_out = contextvars.ContextVar("left_out", default=False)


def call(
  function: Callable[..., Mapping[str, np.ndarray]],
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  *arrays: jax.Array,
) -> dict[str, jax.Array]:
  """What a function of the host makes of arrays, inside a jitted function.

  On a mesh it is to be called inside `jax.shard_map`, where the arrays are a device's own. The
  calls of one process do not overlap each other.

  Args:
    function: (NumPy arrays) -> NumPy arrays by name, the same of the same.
    shapes: of what it gives, floating-point numbers.
    arrays: what it is given.
  """
  if _left_out.get():
    read = sum(x.ravel()[0].astype(jnp.float32) for x in arrays)
    return {name: jnp.full(s.shape, read, s.dtype) for name, s in shapes.items()}

  def on_host(*given):
    given = [np.asarray(x) for x in given]  # which may wait for a thread: not inside the lock
    with _one_at_a_time:
      try:
        results = function(*given)
        return {name: np.asarray(results[name], s.dtype) for name, s in shapes.items()}
      except Exception as error:
        _raised.append(error)
        return {name: np.full(s.shape, np.nan, s.dtype) for name, s in shapes.items()}

  return jax.pure_callback(on_host, dict(shapes), *arrays)


def reraise() -> None:
  """Raises the first of what functions of the host raised since the last look, if any did."""
  with _one_at_a_time:
    first = _raised[0] if _raised else None
    _raised.clear()
  if first is not None:
    raise first


@contextlib.contextmanager
def left_out() -> Iterator[None]:
  """Programs that are traced here call no host, for compiling for devices that are not there."""
  token = _left_out.set(True)
  try:
    yield
  finally:
    _left_out.reset(token)
