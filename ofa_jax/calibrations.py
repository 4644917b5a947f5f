"""The temperatures that make a model's probabilities right, kept beside its weights.

`calibration.json` lies in the model's directory, of a run in the folder of the checkpoint, and goes
where these go. There is one temperature for each way of finding answers: `vqa/chosen` out of
candidates, `vqa/generated` by search. What the probabilities are is said in `tasks/confidence.py`.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from ofa_jax import files, hub, storage
from ofa_jax.convert import json_files, releases
from ofa_jax.decode.beam import Search
from ofa_jax.engine import step_name

NAME = "calibration.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
  """How the probabilities of one kind of answers were made right.

  Attributes:
    temperature: what it takes.
    rows: answers that it was fitted to.
    right: their mean rightness.
    ece_before, ece_after: expected calibration error, see `scoring.calibration.Fit`.
    search: how generated answers were searched for; None of chosen ones.
  """

  temperature: float
  rows: int
  right: float
  ece_before: float
  ece_after: float
  search: Mapping[str, Any] | None = None

  def says(self, name: str, *, search: Search) -> str:
    """A line on where probabilities come from, and whether they were fitted to another search.

    Args:
      name: the model's.
      search: how answers are searched for now.
    """
    line = (
      f"probabilities by the calibration of {name}: temperature {self.temperature:.3g}, fitted to "
      f"{self.rows:,} answers"
    )
    if self.search is None:
      return line
    now = searched(search)
    other = sorted(k for k in now if self.search.get(k, now[k]) != now[k])
    if other:
      told = ", ".join(f"{k} {self.search[k]}" for k in other)
      line += f" that were searched for with {told}; calibrate again for this search"
    return line


def searched(search: Search) -> dict[str, Any]:
  """The fields of a search as JSON gives them back."""
  return json.loads(json.dumps(dataclasses.asdict(search)))


def place_of(source: hub.Source) -> pathlib.Path | None:
  """The folder of a model's weights alone; None: they are a file."""
  if source.form == "run":
    return source.stored()[-1]
  return source.stored()[0].parent if source.form in ("directory", "huggingface") else None


def load(source: hub.Source) -> dict[str, Calibration]:
  """The calibrations of a model by name, see `confidence.name_of`; none where there is no file.

  Raises:
    ValueError: the file is something else.
  """
  place = place_of(source)
  return {} if place is None else _read(place / NAME)


def of_model(name: str | os.PathLike) -> dict[str, Calibration]:
  """The same of whatever `hub.open_model` takes, but that nothing is downloaded for it.

  What cannot be opened has none; it is told where its weights are read.

  Raises:
    ValueError: as `load`.
  """
  if str(name) in hub.RELEASES:
    name = files.at_home(releases.ROOT) / str(name)
  folder, _ = step_name.split_step(str(files.at_home(name)))
  if not storage.is_dir(folder):
    return {}
  if not storage.is_dir(storage.of(folder) / "checkpoints"):
    return _read(storage.of(folder) / NAME)
  try:
    source = hub.open_model(name)
  except ValueError:
    return {}
  return load(source)


def store(place: pathlib.Path, made: Mapping[str, Calibration]) -> pathlib.Path:
  """Adds calibrations to those of a model, in place of others of their names; returns the file.

  Args:
    place: from `place_of`.
    made: the calibrations by their names.

  Raises:
    ValueError: what is there is something else.
    OSError: nothing can be written there.
  """
  known = {**_read(place / NAME), **made}
  content = {
    "format": FORMAT,
    "answers": {name: dataclasses.asdict(known[name]) for name in sorted(known)},
  }
  files.write_text(place / NAME, json.dumps(content, indent=2) + "\n")
  return place / NAME


def _read(path: pathlib.Path) -> dict[str, Calibration]:
  try:
    content = json_files.read(path)
  except FileNotFoundError:
    return {}
  try:
    if content["format"] != FORMAT:
      raise ValueError(f"format {content['format']!r:.40}")
    known = {str(name): Calibration(**values) for name, values in content["answers"].items()}
    for calibration in known.values():
      if not 0 < float(calibration.temperature) < float("inf"):
        raise ValueError(f"a temperature of {calibration.temperature!r:.40}")
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise ValueError(
      f"{path}: expected calibrations, found {error!s:.100}; remove it, and calibrate again"
    ) from error
  return known
