"""METEOR and SPICE of captions, by the programs that coco-caption runs, where these and Java are.

Both are Java archives with data beside them: `meteor/meteor-1.5.jar` (Denkowski and Lavie 2014) and
`spice/spice-1.0.jar` (arXiv 1607.08822) in a folder as coco-caption or its package `pycocoevalcap`
has them. OFA_JAX_COCO_CAPTION names it; where it is not set, an installed `pycocoevalcap` is looked
for. They are started as coco-caption starts them; what they are given are words as
`scoring/treebank.py` makes them.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np

VARIABLE = "OFA_JAX_COCO_CAPTION"
METEOR, SPICE = "meteor/meteor-1.5.jar", "spice/spice-1.0.jar"

_CORENLP = "spice/lib/stanford-corenlp-*.jar"  # SPICE parses with it
_MOST = 300  # characters of what a program said when it failed


class JavaError(ValueError):
  """A program failed; the text says which, and what it said."""


def folder() -> pathlib.Path | None:
  """Where coco-caption's programs are; None: nowhere."""
  if os.environ.get(VARIABLE):
    return pathlib.Path(os.environ[VARIABLE]).expanduser()
  package = importlib.util.find_spec("pycocoevalcap")
  places = package.submodule_search_locations if package else None
  return pathlib.Path(next(iter(places))) if places else None


def missing() -> dict[str, str]:
  """What keeps "meteor" and "spice" from being scored, one phrase each; none of what can be."""
  if shutil.which("java") is None:
    return dict.fromkeys(("meteor", "spice"), "no java on the PATH")
  place = folder()
  if place is None:
    return dict.fromkeys(("meteor", "spice"), f"no folder of coco-caption's in {VARIABLE}")
  needed = {"meteor": (METEOR, "meteor/data/paraphrase-en.gz"), "spice": (SPICE, _CORENLP)}
  absent = {
    name: [x for x in patterns if not any(place.glob(x))] for name, patterns in needed.items()
  }
  return {name: f"no file {place / files[0]}" for name, files in absent.items() if files}


def meteor(
  hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, np.ndarray]:
  """Returns the METEOR of all captions, and that of each, float64[N].

  Args:
    hypotheses: captions in words, single spaces between them.
    references: for each hypothesis the captions of its image, at least one.

  Raises:
    JavaError: METEOR failed, or what it says is something else.
  """
  archive = _archive(METEOR)
  command = ["java", "-jar", "-Xmx2G", archive.name, "-", "-", "-stdio", "-l", "en", "-norm"]
  with _started(command, archive) as program:
    counted = []
    for hypothesis, group in zip(hypotheses, references, strict=True):
      parts = [*(_plain(x) for x in group), _plain(hypothesis)]
      counted.append(program.answer(" ||| ".join(["SCORE", *parts])))
    program.say(" ||| ".join(["EVAL", *counted]))
    each = [program.number() for _ in counted]
    return program.number(), np.array(each, np.float64)


def spice(
  hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, np.ndarray]:
  """Returns the mean SPICE, and that of each caption, float64[N].

  Args: as of `meteor`.

  Raises:
    JavaError: SPICE failed, or what it wrote is something else.
  """
  archive = _archive(SPICE)
  pairs = zip(hypotheses, references, strict=True)
  rows = [{"image_id": i, "test": x, "refs": list(group)} for i, (x, group) in enumerate(pairs)]
  with tempfile.TemporaryDirectory(prefix="ofa_jax-spice-") as made:
    given, told, cache = (os.path.join(made, name) for name in ("in.json", "out.json", "cache"))
    os.mkdir(cache)
    with open(given, "w", encoding="utf-8") as file:
      json.dump(rows, file)
    command = ["java", "-jar", "-Xmx8G", archive.name, given, "-cache", cache]
    command += ["-out", told, "-subset", "-silent"]
    done = subprocess.run(
      command, cwd=archive.parent, check=False, capture_output=True, stdin=subprocess.DEVNULL
    )
    said = (done.stdout + done.stderr).decode("utf-8", "replace")
    if done.returncode or not os.path.isfile(told):
      raise JavaError(f"{archive.name} ended with status {done.returncode}: {_first(said)}")
    with open(told, encoding="utf-8") as file:
      content = file.read()
  try:
    scores = {int(x["image_id"]): float(x["scores"]["All"]["f"]) for x in json.loads(content)}
    each = np.array([scores[i] for i in range(len(rows))], np.float64)
  except (ValueError, KeyError, TypeError) as error:
    raise JavaError(f"{archive.name} wrote no scores of {len(rows)} captions: {error!r}") from error
  return float(np.mean(each)), each


class _Program:
  """A program that answers line by line."""

  def __init__(self, process: subprocess.Popen, name: str, said: tempfile.SpooledTemporaryFile):
    self._process, self._name, self._said = process, name, said

  def say(self, line: str) -> None:
    """Gives it a line."""
    try:
      self._process.stdin.write(f"{line}\n")
      self._process.stdin.flush()
    except OSError as error:
      raise self._failed() from error

  def answer(self, line: str | None = None) -> str:
    """Its next line, perhaps to one that it is given."""
    if line is not None:
      self.say(line)
    answer = self._process.stdout.readline()
    if not answer:
      raise self._failed()
    return answer.strip()

  def number(self) -> float:
    """Its next line, which is a number."""
    line = self.answer()
    try:
      return float(line)
    except ValueError as error:
      raise JavaError(f"{self._name}: expected a score, found {line[:80]!r}") from error

  def _failed(self):
    with contextlib.suppress(OSError):  # of what it has not read
      self._process.stdin.close()
    status = self._process.wait()
    self._said.seek(0)
    said = self._said.read().decode("utf-8", "replace")
    return JavaError(f"{self._name} ended with status {status}: {_first(said)}")


@contextlib.contextmanager
def _started(command: list[str], archive: pathlib.Path) -> Iterator[_Program]:
  """A program that runs while the block does."""
  with tempfile.TemporaryFile() as said:
    process = subprocess.Popen(
      command, cwd=archive.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
      text=True, encoding="utf-8",
    )  # fmt: skip
    try:
      yield _Program(process, archive.name, said)
    finally:
      process.kill()
      for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
          pipe.close()
      process.wait()


def _archive(name: str) -> pathlib.Path:
  place = folder()
  if place is None:
    raise JavaError(f"Expected a folder of coco-caption's in {VARIABLE}, found none")
  return (place / name).resolve()


def _plain(text: str) -> str:
  """A caption without what separates captions."""
  return " ".join(text.replace("|||", " ").split())


def _first(said: str) -> str:
  """The first line that a program said."""
  lines = [line.strip() for line in said.splitlines() if line.strip()]
  return lines[0][:_MOST] if lines else "it said nothing"
