"""Pictures learnt from what a CLIP thinks of them: the second stage of OFA's text to image.

The model draws several pictures of each caption, the codec decodes them, the judge compares them
with the caption, and those that fit better than the others of their caption become likelier. All of
it is one program on the devices: nothing goes to a host in between. The judge is a CLIP of
OpenAI's, as in the original, or a Chinese-CLIP, for captions in Chinese.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ofa_jax.decode import answers
from ofa_jax.decode.beam import Search
from ofa_jax.losses import mean
from ofa_jax.losses_policy import policy_gradient, token_log_probs
from ofa_jax.models.layers import split_rngs
from ofa_jax.tasks import drawn, reward
from ofa_jax.tasks.frozen import Frozen
from ofa_jax.tasks.image_gen import ANSWERING, ImageGen

_COLLAPSED = 0.1  # of the spread between a caption's pictures at the start
_ROWS = 3  # log steps of which means are compared


@dataclasses.dataclass(kw_only=True)
class ImageReward(ImageGen):
  """Captions whose pictures a judge compares; rows may have codes, which are not read.

  Attributes:
    sampling: how the model draws in training, `num_beams` pictures of each caption.
    scale: what the judge's cosine is multiplied by.
    kl: weight of the divergence from `kl_model`, per token; the original has none.
    kl_model: the model to stay near to, as a rule that of `init`.
  """

  sampling: Search = dataclasses.field(
    default_factory=lambda: dataclasses.replace(ANSWERING.search, num_beams=5)
  )
  scale: float = 2.5
  kl: float = 0.0
  kl_model: str | None = None

  def check(self, config):
    faults = super().check(config) + reward.check_rewarded(self)
    faults += self._check_lengths("sampling", self.sampling)
    if not self.sampling.sample:
      faults.append("task.sampling: expected sample=True, found a beam search")
    if self.codec is None or self.judge is None:
      faults.append(
        "task.codec, task.judge: expected the VQGAN that makes pictures and the CLIP that judges "
        f"them, found {self.codec} and {self.judge}"
      )
    return faults

  def frozen(self, mesh, *, precision, training=True, load=True):
    if not training:
      return super().frozen(mesh, precision=precision, training=False, load=load)
    helpers = {name: self.helper(name) for name in ("codec", "judge")}
    if self.kl:
      helpers["before"] = Frozen.of(self.kl_model)
    return drawn.load_helpers(helpers, mesh, precision=precision, load=load)

  def prepare(self, model, batch, *, rngs, step, frozen):
    """Adds what the model draws for each row, and what it is worth."""
    del step
    rows = {"batch": dict(batch), "keys": reward.sample_keys(rngs, len(batch["source"]))}
    batch = {**batch, **answers.on_each_device(self._sampled)(model, rows, frozen)}
    if self.kl:
      before = Frozen.of(self.kl_model).merge(frozen["before"])
      batch["before"] = self._log_probs(before, batch, rngs=None)
    return batch

  def loss(self, model, batch, *, rngs, chunks=1):
    del chunks
    tokens, scores = batch["samples"], batch["score"]
    real = jnp.broadcast_to(batch["weight"][:, None], scores.shape)
    tokens = jnp.where(real[..., None] > 0, tokens, 1)
    metrics = policy_gradient(
      self._log_probs(model, batch, rngs=rngs),
      tokens.reshape(-1, tokens.shape[2]),
      batch["advantage"].ravel(),
      ignore_prefix=self.ignore_prefix,
      sentence_avg=self.sentence_avg,
      kl=self.kl,
      before=batch.get("before"),
    )
    return {
      **metrics,
      "reward": mean(scores.ravel(), real.ravel()),
      "best": mean(jnp.max(scores, axis=1), batch["weight"]),
      "spread": mean(jnp.std(scores, axis=1), batch["weight"]),
    }

  def log_line(self, values):
    return (
      "Global Steps: {step}/{steps} | Train Epoch: {epoch} [{seen}/{rows} ({percent:.0f}%)] | "
      "Reward: {reward:.4f} | Best: {best:.4f} | Spread: {spread:.4f} | Loss: {loss:.6f} | "
      "Grad Norm: {grad_norm:.3f} | Data Time: {data_time:.3f}s | Batch Time: {batch_time:.3f}s | "
      "LR: {lr:.3e} | Global Batch Size: {batch_size}"
    ).format(**values)

  def advise(self, history):
    """Says when the pictures of a caption have become alike."""
    spread = [row["train/spread"] for row in history if "train/spread" in row]
    if len(spread) < 2 * _ROWS or len(spread) % _ROWS:
      return None
    first, now = np.mean(spread[:_ROWS]), np.mean(spread[-_ROWS:])
    if now >= _COLLAPSED * first:
      return None
    return (
      "The model may be collapsing: the pictures of a caption differ in reward by "
      f"{now:.4f}, {first:.4f} at the start. Go on from an earlier checkpoint with a lower "
      "optim.lr, or with task.kl (and task.kl_model, the model of the start)."
    )

  def _sampled(self, model, rows, frozen):
    """The "samples" int32[B, M, T] of a device's rows, their "score" and "advantage" [B, M]."""
    batch = rows["batch"]
    found = self.draw(model, batch, rngs=rows["keys"], search=self.sampling)
    codes = found.tokens[..., :-1] - model.first_code
    scores = self.rewards(codes, batch, frozen, num_codes=model.num_codes)
    return {"samples": found.tokens, "score": scores, "advantage": drawn.leave_one_out(scores)}

  def rewards(
    self,
    codes: jax.Array,
    batch: Mapping[str, jax.Array],
    frozen: Mapping[str, Any],
    *,
    num_codes: int,
  ) -> jax.Array:
    """What pictures are worth beside their captions, float32[B, M].

    Args:
      codes: int32[B, M, C].
      batch: with "caption" int32[B, T], of `drawn.judge_tokens`.
      frozen: weights of "codec" and "judge".
      num_codes: that the model draws from.
    """
    helper = self.helper("judge")
    judge, size = helper.merge(frozen["judge"]), helper.config.vision.image_size
    pictures = self.drawings(codes, frozen["codec"], num_codes=num_codes)
    clip = drawn.image_features(judge, pictures, size=size)
    text = drawn.text_features(judge, batch["caption"])
    return self.scale * jnp.einsum("bme,be->bm", clip, text, precision="highest")

  def _log_probs(self, model, batch, *, rngs):
    """Those of the samples' tokens, float32[B * M, T]; a caption is encoded once for all."""
    tokens = batch["samples"]
    encode_key, decode_key = split_rngs(rngs, 2)
    encoded = reward.for_each(model.encode(batch["source"], rngs=encode_key), tokens.shape[1])
    previous = reward.previous_of(tokens)
    hidden = model.hidden(encoded, previous, code_mask=True, rngs=decode_key)
    places = model.code_places(tokens.reshape(previous.shape))
    return token_log_probs(self.code_logits(model, hidden), places)
