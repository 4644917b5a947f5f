"""How long a run takes from SIGTERM to its saved checkpoint: a prediction from bytes and rates.

A shard that several devices hold is written by one of them, or in equal parts by all where one of
its axes can be divided so: as Orbax saves (`replica_slices.py`).
"""

import collections
import dataclasses
import math
from typing import Any

import jax
import numpy as np

# Assumed, and low: one lane of PCIe 4.0 a device, and what one host writes into a bucket that a
# pod's hosts write into at once.
DEVICE_RATE = 2e9  # bytes a second from a device to its host
BUCKET_RATE = 200e6  # bytes a second from a host to the bucket
STEPS = 2  # the one that is on, and the one at whose end all processes agree
REST = 3.0  # seconds for agreeing, opening files and the last small ones, on requests of 0.1 s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Save:
  """The bytes of one checkpoint.

  Attributes:
    total: of all hosts together.
    host: of the host that writes most.
    device: of the device that gives most to its host.
    hosts: that write anything.
  """

  total: int
  host: int
  device: int
  hosts: int

  def seconds(self, step: float) -> dict[str, float]:
    """From SIGTERM to saved, in parts.

    Args:
      step: seconds of one step.
    """
    return {
      f"{STEPS} steps": STEPS * step,
      "devices to hosts": self.device / DEVICE_RATE,
      "hosts to the bucket": self.host / BUCKET_RATE,
      "agreeing, small files": REST,
    }


def of_state(state: Any, shardings: Any) -> Save:
  """What each host writes of a state.

  Args:
    state: tree of arrays or of their shapes and dtypes.
    shardings: the same tree of shardings, whose devices need not be there.
  """
  devices: collections.Counter[jax.Device] = collections.Counter()
  total = 0
  for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
    shape = sharding.shard_shape(leaf.shape)
    size = math.prod(shape) * np.dtype(leaf.dtype).itemsize
    holders = collections.defaultdict(list)
    for device, index in sharding.devices_indices_map(leaf.shape).items():
      holders[tuple((i.start, i.stop) for i in index)].append(device)
    for replicas in holders.values():
      total += size
      num = len(replicas)
      if num > 1 and any(axis % num == 0 for axis in shape if axis):
        devices.update(dict.fromkeys(replicas, size // num))
      else:
        devices[replicas[0]] += size
  hosts: collections.Counter[int] = collections.Counter()
  for device, size in devices.items():
    hosts[device.process_index] += size
  return Save(
    total=total,
    host=max(hosts.values(), default=0),
    device=max(devices.values(), default=0),
    hosts=sum(size > 0 for size in hosts.values()),
  )
