r"""Renames and reshapes weights between PyTorch and here by one declarative table.

A table is a sequence of rules `(torch name, our path, transform)`. The torch name is a regular
expression of literal text and groups, `(\d+)` or `(\w+)`; the path repeats a group as `\1`. An
index behind the path writes into a part of the parameter: `[\1]` stacks numbered layers on the
first axis, `[\1, :, 0]` puts a query matrix where queries, keys and values share one kernel.

Because the parameters' shapes say how many layers there are, the table is run from our side: it
lists every tensor that the model needs, which makes both directions loops over that list and
strictness a comparison of names. Arrays are NumPy's; this file needs no PyTorch.
"""

import difflib
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

WRAPPERS = ("module.", "model.")  # see `plain_names`


class Transform(NamedTuple):
  """A change of layout and its inverse.

  Attributes:
    to_ours: (torch array, our shape) -> our array.
    to_torch: our array -> torch array.
  """

  to_ours: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
  to_torch: Callable[[np.ndarray], np.ndarray]


class Tensor(NamedTuple):
  """A PyTorch tensor that the model needs, and the part of a parameter that it is."""

  name: str
  shape: tuple[int, ...]
  path: str
  index: tuple[int | slice, ...]
  transform: Transform


Rule = tuple[str, str, Transform]


def linear(inputs: int = 1) -> Transform:
  """[outputs, inputs] <-> [*inputs, *outputs], of which the first `inputs` axes are inputs."""
  return Transform(
    lambda x, shape: x.T.reshape(shape),
    lambda x: x.reshape(math.prod(x.shape[:inputs]), -1).T,
  )


SAME = Transform(lambda x, shape: x, lambda x: x)
FLAT = Transform(lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1))
CONV = Transform(lambda x, shape: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))


def pointwise(inputs: int = 1) -> Transform:
  """[outputs, inputs, 1, 1], a convolution of single pixels <-> the kernel of `linear`."""
  to_ours, to_torch = linear(inputs)
  return Transform(
    lambda x, shape: to_ours(x[:, :, 0, 0], shape), lambda x: to_torch(x)[:, :, None, None]
  )


def patches(channels: int = 3) -> Transform:
  """[D, C, P, P], a convolution of square patches <-> [P * P * C, D], for flattened patches."""

  def to_torch(x):
    size = math.isqrt(x.shape[0] // channels)
    return x.reshape(size, size, channels, -1).transpose(3, 2, 0, 1)

  return Transform(lambda x, shape: x.transpose(2, 3, 1, 0).reshape(shape), to_torch)


def norm_rules(torch: str, ours: str, layer: str = "") -> tuple[Rule, ...]:
  """The rules of a norm; `layer` is the index of a stacked one, `[\1]`."""
  return (
    (f"{torch}.weight", f"{ours}/scale{layer}", SAME),
    (f"{torch}.bias", f"{ours}/bias{layer}", SAME),
  )


def conv_rules(torch: str, ours: str) -> tuple[Rule, ...]:
  """The rules of a convolution with a bias."""
  return ((f"{torch}.weight", f"{ours}/kernel", CONV), (f"{torch}.bias", f"{ours}/bias", SAME))


def pointwise_rules(
  torch: str, ours: str, *, inputs: int = 1, part: int | None = None
) -> tuple[Rule, ...]:
  """The rules of a convolution of single pixels with a bias; the arguments of `linear_rules`."""
  (weight, kernel, _), bias = linear_rules(torch, ours, inputs=inputs, part=part)
  return ((weight, kernel, pointwise(inputs)), bias)


def batch_norm_rules(torch: str, ours: str) -> tuple[Rule, ...]:
  """The rules of a BatchNorm and its running statistics."""
  return (
    *norm_rules(torch, ours),
    (f"{torch}.running_mean", f"{ours}/mean", SAME),
    (f"{torch}.running_var", f"{ours}/var", SAME),
  )


def linear_rules(
  torch: str, ours: str, layer: str = "", *, inputs: int = 1, part: int | None = None
) -> tuple[Rule, ...]:
  """The rules of a linear map with a bias.

  Args:
    torch, ours: names of both layers.
    layer: the index of a stacked one, `[\1]`.
    inputs: axes of our kernel that are inputs.
    part: which of those that share a kernel (queries, keys, values) it is.
  """
  stacked = [layer.strip("[]")] if layer else []
  shared = [] if part is None else [str(part)]
  kernel = stacked + ([":"] * inputs + shared if shared else [])
  kernel, bias = (f"[{', '.join(x)}]" if x else "" for x in (kernel, stacked + shared))
  return (
    (f"{torch}.weight", f"{ours}/kernel{kernel}", linear(inputs)),
    (f"{torch}.bias", f"{ours}/bias{bias}", FLAT),
  )


def vit_block_rules(torch: str, ours: str) -> tuple[Rule, ...]:
  r"""The rules of the layers of CLIP's ViT; the torch name has their number as `(\d+)`."""
  return (
    *norm_rules(f"{torch}.ln_1", f"{ours}/ln_1", r"[\1]"),
    (f"{torch}.attn.in_proj_weight", rf"{ours}/attn/qkv/kernel[\1]", linear()),
    (f"{torch}.attn.in_proj_bias", rf"{ours}/attn/qkv/bias[\1]", FLAT),
    *linear_rules(f"{torch}.attn.out_proj", f"{ours}/attn/out", r"[\1]", inputs=2),
    *norm_rules(f"{torch}.ln_2", f"{ours}/ln_2", r"[\1]"),
    *linear_rules(f"{torch}.mlp.c_fc", f"{ours}/mlp/up", r"[\1]"),
    *linear_rules(f"{torch}.mlp.c_proj", f"{ours}/mlp/down", r"[\1]"),
  )


def needed_tensors(rules: Iterable[Rule], shapes: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
  """Lists the PyTorch tensors that fill parameters of these shapes.

  Raises:
    ValueError: a parameter that the rules do not fill exactly once.
  """
  rules = tuple(rules)
  needed = []
  for path, shape in shapes.items():
    parts = [t for rule in rules for t in _expand(rule, path, shape)]
    if sum(math.prod(t.shape) for t in parts) != math.prod(shape):
      raise ValueError(
        f"Expected rules that fill {path} {tuple(shape)} exactly once, found "
        f"{[t.name for t in parts] or 'none'}; correct the table."
      )
    needed += parts
  return needed


def from_torch(
  state_dict: Mapping[str, np.ndarray],
  rules: Iterable[Rule],
  *,
  shapes: Mapping[str, tuple[int, ...]],
  ignored: Iterable[tuple[str, str]] = (),
) -> dict[str, np.ndarray]:
  """Makes our parameters, float32 by path, of PyTorch's tensors by name.

  Args:
    state_dict: floating arrays of any precision; all are used or ignored.
    rules: the model's table.
    shapes: shape of every parameter by path; all are filled.
    ignored: (torch name regex, reason) of tensors that are left out.

  Raises:
    ValueError: missing and unexpected names, differing shapes, numbers that are no floats, all of
      them; or NaN and infinite numbers, all tensors that have some.
  """
  needed = match(state_dict, rules, shapes=shapes, ignored=ignored)
  params = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
  with np.errstate(over="ignore", invalid="ignore"):  # which is told below, by name
    for tensor in needed:
      part, x = params[tensor.path], state_dict[tensor.name]
      part[tensor.index] = tensor.transform.to_ours(x, part[tensor.index].shape)
  _check_finite(params, needed)
  return params


def match(
  state_dict: Mapping[str, np.ndarray],
  rules: Iterable[Rule],
  *,
  shapes: Mapping[str, tuple[int, ...]],
  ignored: Iterable[tuple[str, str]] = (),
) -> list[Tensor]:
  """Returns the tensors that fill the parameters, all of which the state dict has.

  Reads nothing but names, shapes and dtypes; the arguments and errors are those of `from_torch`.
  """
  needed = {tensor.name: tensor for tensor in needed_tensors(rules, shapes)}
  skip = [pattern for pattern, _ in ignored]
  extra = [n for n in state_dict if n not in needed and not any(re.search(p, n) for p in skip)]
  missing = [name for name in needed if name not in state_dict]
  problems = [f"missing: {name} {needed[name].shape}" for name in missing]
  # Comparing names is slow; where most of them differ, they are another model's anyway.
  names = missing if len(missing) * len(extra) < 1000 else []
  problems += [f"unexpected: {n} {state_dict[n].shape}{_near(n, names)}" for n in extra]
  problems += [
    f"shape of {name}: expected {tensor.shape}, found {state_dict[name].shape}"
    for name, tensor in needed.items()
    if name in state_dict and state_dict[name].shape != tensor.shape
  ]
  problems += [
    f"dtype of {name}: expected floating-point numbers, found {state_dict[name].dtype}"
    for name in needed
    if name in state_dict and not is_float(state_dict[name])
  ]
  if problems:
    raise ValueError(
      f"Expected exactly the {len(needed)} tensors of this model, found {len(state_dict)} and "
      f"{len(problems)} differences. Is the config the one of these weights?\n  "
      + "\n  ".join(problems)
    )
  return list(needed.values())


def to_torch(params: Mapping[str, np.ndarray], rules: Iterable[Rule]) -> dict[str, np.ndarray]:
  """The inverse of `from_torch`: PyTorch's tensors by name, of our parameters by path."""
  shapes = {path: np.shape(x) for path, x in params.items()}
  return {
    tensor.name: np.array(
      tensor.transform.to_torch(np.asarray(params[tensor.path])[tensor.index]), order="C"
    )
    for tensor in needed_tensors(rules, shapes)
  }


def is_float(tensor: np.ndarray) -> bool:
  """Whether an array is of floating-point numbers, bfloat16 among them."""
  dtype = np.asarray(tensor).dtype
  return np.issubdtype(dtype, np.floating) or dtype == ml_dtypes.bfloat16


def plain_names(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The tensors without what wrappers put before the names of all of them, once or several times.

  `module.` is of parallel training, `_orig_mod.` of torch.compile (which also wraps parts),
  `model.` of whatever kept the model under that name.

  Raises:
    ValueError: two tensors have the same name then.
  """
  names = [name.replace("_orig_mod.", "") for name in state_dict]
  stripped = True
  while names and stripped:
    prefix = next((p for p in WRAPPERS if all(n.startswith(p) for n in names)), "")
    stripped = bool(prefix)
    names = [name.removeprefix(prefix) for name in names]
  if len(set(names)) != len(names):
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"Expected one tensor of a name, found {twice} twice, with other wrappers")
  return dict(zip(names, state_dict.values(), strict=True))


def counters(tensors: Iterable[str]) -> dict[str, np.ndarray]:
  """BatchNorm's `num_batches_tracked`, 0, for every running mean among the names."""
  means = [name for name in tensors if name.endswith(".running_mean")]
  return {n.replace("running_mean", "num_batches_tracked"): np.zeros((), np.int64) for n in means}


def _expand(rule: Rule, path: str, shape: tuple[int, ...]) -> Iterable[Tensor]:
  """Yields the tensors by which one rule fills a parameter: none, one, or one for each layer."""
  pattern, template, transform = rule
  ours, _, index = template.partition("[")
  match = _pattern(pattern, ours).fullmatch(path)
  if match is None:
    return
  groups = {int(name[1:]): value for name, value in match.groupdict().items()}
  items = [item.strip() for item in index.rstrip("]").split(",") if item.strip()]
  layer_group = int(items[0][1:]) if items and items[0].startswith("\\") else None
  dummy = np.broadcast_to(np.False_, shape)
  for layer in range(shape[0]) if layer_group else [0]:
    if layer_group:
      groups[layer_group] = str(layer)
      items[0] = str(layer)
    at = tuple(slice(None) if item == ":" else int(item) for item in items)
    number = itertools.count(1)
    name = re.sub(r"\(.*?\)", lambda _, number=number: groups[next(number)], pattern)
    yield Tensor(name, transform.to_torch(dummy[at]).shape, path, at, transform)


@functools.lru_cache(maxsize=1 << 12)
def _pattern(torch: str, ours: str) -> re.Pattern[str]:
  """What our paths of a rule look like, its groups as they are in the torch name."""
  kinds = re.findall(r"\((.*?)\)", torch)
  return re.compile(
    re.sub(r"\\(\d)", lambda group: f"(?P<g{group[1]}>{kinds[int(group[1]) - 1]})", ours)
  )


def count_layers(names: Iterable[str], pattern: str) -> int:
  """Counts the different numbers that the pattern's group takes in the names of tensors."""
  matches = (re.match(pattern, name) for name in names)
  return len({match[1] for match in matches if match})


def _check_finite(params: Mapping[str, np.ndarray], tensors: Iterable[Tensor]) -> None:
  # The extremes of a whole parameter first: NaN and infinity show in them, at the speed of memory.
  damaged = {
    path
    for path, x in params.items()
    if x.size and not (np.isfinite(x.max()) and np.isfinite(x.min()))
  }
  problems = []
  for tensor in tensors:
    if tensor.path in damaged:
      part = params[tensor.path][tensor.index]
      counts = {"NaN": np.isnan(part).sum(), "infinite": np.isinf(part).sum()}
      text = " and ".join(f"{n:,} {kind}" for kind, n in counts.items() if n)
      problems += [f"{tensor.name}: {text} of {part.size:,}"] if text else []
  if problems:
    raise ValueError(
      f"Expected finite weights, found {len(problems)} tensors that are not, as float32; the file "
      "is damaged, or its training had diverged\n  " + "\n  ".join(problems)
    )


def _near(name: str, names: list[str]) -> str:
  near = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
  return f", like the missing {near[0]}" if near else ""
