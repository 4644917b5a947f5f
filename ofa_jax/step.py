"""The state of a run and one update of it, for every task and model.

The modules are split once into a graph definition and plain dictionaries; the step is an ordinary
`jax.jit` over a pytree. Parameters are float32 and cast once, here, to the compute dtype.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ofa_jax import numerics, sharding, trees
from ofa_jax import optim as optim_lib
from ofa_jax.config import Config


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
  """Everything that a run must keep to go on bit for bit.

  Attributes:
    step: int32[], updates done, skipped ones included.
    params: float32 parameters by name.
    opt: optax state of the trained parameters.
    rest: what is learnt without gradients (running statistics of batch norm).
    ema: moving average of `params`; None when off.
    bad: int32[2], non-finite steps in all, and in a row until now.
  """

  step: jax.Array
  params: Any
  opt: Any
  rest: Any
  ema: Any
  bad: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """A config made ready to run: the model's graph, the optimizer, and where everything lies."""

  config: Config
  graph: nnx.GraphDef
  optimizer: optax.GradientTransformation
  learning_rate: Callable[[jax.Array], jax.Array]
  mesh: jax.sharding.Mesh
  abstract: State
  shardings: State

  def model(self, params: Any, rest: Any) -> nnx.Module:
    """The model with these parameters in the compute dtype, merged anew."""
    return nnx.merge(self.graph, numerics.cast(params, self.config.precision), rest)

  def traced(self, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, traced under the program's mesh and matmul precision; jit what this returns."""

    @functools.wraps(fn)
    def under(*args):
      precision = numerics.matmul_precision(self.config.precision)
      mesh = jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)
      with mesh, jax.default_matmul_precision(precision):
        return fn(*args)

    return under


def build(config: Config, mesh: jax.sharding.Mesh, *, steps: int) -> Program:
  """Traces the initialisation without computing it and lays the state out on the mesh.

  Args:
    config: a validated config.
    mesh: from `sharding.make_mesh`.
    steps: updates of the whole run, for the schedule.

  Raises:
    ValueError: the precision is not to be had.
  """
  numerics.check(config.precision, platform=mesh.devices.flat[0].platform)
  graph, params, rest = trees.split_shapes(lambda: _build_model(config, jax.random.key(0)))
  optimizer = optim_lib.transformation(config.optim, params)
  abstract = jax.eval_shape(lambda p, r: _state(config, optimizer, p, r), params, rest)
  whole = sharding.replicated(mesh)
  places = sharding.params_shardings(params, config.model.sharding, mesh)
  shardings = State(
    step=whole,
    params=places,
    opt=sharding.like_params(abstract.opt, params, places, mesh),
    rest=jax.tree.map(lambda _: whole, rest),
    ema=None if config.ema is None else places,
    bad=whole,
  )
  return Program(
    config=config,
    graph=graph,
    optimizer=optimizer,
    learning_rate=optim_lib.schedule(config.optim, steps=steps),
    mesh=mesh,
    abstract=abstract,
    shardings=shardings,
  )


def init(program: Program) -> State:
  """A fresh state, each device computing only its part; the same for every mesh."""
  config = program.config

  @program.traced
  def make():
    _, params, rest = nnx.split(_build_model(config, jax.random.key(config.seed)), nnx.Param, ...)
    return _state(config, program.optimizer, nnx.to_pure_dict(params), nnx.to_pure_dict(rest))

  return jax.jit(make, out_shardings=program.shardings)()


def train_step(program: Program) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
  """`(state, batch, frozen=None) -> (state, metrics)`, jitted; the old state is donated.

  `frozen` is what `task.frozen` gives, for a task that has something.

  A step whose loss or gradient is not finite changes nothing but the counters in `state.bad`.
  Metrics are the task's means with "grad_norm", "lr", and the int32[2] of `state.bad` as "bad".
  """
  config, task = program.config, program.config.task

  @program.traced
  def step(state, batch, frozen=None):
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    if task.prepare is not None:
      model = program.model(state.params, state.rest)
      batch = task.prepare(model, batch, rngs=key, step=state.step, frozen=frozen)
    grads, metrics, rest = _gradients(program, state, batch, key)
    norm = optax.global_norm(grads)
    good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    lr = program.learning_rate(state.step)
    grads = optim_lib.clip(grads, norm, limit=config.optim.clip_norm)
    updates, opt = program.optimizer.update(grads, state.opt, state.params)
    params = optim_lib.apply(config.optim, state.params, updates, lr=lr)
    ema = state.ema
    if ema is not None:
      ema = jax.tree.map(lambda e, p: config.ema * e + (1 - config.ema) * p, ema, params)
    new = (params, opt, rest, ema)
    old = (state.params, state.opt, state.rest, state.ema)
    params, opt, rest, ema = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
    bad = jnp.where(good, state.bad * jnp.array([1, 0], jnp.int32), state.bad + 1)
    state = State(step=state.step + 1, params=params, opt=opt, rest=rest, ema=ema, bad=bad)
    return state, {**metrics, "grad_norm": norm, "lr": lr, "bad": bad}

  whole = sharding.replicated(program.mesh)
  return jax.jit(step, donate_argnums=0, out_shardings=(program.shardings, whole))


def predict_step(program: Program, task: Any) -> Callable[[Any, Any, Any], dict[str, jax.Array]]:
  """`(params, rest, batch) -> task.predict`, jitted; every host gets all rows.

  The batch's "index" and "weight", which say what the rows are, come back beside the predictions.
  """

  @program.traced
  def predict(params, rest, batch):
    known = {name: batch[name] for name in ("index", "weight")}
    return {**task.predict(program.model(params, rest), batch), **known}

  return jax.jit(predict, out_shardings=sharding.replicated(program.mesh))


def statistics(model: nnx.Module) -> Any:
  """What a model holds beside its parameters: the running statistics after a forward pass."""
  return nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[2])


def _build_model(config, key):
  return config.model.build(rngs=nnx.Rngs(key), remat=config.remat, unroll=config.unroll)


def _state(config, optimizer, params, rest):
  return State(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt=optimizer.init(params),
    rest=rest,
    ema=None if config.ema is None else jax.tree.map(jnp.copy, params),
    bad=jnp.zeros(2, jnp.int32),
  )


def _gradients(program, state, batch, key):
  """Gradients, mean metrics and new running statistics of one batch, in `accum` parts."""
  config, task = program.config, program.config.task
  chunks = config.accum if task.whole_batch else 1

  def loss(params, rest, part, key):
    model = program.model(optim_lib.stop_frozen(config.optim, params), rest)
    metrics = task.loss(model, part, rngs=key, chunks=chunks)
    return metrics["loss"].total, (metrics, statistics(model))

  gradient = jax.grad(loss, has_aux=True)
  if config.accum == 1 or task.whole_batch:
    grads, (metrics, rest) = gradient(state.params, state.rest, batch, key)
  else:

    def body(carry, inputs):
      grads, rest = carry
      part, index = inputs
      more, (metrics, rest) = gradient(state.params, rest, part, jax.random.fold_in(key, index))
      return (jax.tree.map(jnp.add, grads, more), rest), metrics

    parts = trees.split_batch(batch, config.accum)
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    (grads, rest), metrics = jax.lax.scan(
      body, (zeros, state.rest), (parts, jnp.arange(config.accum))
    )
    metrics = jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)
  # The sums are divided by the count only here, so that parts and hosts add up to the whole batch.
  count = jnp.maximum(metrics["loss"].count, 1e-9)
  grads = jax.tree.map(lambda g: (g / count).astype(g.dtype), grads)
  return grads, {name: m.value for name, m in metrics.items()}, rest
