"""The text of --help: what a command does, its own flags first, then the fields of its config."""

import dataclasses
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence

from absl import flags

from ofa_jax.config import Config, MeshShape, Optim

WIDTH = 100
ASKING = ("--help", "-help", "--helpshort", "-helpshort", "-h", "--h", "-?")


def asked(argv: Sequence[str]) -> bool:
  """Do the arguments ask for help?"""
  before = argv[: argv.index("--")] if "--" in argv else argv
  return any(arg in ASKING for arg in before[1:])


def text(argv: Sequence[str]) -> str:
  """The whole text, from the flags that are defined by now."""
  parts = [(sys.modules["__main__"].__doc__ or "").strip(), "Flags of this command:"]
  parts += [_entry(_signature(flag), _meaning(flag)) for flag in _own_flags(argv[0])]
  if "config" in flags.FLAGS:
    parts.append(
      "Fields of the config, each a flag after --config; evaluations, model and task have fields "
      "of their own (--config.model.NAME=VALUE, --config.task.NAME=VALUE):"
    )
    parts += [_entry(f"--config.{name}={value}", said) for name, value, said in _fields()]
  parts.append("--helpfull shows the flags of the libraries, too.")
  return "\n\n".join(
    p if p.startswith("  ") or "\n" in p else textwrap.fill(p, WIDTH) for p in parts
  )


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
  if _required(flag):
    return f"{flag.help} (required)"
  return flag.help if flag.default is None else f"{flag.help} (default: {flag.default_as_str})"


def _entry(signature: str, meaning: str) -> str:
  body = textwrap.fill(meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
  return f"  {signature}\n{body}" if meaning else f"  {signature}"


def _fields() -> Iterator[tuple[str, object, str]]:
  """(name, default, meaning) of the config's fields, those of its parts included."""
  said = _attributes(Config.__doc__)
  for field in dataclasses.fields(Config):
    if field.name in ("optim", "mesh"):
      part = Optim if field.name == "optim" else MeshShape
      meanings = _attributes(part.__doc__)
      for inner in dataclasses.fields(part):
        yield f"{field.name}.{inner.name}", _default(inner), meanings.get(inner.name, "")
    elif field.name not in ("model", "task", "evals"):
      yield field.name, _default(field), said.get(field.name, "")


def _default(field: dataclasses.Field) -> object:
  if field.default is not dataclasses.MISSING:
    return field.default
  return "VALUE" if field.default_factory is dataclasses.MISSING else field.default_factory()


def _attributes(doc: str | None) -> dict[str, str]:
  """The meanings in the "Attributes:" of a docstring, by name."""
  _, _, listed = textwrap.dedent(doc or "").partition("Attributes:\n")
  meanings = {}
  for names, body in re.findall(r"^ {2,4}(\w[\w, ]*): (.*(?:\n {6,}.*)*)", listed, re.MULTILINE):
    for name in names.split(", "):
      meanings[name] = " ".join(body.split())
  return meanings
