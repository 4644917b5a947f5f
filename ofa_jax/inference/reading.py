"""Reading the texts in pictures: the part of `OFAModel` that is about them."""

from collections.abc import Sequence

import numpy as np

from ofa_jax.data import ocr as pictures
from ofa_jax.decode.beam import Search
from ofa_jax.inference import inputs
from ofa_jax.inference.inputs import Picture
from ofa_jax.inference.results import Results
from ofa_jax.tasks import ocr


class Reading:
  """What `OFAModel` has of it; the rest of the class is there."""

  def read(
    self,
    images: Sequence[Picture] | np.ndarray,
    *,
    document: bool = False,
    placed: bool = False,
    search: Search | None = None,
    return_scores: bool = False,
    return_probabilities: bool = False,
  ) -> Results:
    """Reads the texts in images.

    Args:
      images: whose aspect is kept; what is missing to a square is their edge.
      document: whether they are long lines of documents, which are cut into four.
      placed: whether they stand in their squares already, as `data.ocr.placed` made them.
      search: how; None: as in `searches`.
      return_scores, return_probabilities: whether to return these, too.

    Raises:
      ValueError: an image is missing; documents for a model of another size than 480 pixels;
        probabilities of a model that is not calibrated.
    """
    answering = ocr.DOCUMENTS if document else ocr.ANSWERING
    returns = self._returns(answering, return_scores, return_probabilities)
    if document and self.image_size != pictures.STRIP_WIDTH:
      raise ValueError(
        f"Expected a model for images of {pictures.STRIP_WIDTH} pixels to read documents, found "
        f"one for {self.image_size}; give image_size"
      )
    images = inputs.pictures(inputs.as_list("images", images), self.image_size)
    if not placed:
      images = [
        x if x is None or isinstance(x, np.ndarray)  # is missing, or as from `preprocess`
        else answering.square(x.convert("RGB"), self.image_size)
        for x in images
      ]  # fmt: skip
    rows = self._asked(answering, images)
    return self._texts(self._search(rows, search or self.searches["read"]), returns)
