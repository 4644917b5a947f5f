"""Finding what phrases describe: the part of `OFAModel` that is about boxes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from ofa_jax.decode.beam import Search
from ofa_jax.inference import inputs
from ofa_jax.inference.inputs import Picture
from ofa_jax.inference.results import Results, Returns, log_probabilities
from ofa_jax.tasks import confidence, refcoco


class Boxes(NamedTuple):
  """Where one phrase may be in its image, the best first.

  Attributes:
    boxes: float32[K, 4] = x0, y0, x1, y1 in pixels of the image.
    scores: float32[K], log-probability of each box and of those that are nearly the same.
    probabilities: float32[K], calibrated; None where the model is not.
  """

  boxes: np.ndarray
  scores: np.ndarray
  probabilities: np.ndarray | None


class Grounding:
  """What `OFAModel` has of it; the rest of the class is there."""

  def ground(
    self,
    images: Sequence[Picture] | np.ndarray,
    phrases: Sequence[str],
    *,
    search: Search | None = None,
    any_box: bool = False,
    min_probability: float | None = None,
    return_scores: bool = False,
    return_probabilities: bool = False,
  ) -> Results:
    """Finds the boxes that phrases describe.

    Args:
      images: one for each phrase.
      phrases: words beyond 80 are cut, with a warning.
      search: of four coordinates; None: as in `searches`. Nothing keeps the model to coordinates.
      any_box: whether other hypotheses count where the best, the original's answer, is no box.
      min_probability: below it the phrase is absent; None: it never is.
      return_scores: whether to return scores, too: those of the search.
      return_probabilities: whether to return probabilities, too: of the box and those of the other
        hypotheses that are nearly the same, 0 where there is no box.

    Returns:
      Boxes float32[4]: x0, y0, x1, y1 in pixels of the given image, NaN if there is none, or the
      phrase is absent.

    Raises:
      ValueError: an empty phrase; an image is missing; the model is not calibrated for what needs
        it.
    """
    wanted = return_probabilities or min_probability is not None
    answering = refcoco.ANSWERING
    returns = Returns.of(self.calibrations, answering, scores=return_scores, probabilities=wanted)
    boxes, scores, logs = [], [], []
    for hypotheses, places, scale in self._boxes(images, phrases, search):
      best, log = refcoco.answer(places, log_probabilities(hypotheses), any_box=any_box)
      boxes.append(refcoco.NO_BOX.copy() if best is None else places[best] * scale)
      scores.append(-np.inf if best is None else hypotheses[best]["score"])
      logs.append(log)
    told = returns.generated(boxes, np.array(scores, np.float32), np.array(logs))
    if min_probability is None:
      return told
    *rest, probabilities = told
    rest[0] = [
      refcoco.NO_BOX.copy() if p < min_probability else box
      for box, p in zip(boxes, probabilities, strict=True)
    ]
    rest += [probabilities] if return_probabilities else []
    return tuple(rest) if len(rest) > 1 else rest[0]

  def ground_all(
    self,
    images: Sequence[Picture] | np.ndarray,
    phrases: Sequence[str],
    *,
    most: int | None = None,
    overlap: float = 0.5,
    min_probability: float | None = None,
    search: Search | None = None,
    seed: int = 0,
  ) -> list[Boxes]:
    """Finds all boxes that phrases may describe, out of the hypotheses of a search.

    Hypotheses that overlap are one box: the best of them, with the probability of all together.

    Args:
      images, phrases: as for `ground`.
      most: boxes of a phrase; None: as many as there are.
      overlap: intersection over union from which on two boxes are one.
      min_probability: of a box; None: any.
      search: `num_beams` hypotheses, or so many samples (`sample=True`); None: as in `searches`.
      seed: of samples.

    Raises:
      ValueError: as `ground`.
    """
    answering = refcoco.ANSWERING
    wanted = min_probability is not None
    Returns.of(self.calibrations, answering, probabilities=wanted)
    known = self.calibrations.get(confidence.name_of(answering, chosen=False))
    told = []
    for hypotheses, places, scale in self._boxes(images, phrases, search, seed=seed):
      regions = confidence.merged(places, log_probabilities(hypotheses), overlap=overlap)
      regions.sort(key=lambda region: -region[1])
      logs = np.array([log for _, log in regions])
      boxes = places[[i for i, _ in regions]].reshape(-1, refcoco.CORNERS) * scale
      values = None
      if known is not None:
        values = confidence.probabilities(logs, temperatures=(known.temperature,))[:, 0]
      kept = slice(most)
      if min_probability is not None:
        kept = np.flatnonzero(values >= min_probability)[:most]
      told.append(
        Boxes(
          boxes[kept],
          logs[kept].astype(np.float32),
          None if values is None else values[kept].astype(np.float32),
        )
      )
    return told

  def _boxes(self, images, phrases, search, *, seed=0):
    """For each phrase its hypotheses, what they say, and the image's scale.

    What they say is float32[M, 4] in pixels of the picture as the model sees it, NaN where it is no
    box; the scale float32[4] makes it pixels of the given image.
    """
    phrases = inputs.check_texts("phrases", phrases)
    images = inputs.pictures(inputs.as_list("images", images), self.image_size)
    rows = self._asked(refcoco.ANSWERING, images, {"text": phrases})
    all_hypotheses = self._search(rows, search or self.searches["ground"], seed=seed)
    for image, hypotheses in zip(images, all_hypotheses, strict=True):
      size = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
      scale = np.divide(size, rows["image"].shape[2:0:-1]).astype(np.float32)
      said = [
        refcoco.read_box(x["tokens"], tokenizer=self.tokenizer, scale=np.ones(2))
        for x in hypotheses
      ]
      places = [refcoco.NO_BOX if box is None else box for box in said]
      yield hypotheses, np.reshape(places, (-1, refcoco.CORNERS)), np.tile(scale, 2)
