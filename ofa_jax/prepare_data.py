r"""Writes the TSV files that OFA reads from a data set as its makers distribute it.

  python -m ofa_jax.prepare_data --layout=vqa --source=downloads/vqa --output=datasets

Layouts: coco, vqa, refcoco, snli_ve, glue, imagenet, gigaword, muge, csv, visual_genome; what each
wants in the source is said in its file in `ofa_jax/data/official`, and in docs/data.md. The files
have the names that the configs look for below OFA_JAX_DATA, which is the output then. Rows whose
picture is missing or unreadable are left out, named and counted; a file appears whole or not at
all. Afterwards `python -m ofa_jax.validate_data --config=...` reads every row as training does.
"""

import os
import pathlib
import sys
from collections.abc import Callable

from absl import flags

from ofa_jax import cli, outputs, storage
from ofa_jax.data.official import (
  coco,
  gigaword,
  glue,
  imagenet,
  muge,
  refcoco,
  snli_ve,
  table,
  visual_genome,
  vqa,
)
from ofa_jax.data.official.writing import Files, Skipped, write
from ofa_jax.files import room_for

LAYOUTS: dict[str, Callable[..., Files]] = {
  "coco": coco.files,
  "vqa": vqa.files,
  "refcoco": refcoco.files,
  "snli_ve": snli_ve.files,
  "glue": glue.files,
  "imagenet": imagenet.files,
  "gigaword": gigaword.files,
  "muge": muge.files,
  "csv": table.files,
  "visual_genome": visual_genome.files,
}


def prepare_data(
  layout: str,
  source: str | os.PathLike,
  output: str | os.PathLike,
  *,
  limit: int | None = None,
  least: int = vqa.LEAST,
  workers: int | None = None,
) -> dict[str, int]:
  """Writes all files of a layout; returns the rows of each by its name.

  Args:
    layout: one of `LAYOUTS`.
    source: folder of the data set.
    output: folder, in which files of these names are replaced.
    limit: the first so many rows of each file are read; None: all.
    least: of "vqa": questions that an answer needs to be in the list.
    workers: threads that read pictures; None: one a core.

  Raises:
    ValueError: files are missing, damaged or of another form; or a file would have no row.
  """
  source = pathlib.Path(source)
  if not source.is_dir():
    raise ValueError(f"Expected a folder in --source, found no folder {source}")
  skipped, rows = Skipped(), {}
  options = {"least": least} if layout == "vqa" else {}
  if layout == "visual_genome":
    options = {"listed": vqa.listed_beside(output)}
    if options["listed"] is None:
      print("Any answer is kept: the list that --layout=vqa writes is not there", file=sys.stderr)
  with room_for(output):
    for file in LAYOUTS[layout](source, skipped=skipped, **options):
      count = write(file, output, skipped=skipped, limit=limit, workers=workers)
      rows[file.name] = count
      print(f"{os.path.join(output, file.name)}: {f'{count:,} rows' if count else 'written'}")
  for kind, number in skipped.counts.most_common():
    print(f"Skipped: {number:,} x {kind}")
  return rows


def main() -> None:
  """Runs the command."""
  layout = flags.DEFINE_enum("layout", None, list(LAYOUTS), "How the data set is laid out.")
  source = cli.define_path("source", "Folder of the data set as it was downloaded.", required=True)
  output = cli.define_path("output", "Folder for the TSV files (OFA_JAX_DATA).", required=True)
  limit = flags.DEFINE_integer(
    "limit", None, "Read the first so many rows of each file only.", lower_bound=1
  )
  least = flags.DEFINE_integer(
    "least", vqa.LEAST, "Of vqa: questions that an answer needs to be in the list.", lower_bound=1
  )
  flags.mark_flag_as_required("layout")

  def run():
    if storage.in_bucket(output.value) or storage.in_bucket(source.value):
      raise ValueError(
        f"Expected local folders in --source and --output, found {source.value}, {output.value}"
      )
    outputs.check_folder(output.value)
    prepare_data(layout.value, source.value, output.value, limit=limit.value, least=least.value)

  cli.run(run, interrupted="files that are written stay; the same command starts anew")


if __name__ == "__main__":
  main()
