"""Pictures whose captions are the names of their classes."""

import numpy as np

from ofa_jax.data.cache import ImageReader
from ofa_jax.data.pairs import find_edges
from ofa_jax.data.protocols import Images
from ofa_jax.data.tsv import Texts


class LabelledRows:
  """The images of pairs with their classes as labels.

  Args:
    images, texts: as `PairData.load` gives them; every text is a class.
    size: side of the images in pixels.

  Attributes:
    classes: the texts, sorted; a label is a place among them.
    labels: int64[N].

  Raises:
    ValueError: images with several classes or none (all are counted, the first five named).
  """

  def __init__(self, images: Images, texts: Texts, *, size: int):
    self.notes = texts.notes
    self.classes = sorted(set(texts.texts))
    place = {name: i for i, name in enumerate(self.classes)}
    self.labels = np.full(len(images), -1)
    faults = []
    for text, image in find_edges(images, texts):
      label = place[texts.texts[text]]
      if self.labels[image] not in (-1, label):
        faults.append(f"{images.name(int(image))} (also {texts.texts[text]})")
      self.labels[image] = label
    faults += [f"{images.name(int(i))} (none)" for i in np.flatnonzero(self.labels < 0)]
    if faults:
      raise ValueError(
        f"Expected one class for every image, found {len(faults)} with several or none: "
        f"{'; '.join(faults[:5])}. Captions are taken as the names of classes."
      )
    self._reader = ImageReader(images, size=size, exact=True)

  def __len__(self) -> int:
    return len(self.labels)

  def example(self, i: int, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    """`image: uint8[S, S, 3]`, `label: int32`. Raises BadRow when the image cannot be read."""
    del rng
    return {"image": self._reader.read(i, None), "label": np.int32(self.labels[i])}

  def blank(self) -> dict[str, np.ndarray]:
    """What stands in a batch where a row is bad."""
    size = self._reader.size
    return {"image": np.zeros((size, size, 3), np.uint8), "label": np.int32(-1)}

  def close(self) -> None:
    """Closes the files."""
    self._reader.close()
