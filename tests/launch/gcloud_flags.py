"""Which flags gcloud's commands have, as its own help says: recorded here, and read by the tests.

  python tests/launch/gcloud_flags.py     # records anew, with the gcloud that is installed

Only names are kept: of the commands that the scripts and the documentation use.
"""

import functools
import json
import re
import subprocess
from pathlib import Path

RECORD = Path(__file__).with_name("gcloud_flags.json")


@functools.cache
def recorded() -> dict[str, set[str]]:
  """The flags of each recorded command, those of every command among them."""
  record = json.loads(RECORD.read_text())
  everywhere = set(record["everywhere"].split())
  return {name: {*flags.split(), *everywhere} for name, flags in record["commands"].items()}


def faults(words: list[str]) -> list[str]:
  """What is wrong with a command line after `gcloud`: an unknown command, unknown flags."""
  commands = sorted(recorded(), key=len, reverse=True)
  line = " ".join(words)
  command = next((name for name in commands if f"{line} ".startswith(f"{name} ")), None)
  if command is None:
    return [f"gcloud has no command recorded for: {line}"]
  given = [word.partition("=")[0] for word in words if word.startswith("--") and word != "--"]
  return [f"gcloud {command} has no {flag}" for flag in given if flag not in recorded()[command]]


def of_help(command: str) -> tuple[set[str], set[str]]:
  """Flags of a command and of every command, by the help of the gcloud that is installed."""
  result = subprocess.run(
    ["gcloud", *command.split(), "--help"], capture_output=True, text=True, check=True
  )
  text = re.sub(r"\x1b\[[0-9;]*m|.\x08", "", result.stdout)  # bold and underlined
  synopsis = re.search(r"\bSYNOPSIS\n(.*?)\nDESCRIPTION\n", text, re.DOTALL)[1]
  everywhere = re.search(r"\nGCLOUD WIDE FLAGS\n(.*?)\n\n[A-Z]", text, re.DOTALL)[1]
  return names_of(synopsis), names_of(everywhere)


def names_of(text: str) -> set[str]:
  """The flags that a text names; `--[no-]async` is two."""
  pairs = re.findall(r"--(\[no-\])?([a-z][a-z0-9-]*)", text)
  return {f"--{name}" for _, name in pairs} | {f"--no-{name}" for both, name in pairs if both}


def main() -> None:
  """Records the commands that are recorded, as the installed gcloud has them."""
  version = subprocess.run(["gcloud", "version"], capture_output=True, text=True, check=True)
  commands, everywhere = {}, set()
  for name in recorded():
    flags, everywhere = of_help(name)
    commands[name] = " ".join(sorted(flags))
  lines = version.stdout.splitlines()
  record = {
    "version": ", ".join([lines[0], *(line for line in lines if line.startswith("core "))]),
    "everywhere": " ".join(sorted(everywhere)),
    "commands": commands,
  }
  RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
  main()
