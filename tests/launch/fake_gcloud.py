"""A gcloud whose TPU workers are folders of this machine: what ssh is told is run in them.

FAKE names the folder of its state: `states`, what `describe` answers, one a line and the last one
for ever; `failures`, how many times it fails before; `silent`, how many workers are passed over
as the real one does with those that it cannot reach; `calls`, what it was told. Flags that no real
gcloud has are refused.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import contextlib

import gcloud_flags

FAKE = Path(os.environ["FAKE"])
WORKERS = int(os.environ.get("FAKE_WORKERS", 2))


def states():
  path = FAKE / "states"
  return path.read_text().split() if path.exists() else []


def workers():
  return [FAKE / f"worker-{i}" for i in range(WORKERS)]


def take_away(state="SUSPENDED"):
  """What a pre-emption leaves: nothing on the workers, and the state."""
  for home in workers():
    for pid in home.glob("ofa_jax/run/pid"):
      # Its group is the supervisor and its command: setsid made it one.
      with contextlib.suppress(ProcessLookupError, ValueError):
        os.killpg(int(pid.read_text()), signal.SIGKILL)
    shutil.rmtree(home, ignore_errors=True)
  (FAKE / "states").write_text(state)


def fail(text):
  sys.exit(f"ERROR: (gcloud.compute.tpus.queued-resources) {text}")


def flag(words, name):
  return next((w.partition("=")[2] for w in words if w.startswith(f"--{name}=")), None)


def describe(words):
  failures = FAKE / "failures"
  left = int(failures.read_text()) if failures.exists() else 0
  if left:
    failures.write_text(str(left - 1))
    fail("the server said: try again later")
  now = states()
  if not now:
    fail("NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/n' was not found")
  if "--format=json" in words:
    print(json.dumps({"state": {"state": now[0]}, "tpu": {"nodeSpec": [{"nodeId": words[4]}]}}))
    return
  print(now[0])
  if len(now) > 1:
    (FAKE / "states").write_text("\n".join(now[1:]))


def describe_node(words):
  print(json.dumps({"networkEndpoints": [{"port": 8470}] * WORKERS}))


def create(words):
  (FAKE / "states").write_text("WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE")


def reached(words):
  if states()[:1] != ["ACTIVE"]:
    fail("the workers cannot be reached")
  chosen = flag(words, "worker")
  silent = FAKE / "silent"
  passed = int(silent.read_text()) if silent.exists() else 0
  return [home for i, home in enumerate(workers()) if chosen in ("all", str(i))][passed:]


def ssh(words):
  homes = reached(words)
  for home in homes:
    home.mkdir(exist_ok=True)
  processes = [
    subprocess.Popen(
      ["bash", "-c", flag(words, "command")],
      cwd=home,
      env={**os.environ, "HOME": str(home), "WORKER": home.name},
    )
    for home in homes
  ]
  sys.exit(max((process.wait() for process in processes), default=0))


def scp(words):
  *sources, target = [w for w in words[4:] if not w.startswith("--")]
  for home in reached(words):
    for source in sources:
      shutil.copy(source, home / target.partition(":")[2])


def delete(words):
  take_away()
  (FAKE / "states").unlink()


def main():
  words = sys.argv[1:]
  with open(FAKE / "calls", "a") as file:
    file.write(json.dumps(words) + "\n")
  wrong = gcloud_flags.faults(words)
  if wrong:
    fail("; ".join(wrong))
  if words[2] == "tpu-vm":
    describe_node(words)
    return
  verb = words[4] if words[0] == "alpha" else words[3]
  {f.__name__: f for f in (describe, create, ssh, scp, delete)}[verb](words)


if __name__ == "__main__":
  main()
