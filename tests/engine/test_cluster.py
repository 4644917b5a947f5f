"""The job that the variables of launchers and clusters describe, or what is wrong about them."""

import itertools
import json
import socket

import jax
import pytest

from ofa_jax.engine import cluster, processes

OURS = {
  "JAX_COORDINATOR_ADDRESS": "node1:1234",
  "JAX_NUM_PROCESSES": "16",
  "JAX_PROCESS_ID": "9",
}


def step(node, local, *, nodes=2, tasks=8, gpus=8, bound=False, **more):
  """What srun gives to a task on nodes of GPUs, all of them visible or the task's own only."""
  visible = gpus // tasks if bound else gpus
  return {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": f"gpu[03-{2 + nodes:02d}]",
    "SLURM_STEP_NUM_TASKS": f"{nodes * tasks}",
    "SLURM_NTASKS": f"{nodes * tasks}",
    "SLURM_STEP_TASKS_PER_NODE": f"{tasks}(x{nodes})" if nodes > 1 else f"{tasks}",
    "SLURM_PROCID": f"{node * tasks + local}",
    "SLURM_NODEID": f"{node}",
    "SLURM_LOCALID": f"{local}",
    "SLURM_GPUS_ON_NODE": f"{gpus}",
    "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(visible))),
    **more,
  }


def read(environ, *, asked=True, tpu=False, num_gpus=0):
  return cluster.read(environ, asked=asked, tpu=tpu, num_gpus=num_gpus)


def test_alone():
  assert read({}, asked=False) is None
  assert read({"JAX_COORDINATOR_ADDRESS": "host:1"}, asked=False) is None
  assert read({**OURS, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, asked=False) is None
  assert read(step(0, 0, nodes=1, tasks=1)) is None
  assert read(step(1, 3), asked=False) is None  # SLURM's need the flag


def test_ours_decide_over_everything_else():
  environ = {**OURS, "MASTER_ADDR": "a", "WORLD_SIZE": "3", "RANK": "7", "SLURM_JOB_ID": "1"}
  for asked, tpu in itertools.product((False, True), (False, True)):
    job = read(environ, asked=asked, tpu=tpu)
    assert (job.address, job.num, job.index, job.method) == ("node1:1234", 16, 9, "deactivate")
    assert job.local_devices is None


@pytest.mark.parametrize(
  ("tasks", "bound", "devices"),
  [
    (1, False, lambda local: None),  # one process a node has all of its GPUs
    (8, False, lambda local: (local,)),  # one a GPU
    (2, False, lambda local: tuple(range(4 * local, 4 * local + 4))),
    (8, True, lambda local: None),  # --gpus-per-task: SLURM has given each its own
    (2, True, lambda local: None),
  ],
)
@pytest.mark.parametrize("ours", [False, True])
def test_every_process_of_a_step_has_the_devices_it_should_have(
  monkeypatch, tasks, bound, devices, ours
):
  """Two nodes of 8 GPUs, as `jax.distributed.initialize` is told of them."""
  calls = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
  monkeypatch.setattr(cluster.distributed.global_state, "client", _Store({}))
  places = list(itertools.product(range(2), range(tasks)))
  for index, (node, local) in enumerate(places):
    environ = step(node, local, tasks=tasks, bound=bound)
    if ours:  # as launch/slurm.sbatch starts them
      environ |= {
        "JAX_COORDINATOR_ADDRESS": "gpu03:20123",
        "JAX_NUM_PROCESSES": f"{2 * tasks}",
        "JAX_PROCESS_ID": f"{index}",
      }
    cluster.join(read(environ, asked=not ours), timeout=5)
  addresses = {a[0] for a, _ in calls}
  assert len(addresses) == 1 and addresses.pop().startswith("gpu03:2")
  assert [a[1:] for a, _ in calls] == [(2 * tasks, i) for i in range(2 * tasks)]
  assert [k["local_device_ids"] for _, k in calls] == [devices(local) for _, local in places]
  assert {k["cluster_detection_method"] for _, k in calls} == {"deactivate"}


class _Store:
  """The keys and values of a job's coordination service."""

  def __init__(self, values):
    self.values = values

  def key_value_set(self, key, value):
    self.values[key] = value

  def blocking_key_value_get(self, key, _):
    return self.values[key]


def test_gpus_without_variables_are_counted():
  environ = step(1, 1, tasks=2)
  del environ["CUDA_VISIBLE_DEVICES"], environ["SLURM_GPUS_ON_NODE"]
  assert read(environ, num_gpus=4).local_devices == (2, 3)
  assert read(environ, num_gpus=0).local_devices is None  # CPUs


@pytest.mark.parametrize(
  ("nodes", "first"),
  [
    ("vm", "vm"),
    ("gpu03,gpu07", "gpu03"),
    ("gpu[003-010,12],cpu1", "gpu003"),
    ("r[7,9]n[1-2]-ib", "r7n1-ib"),
    ("a-[3]", "a-3"),
  ],
)
def test_the_first_host_of_a_node_list(nodes, first):
  job = read(step(0, 0, SLURM_STEP_NODELIST=nodes))
  assert job.address.rpartition(":")[0] == first


def test_ports():
  ports = [int(read(step(0, 0, SLURM_JOB_ID=str(i))).address.rpartition(":")[2]) for i in range(50)]
  assert set(ports) <= set(cluster.PORTS) and len(set(ports)) > 45
  assert ports == [int(read(step(1, 7, SLURM_JOB_ID=str(i))).address[6:]) for i in range(50)]
  assert read(step(0, 0, JAX_COORDINATOR_PORT="99")).address == "gpu03:99"
  assert read(step(0, 0, JAX_COORDINATOR_ADDRESS="ib0:7")).address == "ib0:7"


OTHERS = {
  "torchrun": {
    **{"MASTER_ADDR": "h", "MASTER_PORT": "29500", "WORLD_SIZE": "4", "RANK": "3"},
    **{"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "4,5,6,7"},
  },
  "sky": {
    "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5",
    "SKYPILOT_TASK_ID": "sky-2026-01-01-00-00-00-000000_train_1", "CUDA_VISIBLE_DEVICES": "0,1",
  },
  "mpi": {
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:34911",
    "CUDA_VISIBLE_DEVICES": "0,1",
  },
}  # fmt: skip


def test_other_launchers():
  job = read(OTHERS["torchrun"])
  assert (job.address, job.num, job.index, job.local_devices) == ("h:29500", 4, 3, (2, 3))
  job = read(OTHERS["sky"])
  assert (job.num, job.index, job.local_devices) == (2, 1, None)
  assert job.address.startswith("10.0.0.4:2")
  job = read(OTHERS["mpi"])
  assert (job.address, job.num, job.index, job.method) == (None, 2, 1, "ompi")
  assert job.local_devices == (1,)
  job = read({**OTHERS["mpi"], "JAX_COORDINATOR_ADDRESS": "h:1"})
  assert (job.address, job.method) == ("h:1", "deactivate")


def test_tpus():
  gke = {"TPU_WORKER_HOSTNAMES": "t-0.s,t-1.s", "TPU_WORKER_ID": "1"}
  slices = {
    "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "t-0.s"
  }  # fmt: skip
  for environ in (gke, {**gke, **slices}, {**gke, **OTHERS["sky"]}):
    job = read(environ, tpu=True)
    assert (job.address, job.num, job.method) == (None, None, "gketpu")
  assert read({}, tpu=True).method == "gcetpu"


@pytest.mark.parametrize(
  ("environ", "tpu", "texts"),
  [
    ({**OURS, "JAX_PROCESS_ID": ""}, False, ["JAX_PROCESS_ID is not set"]),
    ({"JAX_PROCESS_ID": "0"}, False, ["ADDRESS is not set", "JAX_NUM_PROCESSES is not set"]),
    ({**OURS, "JAX_PROCESS_ID": "16"}, False, ["JAX_PROCESS_ID=16 is not below JAX_NUM_PROCESSES"]),
    ({**OURS, "JAX_NUM_PROCESSES": "-1"}, False, ["JAX_NUM_PROCESSES=-1 is no number"]),
    ({**OURS, "JAX_LOCAL_DEVICE_IDS": "0;1"}, False, ["JAX_LOCAL_DEVICE_IDS=0;1 are no numbers"]),
    ({}, False, ["no TPU and none of JAX_COORDINATOR_ADDRESS, SLURM_JOB_ID, MASTER_ADDR"]),
    # In an allocation, without srun.
    (
      {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"},
      False,
      ["SLURM_PROCID is not set", "SLURM_STEP_NODELIST (or JAX_COORDINATOR_ADDRESS) is", "srun"],
    ),
    (
      step(0, 0, tasks=3),
      False,
      ["8 visible GPUs of this host cannot be shared among its 3 tasks"],
    ),
    (step(2, 0), False, ["SLURM_PROCID=16 is not below", "SLURM_NODEID=2 is none of the 2 nodes"]),
    ({**OTHERS["torchrun"], "MASTER_PORT": ""}, False, ["MASTER_PORT is not set"]),
    ({**OTHERS["sky"], "SKYPILOT_NODE_IPS": "a"}, False, ["SKYPILOT_NODE_IPS has 1 hosts"]),
    (
      {**OTHERS["mpi"], "OMPI_MCA_orte_hnp_uri": ""},
      False,
      ["OMPI_MCA_orte_hnp_uri (or JAX_COORDINATOR_ADDRESS) is not set"],
    ),
    # Two launchers that do not agree.
    (
      {**step(0, 1), **OTHERS["torchrun"]},
      False,
      ["SLURM_PROCID say process 1 of 16", "WORLD_SIZE, RANK say process 3 of 4"],
    ),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True, ["TPU_WORKER_ID is not set"]),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "2"}, True, ["not below the 2 TPU_WORKER"]),
    (
      {"MEGASCALE_NUM_SLICES": "2"},
      True,
      ["MEGASCALE_COORDINATOR_ADDRESS is not set", "MEGASCALE_SLICE_ID is not set"],
    ),
    (
      {
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "2",
        "MEGASCALE_COORDINATOR_ADDRESS": "h",
      },
      True,
      ["MEGASCALE_SLICE_ID=2 is not below MEGASCALE_NUM_SLICES=2"],
    ),
  ],
)
def test_what_is_missing_or_contradicts_is_told_by_name(environ, tpu, texts):
  with pytest.raises(ValueError, match=r"Expected .* found") as error:
    read(environ, tpu=tpu)
  for text in texts:
    assert text in str(error.value)


def test_launchers_that_agree():
  environ = {**step(0, 3, nodes=1, tasks=4), **OTHERS["torchrun"]}
  assert read(environ).source.startswith("SLURM")


def test_a_port_that_is_taken():
  with socket.create_server(("", 0)) as server:
    port = server.getsockname()[1]
    job = cluster.Job(source="a test", address=f"localhost:{port}", num=2, index=0)
    with pytest.raises(ValueError, match=f"the port {port} of this host to be free"):
      cluster.join(job, timeout=5)


def test_who_is_where(monkeypatch):
  state = cluster.distributed.global_state
  numbers = ", ".join(str(d.id) for d in jax.devices())
  assert cluster.layout() == []
  host = json.dumps({"host": "node7", "source": "SLURM_PROCID"})
  monkeypatch.setattr(state, "client", _Store({f"ofa_jax/host/{i}": host for i in range(2)}))
  monkeypatch.setattr(state, "num_processes", 2)
  monkeypatch.setattr(state, "coordinator_address", "node7:1")
  assert cluster.layout() == [
    "Job of 2 processes at node7:1, of SLURM_PROCID",
    f"Process 0 on node7: {jax.device_count()} cpu: {numbers}",
    "Process 1 on node7: 0",
  ]
  monkeypatch.setattr(state, "process_id", 1)
  assert cluster.layout() == []


@pytest.mark.parametrize(
  ("error", "status"),
  [
    (ValueError("a config"), 1),
    (FileNotFoundError("a file"), 1),
    (ConnectionResetError("a bucket"), 75),
    (TimeoutError("a bucket"), 75),
    (jax.errors.JaxRuntimeError("UNAVAILABLE: socket closed"), 75),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), 1),
  ],
)
def test_statuses(error, status):
  assert processes.status_of(error) == status
