"""Devices that are not there: TPU slices and GPU servers described well enough to compile for.

The TPU compiler comes with libtpu and needs no TPU; the GPU compiler comes with JAX's CUDA plugin
and takes a textual description of the card.
"""

import dataclasses
import os
import re

import jax

from ofa_jax.engine import tpu_compiler

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
  """One kind of accelerator, as its vendor publishes it, per JAX device.

  Attributes:
    platform: "tpu" or "cuda".
    memory: bytes that a program can have.
    peak: dense bfloat16 FLOP/s.
    dims: axes of a topology's shape.
    clock: cycles a second that the compiler's estimates count, where it is published.
    devices_a_chip: devices, as JAX counts them, of what is rented as one.
  """

  platform: str
  memory: int
  peak: float
  dims: int
  clock: float | None = None
  devices_a_chip: int = 1


# Memory of a TPU is what its compiler has to give, a little less than the published 32, 16, 95, 32
# and 192 GB a chip. A chip of tpu7x is two devices.
KINDS = {
  "v4": Kind(platform="tpu", memory=int(30.75 * GIB), peak=275e12, dims=3, clock=1.05e9),
  "v5e": Kind(platform="tpu", memory=int(15.75 * GIB), peak=197e12, dims=2, clock=1.5e9),
  "v5p": Kind(platform="tpu", memory=int(95.74 * GIB), peak=459e12, dims=3, clock=1.75e9),
  "v6e": Kind(platform="tpu", memory=int(31.25 * GIB), peak=918e12, dims=2),
  "tpu7x": Kind(platform="tpu", memory=int(94.75 * GIB), peak=1153.5e12, dims=3, devices_a_chip=2),
  "h100": Kind(platform="cuda", memory=80 * 10**9, peak=989.4e12, dims=1),
}

# Devices as JAX names them; an H200 computes what an H100 does, from more memory.
_PEAKS = {
  "TPU v4": KINDS["v4"].peak,
  "TPU v5 lite": KINDS["v5e"].peak,
  "TPU v5": KINDS["v5p"].peak,
  "TPU v6 lite": KINDS["v6e"].peak,
  "TPU7x": KINDS["tpu7x"].peak,
  "NVIDIA H100 80GB HBM3": KINDS["h100"].peak,
  "NVIDIA H200": KINDS["h100"].peak,
}

# H100 SXM5 80 GB: NVIDIA's H100 datasheet and the CUDA programming guide's table for compute
# capability 9.0.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3350000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 80000000000
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# Without a card nothing can be timed: no autotuning, and products through cuBLAS, which needs none.
_OPTIONS = {
  "tpu": {},
  "cuda": {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False},
}

INSTALL = {
  "tpu": 'pip install -e ".[tpu]", or only the compiler that belongs to this JAX: '
  'pip install "libtpu==0.0.42.*" for jax 0.10.2',
  "cuda": 'pip install -e ".[cuda]"',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
  """`kind:shape[,slices=N]`: "v5e:16x16", "v5p:4x4x4,slices=2", "h100:8"."""

  kind: str
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def hardware(self) -> Kind:
    return KINDS[self.kind]

  @property
  def compiler_options(self) -> dict[str, int | bool]:
    return _OPTIONS[self.hardware.platform]


def parse(text: str) -> Topology:
  """Reads a topology's name; ValueError says what is wrong with it."""
  parsed = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:,slices=(\d+))?", text)
  if not parsed or parsed[1] not in KINDS:
    raise ValueError(
      f"--topology: expected KIND:SHAPE[,slices=N] with KIND one of {', '.join(KINDS)}, like "
      f"v5e:16x16, v5p:4x4x4, v6e:16x16,slices=2 or h100:8; found {text!r}"
    )
  kind, shape = parsed[1], tuple(int(n) for n in parsed[2].split("x"))
  slices = int(parsed[3] or 1)
  dims = KINDS[kind].dims
  if len(shape) != dims or 0 in shape or slices < 1:
    raise ValueError(f"--topology: expected {dims} positive axes for {kind}, found {text!r}")
  if slices > 1 and KINDS[kind].platform != "tpu":
    raise ValueError(f"--topology: slices are of TPUs, found {text!r}")
  return Topology(kind=kind, shape=shape, slices=slices)


def peak(device_kind: str) -> float | None:
  """Published dense bfloat16 FLOP/s of a device as JAX names it; None where it is not known."""
  return _PEAKS.get(device_kind)


def devices(topology: Topology) -> list[jax.Device]:
  """The devices to compile for.

  Raises:
    ValueError: the compiler is not installed, or knows no such topology.
  """
  from jax.experimental import topologies

  platform = topology.hardware.platform
  shape = "x".join(str(n) for n in topology.shape)
  if platform == "tpu":
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or it asks the network for a TPU's metadata
    tpu_compiler.deepen_stack()
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing here holds a real TPU
    name = f"{topology.kind}:{shape}"
    options = {}
    if topology.kind == "v4":
      # Two cores appear as one device, as they do on real machines.
      options |= {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
      options |= {"wrap": (False,) * 3}
    if topology.slices > 1:
      options["num_slices"] = topology.slices
  else:
    name = ""
    options = {"target_config": _H100, "topology": f"1x1x{shape}"}
  try:
    described = topologies.get_topology_desc(
      platform=platform, topology_name=name, **options
    ).devices
  except Exception as e:
    reason = str(e).splitlines()[0] if str(e) else type(e).__name__
    raise ValueError(
      f"Cannot describe {topology.kind}:{shape} ({reason}). If the compiler is missing: "
      + INSTALL[platform]
    ) from e
  return list(described)
