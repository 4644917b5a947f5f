"""What the commands share: the --config flag, joining a cluster, errors a person can read."""

import ast
import contextlib
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

import jax
import rich.console
import rich.progress
from absl import app, flags
from ml_collections import config_flags
from ml_collections.config_flags import tuple_parser

from ofa_jax import numerics
from ofa_jax.config import PRECISIONS, Config, explain_unknown_field
from ofa_jax.files import written_whole


def define_config(
  *, flag_values: flags.FlagValues = flags.FLAGS, argv: Sequence[str] | None = None
) -> flags.FlagHolder:
  """The flag --config=FILE.py[:ARG], whose fields are flags too: --config.optim.lr=2e-5.

  Args:
    flag_values: where it is defined.
    argv: what will be parsed, if not `sys.argv`.
  """
  flags.DEFINE_bool(
    "distributed",
    False,
    "Join the other processes of this job, found through the cluster's environment (TPU pods, "
    "SLURM, MPI). Without it, JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID do.",
    flag_values=flag_values,
  )
  for kind, parser in _PARSERS.items():
    config_flags.register_flag_parser_for_type(kind, parser)
  return config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, with an optional argument: configs/quickstart.py[:ARG].",
    flag_values=flag_values,
    sys_argv=argv,
  )


def define_precision() -> flags.FlagHolder:
  """The flag --precision of the commands that run a model without a config."""
  text = "bf16 is faster on accelerators; fp64 is slower, and rounding decides nothing."
  return flags.DEFINE_enum("precision", "fp32", PRECISIONS, text)


def run(main: Callable[[], None], *, argv: Sequence[str] | None = None) -> None:
  """Parses flags, joins the cluster (commands with a --config) and runs `main`.

  A ValueError, or a run that diverged, ends as one message and status 1.

  Args:
    main: the command.
    argv: program name and flags; None is `sys.argv`.
  """
  try:
    app.run(lambda rest: _start(main, rest[1:]), argv=argv, flags_parser=_parse)
  except (ValueError, FloatingPointError) as e:
    if os.environ.get("OFA_JAX_TRACEBACK"):
      raise
    _fail(f"{e}\n(OFA_JAX_TRACEBACK=1 shows where this was raised)")


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[TextIO]:
  """Opens a text file that takes its name only when the block ends without an error."""
  with written_whole(path, replace=True) as made, open(made, "w", encoding="utf-8") as file:
    yield file


@contextlib.contextmanager
def progress(
  text: str, *, total: float, unit: str, done: float = 0
) -> Iterator[Callable[[float], None]]:
  """Shows a bar with the rate on a terminal; gives the function that advances it by some units."""
  console = rich.console.Console(stderr=True)
  columns = (
    rich.progress.TextColumn("{task.description}"),
    rich.progress.BarColumn(),
    rich.progress.TaskProgressColumn(),
    _Rate(unit),
    rich.progress.TimeRemainingColumn(),
  )
  with rich.progress.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
    task = bar.add_task(text, total=total, completed=done)
    yield lambda units: bar.advance(task, units)


class _Number(flags.ArgumentParser):
  """A number, or None where the field may be that (`config.validate` says where not)."""

  def __init__(self, parser: flags.ArgumentParser):
    super().__init__()
    self._parser = parser

  def parse(self, argument):
    return None if argument in ("None", "none") else self._parser.parse(argument)

  def flag_type(self):
    return self._parser.flag_type()


class _Text(flags.ArgumentParser):
  """A text, or None."""

  def parse(self, argument):
    return None if argument in ("None", "none") else argument


class _Tuple(tuple_parser.TupleParser):
  """A Python literal, or texts as they are, with commas between them (but for those in {a,b})."""

  def parse(self, argument):
    if isinstance(argument, list):  # of a flag that was given once or more
      return tuple(part for text in argument for part in self.parse(text))
    if not isinstance(argument, str):
      return super().parse(argument)
    try:
      value = ast.literal_eval(argument)
    except (ValueError, SyntaxError):
      return tuple(part.strip() for part in re.split(r",(?![^{]*\})", argument))
    return value if isinstance(value, tuple) else (value,)


_PARSERS = {
  int: _Number(flags.IntegerParser()),
  float: _Number(flags.FloatParser()),
  str: _Text(),
  tuple: _Tuple(),
}


class _Rate(rich.progress.ProgressColumn):
  def __init__(self, unit: str):
    super().__init__()
    self._unit = unit

  def render(self, task: rich.progress.Task) -> str:
    done = min(task.completed, task.total)
    return f"{done:,.0f} {self._unit}, {task.finished_speed or task.speed or 0:,.0f}/s"


def _start(main, unexpected):
  if unexpected:
    raise ValueError(f"Expected only flags (--name=value), found {' '.join(unexpected)}")
  if "distributed" in flags.FLAGS:
    _join_cluster()
  numerics.enable(_precision())
  main()


def _precision() -> str | None:
  """What the model of this command is computed in, as far as there is one."""
  if "precision" in flags.FLAGS:
    return flags.FLAGS.precision
  config = flags.FLAGS.config if "config" in flags.FLAGS else None
  return config and config.precision


def _join_cluster():
  if "JAX_COORDINATOR_ADDRESS" in os.environ and "JAX_NUM_PROCESSES" in os.environ:
    jax.distributed.initialize(
      os.environ["JAX_COORDINATOR_ADDRESS"],
      int(os.environ["JAX_NUM_PROCESSES"]),
      int(os.environ["JAX_PROCESS_ID"]),
    )
  elif flags.FLAGS.distributed:
    jax.distributed.initialize()


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
