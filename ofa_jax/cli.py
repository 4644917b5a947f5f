"""What the commands share: the --config flag, joining a cluster, errors a person can read."""

import os
import runpy
import sys
from collections.abc import Callable

import jax
from absl import app, flags
from ml_collections import config_flags

from ofa_jax.config import Config, explain_unknown_field


def define_config() -> flags.FlagHolder:
  """The flag --config=FILE.py[:ARG], whose fields are flags too: --config.optim.lr=2e-5."""
  flags.DEFINE_bool(
    "distributed",
    False,
    "Join the other processes of this job, found through the cluster's environment (TPU pods, "
    "SLURM, MPI). Without it, JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID do.",
  )
  return config_flags.DEFINE_config_file(
    "config", None, "Config file, with an optional argument: configs/quickstart.py[:ARG]."
  )


def run(main: Callable[[], None]) -> None:
  """Parses flags, joins the cluster and runs `main`; a ValueError ends as one message, status 1."""
  try:
    app.run(lambda _: _start(main), flags_parser=_parse)
  except ValueError as e:
    if os.environ.get("OFA_JAX_TRACEBACK"):
      raise
    _fail(f"{e}\n(OFA_JAX_TRACEBACK=1 shows where this was raised)")


def _start(main):
  if "JAX_COORDINATOR_ADDRESS" in os.environ and "JAX_NUM_PROCESSES" in os.environ:
    jax.distributed.initialize(
      os.environ["JAX_COORDINATOR_ADDRESS"],
      int(os.environ["JAX_NUM_PROCESSES"]),
      int(os.environ["JAX_PROCESS_ID"]),
    )
  elif flags.FLAGS.distributed:
    jax.distributed.initialize()
  main()


def _parse(argv):
  try:
    return app.parse_flags_with_usage(argv)
  except KeyError as e:
    text = explain_unknown_field(_plain_config(argv), str(e))
    _fail(text or str(e))


def _plain_config(argv) -> Config | None:
  """The config without its overrides, to name the fields that exist."""
  for i, arg in enumerate(argv):
    name, _, value = arg.partition("=")
    if name.lstrip("-") == "config":
      path, _, option = (value or argv[i + 1]).partition(":")
      get_config = runpy.run_path(path)["get_config"]
      return get_config(option) if option else get_config()
  return None


def _fail(message):
  print(f"error: {message}", file=sys.stderr)
  raise SystemExit(1)
