"""AdamW and fairseq's Adam, schedules, and what each parameter gets: decay, freezing, multipliers.

The optax transformation gives the direction of a unit learning rate; the learning rate comes from
the step of the run, not from a count of its own, so that skipped steps advance the schedule.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ofa_jax import trees
from ofa_jax.config import Optim
from ofa_jax.engine import lora


def schedule(optim: Optim, *, steps: int) -> Callable[[jax.Array], jax.Array]:
  """Learning rate of a 0-based step.

  Linear warm-up, `lr * (step + 1) / warmup`, then by name: "constant", "linear" to zero, or
  "cosine", `lr * (1 + cos(pi * (step - warmup) / (steps - warmup))) / 2`, as Chinese-CLIP's.

  "polynomial" is fairseq's polynomial_decay: from `lr` to `end_lr` by a power of the way that is
  left. Its warm-up counts finished updates, `lr * step / warmup`: the first one has rate 0.
  """
  warmup = int(steps * optim.warmup_ratio) if optim.warmup_ratio else optim.warmup
  rest = max(1, steps - warmup)
  begun = 0.0 if optim.schedule == "polynomial" else 1.0
  end = optim.end_lr / optim.lr

  def learning_rate(step):
    step = jnp.asarray(step, jnp.float32)
    done = jnp.clip((step - warmup) / rest, 0.0, 1.0)
    decay = {
      "constant": 1.0,
      "linear": 1.0 - done,
      "cosine": 0.5 * (1.0 + jnp.cos(math.pi * done)),
      "polynomial": end + (1.0 - end) * (1.0 - done) ** optim.power,
    }[optim.schedule]
    warm = jnp.minimum(1.0, (step + begun) / max(1, warmup))
    return optim.lr * jnp.where(step < warmup, warm, decay)

  return learning_rate


def transformation(optim: Optim, params: Any) -> optax.GradientTransformation:
  """Adam with decoupled weight decay, without its learning rate; frozen parameters have no state.

  With `optim.lora` the state is `lora.Factored`, and `update` takes the trees that `seen` gives.

  Args:
    optim: the config.
    params: tree of arrays or ShapeDtypeStructs, for the masks.

  Raises:
    ValueError: patterns that match no parameter; multipliers that are not one a layer.
  """
  patterns = [
    ("freeze", optim.freeze),
    ("no_decay", optim.no_decay),
    ("lr_scale", tuple(p for p, _ in optim.lr_scale)),
    ("clamp", tuple(p for p, _ in optim.clamp)),
  ]
  lost = [f"  optim.{name}: {p!r}" for name, ps in patterns for p in trees.unmatched(ps, params)]
  if lost:
    raise ValueError(
      "Expected every pattern to match a parameter, found no match for\n"
      + "\n".join(lost)
      + "\nParameter paths look like\n  "
      + "\n  ".join(list(trees.flatten(params))[:5])
    )
  factors = None
  if optim.lora is not None:
    factors = jax.eval_shape(lambda: lora.init(optim.lora, params))
    params = lora.trained(params, factors)
  trainable = trees.map_paths(lambda path, p: bool(np.any(_rate(optim, path, p))), params)
  decayed = jax.tree.map(lambda no: not no, trees.matches(optim.no_decay, params))
  adam = _ADAMS[optim.adam](b1=optim.b1, b2=optim.b2, eps=optim.eps)
  decay = optax.add_decayed_weights(optim.weight_decay, mask=decayed)
  inner = optax.masked(optax.chain(adam, decay) if optim.weight_decay else adam, trainable)
  if factors is None:
    return inner

  def init(params):
    factors = lora.init(optim.lora, params)
    return lora.Factored(factors, inner.init(lora.trained(params, factors)))

  def update(grads, state, params):
    """Of the tree of factors; the factors themselves are changed by `updated`."""
    updates, new = inner.update(grads, state.inner, params)
    return updates, lora.Factored(state.factors, new)

  return optax.GradientTransformation(init, update)


def seen(optim: Optim, params: Any, opt: Any, grads: Any) -> tuple[Any, Any]:
  """The trees of parameters and of their gradients that the optimizer sees."""
  if optim.lora is None:
    return params, grads
  return lora.trained(params, opt.factors), lora.gradients(optim.lora, grads, opt.factors)


def updated(optim: Optim, params: Any, opt: Any, tree: Any) -> tuple[Any, Any]:
  """Parameters and the optimizer's state, where `tree` is what the optimizer has made of `seen`."""
  if optim.lora is None:
    return tree, opt
  params, factors = lora.applied(optim.lora, params, opt.factors, tree)
  return params, lora.Factored(factors, opt.inner)


def trained(optim: Optim, params: Any) -> dict[str, int]:
  """How many numbers of each parameter, or of its factors, are trained; by path, without zeros.

  Args:
    optim: the config.
    params: tree of arrays or ShapeDtypeStructs.
  """
  if optim.lora is not None:
    params = lora.trained(params, jax.eval_shape(lambda: lora.init(optim.lora, params)))

  def number(path, p):
    rate = np.asarray(_rate(optim, path, p)) != 0  # of the whole, or of each layer
    return int(np.mean(rate) * np.prod(p.shape))

  numbers = {path: number(path, p) for path, p in trees.flatten(params).items()}
  return {path: n for path, n in numbers.items() if n}


def stop_frozen(optim: Optim, params: Any) -> Any:
  """Parameters with no gradient through the frozen ones, so that XLA drops their backward pass.

  Of a stack of which some layers are frozen the gradient is computed and set to zero.
  """

  def one(path, p):
    trained = np.asarray(_rate(optim, path, p)) != 0
    if trained.all():
      return p
    fixed = jax.lax.stop_gradient(p)
    return jnp.where(trained, p, fixed) if trained.any() else fixed

  return trees.map_paths(one, params)


@jax.named_scope("optimizer")
def apply(optim: Optim, params: Any, updates: Any, *, lr: jax.Array) -> Any:
  """New parameters: `p - lr * lr_scale * update`, frozen ones as they are, then clamped."""

  def one(path, p, update):
    rate = _rate(optim, path, p)
    if not np.any(rate):
      return p
    p = p - lr.astype(p.dtype) * rate * update.astype(p.dtype)
    bounds = trees.first_match(optim.clamp, path)
    return p if bounds is None else jnp.clip(p, *bounds)

  return trees.map_paths(one, params, updates)


def clip(grads: Any, norm: jax.Array, *, limit: float | None) -> Any:
  """Gradients scaled down so that their global norm is at most `limit`; None: as they are."""
  if limit is None:
    return grads
  factor = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-6))
  return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)


def _scale_by_fairseq_adam(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
  """Adam as fairseq has it: eps is added to the second moment's root before the bias correction.

  `m * sqrt(1 - b2^t) / (1 - b1^t) / (sqrt(v) + eps)` is the usual form with another eps each step.
  """

  def update(grads, state, params=None):
    correction = 1 - b2 ** (state.count + 1).astype(jnp.float32)
    usual = optax.scale_by_adam(b1=b1, b2=b2, eps=eps / jnp.sqrt(correction))
    return usual.update(grads, state, params)

  return optax.GradientTransformation(optax.scale_by_adam(b1=b1, b2=b2, eps=eps).init, update)


_ADAMS = {"adamw": optax.scale_by_adam, "fairseq": _scale_by_fairseq_adam}


def _rate(optim: Optim, path: str, p: Any) -> float | np.ndarray:
  """Multiplier of a parameter's learning rate, 0 where frozen; by layer: float32[L, 1, ...]."""
  path = lora.matrix_of(path)
  if trees.first_match(((f, True) for f in optim.freeze), path):
    return 0.0
  if optim.lora is not None and not lora.trains(optim.lora, path):
    return 0.0
  rate = trees.first_match(optim.lr_scale, path, default=1.0)
  if not isinstance(rate, (tuple, list)):
    return rate
  if not p.shape or len(rate) != p.shape[0]:
    raise ValueError(
      f"optim.lr_scale: expected one number, or one for each of the layers of {path} "
      f"{tuple(p.shape)}, found {len(rate)}"
    )
  return np.asarray(rate, np.float32).reshape(-1, *[1] * (len(p.shape) - 1))
