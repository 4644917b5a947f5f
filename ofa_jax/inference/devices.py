"""What PyTorch's users say about devices and modes, understood or answered."""

import re
import warnings
from typing import Any

import jax

_PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "gpu": "gpu", "tpu": "tpu"}


def choose(device: Any = None) -> list[jax.Device]:
  """The devices of this machine that a model goes to.

  Args:
    device: "cpu", "cuda", "gpu" or "tpu", of which ":1" is the second only; or an object that is
      written so, such as a `torch.device`. None: all devices of JAX's default platform. One that
      JAX does not have gives a warning and the default.

  Raises:
    ValueError: something else.
  """
  if device is None:
    return jax.local_devices()
  known = re.fullmatch(r"(cpu|cuda|gpu|tpu)(?::(\d+))?", str(device))
  if known is None:
    raise ValueError(
      f"Expected device cpu, cuda, gpu or tpu, perhaps with a number (cuda:0), found {device!r}"
    )
  try:
    devices = jax.local_devices(backend=_PLATFORMS[known[1]])
    return devices if known[2] is None else [devices[int(known[2])]]
  except (RuntimeError, IndexError):
    devices = jax.local_devices()
    warnings.warn(
      f"device={str(device)!r}: JAX has {len(devices)} {devices[0].platform.upper()} devices here; "
      'the model goes there. For GPUs: pip install -e ".[cuda]"'
    )
    return devices


def itself(model: Any, *args: Any, **kwargs: Any) -> Any:
  """Returns the model as it is: `eval`, `float`, `to`, which PyTorch's users call after loading.

  There is no training mode to leave, and devices and precision are `load_from_name`'s.
  """
  del args, kwargs
  return model
