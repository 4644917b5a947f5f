"""A SLURM of one machine, with its own key, ports and state in a folder; needs root and no systemd.

  python -m tests.launch.slurm_cluster FOLDER COMMAND...

runs a command with it, SLURM_CONF set. For the GPUs of its node stand other names of /dev/null, of
which SLURM makes `CUDA_VISIBLE_DEVICES` as always.
"""

import contextlib
import os
import pathlib
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator

DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIG = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=60
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=2000 Gres=gpu:{gpus} State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60 State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2 State=UP
"""


def missing() -> str | None:
  """Why it cannot run here, or None."""
  if os.geteuid() != 0:
    return "SLURM's daemons want root"
  absent = [name for name in DAEMONS if shutil.which(name, path=_path()) is None]
  return f"{', '.join(absent)}: apt-get install slurm-wlm munge" if absent else None


def install() -> str | None:
  """Installs Debian's packages where they are missing; why that cannot be, or None."""
  reason = missing()
  if reason is None or os.geteuid() != 0 or shutil.which("apt-get") is None:
    return reason
  quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
  command = ["apt-get", "install", "--yes", "--no-install-recommends", "slurm-wlm", "munge"]
  for words in (["apt-get", "update"], command):
    done = subprocess.run(words, env=quiet, capture_output=True, text=True)
    if done.returncode != 0:
      return f"{' '.join(words)}: {done.stderr.strip()[-200:]}"
  return missing()


@contextlib.contextmanager
def running(folder: pathlib.Path, *, gpus: int = 8) -> Iterator[dict[str, str]]:
  """Starts the daemons and gives the environment of SLURM's commands.

  Args:
    folder: for keys, state and logs; of a short path, for the socket in it.
    gpus: of the node.

  Raises:
    RuntimeError: the node does not become idle; with the ends of the logs.
  """
  folder.mkdir(parents=True, exist_ok=True)
  folder.chmod(0o755)
  for name in ("state", "spool", "munge"):
    (folder / name).mkdir()
  host = socket.gethostname()
  config = CONFIG.format(
    folder=folder, host=host, ports=_free_ports(2), cpus=os.cpu_count(), gpus=gpus
  )
  (folder / "slurm.conf").write_text(config)
  for i in range(gpus):
    os.mknod(folder / f"gpu{i}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
  files = f"{folder}/gpu[0-{gpus - 1}]"
  (folder / "gres.conf").write_text(f"Name=gpu File={files} Flags=nvidia_gpu_env\n" if gpus else "")
  (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
  key = folder / "munge" / "key"
  key.write_bytes(os.urandom(1024))
  for path in (key, key.parent):
    path.chmod(0o700)
  environment = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf", "PATH": _path()}
  munge = ["munged", "--foreground", "--force", f"--key-file={key}"]
  munge += [f"--{name}-file={folder}/munge/{name}" for name in ("log", "pid", "seed")]
  munge += [f"--socket={folder}/munge.socket", "--num-threads=2"]
  started = []
  try:
    with open(folder / "daemons.log", "w") as log:
      for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D"]):
        started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        time.sleep(1)
    _wait_until_idle(folder, environment)
    yield environment
  finally:
    for process in reversed(started):
      process.terminate()
    for process in reversed(started):
      try:
        process.wait(timeout=20)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_until_idle(folder: pathlib.Path, environment: dict[str, str]) -> None:
  for _ in range(60):
    state = subprocess.run(
      ["sinfo", "--noheader", "--format=%T"], env=environment, capture_output=True, text=True
    )
    if state.stdout.strip() == "idle":
      return
    time.sleep(0.5)
  logs = "\n".join(
    path.read_text(errors="replace")[-2000:] for path in sorted(folder.glob("*.log"))
  )
  raise RuntimeError(f"no idle node: {state.stdout} {state.stderr}\n{logs}")


def _path() -> str:
  return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
  with contextlib.ExitStack() as stack:
    servers = [stack.enter_context(socket.create_server(("", 0))) for _ in range(count)]
    return [server.getsockname()[1] for server in servers]


def main() -> None:
  """See above."""
  reason = missing()
  if reason:
    raise SystemExit(reason)
  with running(pathlib.Path(sys.argv[1])) as environment:
    raise SystemExit(subprocess.call(sys.argv[2:], env=environment))


if __name__ == "__main__":
  main()
