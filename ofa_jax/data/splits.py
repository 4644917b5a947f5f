"""The pairs of a split: given, found beside the training data, or held out of that."""

from collections.abc import Mapping, Sequence

from ofa_jax import storage
from ofa_jax.data import held_out
from ofa_jax.data.pairs import PairData
from ofa_jax.data.protocols import Images
from ofa_jax.data.tsv import Texts

Source = PairData | str


def load(
  given: Mapping[str, Sequence[Source]], split: str, *, hold_out: float = 0.0
) -> list[tuple[Images, Texts, float]]:
  """Opens the data of a split: images, captions and weight of each source.

  Where nothing is given to evaluate on and `hold_out` is above 0, "valid" is that split of the
  folder that was given to train on, or else pictures held out of the first source of "train",
  which trains without them.

  Args:
    given: sources by split; a path is a folder in which the split is looked for, or a file or
      pattern (`PairData.of`).
    split: its name.
    hold_out: share of the pictures.

  Raises:
    ValueError: nothing was given, or faulty files.
  """
  sources = given.get(split)
  beside = _beside(given) if hold_out and not given.get("valid") else None
  if split == "valid" and beside is not None:
    sources = [beside]
  divided = hold_out > 0 and not given.get("valid") and beside is None
  if split == "valid" and divided and given.get("train"):
    return [_divided(given["train"][0], share=hold_out, held=True)]
  if not sources:
    raise ValueError(
      f"Expected data for the split {split!r} in task.{split}, found none. Give "
      f"--config.task.{split}=PATH: a table (.csv, .tsv), .tar shards, or a folder."
    )
  if split == "train" and divided:
    first, *others = sources
    return [_divided(first, share=hold_out, held=False), *(_whole(s, split) for s in others)]
  return [_whole(source, split) for source in sources]


def of(source: Source, split: str) -> PairData:
  """What a path on the command line means: a folder with the split, or a file that is one."""
  if isinstance(source, PairData):
    return source
  return PairData.of(source, split if storage.is_dir(source) else None)


def _whole(source: Source, split: str) -> tuple[Images, Texts, float]:
  data = of(source, split)
  return *data.load(), data.weight


def _divided(source: Source, *, share: float, held: bool) -> tuple[Images, Texts, float]:
  images, texts, weight = _whole(source, "train")
  return *held_out.divide(images, texts, share=share, held_out=held), weight


def _beside(given: Mapping[str, Sequence[Source]]) -> PairData | None:
  """The split "valid" of the one folder that was given to train on; None where it has none."""
  train = given.get("train") or ()
  if len(train) != 1 or isinstance(train[0], PairData) or not storage.is_dir(train[0]):
    return None
  try:
    return PairData.of(train[0], "valid")
  except ValueError:
    return None
