"""Metrics for TensorBoard and Weights & Biases, beside `metrics.jsonl`.

Both take the rows of `metrics.jsonl` under the same names, and a run that is started again goes on
in the same place: rows of steps that it repeats are not there twice.
"""

import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from etils import epath


class Writer(Protocol):
  """Takes one row of metrics after the other."""

  def row(self, step: int, values: Mapping[str, float]) -> None:
    """The metrics of a step; several rows of one step have different names."""

  def close(self, *, failed: bool) -> None:
    """Writes out what is buffered; `failed` when the run ends with an error."""


class TensorBoard:
  """Event files in `workdir/tensorboard`, for `tensorboard --logdir=workdir`."""

  def __init__(self, workdir: epath.Path, *, start: int, described: Mapping[str, Any]):
    """Args as `open_writers`."""
    import tensorboardX

    del described  # it stands in config.json
    # Readers drop what an earlier start of the run has written of the steps from here on.
    folder = os.fspath(workdir / "tensorboard")
    self._writer = tensorboardX.SummaryWriter(
      folder,
      purge_step=start + 1,
      filename_suffix=f".{start:09}",  # else two starts in one second write one file
    )

  def row(self, step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def close(self, *, failed: bool) -> None:
    del failed
    self._writer.close()


class WandB:
  """A run of Weights & Biases; its id is kept in `workdir/wandb_id.txt`.

  The project is "ofa_jax" or WANDB_PROJECT; its other environment variables work as they do
  elsewhere (WANDB_MODE=offline needs no account).
  """

  def __init__(self, workdir: epath.Path, *, start: int, described: Mapping[str, Any]):
    """Args as `open_writers`; ValueError when the service refuses."""
    import wandb

    del start  # the server compares steps itself
    kept = workdir / "wandb_id.txt"
    if not kept.exists():
      kept.write_text(uuid.uuid4().hex[:12])
    try:
      self._run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "ofa_jax"),
        name=described.get("name") or workdir.name,
        id=kept.read_text().strip(),
        resume="allow",
        dir=None if "://" in str(workdir) else os.fspath(workdir),
        config=dict(described),
        settings=wandb.Settings(console="off"),
      )
    except wandb.Error as error:
      raise ValueError(
        f"log_to: Weights & Biases says: {error}. Run `wandb login`, or set WANDB_MODE=offline."
      ) from error

  def row(self, step: int, values: Mapping[str, float]) -> None:
    # Rows that the server has already, of a run that was killed after its checkpoint, it ignores.
    self._run.log(dict(values), step=step)

  def close(self, *, failed: bool) -> None:
    self._run.finish(exit_code=int(failed))


def open_writers(
  names: Sequence[str], workdir: epath.Path, *, start: int, described: Mapping[str, Any]
) -> list[Writer]:
  """Opens the writers of a run.

  Args:
    names: of `config.LOG_PACKAGES`.
    workdir: folder of the run.
    start: updates already done; rows of later ones, left by a killed run, are replaced.
    described: the config as JSON-able data.
  """
  kinds = {"tensorboard": TensorBoard, "wandb": WandB}
  return [kinds[name](workdir, start=start, described=described) for name in names]
