"""Models beside the one that is trained: a teacher, a judge, what draws images of codes."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from ofa_jax import hub, numerics, trees
from ofa_jax.convert.params import ModelConfig
from ofa_jax.models.abstract import abstract


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frozen:
  """A stored model whose weights a step reads and nothing trains.

  They are an input of the step, whole on every device: neither constants of its program nor in its
  checkpoints. `Task.frozen` gives them, and `prepare` or `predict` merges them.

  Attributes:
    name: where it is stored, as `hub.open_model` takes it.
    config: its sizes.
    precision: what its parameters are kept in, whatever the run's is, such as "fp32" of a codec
      whose pictures bf16 would change; None: the run's.
  """

  name: str
  config: ModelConfig
  precision: str | None = None

  @classmethod
  def of(cls, name: str, *, precision: str | None = None) -> "Frozen":
    """A model by its name; the sizes of a public one need no download."""
    return cls(name=name, config=hub.config_of(name), precision=precision)

  def spec(self, mesh: jax.sharding.Mesh, *, precision: str) -> dict[str, Any]:
    """What `load` would give, as ShapeDtypeStructs with shardings; nothing is read."""
    _, params, rest = abstract(self.config)
    kept = self.precision or precision
    shapes = {"params": jax.eval_shape(lambda x: numerics.cast(x, kept), params), "rest": rest}
    whole = _whole(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)

  def load(self, mesh: jax.sharding.Mesh, *, precision: str) -> dict[str, Any]:
    """Reads the weights onto a mesh.

    Args:
      mesh: where they go, whole.
      precision: that of the run, in which the parameters are kept if the model has none of its own;
        statistics stay float32.

    Returns:
      "params" and "rest", nested dicts of arrays.

    Raises:
      ValueError: there is no such model, or it has other sizes by now.
    """
    source = hub.open_model(self.name)
    differences = trees.difference(abstract(self.config)[1:], abstract(source.config)[1:])
    if differences:
      raise ValueError(
        f"{self.name}: expected the sizes that it had before, found {len(differences)} differences:"
        "\n  " + "\n  ".join(differences[:20])
      )
    params, rest = source.load(_whole(mesh))
    return {"params": numerics.cast(params, self.precision or precision), "rest": rest}

  def merge(self, weights: Any) -> nnx.Module:
    """The model with the weights of `load`; inside the step."""
    return nnx.merge(abstract(self.config)[0], weights["params"], weights["rest"])


def _whole(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
