#!/usr/bin/env python3
r"""A run on Cloud TPU VMs: asks for a slice, installs, starts, and keeps the run going.

  python launch/tpu_vm.py create  NAME --zone=Z --type=v6e-256 [--spot] [--slices=N]
  python launch/tpu_vm.py install NAME --zone=Z [--package=SPEC]
  python launch/tpu_vm.py run     NAME --zone=Z -- python -m ofa_jax.train ...
  python launch/tpu_vm.py keep    NAME --zone=Z --type=v6e-256 --spot -- python -m ofa_jax.train ...
  python launch/tpu_vm.py status | logs [--follow] | stop | delete  NAME --zone=Z

`run` starts the command on every worker under `supervise.sh` and returns; it goes on when the
connection ends. `keep` does all of it and stays: when the slice is taken away it asks for another
one, installs and starts the same command, until the command has finished (0) or ended with a
status that starting again would not mend. It may itself be stopped and started again.

A slice is a queued resource of the Cloud TPU API. Nothing is waited for without an end: each call
of gcloud has a limit, a `describe` that fails is tried a few times, a request that is not
fulfilled in --wait hours ends. It needs gcloud, Python 3.9 and nothing else.
"""

import argparse
import json
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
# The TPU software of each kind of accelerator (cloud.google.com/tpu/docs/runtimes).
RUNTIMES = {
  "v4": "tpu-ubuntu2204-base",
  "v5litepod": "v2-alpha-tpuv5-lite",
  "v5p": "v2-alpha-tpuv5",
  "v6e": "v2-alpha-tpuv6e",
}
# Of newer chips the Cloud TPU API offers none: Google's page on queued resources names GKE.
ONLY_GKE = ("tpu7x", "v7", "ironwood")
WAITING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
LOST = ("SUSPENDING", "SUSPENDED", "FAILED", "DELETING", "MISSING")
FOLDER = "ofa_jax"  # on the workers, in the home folder
UNTIL_AGAIN = (75, 143)  # ends of a command that was told to stop with the machine it ran on
TRIES = 5  # of a `describe` or an ssh, before its error is the end

# On each worker: uv brings Python 3.12, for the images' own is older.
INSTALL = """set -e
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || python3 -m pip install --quiet --user uv
cd {folder}
uv venv --quiet --allow-existing --python=3.12 venv
uv pip install --quiet --python=venv/bin/python --requirement=requirements-tpu.txt
uv pip install --quiet --python=venv/bin/python --no-deps --reinstall {package}
venv/bin/python -c 'import ofa_jax; print("installed", ofa_jax.__version__)'
"""
# A supervisor holds a lock as long as it lives, whatever process has its number after a reboot.
# What runs already goes on: after one worker was rebooted, only that one is started.
START = """cd {folder} 2>/dev/null && test -x venv/bin/python || {{
  echo "$(hostname): expected an installation, found none: tpu_vm.py install" >&2; exit 3; }}
if test -e run/pid && ! flock --nonblock run/pid true; then echo "runs already"; exit 0; fi
rm -f run/status run/pid
PATH="$PWD/venv/bin:$PWD:$PATH" RESTARTS={restarts} setsid nohup bash supervise.sh run {command} \\
  </dev/null >/dev/null 2>start.txt &
for i in $(seq 60); do test -s run/pid && break; sleep 1; done
test -s run/pid || {{ cat start.txt >&2; exit 1; }}
"""
STATUS = """cd {folder} 2>/dev/null || {{ echo "WORKER $(hostname) not-installed"; exit 0; }}
if test ! -e run/status; then echo "WORKER $(hostname) not-started"
elif test -s run/status; then echo "WORKER $(hostname) $(cat run/status)"
elif ! flock --nonblock run/pid true; then echo "WORKER $(hostname) running"
else echo "WORKER $(hostname) vanished"; fi
"""
STOP = """cd {folder} 2>/dev/null && test -e run/pid || exit 0
if flock --nonblock run/pid true; then exit 0; fi
kill -TERM "$(cat run/pid)"
for i in $(seq {seconds}); do test -s run/status && exit 0; sleep 1; done
echo "$(hostname): still running after {seconds} s" >&2; exit 1
"""


class LaunchError(Exception):
  """What ends the script with one message."""


def gcloud(*words: str, limit: float, echo: bool = False) -> subprocess.CompletedProcess:
  """Runs gcloud; what it prints is shown where `echo`, else kept.

  Args:
    words: after `gcloud`.
    limit: seconds; a call that takes longer has failed.
  """
  command = ["gcloud", *words]
  kept = None if echo else subprocess.PIPE
  try:
    return subprocess.run(command, stdout=kept, stderr=kept, text=True, timeout=limit, check=False)
  except FileNotFoundError:
    raise LaunchError(
      "Expected gcloud on the PATH: https://cloud.google.com/sdk/docs/install"
    ) from None
  except subprocess.TimeoutExpired:
    return subprocess.CompletedProcess(command, 124, "", f"no answer within {limit:g} s")


def checked(result: subprocess.CompletedProcess, what: str) -> str:
  """What it printed; LaunchError with its own words where it failed."""
  if result.returncode:
    raise LaunchError(f"{what} failed ({result.returncode}): {(result.stderr or '').strip()}")
  return result.stdout or ""


def tried(call, what: str, pause: float, hopeless=lambda: False) -> str:
  """What a call printed that may fail in passing: some tries, each after a longer pause."""
  for turn in range(1, TRIES + 1):
    result = call()
    if result.returncode == 0 or turn == TRIES or hopeless():
      break
    say(f"{what} failed, try {turn} of {TRIES}: {(result.stderr or '').strip()}")
    time.sleep(turn * pause)
  return checked(result, f"{what}, tried {turn} times,")


def say(text: str) -> None:
  print(f"[tpu_vm {time.strftime('%H:%M:%S')}] {text}", flush=True)


def where(args) -> list[str]:
  return [f"--zone={args.zone}", *([f"--project={args.project}"] if args.project else [])]


def runtime(kind: str) -> str:
  """The TPU software that belongs to an accelerator type."""
  family = kind.partition("-")[0]
  if family.startswith(ONLY_GKE):
    raise LaunchError(
      f"--type: found {kind}, of which the Cloud TPU API has none. Google offers these chips on "
      "GKE: launch/gke/tpu.yaml"
    )
  if family not in RUNTIMES or not kind.rpartition("-")[2].isdigit():
    raise LaunchError(
      f"--type: expected KIND-SIZE with KIND one of {', '.join(RUNTIMES)}, such as v5litepod-256 "
      f"or v6e-256; found {kind!r}"
    )
  return RUNTIMES[family]


def state(args) -> str:
  """The queued resource's state, "MISSING" where there is none."""
  words = ("compute", "tpus", "queued-resources", "describe", args.name, *where(args))

  def describe():
    result = gcloud(*words, "--format=value(state.state)", limit=120)
    if result.returncode and "NOT_FOUND" in result.stderr:
      return subprocess.CompletedProcess(words, 0, "MISSING", "")
    return result

  return tried(describe, f"describing {args.name}", args.poll).strip()


def lost(args):
  """Whether the slices were taken away, as a function to ask later."""
  return lambda: state(args) in LOST


def create(args) -> None:
  """Asks for the slices and waits until they are there, or cannot be."""
  if args.type is None:
    raise LaunchError("create: --type is needed, such as --type=v5litepod-256")
  version = args.runtime or runtime(args.type)
  now = state(args)
  if now == "MISSING":
    words = ["compute", "tpus", "queued-resources", "create", args.name, *where(args)]
    words += [f"--accelerator-type={args.type}", f"--runtime-version={version}"]
    words += [f"--valid-until-duration={round(args.wait * 3600)}s"]
    single = args.slices == 1
    words += [f"--node-id={args.name}"] if single else [f"--node-count={args.slices}"]
    words += ["--spot"] if args.spot else ["--reserved"] if args.reserved else []
    words += ["--internal-ips"] if args.internal_ips else []
    for flag in ("service_account", "network", "subnetwork"):
      value = getattr(args, flag)
      words += [f"--{flag.replace('_', '-')}={value}"] if value else []
    if args.service_account:
      words += ["--scopes=https://www.googleapis.com/auth/cloud-platform"]
    if args.flex_start:  # so far only among gcloud's alpha commands
      words.insert(0, "alpha")
      words += ["--provisioning-model=flex-start", f"--max-run-duration={args.flex_start}"]
    checked(gcloud(*words, limit=300), "create")
  elif now in LOST:
    raise LaunchError(f"{args.name} is {now}: tpu_vm.py delete, then create")
  else:
    say(f"{args.name} is there already: {now}")
  end = time.monotonic() + args.wait * 3600
  before = None
  while True:
    now = state(args)
    if now != before:
      say(f"{args.name}: {now}")
      before = now
    if now == "ACTIVE":
      return
    if now not in WAITING:
      raise LaunchError(
        f"create: expected {args.name} to become ACTIVE, found {now}. Why: gcloud compute tpus "
        f"queued-resources describe {args.name} {' '.join(where(args))}"
      )
    if time.monotonic() > end:
      raise LaunchError(f"create: {args.name} is still {now} after {args.wait:g} hours (--wait)")
    time.sleep(args.poll)


def hosts(args) -> int:
  """Workers of all slices, as the Cloud TPU API knows them."""
  if args.hosts is None:
    words = ("compute", "tpus", "queued-resources", "describe", args.name, *where(args))
    text = tried(lambda: gcloud(*words, "--format=json", limit=120), "describe", args.poll)
    nodes = [spec["nodeId"] for spec in json.loads(text)["tpu"]["nodeSpec"]]
    args.hosts = 0
    for node in nodes:
      words = ("compute", "tpus", "tpu-vm", "describe", node, *where(args), "--format=json")
      text = tried(lambda words=words: gcloud(*words, limit=120), f"describing {node}", args.poll)
      args.hosts += len(json.loads(text)["networkEndpoints"])
  return args.hosts


def ssh(args, script: str, *, limit: float, echo: bool = False, worker: str = "all"):
  """Runs a script on the workers of all slices at once, or on one of the first slice."""
  words = ["compute", "tpus", "queued-resources", "ssh", args.name, *where(args), "--quiet"]
  words += ["--node=all" if worker == "all" else "--node=0", f"--worker={worker}"]
  words += ["--tunnel-through-iap"] if args.iap else ["--internal-ip"] if args.internal_ips else []
  return gcloud(*words, f"--command={script}", limit=limit, echo=echo)


def everywhere(args, script: str, *, limit: float) -> subprocess.CompletedProcess:
  """Runs a script on all workers; it has failed too where not all of them have run it.

  gcloud goes on without a worker that it cannot reach, and without all of them where a key is
  missing, and says that it succeeded.
  """
  result = ssh(args, f"( {script} ) && echo WORKER-DONE", limit=limit)
  done = (result.stdout or "").count("WORKER-DONE")
  if result.returncode == 0 and done != hosts(args):
    text = f"{done} of {hosts(args)} workers answered: {result.stderr}"
    return subprocess.CompletedProcess(result.args, 1, result.stdout, text)
  return result


def install(args) -> None:
  """Copies the wheel of this checkout, or names a published one, and installs it everywhere."""
  with tempfile.TemporaryDirectory() as folder:
    files = [HERE / name for name in ("requirements-tpu.txt", "supervise.sh", "smoke.sh")]
    package = args.package
    if package is None:
      wheel = build(pathlib.Path(folder))
      files, package = [*files, wheel], f"./{wheel.name}"
    script = f"mkdir -p {FOLDER}"
    tried(lambda: everywhere(args, script, limit=600), "reaching the workers", args.poll)
    words = ["compute", "tpus", "queued-resources", "scp", *map(str, files)]
    words += [f"{args.name}:{FOLDER}/", *where(args), "--node=all", "--worker=all", "--quiet"]
    words += ["--tunnel-through-iap"] if args.iap else []
    words += ["--internal-ip"] if args.internal_ips and not args.iap else []
    checked(gcloud(*words, limit=1800), "copying to the workers")
  script = INSTALL.format(folder=FOLDER, package=shlex.quote(package))
  tried(lambda: everywhere(args, script, limit=3600), "installing", args.poll, lost(args))
  say(f"{hosts(args)} workers have {package}")


def build(folder: pathlib.Path) -> pathlib.Path:
  """The wheel of this checkout."""
  tool = ["uv", "build", "--wheel", f"--out-dir={folder}"]
  if not shutil.which("uv"):
    tool = [sys.executable, "-m", "pip", "wheel", "--no-deps", f"--wheel-dir={folder}"]
  result = subprocess.run([*tool, str(HERE.parent)], capture_output=True, text=True, check=False)
  checked(result, "building the wheel")
  return next(folder.glob("*.whl"))


def run(args) -> None:
  """Starts the command on all workers."""
  if not args.command:
    raise LaunchError("run: expected a command after --, such as -- python -m ofa_jax.train ...")
  command = shlex.join(args.command)
  script = START.format(folder=FOLDER, restarts=args.restarts, command=command)
  checked(everywhere(args, script, limit=600), "starting")
  say(f"started; tpu_vm.py logs {args.name} --follow shows what it prints")


def workers(args) -> dict[str, str]:
  """What each worker's run is at: a status, or "running", "not-started", "not-installed"."""
  script = STATUS.format(folder=FOLDER)
  text = tried(
    lambda: everywhere(args, script, limit=300), "asking the workers", args.poll, lost(args)
  )
  lines = [line.split() for line in text.splitlines() if line.startswith("WORKER ")]
  return {f"{i}:{name}": value for i, (_, name, value) in enumerate(sorted(lines))}


def status(args) -> None:
  """Prints the resource's state and, where it is there, each worker's."""
  now = state(args)
  print(f"{args.name}: {now}")
  if now == "ACTIVE":
    for name, value in workers(args).items():
      print(f"  {name.partition(':')[2]}: {value}")


def logs(args) -> None:
  """Shows the end of what the command prints on one worker."""
  follow = "-F" if args.follow else ""
  script = f"tail -n {args.lines} {follow} {FOLDER}/run/log.txt"
  limit = 7 * 24 * 3600 if args.follow else 300
  checked(ssh(args, script, limit=limit, echo=True, worker=args.worker), "logs")


def stop(args) -> None:
  """Tells the command to save and end, and waits until it has."""
  script = STOP.format(folder=FOLDER, seconds=args.seconds)
  checked(everywhere(args, script, limit=args.seconds + 300), "stop")
  status(args)


def delete(args) -> None:
  """Gives the slices back."""
  words = ("compute", "tpus", "queued-resources", "delete", args.name, *where(args))
  result = gcloud(*words, "--force", "--quiet", limit=1800)
  if "NOT_FOUND" not in (result.stderr or ""):
    checked(result, "delete")
  say(f"{args.name} is deleted")


def keep(args) -> None:
  """Has the command run until it is finished, on as many slices one after the other as it takes."""
  if not args.command:
    raise LaunchError("keep: expected a command after --, such as -- python -m ofa_jax.train ...")
  for num in range(args.slices_lost + 1):
    if state(args) in LOST[:-1]:
      delete(args)
    create(args)
    if whole_run(args):
      say(f"finished; {args.name} is still there: tpu_vm.py delete")
      return
    say(f"{args.name} was taken away ({num + 1} times so far)")
  raise LaunchError(
    f"keep: {args.name} was taken away {args.slices_lost + 1} times (--slices-lost)"
  )


def whole_run(args) -> bool:
  """Installs and starts where that is left to do, then waits; False: the slice is gone.

  Raises:
    LaunchError: the command ended with a status that starting it again would not mend.
  """
  while True:
    try:
      values = set(workers(args).values())
      if "not-installed" in values:
        install(args)
      faults = {v for v in values if v.isdigit() and int(v) not in (0, *UNTIL_AGAIN)}
      if values == {"0"}:
        return True
      if not faults and values - {"0", "running"}:
        run(args)
    except LaunchError:
      if lost(args)():  # it went away between two calls
        return False
      raise
    if faults and "running" not in values:
      raise LaunchError(
        f"keep: the command ended with {', '.join(sorted(faults))}; not started again. What it "
        f"said: tpu_vm.py logs {args.name}"
      )
    time.sleep(args.poll)
    if lost(args)():
      return False


VERBS = {f.__name__: f for f in (create, install, run, keep, status, logs, stop, delete)}


def parser() -> argparse.ArgumentParser:
  """The command line, but for what follows `--`."""
  flags = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flags.add_argument("verb", choices=VERBS)
  flags.add_argument("name", help="of the queued resource")
  flags.add_argument("--zone", required=True, help="such as us-west4-a")
  flags.add_argument("--project", help="gcloud's own where it is not given")
  flags.add_argument("--iap", action="store_true", help="ssh through Identity-Aware Proxy")
  flags.add_argument("--poll", type=float, default=30, help="seconds between two looks (30)")
  slices = flags.add_argument_group("create, keep")
  slices.add_argument("--type", help="accelerator type, such as v5litepod-256, v5p-128, v6e-256")
  slices.add_argument("--slices", type=int, default=1, help="slices of that type (1)")
  slices.add_argument("--runtime", help="TPU software; by default the one of the type")
  tier = slices.add_mutually_exclusive_group()
  tier.add_argument("--spot", action="store_true", help="cheaper, and may be taken away")
  tier.add_argument("--reserved", action="store_true", help="from the project's reservation")
  tier.add_argument("--flex-start", metavar="DURATION", help="for so long at most, such as 4h")
  slices.add_argument("--service-account", help="whose rights the run has, such as to the bucket")
  slices.add_argument(
    "--internal-ips", action="store_true", help="no external addresses: the network needs a NAT"
  )
  slices.add_argument("--network")
  slices.add_argument("--subnetwork")
  slices.add_argument("--wait", type=float, default=24, help="hours to wait for slices (24)")
  slices.add_argument("--slices-lost", type=int, default=50, help="keep: ends after so many (50)")
  runs = flags.add_argument_group("install, run, logs, stop")
  runs.add_argument("--package", help="what to install instead of this checkout: ofa-jax==0.1.0")
  runs.add_argument("--restarts", type=int, default=100, help="of the command on one slice (100)")
  runs.add_argument("--follow", action="store_true", help="logs: go on until Ctrl-C")
  runs.add_argument("--worker", default="0", help="logs: which one (0)")
  runs.add_argument("--lines", type=int, default=50, help="logs: how many (50)")
  runs.add_argument("--seconds", type=int, default=300, help="stop: to wait for the save (300)")
  return flags


def main() -> None:
  """The command."""
  words = sys.argv[1:]
  cut = words.index("--") if "--" in words else len(words)
  args = parser().parse_args(words[:cut])
  args.command, args.hosts = words[cut + 1 :], None
  try:
    VERBS[args.verb](args)
  except LaunchError as fault:
    sys.exit(str(fault))
  except KeyboardInterrupt:
    sys.exit(130)


if __name__ == "__main__":
  main()
