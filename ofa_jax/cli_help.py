"""The text of --help: what a command does, its flags in groups, then the fields of its config."""

import dataclasses
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from ofa_jax.config import Config, Eval

WIDTH = 100
_LONGEST = 60  # letters of a value that are shown
# Flags that every command with a config has, apart from its own.
JOBS = ("distributed", "start-timeout", "interrupted-status")
ASKING = ("--help", "-help", "--helpshort", "-helpshort", "-h", "--h", "-?")


def asked(argv: Sequence[str]) -> bool:
  """Do the arguments ask for help?"""
  before = argv[: argv.index("--")] if "--" in argv else argv
  return any(arg in ASKING for arg in before[1:])


def text(argv: Sequence[str], *, config: Config | None = None) -> str:
  """The whole text, from the flags that are defined by now.

  Args:
    argv: of the command.
    config: the one that was given beside --help; its fields are shown as they are in it.
  """
  parts = [(sys.modules["__main__"].__doc__ or "").strip()]
  own = list(_own_flags(argv[0]))
  groups = {
    "What must be given": [f for f in own if _required(f)],
    "What may be given": [f for f in own if not _required(f) and f.name not in JOBS],
    "For jobs of several processes, and for schedulers": [f for f in own if f.name in JOBS],
  }
  for title, members in groups.items():
    if members:
      parts += [f"{title}:", *(_entry(_signature(f), _meaning(f)) for f in members)]
  if "config" in flags.FLAGS:
    parts += _config_parts(config)
  parts.append("--helpfull shows the flags of the libraries, too.")
  return "\n\n".join(
    p if p.startswith("  ") or "\n" in p else textwrap.fill(p, WIDTH) for p in parts
  )


def _config_parts(config: Config | None) -> Iterator[str]:
  """The fields of a config by group, each a flag after --config."""
  values = config or Config(model=None, task=None, batch_size=0)
  known = {f.name: getattr(values, f.name) for f in dataclasses.fields(Config)}
  evals = list(known.pop("evals")) or [Eval(name="valid", task=None)]
  optim, mesh, model, task = (known.pop(name) for name in ("optim", "mesh", "model", "task"))
  if config is None:
    known["batch_size"] = "VALUE"
    shown = "with their defaults; with --config=FILE before --help, those of that file"
  else:
    shown = "as they are in this file"
  yield f"Fields of the config, {shown}."
  yield "The run, Config:"
  yield from (_entry(f"--config.{n}={_value(v)}", m) for n, v, m in _leaves(Config, known))
  groups = {"optim": ("The optimizer", optim), "mesh": ("The devices", mesh)}
  if config is not None:
    groups |= {"model": ("The model", model), "task": ("The task", task)}
  groups |= {f"evals[{i}]": ("An evaluation", e) for i, e in enumerate(evals)}
  for path, (title, value) in groups.items():
    yield f"{title}, {type(value).__name__}:"
    yield from (_entry(f"--config.{path}.{n}={_value(v)}", m) for n, v, m in _inside(value))
  if config is None:
    yield "Model and task have fields too: --config.model.NAME=VALUE, --config.task.NAME=VALUE."


def _inside(value: Any) -> Iterator[tuple[str, Any, str]]:
  """(path, value, meaning) of all fields of a dataclass, those of its parts included."""
  names = [f.name for f in dataclasses.fields(value) if f.init and f.repr]
  yield from _leaves(type(value), {name: getattr(value, name) for name in names})


def _leaves(kind: type, values: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
  said = _attributes(kind.__doc__)
  for base in kind.__mro__[1:]:
    said = _attributes(base.__doc__) | said
  for name, value in values.items():
    if dataclasses.is_dataclass(value):
      if kind is not Eval:  # the task of an evaluation is shown once, above
        yield from ((f"{name}.{inner}", v, m) for inner, v, m in _inside(value))
    elif not (kind is Eval and name == "task"):
      yield name, value, said.get(name, "")


def _value(value: Any) -> str:
  return textwrap.shorten(str(value), _LONGEST, placeholder=" ...")


def _own_flags(program: str) -> Iterator[flags.Flag]:
  """The flags of the command's module and of `cli`, those that must be given first."""
  modules = flags.FLAGS.flags_by_module_dict()
  mine = [flag for name in modules if _is_own(name, program) for flag in modules[name]]
  return iter(sorted(mine, key=lambda f: (not _required(f), f.name)))


def _is_own(module: str, program: str) -> bool:
  return module in (program, sys.argv[0], "__main__") or module.split(".")[0] == "ofa_jax"


def _required(flag: flags.Flag) -> bool:
  return flag.name == "config" or any(
    flag.name in validator.get_flags_names() and "must have a value" in validator.message
    for validator in flag.validators
  )


def _signature(flag: flags.Flag) -> str:
  if flag.boolean:
    return f"--[no]{flag.name}"
  values = getattr(flag.parser, "enum_values", None)
  return f"--{flag.name}={'|'.join(values) if values else 'VALUE'}"


def _meaning(flag: flags.Flag) -> str:
  said = re.sub(r"^<[^>]*>: ", "", flag.help)  # absl puts the values of an enum before it
  if _required(flag) or flag.default is None:
    return said
  return f"{said} (default: {flag.default_as_str.strip(chr(39))})"


def _entry(signature: str, meaning: str) -> str:
  body = textwrap.fill(meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
  return f"  {signature}\n{body}" if meaning else f"  {signature}"


def _attributes(doc: str | None) -> dict[str, str]:
  """The meanings in the "Attributes:" of a docstring, by name."""
  _, _, listed = textwrap.dedent(doc or "").partition("Attributes:\n")
  meanings = {}
  for names, body in re.findall(r"^ {2,4}(\w[\w, ]*): (.*(?:\n {6,}.*)*)", listed, re.MULTILINE):
    for name in names.split(", "):
      meanings[name] = " ".join(body.split())
  return meanings
