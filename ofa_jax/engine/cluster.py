"""Which job this process belongs to, as the variables say that launchers and clusters set.

`JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` decide wherever all three are
there. With `--distributed` the variables of TPUs, SLURM, torchrun, SkyPilot and Open MPI are read;
where two of these describe different jobs, a person decides.
"""

import dataclasses
import errno
import glob
import importlib.util
import json
import logging
import os
import re
import socket
import sys
import threading
import zlib
from collections.abc import Callable, Mapping

import jax
from jax._src import cloud_tpu_init, distributed  # neither has a public name

from ofa_jax.engine import processes

OURS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Below what Linux gives to outgoing connections (32768 on) and Kubernetes to services (30000 on).
PORTS = range(20000, 30000)

_MEGASCALE = ("MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS")
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_HOST = "ofa_jax/host"
_EXPLICIT = "deactivate"  # how JAX is told to look for nothing itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """What `jax.distributed.initialize` is called with.

  Attributes:
    source: whose variables it is read from.
    address: host:port of process 0; None: JAX asks the cluster, as for all that is None.
    num: processes of the job.
    index: of this process.
    local_devices: those of the visible GPUs that are this process's; None: all of them.
    method: how JAX looks for what is None.
  """

  source: str
  address: str | None = None
  num: int | None = None
  index: int | None = None
  local_devices: tuple[int, ...] | None = None
  method: str | None = _EXPLICIT


def read(
  environ: Mapping[str, str],
  *,
  asked: bool,
  tpu: bool | None = None,
  num_gpus: int | None = None,
) -> Job | None:
  """The job that this process belongs to; None where it is alone.

  Args:
    environ: the variables.
    asked: a person said that there is one (`--distributed`).
    tpu: this is a TPU VM; None: is it?
    num_gpus: GPUs of this host where no variable says which are visible; None: they are counted.

  Raises:
    ValueError: variables are missing or contradict, or there is no job although one was asked for.
  """
  given = _Given(environ)
  gpus = _num_visible(given, num_gpus)
  if all(given.text(name) for name in OURS):
    job = _ours(given, gpus)
  else:
    stray = [name for name in OURS[1:] if given.text(name)]
    if stray:
      missing = [name for name in OURS if not given.text(name)]
      for name in missing:
        given.fault(f"{name} is not set")
      for name in stray:
        given.number(name)
      _check_address(given)
      given.check(
        f"{', '.join(OURS)} to describe a job together",
        "Set all three for several processes, or unset them for one.",
      )
    if not asked:
      return None  # an address by itself is what some platforms set everywhere
    job = _of_cluster(
      given, gpus, tpu=cloud_tpu_init.running_in_cloud_tpu_vm if tpu is None else tpu
    )
  return None if job.num == 1 else job


class _Given:
  """The variables, with what is wrong about those that were read."""

  def __init__(self, environ: Mapping[str, str]):
    self._environ = environ
    self.faults: list[str] = []

  def text(self, name: str) -> str:
    return self._environ.get(name, "").strip()

  def fault(self, text: str) -> None:
    self.faults.append(text)

  def needed(self, name: str, *, otherwise: str = "") -> str:
    text = self.text(name)
    if not text:
      self.fault(f"{name}{f' (or {otherwise})' if otherwise else ''} is not set")
    return text

  def number(self, name: str) -> int | None:
    """A number that must be there."""
    text = self.needed(name)
    if text and not text.isdecimal():
      self.fault(f"{name}={text} is no number")
    return int(text) if text.isdecimal() else None

  def place(self, index: str, num: str) -> tuple[int | None, int | None]:
    """A number that must be below another."""
    i, n = self.number(index), self.number(num)
    if i is not None and n is not None and i >= n:
      self.fault(f"{index}={i} is not below {num}={n}")
    return i, n

  def check(self, expected: str, cure: str) -> None:
    if self.faults:
      raise ValueError(f"Expected {expected}, found: {'; '.join(self.faults)}. {cure}")


def _ours(given: _Given, gpus: int) -> Job:
  index, num = given.place(OURS[2], OURS[1])
  _check_address(given)
  if given.text("JAX_LOCAL_DEVICE_IDS") and not re.fullmatch(
    r"\d+(,\d+)*", given.text("JAX_LOCAL_DEVICE_IDS")
  ):
    given.fault(f"JAX_LOCAL_DEVICE_IDS={given.text('JAX_LOCAL_DEVICE_IDS')} are no numbers")
  given.check(
    f"{', '.join(OURS)} to describe a job together",
    "Set all three for several processes, or unset them for one.",
  )
  # Of a step whose tasks are the processes, SLURM knows how many share a host.
  in_step = (given.text("SLURM_PROCID"), given.text("SLURM_STEP_NUM_TASKS")) == (
    str(index),
    str(num),
  )
  local = _slurm_devices(given, gpus) if in_step else None
  given.check("SLURM's variables to describe a step", _THROUGH_SRUN)
  return Job(
    source=", ".join(OURS),
    address=given.text(OURS[0]),
    num=num,
    index=index,
    local_devices=local,
  )


def _of_cluster(given: _Given, gpus: int, *, tpu: bool) -> Job:
  """The job that one of the clusters describes."""
  if tpu:
    return _tpu(given)
  readers: dict[str, Callable[[_Given, int], Job]] = {
    "SLURM_JOB_ID": _slurm,
    "MASTER_ADDR": _torchrun,
    "SKYPILOT_NODE_RANK": _skypilot,
    "OMPI_COMM_WORLD_SIZE": _open_mpi,
  }
  jobs = [reader(given, gpus) for name, reader in readers.items() if given.text(name)]
  if any((job.num, job.index) != (jobs[0].num, jobs[0].index) for job in jobs):
    described = "; ".join(f"{job.source} say process {job.index} of {job.num}" for job in jobs)
    raise ValueError(
      f"Expected one job in the environment, found several: {described}. Unset the variables of "
      f"the other, or decide with {', '.join(OURS)}."
    )
  if jobs:
    return jobs[0]
  if given.text("KUBERNETES_SERVICE_HOST") and importlib.util.find_spec("kubernetes"):
    return Job(source="Kubernetes", method=None)
  raise ValueError(
    "Expected to find the other processes of the job for --distributed, found no TPU and none of "
    f"{', '.join((OURS[0], *readers))} in the environment. Leave --distributed out for one "
    f"process, or set {', '.join(OURS)}."
  )


def _tpu(given: _Given) -> Job:
  """A TPU VM of GKE, which has variables, or of Compute Engine, whose metadata JAX asks."""
  if any(given.text(name) for name in _MEGASCALE):
    given.needed(_MEGASCALE[2])
    given.place(_MEGASCALE[1], _MEGASCALE[0])
  hosts = given.text("TPU_PROCESS_ADDRESSES") or given.text("TPU_WORKER_HOSTNAMES")
  if hosts:
    worker = given.number("TPU_WORKER_ID")
    num = len(hosts.split(","))
    if worker is not None and worker >= num:
      given.fault(f"TPU_WORKER_ID={worker} is not below the {num} TPU_WORKER_HOSTNAMES={hosts}")
  given.check(
    "the TPU's variables to describe a slice, or MEGASCALE_* to describe several",
    "GKE sets them for a JobSet in one node pool a slice, see launch/README.md.",
  )
  return Job(source="the TPU", method="gketpu" if hosts else "gcetpu")


_THROUGH_SRUN = "Start with srun (launch/slurm.sbatch does), or leave --distributed out for one."


def _slurm(given: _Given, gpus: int) -> Job:
  index, num = given.place("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
  address = given.text(OURS[0])
  if not address:
    nodes = given.needed("SLURM_STEP_NODELIST", otherwise=OURS[0])
    parts = (given.text("SLURM_JOB_ID"), given.text("SLURM_STEP_ID"))
    address = f"{_first_host(nodes)}:{_port(given, *parts)}"
  local = _slurm_devices(given, gpus)
  given.check("SLURM's variables to describe a step", _THROUGH_SRUN)
  return Job(
    source="SLURM_STEP_NUM_TASKS, SLURM_PROCID",
    address=address,
    num=num,
    index=index,
    local_devices=local,
  )


def _slurm_devices(given: _Given, gpus: int) -> tuple[int, ...] | None:
  node = given.number("SLURM_NODEID")
  tasks = _expand(given.needed("SLURM_STEP_TASKS_PER_NODE"))
  if node is None or not tasks:
    return None
  if node >= len(tasks):
    given.fault(f"SLURM_NODEID={node} is none of the {len(tasks)} nodes of the step")
    return None
  whole = given.text("SLURM_GPUS_ON_NODE")
  return _share(
    given, "SLURM_LOCALID", tasks[node], gpus, whole=int(whole) if whole.isdecimal() else None
  )


def _torchrun(given: _Given, gpus: int) -> Job:
  index, num = given.place("RANK", "WORLD_SIZE")
  host, port = given.text("MASTER_ADDR"), given.number("MASTER_PORT")
  local = None
  if given.text("LOCAL_RANK") or given.text("LOCAL_WORLD_SIZE"):
    local = _share(given, "LOCAL_RANK", given.number("LOCAL_WORLD_SIZE"), gpus)
  given.check("MASTER_ADDR, MASTER_PORT, WORLD_SIZE and RANK to describe a job", _SET_OURS)
  return Job(
    source="WORLD_SIZE, RANK", address=f"{host}:{port}", num=num, index=index, local_devices=local
  )


def _skypilot(given: _Given, gpus: int) -> Job:
  del gpus  # one process a node
  index, num = given.place("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES")
  hosts = given.needed("SKYPILOT_NODE_IPS").split()
  if num is not None and hosts and len(hosts) != num:
    given.fault(f"SKYPILOT_NODE_IPS has {len(hosts)} hosts, SKYPILOT_NUM_NODES={num}")
  given.check("SkyPilot's variables to describe a job", _SET_OURS)
  address = given.text(OURS[0]) or f"{hosts[0]}:{_port(given, given.text('SKYPILOT_TASK_ID'))}"
  return Job(source="SKYPILOT_NUM_NODES, SKYPILOT_NODE_RANK", address=address, num=num, index=index)


def _open_mpi(given: _Given, gpus: int) -> Job:
  index, num = given.place("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
  local = _share(
    given, "OMPI_COMM_WORLD_LOCAL_RANK", given.number("OMPI_COMM_WORLD_LOCAL_SIZE"), gpus
  )
  address = given.text(OURS[0])
  if not address:
    given.needed("OMPI_MCA_orte_hnp_uri", otherwise=OURS[0])
  given.check("Open MPI's variables to describe a job", _SET_OURS)
  return Job(
    source="OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_RANK",
    address=address or None,
    num=num,
    index=index,
    local_devices=local,
    method=_EXPLICIT if address else "ompi",
  )


_SET_OURS = f"Or set {', '.join(OURS)} instead."


def _share(
  given: _Given, rank: str, tasks: int | None, gpus: int, *, whole: int | None = None
) -> tuple[int, ...] | None:
  """Which of the visible GPUs belong to one of the tasks of a host; None: all.

  Args:
    given: the variables.
    rank: the name of the task's number on this host.
    tasks: on this host.
    gpus: visible ones.
    whole: GPUs of all tasks of this host, where that is known: a task that sees fewer was given its
      own by the cluster.
  """
  local = given.number(rank)
  if local is None or not tasks or tasks == 1 or not gpus or (whole is not None and gpus < whole):
    return None
  if local >= tasks:
    given.fault(f"{rank}={local} is not below the {tasks} tasks of this host")
    return None
  if gpus % tasks:
    given.fault(f"the {gpus} visible GPUs of this host cannot be shared among its {tasks} tasks")
    return None
  each = gpus // tasks
  return tuple(range(local * each, (local + 1) * each))


def _num_visible(given: _Given, counted: int | None) -> int:
  for name in _VISIBLE:
    if text := given.text(name):
      return 0 if text in ("-1", "NoDevFiles") else len(text.split(","))
  return len(glob.glob("/dev/nvidia[0-9]*")) if counted is None else counted


def _check_address(given: _Given) -> None:
  address = given.text(OURS[0])
  if address and not address.rpartition(":")[2].isdecimal():
    given.fault(f"{OURS[0]}={address} has no port (host:1234)")


def _port(given: _Given, *parts: str) -> int:
  """The same for all processes of a job, another one for most other jobs."""
  text = given.text("JAX_COORDINATOR_PORT")
  if text.isdecimal():
    return int(text)
  return PORTS[zlib.crc32("/".join(parts).encode()) % len(PORTS)]


def _first_host(nodes: str) -> str:
  """Of gpu[003-010,12],cpu1 it is gpu003; of a[1-2]b[3-4] it is a1b3."""
  first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0]
  return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _expand(counts: str) -> list[int]:
  """Of 2(x3),1 it is [2, 2, 2, 1]."""
  return [
    int(count)
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?(?:,|$)", counts)
    for _ in range(int(times or 1))
  ]


def join(job: Job, *, timeout: int) -> None:
  """Joins the other processes; what goes wrong there ends this one with a message.

  Args:
    job: from `read`.
    timeout: seconds in which all must have come (`--start-timeout`).

  Raises:
    ValueError: something else listens at the job's port, or JAX refuses.
    ConnectionError: another process or the network failed.
  """
  where = (
    f"at {job.address} as process {job.index} of {job.num}" if job.address else "of its cluster"
  )
  expected = f"Expected to join the processes of the job {where}"

  def too_late():
    print(
      f"error: {expected} within --start-timeout={timeout} s, found that not all of them came. Do "
      "all of them run, with the same address, and can they reach it? It was read from "
      f"{job.source}.",
      file=sys.stderr,
      flush=True,
    )
    processes.leave(processes.AGAIN)

  if job.index == 0 and job.address and not os.environ.get("JAX_COORDINATOR_BIND_ADDRESS"):
    _check_free(job.address)
  logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)
  # JAX's own limit aborts the process; this one comes before it.
  timer = threading.Timer(timeout, too_late)
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
      job.address,
      job.num,
      job.index,
      local_device_ids=job.local_devices,
      cluster_detection_method=job.method,
      initialization_timeout=timeout + 60,
    )
    state = distributed.global_state
    record = {"host": socket.gethostname(), "source": job.source}
    state.client.key_value_set(f"{_HOST}/{state.process_id}", json.dumps(record))
  except (RuntimeError, ValueError) as e:  # JaxRuntimeError is one
    kind = ConnectionError if processes.status_of(e) == processes.AGAIN else ValueError
    raise kind(f"{expected}, found: {str(e).splitlines()[0]}") from e
  finally:
    timer.cancel()


def _check_free(address: str) -> None:
  """gRPC would share the port with whoever listens there, and get half of the connections."""
  port = int(address.rpartition(":")[2])
  try:
    socket.create_server(("", port)).close()
  except OSError as e:
    if e.errno != errno.EADDRINUSE:
      return  # JAX says what is wrong
    raise ValueError(
      f"Expected the port {port} of this host to be free for process 0 of the job, found that "
      f"something listens there. Set {OURS[0]} to another one for all processes, or "
      "JAX_COORDINATOR_PORT where the cluster's variables are read."
    ) from e


def layout() -> list[str]:
  """Which process is on which host with which devices, a line each; empty on one process.

  Only process 0 gets them.
  """
  state = distributed.global_state
  if state.client is None or state.num_processes == 1 or state.process_id != 0:
    return []
  records = [
    json.loads(state.client.blocking_key_value_get(f"{_HOST}/{i}", 60_000))
    for i in range(state.num_processes)
  ]
  lines = [
    f"Job of {state.num_processes} processes at {state.coordinator_address}, of "
    f"{records[0]['source']}"
  ]
  for i, record in enumerate(records):
    own = [d for d in jax.devices() if d.process_index == i]
    slices = sorted({d.slice_index for d in own if getattr(d, "slice_index", None) is not None})
    kind = f" {own[0].device_kind}: {', '.join(str(d.id) for d in own)}" if own else ""
    part = f" of slice {', '.join(map(str, slices))}" if slices else ""
    lines.append(f"Process {i} on {record['host']}: {len(own)}{kind}{part}")
  return lines
