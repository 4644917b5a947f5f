"""A linear model that learns from two streams of other fields, shapes and sizes; also a config."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from ofa_jax import losses
from ofa_jax.config import Config, Optim
from ofa_jax.tasks.base import Task, spec_of

WIDTH = 6


class Linear(nnx.Module):
  """One product for both streams."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.kernel = nnx.Param(jax.random.normal(rngs.params(), (WIDTH,)))
    self.bias = nnx.Param(jnp.zeros(()))

  def __call__(self, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ self.kernel[...]) + self.bias[...]


@dataclasses.dataclass
class LinearConfig:
  """What `step.build` asks of a model's config."""

  sharding: ClassVar[tuple[tuple[str, P], ...]] = ()
  towers: ClassVar[dict[str, str]] = {"all": ""}

  def build(self, *, rngs: nnx.Rngs, remat: str = "none", unroll: int = 1) -> Linear:
    del remat, unroll
    return Linear(rngs=rngs)


class Pairs:
  """One number of one vector."""

  notes = ()

  def __len__(self) -> int:
    return 40

  def example(self, i: int, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    x = np.random.default_rng(i).normal(size=WIDTH) + rng.normal(scale=0.1)
    return {"x": x.astype(np.float32), "y": np.float32(np.sin(i))}

  def blank(self) -> dict[str, np.ndarray]:
    return {"x": np.zeros(WIDTH, np.float32), "y": np.float32(0)}

  def close(self) -> None:
    pass


class Texts(Pairs):
  """Up to three numbers, each of one vector; longer ones are larger."""

  def __len__(self) -> int:
    return 28

  def example(self, i: int, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    words = np.random.default_rng((i, 1)).normal(size=(3, WIDTH)) * (1 + i % 3)
    return {"words": words.astype(np.float32), "length": np.int32(1 + i % 3)}

  def blank(self) -> dict[str, np.ndarray]:
    return {"words": np.zeros((3, WIDTH), np.float32), "length": np.int32(0)}


@dataclasses.dataclass(kw_only=True)
class TwoStreams(Task):
  """The mean over the pairs plus half the mean over the words, as OFA's pretraining adds losses."""

  num_texts: int = 8
  random_counts: bool = False

  unit: ClassVar[str] = "pairs"

  def batch_sizes(self, batch_size):
    return {"pairs": batch_size, "texts": self.num_texts}

  def examples(self, split):
    return {"pairs": Pairs(), "texts": Texts()}

  def batch_spec(self, batch_size):
    sizes = self.batch_sizes(batch_size)
    return {name: spec_of(rows.blank(), sizes[name]) for name, rows in self.examples("").items()}

  def loss(self, model, batch, *, rngs, chunks=1):
    pairs, texts = batch["pairs"], batch["texts"]
    of_pairs = losses.mean(jnp.square(model(pairs["x"]) - pairs["y"]), pairs["weight"])
    keep = (jnp.arange(3) < texts["length"][:, None]) & (texts["weight"][:, None] > 0)
    if self.random_counts:  # a loss that is its own count: its gradient for the bias is 1
      keep &= jax.random.bernoulli(rngs, 0.5, keep.shape)
      ones = jnp.where(keep, 1.0, 0.0)
      return {
        "loss": losses.sum_of_means(
          of_pairs._replace(total=0.0 * of_pairs.total), losses.mean(ones * model.bias[...], ones)
        )
      }
    of_words = losses.mean(jnp.square(model(texts["words"]) - 1), keep)
    half = losses.Mean(of_words.total / 2, of_words.count)
    return {
      "loss": losses.sum_of_means(of_pairs, half),
      "pairs_loss": of_pairs,
      "words_loss": of_words,
    }


def get_config() -> Config:
  """A run of a second."""
  return Config(
    name="two streams",
    model=LinearConfig(),
    task=TwoStreams(),
    batch_size=16,
    steps=7,
    log_every=1,
    save_every=4,
    optim=Optim(lr=0.1, schedule="constant"),
    precision="fp32",
  )
