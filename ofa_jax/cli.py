"""What the commands share: flags, joining a cluster, errors and stops that a person can read."""

import contextlib
import difflib
import os
import re
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TextIO

import rich.console
import rich.progress
from absl import app, flags
from ml_collections import config_flags

from ofa_jax import cli_help, cli_parsers, configs, numerics, outputs, staging
from ofa_jax.config import PRECISIONS, Config, explain_unknown_field
from ofa_jax.engine import cluster, lock, log, processes, tpu_compiler
from ofa_jax.files import room_for, written_whole
from ofa_jax.text_files import printable

RECIPES = configs.__path__[0] if configs.__path__ else os.devnull  # where nothing is


def define_config(
  *, flag_values: flags.FlagValues = flags.FLAGS, argv: Sequence[str] | None = None
) -> flags.FlagHolder:
  """The flag --config=FILE.py[:ARG], whose fields are flags too: --config.optim.lr=2e-5.

  Args:
    flag_values: where it is defined.
    argv: what will be parsed, if not `sys.argv`.
  """
  define_distributed(flag_values=flag_values)
  for kind, parser in cli_parsers.OF_FIELDS.items():
    config_flags.register_flag_parser_for_type(kind, parser)
  return config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, with an optional argument: configs/quickstart.py[:ARG].",
    flag_values=flag_values,
    sys_argv=argv,
  )


def define_distributed(*, flag_values: flags.FlagValues = flags.FLAGS) -> None:
  """The flags of commands that several processes may share: --distributed, --start-timeout."""
  flags.DEFINE_bool(
    "distributed",
    False,
    "Join the other processes of this job, found through the environment of TPU pods, SLURM, "
    "torchrun, SkyPilot or Open MPI. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
    "JAX_PROCESS_ID need no flag, and decide.",
    flag_values=flag_values,
  )
  flags.DEFINE_integer(
    "start-timeout",
    300,
    "Seconds that the processes of a job wait for each other.",
    lower_bound=1,
    flag_values=flag_values,
  )


def define_precision() -> flags.FlagHolder:
  """The flag --precision of the commands that run a model without a config."""
  text = "bf16 is faster on accelerators; fp64 is slower, and rounding decides nothing."
  return flags.DEFINE_enum("precision", "fp32", PRECISIONS, text)


def define_interrupted_status() -> flags.FlagHolder:
  """The flag --interrupted-status of commands that save when they are told to stop."""
  given = os.environ.get("OFA_JAX_INTERRUPTED_STATUS", "0")
  if not given.isdecimal() or int(given) > 255:
    _fail(f"Expected a status from 0 to 255 in OFA_JAX_INTERRUPTED_STATUS, found {given!r}")
  return flags.DEFINE_integer(
    "interrupted-status",
    int(given),
    "Exit status after SIGTERM or Ctrl-C, when what was done is saved; 75 for schedulers that "
    "start the same command again. OFA_JAX_INTERRUPTED_STATUS in the environment is its default.",
    lower_bound=0,
    upper_bound=255,
  )


def define_shard() -> flags.FlagHolder:
  """The flag --shard of commands whose rows several jobs may share; see `shards.parse`."""
  return flags.DEFINE_string(
    "shard",
    None,
    "I/N: the I-th of N shares of the rows, from 0, of as many jobs; array/N: the one that SLURM's "
    "--array numbers; merge/N: puts their files together.",
  )


def define_max_bad_rate(rows: str) -> flags.FlagHolder:
  """The flag --max-bad-rate, a share; `rows`: what may be unreadable."""
  text = f"Share of unreadable {rows} allowed."
  serializer = flags.ArgumentSerializer()
  return flags.DEFINE(cli_parsers.Share(), "max-bad-rate", 0.01, text, serializer=serializer)


def define_path(name: str, help_text: str, *, required: bool = False) -> flags.FlagHolder:
  """A flag that is a path, a URL or the name of something; ~ is the home directory."""
  return flags.DEFINE(
    cli_parsers.Path(),
    name,
    None,
    help_text,
    serializer=flags.ArgumentSerializer(),
    required=required,
  )


def define_stage() -> flags.FlagHolder:
  """The flag that has data of buckets copied to a local disk, see `ofa_jax.staging`."""
  return define_path(
    "stage",
    "Folder of a local disk to which data files of gs:// and s3:// are copied as they are needed; "
    "copies that are there are used again.",
  )


def define_paths(name: str, help_text: str, *, required: bool = False) -> flags.FlagHolder:
  """A flag that is several of them, separated by commas."""
  serializer = flags.ListSerializer(",")
  return flags.DEFINE(
    cli_parsers.Paths(), name, None, help_text, serializer=serializer, required=required
  )


def run(
  main: Callable[[], None],
  *,
  argv: Sequence[str] | None = None,
  interrupted: str = "the same command starts anew",
) -> None:
  """Parses flags, joins the cluster (commands with --distributed) and runs `main`.

  What a person caused ends as one message and status 1, or `processes.AGAIN` where only a host or
  a network failed; Ctrl-C as one line and status 130. What fails in one process of a job ends all
  of them.

  Args:
    main: the command.
    argv: program name and flags; None is `sys.argv`.
    interrupted: what a person who pressed Ctrl-C should know.
  """
  sys.unraisablehook = _without_noise
  tpu_compiler.deepen_stack()
  with readable(interrupted):
    argv = list(sys.argv if argv is None else argv)
    app.run(lambda rest: _start(main, rest[1:]), argv=argv, flags_parser=_parse)


@contextlib.contextmanager
def readable(interrupted: str = "the same command starts anew") -> Iterator[None]:
  """Ends the process with a message where a person caused what is raised in the block.

  Args: as of `run`.
  """
  try:
    yield
  except processes.Stopped:
    # The signal may have come amid a compilation: what the interpreter would clear away at its end
    # is in no state for that.
    processes.end(flags.FLAGS["interrupted-status"].value)
  except KeyboardInterrupt:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough, the status is not to change
    print(f"Interrupted; {interrupted}", file=sys.stderr, flush=True)
    # Threads that read data or compile are not waited for.
    processes.leave(processes.INTERRUPTED)
  except processes.EXPECTED as e:
    if os.environ.get("OFA_JAX_TRACEBACK"):
      raise
    text = f"{processes.describe(e)}\n(OFA_JAX_TRACEBACK=1 shows where this was raised)"
    _fail(text, status=processes.status_of(e))
  except RuntimeError as e:
    if "home directory" not in str(e) or os.environ.get("OFA_JAX_TRACEBACK"):
      raise
    _fail(f"{e} Set HOME, or name every folder that is used.")


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[TextIO]:
  """Opens a text file that takes its name only when the block ends without an error."""
  with written_whole(path, replace=True) as made, open(made, "w", encoding="utf-8") as file:
    yield file


@contextlib.contextmanager
def sole_writer(
  path: str | os.PathLike,
  *,
  flag: str = "--output",
  inputs: Iterable[str | os.PathLike | None] = (),
  new: bool = False,
  makes_parents: bool = True,
) -> Iterator[None]:
  """Sees that a file can be written and that no other process writes it during the block.

  Args:
    path: the file.
    flag: what a person gave it as.
    inputs: what the command reads, which must not be the same.
    new: it may be a folder, too, and must not exist.
    makes_parents: see `outputs.check_file`.

  Raises:
    ValueError: it cannot be written, see `outputs.check_file`; another process writes it; the disk
      is full in the block.
  """
  if not new:
    outputs.check_file(path, flag=flag, inputs=inputs, makes_parents=makes_parents)
  elif not os.path.lexists(path):
    outputs.check_new(path, flag=flag)
  with lock.one_writer(path, file=True) as note:
    if note:
      print(note, file=sys.stderr)
    if new:  # only now, so that the lock of one that was killed at its very end is cleared away
      outputs.check_new(path, flag=flag)
    with room_for(path):
      yield


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
  if "stage" in flags.FLAGS and flags.FLAGS.stage:
    staging.stage_to(flags.FLAGS.stage)
  if "distributed" in flags.FLAGS:
    _join_cluster()
  with processes.one_fate():
    if "config" in flags.FLAGS:
      config = flags.FLAGS.config
      if config is None:
        raise ValueError("Expected --config=FILE.py, found none. One to try: configs/quickstart.py")
      try:
        _ = config.precision
      except OSError as e:  # raised in the config file, and kept by ml_collections until now
        raise e.__cause__ or e from None
      cli_parsers.expand_in(config)
    numerics.enable(_precision())
    main()


def _precision() -> str | None:
  """What the model of this command is computed in, as far as there is one."""
  if "precision" in flags.FLAGS:
    return flags.FLAGS.precision
  config = flags.FLAGS.config if "config" in flags.FLAGS else None
  return config and config.precision


def _join_cluster():
  job = cluster.read(os.environ, asked=flags.FLAGS.distributed)
  if job is not None:
    cluster.join(job, timeout=flags.FLAGS["start-timeout"].value)


def _parse(argv):
  if cli_help.asked(argv):
    _help(argv)
  argv = _with_config_file(argv)
  try:
    return flags.FLAGS(argv)
  except flags.Error as e:
    if "Error whilst parsing config file" in str(e):
      _fail(_in_config_file(_first(e), argv))
    missing = re.search(r"Flag --(\S+) must have a value other than None", str(e))
    text = f"Expected --{missing[1]}=VALUE, found none" if missing else str(e)
    _fail(f"{text}\n(--help shows all flags)")
  except KeyError as e:
    text = explain_unknown_field(_plain_config(argv), str(e))
    _fail(text or f"--config: {e}")
  except Exception as e:
    if os.environ.get("OFA_JAX_TRACEBACK"):
      raise
    kept = isinstance(e, OSError) and e.__cause__  # of a config file that failed, see `_start`
    _fail(_in_config_file(kept or e, argv))


def _help(argv):
  config = note = None
  if "config" in flags.FLAGS and _config_place(argv) is not None:
    try:
      config = _plain_config(_with_config_file(argv))
    except Exception as e:
      note = f"(the fields are not those of --config: {processes.describe(e)})"
  print(cli_help.text(argv, config=config), *([note] if note else []), sep="\n\n")
  raise SystemExit(0)


def _config_place(argv) -> tuple[int, str] | None:
  """Where --config stands in the arguments, and its value."""
  for i, arg in enumerate(argv):
    name, equals, value = arg.partition("=")
    if name in ("-config", "--config"):
      if equals:
        return i, value
      return (i + 1, argv[i + 1]) if i + 1 < len(argv) else None
  return None


def _with_config_file(argv):
  """The arguments with the ~ of --config expanded; says so where there is no such file."""
  place = _config_place(argv)
  if place is None or "config" not in flags.FLAGS:
    return argv
  i, value = place
  path, colon, option = value.partition(":")
  path = cli_parsers.expand(path)
  if not os.path.isfile(path):
    recipe = _recipe(path)
    if recipe is None:
      raise ValueError(f"Expected a Python file in --config, found no file {path}{_near(path)}")
    path = recipe
  argv = list(argv)
  argv[i] = f"{argv[i][: len(argv[i]) - len(value)]}{path}{colon}{option}"
  return argv


def _recipe(path: str) -> str | None:
  """Where the package has a recipe configs/NAME.py that the current folder has not."""
  folder, name = os.path.split(os.path.normpath(path))
  recipe = os.path.join(RECIPES, name)
  return recipe if folder == "configs" and os.path.isfile(recipe) else None


def _near(path: str) -> str:
  """A hint at the files whose names are alike."""
  folder, name = os.path.split(path)
  names = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
  if os.path.normpath(folder) == "configs":
    names = {*names, *(os.listdir(RECIPES) if os.path.isdir(RECIPES) else ())}
  names = sorted(n for n in names if n.endswith(".py"))
  near = difflib.get_close_matches(name, names, n=3) or names[:8]
  if near:
    return f". Did you mean {' or '.join(os.path.join(folder, n) for n in near)}?"
  return "" if os.path.isdir(folder or ".") else f" (there is no folder {folder})"


def _first(error: BaseException) -> BaseException:
  """The error that the others were raised because of."""
  while error.__context__ is not None:
    error = error.__context__
  return error


def _in_config_file(error: Exception, argv) -> str:
  """What a config file raised, with the line of it that a person can mend."""
  place = _config_place(argv)
  path = place[1].partition(":")[0] if place else ""
  if isinstance(error, SyntaxError) and error.filename:
    return (
      f"--config: {error.filename}, line {error.lineno}: {error.msg}: {error.text or ''}".rstrip()
    )
  frames = traceback.extract_tb(error.__traceback__)
  own = [f for f in frames if path and os.path.abspath(f.filename) == os.path.abspath(path)]
  where = f"{path}, line {own[-1].lineno}: {own[-1].line}: " if own else ""
  text = processes.describe(error)
  if "home directory" in text:
    text += " Set HOME, or the folder that this config asks for."
  return f"--config: {where}{text}\n(OFA_JAX_TRACEBACK=1 shows where this was raised)"


def _plain_config(argv) -> Config | None:
  """The config without its overrides, to name the fields that exist."""
  place = _config_place(argv)
  if place is None:
    return None
  path, _, option = place[1].partition(":")
  get_config = runpy.run_path(path)["get_config"]
  return get_config(option) if option else get_config()


def _without_noise(unraisable):
  """What the threads of a save that failed say afterwards, to nobody, is not shown."""
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


def _fail(message, *, status=processes.FAULT):
  message = printable(message, but="\n\t")  # it may quote what a file holds
  text = log.for_terminal(f"error: {message}", rich.console.Console(stderr=True))
  print(text, file=sys.stderr, flush=True)
  raise SystemExit(status)
