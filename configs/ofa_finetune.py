"""What the fine-tuning recipes of OFA share: how they are asked for, and what all scripts have.

The argument of these configs is SIZE and other words behind commas, in any order. Data lies under
OFA_JAX_DATA, which is datasets/ where it is not set. Any number of devices gives the updates of the
original's, and `accum` makes them fit.
"""

import os
from collections.abc import Sequence

from ofa_jax.config import Config, MeshShape, Optim
from ofa_jax.models import ofa
from ofa_jax.tasks.seq2seq import Seq2Seq

BIG = ("large", "huge")
CHINESE_SIZES = ("base", "large")  # which the original publishes
CHINESE_WORDS = 30325


def read(
  argument: str,
  *,
  sizes: Sequence[str] = tuple(ofa.SIZES),
  default: str = "base",
  words: Sequence[str] = (),
) -> tuple[str, tuple[str, ...]]:
  """Reads the argument of a recipe.

  Args:
    argument: a size and other words behind commas, all of which may be missing.
    sizes: that there are.
    default: the size where none is named.
    words: the others that there are.

  Returns:
    The size, and the words that were there, in the order of `words`.

  Raises:
    ValueError: an unknown word, or two sizes.
  """
  asked = split(argument)
  known = [word for word in sizes if word in asked]
  faulty = [word for word in asked if word not in (*sizes, *words)]
  if faulty or len(known) > 1:
    others = " or ".join(x for x in (", ".join(words[:-1]), *words[-1:]) if x)
    raise ValueError(
      f"Expected a size out of {', '.join(sizes)}{f' and perhaps {others}' if others else ''}, "
      f"found {', '.join(faulty or known)}"
    )
  return (known or [default])[0], tuple(word for word in words if word in asked)


def split(argument: str) -> list[str]:
  """The words of a recipe's argument."""
  return [word for word in argument.split(",") if word]


def one_of(asked: Sequence[str], names: Sequence[str], *, what: str) -> str | None:
  """The one of these names that is asked for, None where none is.

  Args:
    asked: words of a recipe's argument.
    names: of which at most one may be there.
    what: they are, for the error.

  Raises:
    ValueError: several are there.
  """
  chosen = [name for name in names if name in asked]
  if len(chosen) > 1:
    raise ValueError(f"Expected one {what} out of {', '.join(names)}, found {', '.join(chosen)}")
  return chosen[0] if chosen else None


def folder(name: str) -> str:
  """Where a data set lies."""
  return f"{os.environ.get('OFA_JAX_DATA', 'datasets')}/{name}"


def released(size: str, *, chinese: bool = False) -> str:
  """The name of the released model of a size, which has the tokenizer, too."""
  return f"OFA-CN-{size}" if chinese else f"OFA-{size}"


def finetune(
  size: str,
  task: Seq2Seq,
  *,
  name: str,
  batch_size: int,
  lr: float,
  drop_path: float = 0.1,
  warmup_ratio: float = 0.06,
  chinese: bool = False,
  freeze_embedding: bool = False,
) -> Config:
  """What all the original's scripts have; how long they train and what they evaluate is missing.

  Args:
    size: of `ofa.SIZES`.
    task: what is learnt.
    name: of it.
    batch_size: rows of an update.
    lr: the highest rate.
    drop_path: rate of both transformers.
    warmup_ratio: share of the updates until then.
    chinese: whether the model is one of the Chinese ones.
    freeze_embedding: whether the table of tokens is left as it is (--freeze-*-embedding).
  """
  model = released(size, chinese=chinese)
  vocabulary = {"vocab_size": CHINESE_WORDS} if chinese else {}
  return Config(
    name=f"{model}: {name}",
    init=model,
    model=ofa.config(
      size, dropout=0.1, encoder_drop_path=drop_path, decoder_drop_path=drop_path, **vocabulary
    ),
    task=task,
    batch_size=batch_size,
    seed=1,
    log_every=10,
    optim=Optim(
      lr=lr,
      adam="fairseq",
      weight_decay=0.01,
      clip_norm=1.0,
      schedule="polynomial",
      warmup_ratio=warmup_ratio,
      freeze=ofa.FREEZE["embedding"] if freeze_embedding else (),
    ),
    mesh=MeshShape(data=1, fsdp=-1) if size == "huge" else MeshShape(),
    remat="full" if size in BIG else "none",
  )
