"""The state of a run and one update of it, for every task and model.

The modules are split once into a graph definition and plain dictionaries; the step is an ordinary
`jax.jit` over a pytree. Parameters are float32 and cast once, here, to the compute dtype.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp
import optax
from flax import nnx
from jax.interpreters import partial_eval

from ofa_jax import numerics, trees
from ofa_jax.config import Config
from ofa_jax.engine import optim as optim_lib
from ofa_jax.engine import sharding
from ofa_jax.trees import Tree

# Folded into keys where small numbers are: steps into the seed's, parts and splits into a step's.
_PREDICTIONS = _PREPARES = 2**32 - 1


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
    ema_rest: moving average of `rest`; None when off.
  """

  step: jax.Array
  params: Tree
  opt: optax.OptState
  rest: Tree
  ema: Tree | None
  bad: jax.Array
  ema_rest: Tree | None = None

  @property
  def evaluated(self) -> tuple[Tree, Tree]:
    """(params, rest) that are evaluated: the moving average where there is one."""
    if self.ema is None:
      return self.params, self.rest
    return self.ema, self.ema_rest


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

  def model(self, params: Tree, rest: Tree) -> nnx.Module:
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
  model = jax.eval_shape(lambda: _build_model(config, jax.random.key(0)))
  _, params, rest = trees.split(model)
  optimizer = optim_lib.transformation(config.optim, params)
  abstract = jax.eval_shape(lambda p, r: _state(config, optimizer, p, r), params, rest)
  whole = sharding.replicated(mesh)
  places = sharding.params_shardings(params, config.model.sharding, mesh)
  graph = nnx.graphdef(sharding.gathering(model, places))
  shardings = State(
    step=whole,
    params=places,
    opt=sharding.like_params(abstract.opt, params, places, mesh),
    rest=jax.tree.map(lambda _: whole, rest),
    ema=None if config.ema is None else places,
    bad=whole,
    ema_rest=None if config.ema is None else jax.tree.map(lambda _: whole, rest),
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
    _, params, rest = trees.split(_build_model(config, jax.random.key(config.seed)))
    return _state(config, program.optimizer, params, rest)

  return jax.jit(make, out_shardings=program.shardings)()


def train_step(program: Program) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
  """`(state, batch, frozen=None) -> (state, metrics)`, jitted; the old state is donated.

  `frozen` is what `task.frozen` gives, for a task that has something.

  A step whose loss or gradient is not finite changes nothing but the counters in `state.bad`.
  Metrics are the task's means with "grad_norm", "lr", and the int32[2] of `state.bad` as "bad".
  """
  config = program.config

  @program.traced
  def step(state, batch, frozen=None):
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    grads, metrics, rest = _gradients(program, state, batch, key, frozen)
    tree, grads = optim_lib.seen(config.optim, state.params, state.opt, grads)
    norm = optax.global_norm(grads)
    good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    lr = program.learning_rate(state.step)
    grads = optim_lib.clip(grads, norm, limit=config.optim.clip_norm)
    updates, opt = program.optimizer.update(grads, state.opt, tree)
    tree = optim_lib.apply(config.optim, tree, updates, lr=lr)
    params, opt = optim_lib.updated(config.optim, state.params, opt, tree)
    new = (params, opt, rest, *_averages(config, state, params, rest))
    old = (state.params, state.opt, state.rest, state.ema, state.ema_rest)
    with jax.named_scope("optimizer"):
      new = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
    params, opt, rest, ema, ema_rest = new
    bad = jnp.where(good, state.bad * jnp.array([1, 0], jnp.int32), state.bad + 1)
    state = State(
      step=state.step + 1,
      params=params,
      opt=opt,
      rest=rest,
      ema=ema,
      ema_rest=ema_rest,
      bad=bad,
    )
    return state, {**metrics, "grad_norm": norm, "lr": lr, "bad": bad}

  whole = sharding.replicated(program.mesh)
  return jax.jit(step, donate_argnums=0, out_shardings=(program.shardings, whole))


def predict_step(
  program: Program, task: Any, *, evaluation: int = 0
) -> Callable[..., dict[str, jax.Array]]:
  """`(params, rest, batch, stream, frozen=None) -> task.predict`, jitted; every host gets all rows.

  The batch's "index" and "weight", which say what the rows are, come back beside the predictions.

  Args:
    program: from `build`.
    task: of an evaluation of the program's config.
    evaluation: its number there. With `stream`, the number of the stream that the batch is of, it
      makes the key that `predict` gets as `rngs`.
  """

  @program.traced
  def predict(params, rest, batch, stream, frozen=None):
    known = {name: batch[name] for name in ("index", "weight")}
    model = program.model(params, rest)
    key = prediction_key(program.config.seed, evaluation=evaluation, stream=stream)
    return {**task.predict(model, batch, rngs=key, frozen=frozen), **known}

  return jax.jit(predict, out_shardings=sharding.replicated(program.mesh))


def prediction_key(seed: int, *, evaluation: int, stream: jax.typing.ArrayLike) -> jax.Array:
  """The PRNG key of a stream of an evaluation, each by its number.

  It is the same at every step of a run and for a stored model, so that what differs between two of
  them is the model. Threefry, whatever the default: it alone draws for rows by keys of their own.
  """
  key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), _PREDICTIONS)
  return jax.random.fold_in(jax.random.fold_in(key, evaluation), stream)


def statistics(model: nnx.Module) -> Tree:
  """What a model holds beside its parameters: the running statistics after a forward pass."""
  return trees.split(model)[2]


def _build_model(config, key):
  return config.model.build(rngs=nnx.Rngs(key), remat=config.remat, unroll=config.unroll)


def _state(config, optimizer, params, rest):
  return State(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt=optimizer.init(params),
    rest=rest,
    bad=jnp.zeros(2, jnp.int32),
    **averages_of(config, params, rest),
  )


def averages_of(config: Config, params: Tree, rest: Tree) -> dict[str, Tree | None]:
  """The fields `ema` and `ema_rest` of a state that begins with these weights."""
  if config.ema is None:
    return {"ema": None, "ema_rest": None}
  return {"ema": jax.tree.map(jnp.copy, params), "ema_rest": jax.tree.map(jnp.copy, rest)}


def _averages(config, state, params, rest):
  """(ema, ema_rest) after an update, by fairseq's formula: a copy until they start."""
  if config.ema is None:
    return None, None
  share, new = config.ema, 1 - config.ema
  if config.ema_start:
    early = state.step + 1 < config.ema_start
    share, new = jnp.where(early, 0.0, share), jnp.where(early, 1.0, new)

  def average(old, now):
    return share * old + new * now

  return jax.tree.map(average, state.ema, params), jax.tree.map(average, state.ema_rest, rest)


def _gradients(program, state, batch, key, frozen):
  """Gradients, mean metrics and new running statistics of one batch, in `accum` parts."""
  config, task = program.config, program.config.task
  chunks = config.accum if task.whole_batch else 1

  def prepared(part, key):
    """What needs no gradient; the running statistics are those before the step for all parts."""
    if task.prepare is None:
      return part
    model = program.model(state.params, state.rest)
    key = jax.random.fold_in(key, _PREPARES)  # apart from those that the loss makes of it
    return task.prepare(model, part, rngs=key, step=state.step, frozen=frozen)

  def forward(params, rest, part, key):
    model = program.model(optim_lib.stop_frozen(config.optim, params), rest)
    return task.loss(model, part, rngs=key, chunks=chunks), statistics(model)

  def loss(params, rest, part, key, counts=None):
    metrics, rest = forward(params, rest, part, key)
    return _objective(metrics["loss"], counts), (metrics, rest)

  gradient = jax.grad(loss, has_aux=True)
  if config.accum == 1 or task.whole_batch:
    batch = prepared(batch, key)
    grads, (metrics, rest) = gradient(state.params, state.rest, batch, key)
  else:
    parts = trees.split_batch(batch, config.accum)
    counts = _counts(
      lambda part, key: forward(state.params, state.rest, prepared(part, key), key)[0], parts, key
    )

    def body(carry, inputs):
      grads, rest = carry
      part, index = inputs
      part_key = jax.random.fold_in(key, index)
      part = prepared(part, part_key)
      more, (metrics, rest) = gradient(state.params, rest, part, part_key, counts)
      return (jax.tree.map(jnp.add, grads, more), rest), metrics

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    (grads, rest), metrics = jax.lax.scan(
      body, (zeros, state.rest), (parts, jnp.arange(config.accum))
    )
    metrics = jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)
  terms = metrics["loss"].terms
  if len(terms) == 1:
    # Divided by the count only here, so that parts and hosts add up to the whole batch.
    count = jnp.maximum(terms[0].count, 1e-9)
    grads = jax.tree.map(lambda g: (g / count).astype(g.dtype), grads)
  return grads, {name: m.value for name, m in metrics.items()}, rest


def _objective(loss, counts):
  """What is differentiated: of one mean the total, of a sum of means each over its count.

  `counts` are those of the whole batch, None where that is the batch at hand.
  """
  terms = loss.terms
  if len(terms) == 1:
    return terms[0].total
  counts = [term.count for term in terms] if counts is None else counts
  counts = [jnp.maximum(jax.lax.stop_gradient(count), 1e-9) for count in counts]
  return sum(term.total / count for term, count in zip(terms, counts, strict=True))


def _counts(metrics_of, parts, key):
  """What each mean of the loss counts in all parts of the batch; None where the loss is one mean.

  The gradient of a sum of means needs these before the first part. The loss itself is asked, so
  that nothing counts in two places; of its computation only what the counts depend on is kept,
  which is a few operations on the batch where they depend neither on the model nor on the dropout.

  Args:
    metrics_of: (part, key) -> the task's metrics.
    parts: the batch as `trees.split_batch` gives it.
    key: the step's; part i has this folded with i, here as in the gradient.
  """

  def count(part, key):
    return [term.count for term in metrics_of(part, key)["loss"].terms]

  first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), parts)
  traced, shapes = jax.make_jaxpr(count, return_shape=True)(first, key)
  if len(shapes) == 1:
    return None
  jaxpr, used = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(shapes))
  counted = jex.core.jaxpr_as_fun(jex.core.ClosedJaxpr(jaxpr, traced.consts))

  def of_part(inputs):
    part, index = inputs
    leaves = jax.tree.leaves((part, jax.random.fold_in(key, index)))
    return counted(*(leaf for leaf, use in zip(leaves, used, strict=True) if use))

  counts = jax.lax.map(of_part, (parts, jnp.arange(len(jax.tree.leaves(parts)[0]))))
  return [jnp.sum(count, axis=0) for count in counts]
