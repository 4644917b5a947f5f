"""How fast a run can leave: whose bytes a checkpoint is, beside what Orbax itself would write."""

import collections
import json

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ofa_jax.ahead import rental, stopping

KIB = 1024


@pytest.fixture(scope="module")
def mesh():
  return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "fsdp"))


def of_orbax(array):
  """Bytes that each device gives to its host when Orbax saves."""
  from orbax.checkpoint._src.serialization import replica_slices

  slices = replica_slices.get_replica_slices(array, 0, use_replica_parallel=True)
  sizes = collections.Counter()
  for part in slices.replica_slices:
    shape = (
      part.unsliced_data.shape
      if part.slice_args is None
      else [
        part.slice_args.limit_index - part.slice_args.start_index
        if i == part.slice_args.axis
        else n
        for i, n in enumerate(part.unsliced_data.shape)
      ]
    )
    (device,) = part.unsliced_data.devices()
    sizes[device] += int(np.prod(shape)) * array.dtype.itemsize
  return sizes


@pytest.mark.parametrize(
  ("shape", "spec"),
  [
    ((8, 16), P("fsdp")),  # four shards, each in two halves
    ((8, 16), P()),  # eight parts of what all have
    ((4, 5), P("fsdp")),  # shards of 1 x 5: one of the two writes all
    ((), P()),
    ((16, 3), P(("data", "fsdp"))),  # nobody has what another one has
  ],
)
def test_devices_write_what_orbax_has_them_write(mesh, shape, spec):
  sharding = NamedSharding(mesh, spec)
  array = jax.device_put(np.zeros(shape, np.float32), sharding)
  save = stopping.of_state([jax.ShapeDtypeStruct(shape, np.float32)], [sharding])
  expected = of_orbax(array)
  assert save.device == max(expected.values())
  assert save.total == save.host == expected.total() == array.nbytes
  assert save.hosts == 1


def test_hosts_share_what_all_have(mesh, monkeypatch):
  class Host:
    """A device of another host."""

    def __init__(self, index):
      self.process_index = index // 2

  class Sharding:
    def shard_shape(self, shape):
      return shape[0] // 4, *shape[1:]

    def devices_indices_map(self, shape):
      step = shape[0] // 4
      devices = [Host(i) for i in range(8)]
      return {
        d: (slice(i % 4 * step, (i % 4 + 1) * step), slice(None)) for i, d in enumerate(devices)
      }

  array = jax.ShapeDtypeStruct((8, 128), np.float32)
  save = stopping.of_state([array], [Sharding()])
  assert (save.total, save.host, save.hosts) == (4 * KIB, KIB, 4)


def test_seconds_are_named():
  save = stopping.Save(total=64 * 10**9, host=10**9, device=10**9, hosts=64)
  parts = save.seconds(2.0)
  assert parts["2 steps"] == 4.0
  assert parts["devices to hosts"] == 0.5
  assert parts["hosts to the bucket"] == 5.0
  json.dumps(parts)


def lines(**changed):
  save = stopping.Save(total=64 * KIB, host=16 * KIB, device=KIB, hosts=4)
  given = {"seconds": 3.6, "bound": False, "steps": None, "chips": 256, "price": None, **changed}
  return dict(rental.rows(save, **given))


def test_chip_hours_and_their_price():
  rows = lines()
  assert rows["  chip-hours"].startswith("256 for 1,000 steps")
  assert "  cost" not in rows
  assert rows["  checkpoint"] == "64.0 KiB by 4 hosts, 16.0 KiB by the busiest"
  assert rows["  SIGTERM to saved"].startswith("10.2 s: 2 steps 7.2,")
  rows = lines(steps=500, price=1.5, chips=100)
  assert rows["  chip-hours"].startswith("50 for 500 steps")
  assert rows["  cost"] == "$75.00; an hour of 100 chips at $1.5 is $150.00"


def test_a_bound_is_said_to_be_one():
  rows = lines(bound=True, price=1.0)
  assert all(rows[name].startswith("at least ") for name in ("  chip-hours", "  cost"))
  assert "no forecast" in rows["rented"]
