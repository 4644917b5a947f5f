"""Drawing pictures of texts: the part of `OFAModel` that is about them.

  pictures = model.draw(["a red boat on a lake"], samples=24, top=4, codec="vqgan", judge="clip")

The model writes codes, a codec (VQGAN) makes pictures of them, and a judge (a CLIP of OpenAI's, or
for Chinese a Chinese-CLIP) chooses the best. All samples of several texts are one batch on the
devices. A picture depends on its text, the seed and its number among the samples, not on the other
texts nor on how many samples there are.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ofa_jax import hub, partial
from ofa_jax.convert import json_files
from ofa_jax.decode import codes
from ofa_jax.decode.beam import Search
from ofa_jax.inference import inputs
from ofa_jax.inference.runner import Runner
from ofa_jax.tasks import drawn, image_gen
from ofa_jax.tasks.choice import MAX_POSITIONS
from ofa_jax.tasks.frozen import Frozen
from ofa_jax.tokenizers.special import PAD

DECODE_BATCH = 8  # pictures that a device decodes at once


class Drawings(NamedTuple):
  """The best pictures of N texts, `top` of each, the best first.

  Attributes:
    images: uint8[N, top, S, S, 3].
    scores: float32[N, top], the judge's cosines; without one the mean log-probability of a code.
    codes: int32[N, top, C].
  """

  images: np.ndarray
  scores: np.ndarray
  codes: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Drawn:
  """What is compiled for; static.

  Attributes:
    search: how codes are drawn.
    guidance: of classifier-free guidance.
    top: pictures of each text that come back.
  """

  search: Search
  guidance: float
  top: int


class Painter:
  """A model with what makes pictures of its codes and what chooses among them.

  Args:
    runner: the model's.
    codec: a VQGAN, as `hub.open_model` takes it.
    judge: a CLIP of OpenAI's or Chinese-CLIP; None: the likeliest codes are the best.
    precision: what the judge computes in; the codec does in float32.

  Attributes:
    size: side in pixels of the pictures.

  Raises:
    ValueError: the models do not fit together.
  """

  def __init__(self, runner: Runner, *, codec: str, judge: str | None, precision: str):
    config = runner.config
    helper = Frozen.of(codec, precision="fp32")
    self.num_codes = config.code_window**2
    drawn.check_codec(codec, helper.config, codes=config.num_codes)
    self.size = drawn.picture_side(helper.config, self.num_codes)
    self.judge, self._runner, self._codec = judge, runner, helper
    self._weights = {"codec": helper.load(runner.mesh, precision=precision)}
    self._judge = None
    if judge is not None:
      drawn.judge_length(judge)  # refuses what is no CLIP
      self._judge = Frozen.of(judge)
      self._weights["judge"] = self._judge.load(runner.mesh, precision=precision)
    self._draw = runner.compiled(self._drawn)

  @property
  def identity(self) -> list[dict[str, Any]]:
    """What tells its codec and judge from others, as JSON."""
    names = (self._codec.name, self.judge)
    return [partial.fingerprint(hub.open_model(x).stored()) for x in names if x is not None]

  def check(self, caption: str) -> None:
    """Raises ValueError for a caption that the judge cannot read."""
    if self.judge is not None:
      drawn.judge_tokens(self.judge, [caption])

  def draw(
    self,
    rows: Mapping[str, np.ndarray],
    *,
    drawing: _Drawn,
    untold: np.ndarray | None,
    seed: int,
  ) -> Drawings:
    """Draws for rows of "source", "text_key" uint32[N], and for a judge "caption".

    Args:
      rows: by name.
      drawing: how.
      untold: int32[1, T], what is asked without any text, for guidance.
      seed: of all.
    """
    positions = drawing.search.num_beams * (self.num_codes + 1) * (1 + (drawing.guidance != 1))
    shared = {"rngs": jax.random.key(seed), "untold": untold, **self._weights}
    most = max(1, MAX_POSITIONS // positions)
    return self._runner.run(self._draw, rows, shared=shared, static=drawing, most=most)

  def _drawn(self, weights, rows, shared, static):
    (model,) = self._runner.models(weights)
    source = rows["source"]
    if static.guidance != 1:
      room = source.shape[1] - shared["untold"].shape[1]
      untold = jnp.pad(shared["untold"], ((0, 0), (0, room)), constant_values=PAD)
      source = jnp.concatenate([source, jnp.broadcast_to(untold, source.shape)])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(shared["rngs"], rows["text_key"])
    found = codes.generate(
      model, model.encode(source), search=static.search, rngs=keys, guidance=static.guidance
    )
    own, scores = found.tokens[..., :-1] - model.first_code, found.scores
    if self._judge is None:  # then nothing but the best has to be decoded
      own, scores = own[:, : static.top], scores[:, : static.top]
    codec = self._codec.merge(shared["codec"])
    images = drawn.decoded(codec, own, batch_size=DECODE_BATCH)
    if self._judge is not None:
      judge, size = self._judge.merge(shared["judge"]), self._judge.config.vision.image_size
      seen = drawn.image_features(judge, images, size=size)
      asked = drawn.text_features(judge, rows["caption"])
      scores = jnp.einsum("bme,be->bm", seen, asked, precision="highest")
    best = jnp.argsort(-scores, axis=1, stable=True)[:, : static.top]

    def take(x):
      return jnp.take_along_axis(x, best.reshape(*best.shape, *[1] * (x.ndim - 2)), axis=1)

    return Drawings(take(images), take(scores), take(own))


class Drawing:
  """What `OFAModel` has of it; the rest of the class is there."""

  def draw(
    self,
    texts: Sequence[str],
    *,
    samples: int = 24,
    top: int = 1,
    codec: str | None = None,
    judge: str | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 256,
    top_p: float = 0.0,
    seed: int = 0,
    return_scores: bool = False,
  ) -> list[list[Image.Image]] | tuple[list[list[Image.Image]], np.ndarray]:
    """Draws pictures of texts.

    Args:
      texts: what they show; words beyond 64 are cut, with a warning.
      samples: pictures that are drawn of each.
      top: how many of these come back, the best first.
      codec: the VQGAN that the model learnt the codes of: a model directory. None: the one that the
        model's own run names.
      judge: the CLIP of OpenAI's, or Chinese-CLIP, that chooses; None: as `codec`, or, where there
        is none, the likeliest are the best.
      guidance: above 1 texts weigh more (classifier-free guidance, which is not the original's and
        doubles the work); for models that were trained with `task.drop_caption`.
      temperature: divides the logits.
      top_k, top_p: what codes are drawn from, see `decode.sample.draw`.
      seed: another one gives other pictures.
      return_scores: whether to return scores float32[N, top], too: see `Drawings`.

    Raises:
      ValueError: an empty text, or one that the judge cannot read; models that do not fit together;
        options that contradict each other.
    """
    found = self.drawings(
      texts,
      samples=samples,
      top=top,
      codec=codec,
      judge=judge,
      guidance=guidance,
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
      seed=seed,
    )
    images = [[Image.fromarray(image) for image in row] for row in found.images]
    return (images, found.scores) if return_scores else images

  def drawings(
    self,
    texts: Sequence[str],
    *,
    samples: int = 24,
    top: int = 1,
    codec: str | None = None,
    judge: str | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 256,
    top_p: float = 0.0,
    seed: int = 0,
  ) -> Drawings:
    """As `draw`, as arrays, with scores and codes."""
    texts = inputs.check_texts("texts", texts)
    seed = inputs.check_seed(seed)
    if not 1 <= top <= samples:
      raise ValueError(f"Expected top from 1 to samples {samples}, found {top}")
    painter = self.painter(codec, judge)
    number = painter.num_codes
    search = dataclasses.replace(
      image_gen.ANSWERING.search,
      num_beams=samples,
      max_length=number,
      min_length=number,
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
    )
    if not texts:
      shape = (0, top, painter.size, painter.size, 3)
      none = np.zeros((0, top, number), np.int32)
      return Drawings(np.zeros(shape, np.uint8), np.zeros((0, top), np.float32), none)
    rows = self._asked(image_gen.ANSWERING, None, {"text": texts}, image_needed=False)
    rows["text_key"] = np.array([zlib.crc32(text.encode()) for text in texts], np.uint32)
    untold = None
    if guidance != 1:
      untold = self._asked(image_gen.ANSWERING, None, {"text": [""]}, image_needed=False)["source"]
    if painter.judge is not None:
      rows["caption"] = _judged_texts(painter.judge, texts)
    drawing = _Drawn(search, float(guidance), top)
    return painter.draw(rows, drawing=drawing, untold=untold, seed=seed)

  def painter(self, codec: str | None = None, judge: str | None = None) -> Painter:
    """The model with its codec and judge, which are loaded once.

    Raises:
      ValueError: the model draws nothing; there is no codec; or as `Painter`.
    """
    if not self.config.num_codes:
      raise ValueError(
        "Expected a model that writes image codes, found one without; OFA's that draw are "
        "OFA-base-image_gen and OFA-large-image_gen, and what configs/ofa_image_gen.py trains"
      )
    named = named_by_run(self._source)
    if codec is None and "codec" not in named:
      raise ValueError(
        "Expected codec, the VQGAN that makes pictures of the model's codes, found None and no run "
        "that names one: convert the original's with tools/convert_torch_weights.py"
      )
    return self._painter(codec or named["codec"], judge or named.get("judge"))

  def can_draw(self, codec: str | None = None, judge: str | None = None) -> bool:
    """Whether there is what makes pictures of the model's codes, which is loaded here.

    Raises:
      ValueError: a codec or judge is given, and the model cannot draw with it.
    """
    try:
      self.painter(codec, judge)
    except (ValueError, OSError):  # OSError: what a run names is not there any more
      if codec is None and judge is None:
        return False
      raise
    return True

  def _make_painter(self, codec, judge):
    if self._num_models > 1:
      raise ValueError(f"Expected one model to draw with, found {self._num_models}")
    return Painter(self._runner, codec=codec, judge=judge, precision=self.precision)


def named_by_run(source: hub.Source) -> dict[str, str]:
  """The "codec" and "judge" that a run's task names, or one of its evaluations."""
  if source.form != "run":
    return {}
  described = json_files.read(source.stored()[0])
  tasks = [described.get("task"), *(x.get("task") for x in described.get("evals") or ())]
  found = {}
  for task in tasks:
    for name in ("codec", "judge"):
      if isinstance(task, Mapping) and isinstance(task.get(name), str):
        found.setdefault(name, task[name])
  return found


def _judged_texts(judge: str, texts: Sequence[str]) -> np.ndarray:
  """Texts as a judge reads them; ValueError which names those that are too long."""
  try:
    return drawn.judge_tokens(judge, texts)
  except ValueError:
    faults = []
    for number, text in enumerate(texts):
      try:
        drawn.judge_tokens(judge, [text])
      except ValueError as error:
        faults.append(f"number {number}: {error}")
    raise ValueError(
      f"Expected texts that {judge} can read, found {len(faults)} too long: "
      + "; ".join(faults[:3])
      + ". Shorten them, or draw without a judge"
    ) from None
