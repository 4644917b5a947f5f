"""Captions learnt from what the model writes itself (self-critical training, arXiv 1612.00563).

The second stage of OFA's captioning: the model searches for captions of each picture, a reward
compares them with those that people wrote, and those that are better than the others of their
picture become likelier. All of it is one program: each device searches, its host scores the texts
of its rows in a callback (`host_calls`), and the update follows. What goes between device and host
is a few thousand token ids; to search in a program of its own would gather the weights twice and
wait for the same scores.

The README of the original calls this stage "very unstable". Here BatchNorm is kept as it is in the
recipe, a divergence from the start may cost (`kl`), and what collapses is told (`advise`).
"""

import dataclasses
import time
import warnings
from collections.abc import Sequence
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ofa_jax import host_calls
from ofa_jax.data.text import REFERENCES
from ofa_jax.data.tsv import IMAGE, BadRow
from ofa_jax.decode import answers
from ofa_jax.decode.beam import Search
from ofa_jax.losses import mean
from ofa_jax.losses_policy import policy_gradient, token_log_probs
from ofa_jax.losses_vocabulary import InBlocks
from ofa_jax.models.layers import split_rngs
from ofa_jax.models.ofa.encoder import Encoded
from ofa_jax.scoring import rewards
from ofa_jax.scoring.rewards import Reward
from ofa_jax.tasks.answering import read
from ofa_jax.tasks.caption import ANSWERING, Caption
from ofa_jax.tasks.frozen import Frozen
from ofa_jax.tasks.seq2seq import MAX_POSITIONS
from ofa_jax.tokenizers.special import BOS, EOS, PAD

_TOLD = ("score", "advantage", "words", "punctuated", "distinct")  # of each sample, by the host
_UNUSED = (
  "smoothing", "drop_worst", "drop_best", "log_end", "rdrop", "num_patches", "ignore_eos",
)  # fmt: skip

# Of what is logged, where a run is said to collapse: means of so many log steps.
_ROWS = 3
_ALIKE = 0.25  # of the samples of a row beside the first, the share that differ
_SHORTER, _LONGER = 0.7, 1.4  # words, by those at the start
_BARE = 0.1  # punctuated texts, by those at the start


@dataclasses.dataclass(kw_only=True)
class SelfCritical(Caption):
  """Captions that a reward judges. A training row has all captions of its picture.

  Attributes:
    sampling: how the model writes in training, in evaluation mode: by beam search, all of whose
      hypotheses count, or drawn.
    reward: `(texts, references) -> scores`; the texts have no punctuation.
    reference_bytes: room for the captions of a row, in UTF-8; later ones are left out.
    kl: weight of the divergence from `kl_model`, per token.
    kl_model: the model to stay near to, as a rule that of `init`; its weights are kept beside the
      others.
  """

  grouped: ClassVar[bool] = True

  sampling: Search = dataclasses.field(
    default_factory=lambda: dataclasses.replace(ANSWERING.search)
  )
  reward: Reward = dataclasses.field(default_factory=rewards.CiderD)
  reference_bytes: int = 1024
  kl: float = 0.0
  kl_model: str | None = None

  def check(self, config):
    faults = super().check(config)
    if (length := self.sampling.max_length) >= MAX_POSITIONS:
      faults.append(f"task.sampling.max_length: expected below {MAX_POSITIONS}, found {length}")
    return faults + check_rewarded(self)

  def frozen(self, mesh, *, precision, training=True, load=True):
    if not (training and self.kl):
      return super().frozen(mesh, precision=precision, training=training, load=load)
    model = Frozen.of(self.kl_model)
    return (model.load if load else model.spec)(mesh, precision=precision)

  def examples(self, split):
    rows = super().examples(split)
    if split == "train":
      rewards.learn(self.reward, self._corpus(rows))
    return rows

  def example(self, row, rng):
    references = self.references(row["caption"])
    if rng is None:
      made = super().example(row, rng)
    elif not any(references):
      raise BadRow(row.name, "the captions are empty")
    else:
      made = {IMAGE: self.image(row, rng), "source": self.asked(row), "target": []}
    room, whole = self.reference_bytes, len(REFERENCES.join(references).encode())
    if rng is not None and whole > room:
      if (size := len(references[0].encode())) > room:
        raise BadRow(row.name, f"the first caption has {size:,} bytes, task.reference_bytes {room}")
      warnings.warn(f"Left captions out: task.reference_bytes is {room}; {whole} keep them all")
    return {**made, "references": self._stored(references)}

  def blank(self):
    return {**super().blank(), "references": self._stored([])}

  def prepare(self, model, batch, *, rngs, step, frozen):
    """Adds what the model writes of each row, and what it is worth."""
    del step
    keys = None
    if self.sampling.sample:  # by keys of their own, the same on any mesh
      keys = sample_keys(rngs, len(batch["source"]))
    rows = {"batch": dict(batch), "keys": keys}
    samples = answers.on_each_device(self._sampled)(model, rows, None)
    batch = {**batch, **samples}
    if self.kl:
      other = Frozen.of(self.kl_model).merge(frozen)
      batch["before"] = self._log_probs(other, batch, rngs=None)
    return batch

  def loss(self, model, batch, *, rngs, chunks=1):
    del chunks
    real = batch["weight"][:, None, None] > 0
    tokens = jnp.where(real, batch["samples"], PAD)
    there = (tokens[..., 0] != PAD).astype(jnp.float32)
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    metrics = policy_gradient(
      self._log_probs(model, batch, rngs=rngs),
      flat(tokens),
      flat(batch["advantage"]),
      ignore_prefix=self.ignore_prefix,
      sentence_avg=self.sentence_avg,
      kl=self.kl,
      before=batch.get("before"),
    )
    told = {name: mean(flat(batch[name]), flat(there)) for name in _TOLD if name != "advantage"}
    return {
      **metrics,
      "reward": told.pop("score"),
      **told,
      "scoring_s_per_row": mean(batch["seconds"], batch["weight"]),
    }

  def log_line(self, values):
    # The calls of a process follow each other.
    seconds = values["scoring_s_per_row"] * values["batch_size"] / jax.process_count()
    return (
      "Global Steps: {step}/{steps} | Train Epoch: {epoch} [{seen}/{rows} ({percent:.0f}%)] | "
      "Reward: {reward:.4f} | Loss: {loss:.6f} | Words: {words:.2f} | Distinct: {distinct:.0%} | "
      "Grad Norm: {grad_norm:.3f} | Data Time: {data_time:.3f}s | Scoring Time: {seconds:.3f}s | "
      "Batch Time: {batch_time:.3f}s | LR: {lr:.3e} | Global Batch Size: {batch_size}"
    ).format(seconds=seconds, **values)

  def advise(self, history):
    """Says when the texts of a row have become alike, shorter, longer or without punctuation."""
    logged = [row for row in history if "train/distinct" in row]
    if len(logged) < 2 * _ROWS or len(logged) % _ROWS:
      return None
    names = ("distinct", "words", "punctuated")
    first, now = (
      {name: np.mean([row[f"train/{name}"] for row in rows]) for name in names}
      for rows in (logged[:_ROWS], logged[-_ROWS:])
    )
    samples = self.sampling.num_beams
    signs = []
    if (now["distinct"] * samples - 1) / (samples - 1) < _ALIKE:
      signs.append(f"of {samples} texts of a row {now['distinct'] * samples:.1f} differ")
    if not _SHORTER <= now["words"] / max(first["words"], 1e-9) <= _LONGER:
      signs.append(f"a text has {now['words']:.1f} words, {first['words']:.1f} at the start")
    if first["punctuated"] > 0.05 and now["punctuated"] < _BARE * first["punctuated"]:
      signs.append(
        f"{now['punctuated']:.0%} of the texts have punctuation, {first['punctuated']:.0%} at the "
        "start (the reward does not see it)"
      )
    if not signs:
      return None
    return (
      f"The model may be collapsing: {'; '.join(signs)}. Go on from an earlier checkpoint with a "
      "lower optim.lr, with task.kl (and task.kl_model, the model of the start), or with "
      "rewards.length_gap as a part of the reward; model.freeze_resnet=True keeps BatchNorm still."
    )

  def _corpus(self, rows):
    """The references of every row that can be read."""
    for i in range(len(rows)):
      try:
        yield self.references(rows.table.text(i, "caption"))
      except BadRow:
        continue

  def _stored(self, references: Sequence[str]) -> np.ndarray:
    """uint8[reference_bytes]: as many captions as there is room for, "&&" between them."""
    stored = b""
    for number, caption in enumerate(references):
      more = REFERENCES.encode() * (number > 0) + caption.encode()
      if len(stored) + len(more) > self.reference_bytes:
        break
      stored += more
    return np.frombuffer(stored.ljust(self.reference_bytes, b"\0"), np.uint8)

  def _sampled(self, model, rows, shared):
    """The "samples" int32[B, M, T] of a device's rows, ends and padding included, and scores."""
    del shared
    batch = rows["batch"]
    written = self.generate(model, batch, rngs=rows["keys"], search=self.sampling)
    size = written.lengths.shape
    shapes = {name: jax.ShapeDtypeStruct(size, jnp.float32) for name in _TOLD}
    shapes["seconds"] = jax.ShapeDtypeStruct(size[:1], jnp.float32)
    told = host_calls.call(self._judge, shapes, written.tokens, batch["references"])
    return {"samples": written.tokens, **told}

  def _log_probs(self, model, batch, *, rngs):
    """Those of the samples' tokens, float32[B * M, T].

    A picture is encoded once for all of its samples. The original encodes it for each: the same
    numbers where nothing is dropped, BatchNorm's statistics of the batch included.
    """
    tokens = batch["samples"]
    encode_key, decode_key = split_rngs(rngs, 2)
    encoded = model.encode(batch["source"], **self.pictures(batch), rngs=encode_key)
    previous = previous_of(tokens)
    states = model.hidden(for_each(encoded, tokens.shape[1]), previous, rngs=decode_key)
    logits = InBlocks(states, model.table, self.vocab_blocks)
    if self.vocab_blocks == 1:
      logits = model.logits(states)
    tokens = tokens.reshape(previous.shape)
    return token_log_probs(logits, tokens, allowed_range=self.allowed_range)

  def _judge(self, tokens: np.ndarray, references: np.ndarray) -> dict[str, np.ndarray]:
    """On the host: what samples int32[B, M, T] are worth beside uint8[B, N] of captions."""
    begin = time.perf_counter()
    # Where a bad row was left out nothing is judged.
    there = (tokens[..., 0] != PAD) & references.any(axis=1, keepdims=True)
    raw = [read(self.words, ids) for ids in tokens[there]]
    texts = [self.answering.tell(text, None) for text in raw]
    groups = [bytes(row).rstrip(b"\0").decode().split(REFERENCES) for row in references]
    told = {name: np.zeros(there.shape) for name in _TOLD}
    of_text = [groups[row] for row in np.nonzero(there)[0]]
    told["score"][there] = self._scores(texts, of_text)
    told["advantage"] = rewards.leave_one_out(told["score"], there)
    told["words"][there] = [len(text.split()) for text in texts]
    told["punctuated"][there] = [text != bare for text, bare in zip(raw, texts, strict=True)]
    seen = set()
    for at, text in zip(np.argwhere(there), texts, strict=True):
      told["distinct"][*at] = (at[0], text) not in seen
      seen.add((at[0], text))
    share = (time.perf_counter() - begin) / len(tokens)
    return {**told, "seconds": np.full(len(tokens), share)}

  def _scores(self, texts, references):
    """float64[N] of the reward; an error that names it where it raises or gives anything else."""
    if not texts:
      return np.zeros(0)
    name = getattr(self.reward, "__name__", type(self.reward).__name__)
    try:
      scores = np.asarray(self.reward(texts, references), np.float64)
    except ValueError as error:
      raise ValueError(f"task.reward {name}: {error}") from error
    except Exception as error:
      raise RuntimeError(
        f"task.reward {name} raised {type(error).__name__} for {len(texts)} texts: {error}"
      ) from error
    if scores.shape != (len(texts),) or not np.isfinite(scores).all():
      raise ValueError(
        f"task.reward {name}: expected {len(texts)} finite numbers, one for each text, found "
        f"{f'shape {scores.shape}' if scores.shape != (len(texts),) else scores[:8].tolist()}"
      )
    return scores


class Rewarded(Protocol):
  """What tasks that learn from rewards have in common.

  Attributes:
    sampling: how the model writes in training.
    kl: weight of the divergence from `kl_model`.
    kl_model: the model to stay near to.
  """

  sampling: Search
  kl: float
  kl_model: str | None


def check_rewarded(task: Rewarded) -> list[str]:
  """Faults of a task that learns from rewards, one line each."""
  known = type(task).__dataclass_fields__
  faults = [
    f"task.{name}: expected {default!r}, as rewards take the place of right answers, found "
    f"{getattr(task, name)!r}"
    for name in _UNUSED
    if getattr(task, name) != (default := known[name].default)
  ]
  if task.sampling.num_beams < 2:
    faults.append(
      "task.sampling.num_beams: expected at least 2, as each sample is compared with the others of "
      f"its row, found {task.sampling.num_beams}"
    )
  if task.kl < 0:
    faults.append(f"task.kl: expected a weight from 0, found {task.kl}")
  if task.kl and task.kl_model is None:
    faults.append("task.kl_model: expected the model to stay near to, found None; name init's")
  return faults


def sample_keys(rngs: jax.Array, rows: int) -> jax.Array:
  """PRNG keys [rows] of a batch in training, the same on any mesh."""
  key = jax.random.key(jax.random.bits(rngs, dtype=jnp.uint32), impl="threefry2x32")
  return answers.row_keys(key, jnp.arange(rows))


def previous_of(tokens: jax.Array) -> jax.Array:
  """What the decoder sees of samples int32[B, M, T] before each token, int32[B * M, T]."""
  previous = jnp.pad(tokens[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=BOS)
  return jnp.where(previous == EOS, PAD, previous).reshape(-1, tokens.shape[2])


def for_each(encoded: Encoded, samples: int) -> Encoded:
  """The encoded inputs for so many samples of each, which stand behind one another."""

  def repeat(x):
    return jnp.broadcast_to(x[:, None], (len(x), samples, *x.shape[1:])).reshape(-1, *x.shape[1:])

  positions = encoded.positions
  return Encoded(
    hidden=repeat(encoded.hidden),
    mask=repeat(encoded.mask),
    positions=positions if len(positions) == 1 else repeat(positions),
  )
