"""One mesh for one device and for a pod, and tables that say where parameters live.

A model brings an ordered table `(path regex, PartitionSpec)`; specs name no axis for stacked
layers, which is prepended here. Axes that a mesh or a shape cannot satisfy are dropped, and a large
parameter that then lies whole on every device is split along its largest divisible axis over
`fsdp` instead.

What is split over `fsdp` is stored so and never multiplied so: wherever a model reads such a
parameter it gets the whole one, in the compute dtype, and the gradient goes back in parts. Left to
itself, a compiler may multiply by the slices one after the other, and does.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Union

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ofa_jax import trees

AXES = (*trees.BATCH_AXES, "tensor")
BATCH = P(trees.BATCH_AXES)
# Arrays with a leading axis of rows by field; of several streams, those of each by name.
Batch = Mapping[str, Union[np.ndarray, jax.Array, "Batch"]]
_LARGE = 2**16  # scalars; below this, splitting costs more than it saves


def make_mesh(sizes: tuple[int, int, int], *, devices: list | None = None) -> Mesh:
  """Mesh over all devices (or the given ones) with axes ("data", "fsdp", "tensor").

  Where the devices are several TPU slices, only `data` runs over the slow network between them.

  Raises:
    ValueError: `data` is not a multiple of the slices.
  """
  types = (AxisType.Auto,) * 3
  devices = jax.devices() if devices is None else devices
  slices = len({getattr(d, "slice_index", None) for d in devices if d.platform == "tpu"})
  if slices < 2:
    return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
  data, *inside = sizes
  if data % slices:
    raise ValueError(
      f"mesh.data: expected a multiple of the {slices} slices, found {data}; fsdp and tensor stay "
      "inside a slice"
    )
  grid = mesh_utils.create_hybrid_device_mesh(
    (data // slices, *inside), (slices, 1, 1), devices=devices
  )
  return Mesh(grid, AXES, axis_types=types)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over `data` x `fsdp`."""
  return NamedSharding(mesh, BATCH)


def params_shardings(params: Any, table: Iterable[tuple[str, P]], mesh: Mesh) -> Any:
  """Sharding of every parameter.

  Args:
    params: tree of arrays or ShapeDtypeStructs.
    table: ordered `(regex, PartitionSpec)`, first match wins.
    mesh: from `make_mesh`.

  Raises:
    ValueError: large parameters that no row matches, all of them at once.
  """
  table = tuple(table)
  missing = []

  def place(path, leaf):
    spec = trees.first_match(table, path)
    if spec is None:
      if np.prod(leaf.shape) >= _LARGE:
        missing.append(f"  {path} {tuple(leaf.shape)}")
      spec = P()
    return NamedSharding(mesh, fit_spec(spec, leaf.shape, mesh))

  shardings = trees.map_paths(place, params)
  if missing:
    raise ValueError(
      "Expected a sharding row for every large parameter, found none for\n"
      + "\n".join(missing)
      + "\nAdd rows to the model's sharding table."
    )
  return shardings


def fit_spec(spec: P, shape: tuple[int, ...], mesh: Mesh) -> P:
  """The spec as far as mesh and shape allow: layer axis prepended, indivisible axes dropped."""
  if len(spec) > len(shape):
    raise ValueError(
      f"Expected a spec of at most {len(shape)} axes for shape {shape}, found {spec}"
    )
  stacked = len(shape) - len(spec)
  axes = [None] * stacked + list(spec)
  for i, name in enumerate(axes):
    if name is not None and (mesh.shape[name] == 1 or shape[i] % mesh.shape[name]):
      axes[i] = None
  wants_fsdp = "fsdp" in spec and mesh.shape["fsdp"] > 1 and np.prod(shape) >= _LARGE
  if wants_fsdp and "fsdp" not in axes:
    free = [
      i
      for i in range(stacked, len(shape))
      if axes[i] is None and shape[i] % mesh.shape["fsdp"] == 0
    ]
    if free:
      axes[max(free, key=lambda i: shape[i])] = "fsdp"
  while axes and axes[-1] is None:
    axes.pop()
  return P(*axes)


class SplitParam(nnx.Param):
  """A parameter that is stored split over `fsdp` and is whole where it is read.

  Its metadata `axes` names the mesh axis of each of its axes. One taken off a stack of layers has
  lost its first axes, so that a loop over layers gathers one layer at a time, and a layer that the
  backward pass computes again is gathered again.
  """

  def get_value(self, *, index: Any = ...) -> jax.Array:
    """Returns the whole value, or the part of it that `index` names."""
    value = _gather(self.get_raw_value(), self.axes)
    return value if index is ... else value[index]


def gathering(module: nnx.Module, shardings: Any) -> nnx.Module:
  """The module with its parameters that are split over `fsdp` as `SplitParam`.

  Args:
    module: abstract or not.
    shardings: of its parameters, from `params_shardings`.
  """
  places = trees.flatten(shardings)

  def convert(path, param):
    if not isinstance(param, nnx.Param):
      return param
    axes = tuple(places[trees.path_name(path)].spec)
    if "fsdp" not in axes:
      return param
    axes += (None,) * (param.ndim - len(axes))
    return SplitParam.from_metadata(param.get_raw_value(), {**param.get_metadata(), "axes": axes})

  return jax.tree_util.tree_map_with_path(
    convert, module, is_leaf=lambda x: isinstance(x, nnx.Variable)
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x, axes):
  """x, whole along the axes that `fsdp` splits; its gradient is split again."""
  return _constrain(x, _whole(axes))


def _gather_forward(x, axes):
  return _gather(x, axes), None


def _gather_backward(axes, _, gradient):
  # Whole first: a product whose result has to be split is computed slice by slice too. Of the sum
  # over devices and the slicing, libtpu 0.0.42.1 makes an all-reduce and a slice.
  return (_constrain(_constrain(gradient, _whole(axes)), axes),)


_gather.defvjp(_gather_forward, _gather_backward)


def _whole(axes):
  return tuple(None if name == "fsdp" else name for name in axes)


def _constrain(x, axes):
  # Under shard_map every device has all of x already.
  if "fsdp" not in jax.sharding.get_abstract_mesh().auto_axes:
    return x
  return jax.lax.with_sharding_constraint(x, P(*axes[len(axes) - x.ndim :]))


def like_params(tree: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
  """Shardings for a tree that holds copies of the parameter tree, such as optimizer state.

  A leaf whose path ends with a parameter's path and that has its shape lies where the parameter
  lies; everything else is replicated.
  """
  shapes = {path: leaf.shape for path, leaf in trees.flatten(params).items()}
  places = trees.flatten(shardings)

  def place(path, leaf):
    parts = path.split("/")
    for start in range(len(parts)):
      name = "/".join(parts[start:])
      if name in places and shapes[name] == leaf.shape:
        return places[name]
    return replicated(mesh)

  return trees.map_paths(place, tree)


def to_global(batch: Batch, mesh: Mesh) -> Batch:
  """This host's rows as global arrays over the mesh; of several streams, the rows of each."""
  place = functools.partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
  return jax.tree.map(place, batch)


def bytes_per_device(tree: Any, shardings: Any) -> int:
  """Bytes that one device holds of a tree laid out by `shardings`."""
  total = 0
  for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
    total += int(np.prod(sharding.shard_shape(leaf.shape))) * np.dtype(leaf.dtype).itemsize
  return total
