"""What README and docs say in code: pages, lines of code, commands."""

import functools
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted(
  [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "launch").rglob("*.md")]
)
# With which a command begins; what else stands in backticks is none.
PROGRAMS = (
  *("apt", "apt-get", "curl", "docker", "envsubst", "gcloud", "iconv", "jupyter", "jupytext"),
  *("kubectl", "mkdocs", "ovc", "pip", "python", "python3", "ruff", "sbatch", "sky", "source"),
  *("srun", "trtexec", "uv"),
)


@functools.cache
def text_of(page: Path) -> str:
  return page.read_text(encoding="utf-8")


@functools.cache
def codes_of(page: Path) -> list[str]:
  """Fenced blocks, their continued lines joined, and spans between backticks."""
  text = text_of(page)
  fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
  spans = re.findall(
    r"`([^`\n]+(?:\n[^`\n]+)?)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
  )
  lines = [line for block in fenced for line in block.replace("\\\n", " ").splitlines()]
  return [*lines, *(" ".join(span.split()) for span in spans)]


def lines_of_shells(page: Path) -> list[str]:
  """What stands in the blocks that say that they are for a shell."""
  blocks = re.findall(r"^```bash\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)
  return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def commands_in(code: str) -> Iterator[str]:
  """The commands of a line, one space between words, without comments.

  What follows `&&`, `;` or `|` is one more; what a program is given to run belongs to it. The name
  of a command without anything is none, nor is `NAME=value`.
  """
  code = re.sub(r"(^|\s)#.*", "", code)
  for command in re.split(r"&&|;|\\?\|\s", code):
    words = command.split()
    given = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), 0)
    program, *rest = words[given:] or [""]
    known = program in PROGRAMS or re.fullmatch(r"(launch/)?\w+\.sh", program)
    named = re.fullmatch(r"(-m ofa_jax\.\w+|tools/\w+\.py)?", " ".join(rest))
    if known and not named:
      yield " ".join(words)


@functools.cache
def commands() -> dict[str, Path]:
  """All documented commands, and the page where each stands first."""
  found = {}
  for page in PAGES:
    for code in codes_of(page):
      for command in commands_in(code):
        found.setdefault(command, page)
  return found
