"""Zero-shot classification by class names put into templates (Chinese-CLIP, arXiv 2211.01335)."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from ofa_jax import storage, text_files
from ofa_jax.data import folder, pairs
from ofa_jax.data.protocols import Rows
from ofa_jax.scoring import zeroshot
from ofa_jax.tasks.base import Task
from ofa_jax.tasks.contrastive import check_image_size, encode_either, tokenizer

_TOP5_CLASSES = 10  # of fewer classes, half and more are among the first five anyway


@dataclasses.dataclass(kw_only=True)
class ZeroShot(Task):
  """Zero-shot classification: the class whose averaged prompts lie nearest to the image.

  Attributes:
    directory: holds `test/<class>/*` and `label_cn.txt`, one class name a line in folder order.
    templates: prompts with `{}` for the class name.
    image_size: pixels a side.
    context_length: tokens of a prompt.
  """

  directory: str
  templates: tuple[str, ...]
  image_size: int = 224
  context_length: int = 52

  metrics: ClassVar[tuple[str, ...]] = ("zeroshot_top1", "zeroshot_top5")

  def check(self, config: Any) -> list[str]:
    return check_image_size(self.image_size, config)

  def streams(self, split: str) -> dict[str, Rows]:
    table = folder.ImageFolder(storage.of(self.directory) / split)
    names = text_files.read(storage.of(self.directory) / "label_cn.txt").split("\n")
    names = [name.strip() for name in names if name.strip()]
    if len(names) != len(table.classes):
      raise ValueError(
        f"Expected one class name for each folder of {storage.of(self.directory) / split}, found "
        f"{len(names)} names in label_cn.txt and {len(table.classes)} folders"
      )
    prompts = [template.replace("{}", name) for name in names for template in self.templates]
    return {
      "image": folder.FolderRows(table, size=self.image_size),
      "text": pairs.TextRows(prompts, tokenize=tokenizer(self.context_length)),
    }

  def predict(self, model, batch, *, rngs, frozen):
    del rngs, frozen
    return {"features": encode_either(model, batch)}

  def score(self, predictions, streams):
    """Top-1, and top-5 of 10 classes and more, as fractions of all images.

    An unreadable image counts as wrong.
    """
    prompts = predictions["text"]["features"]
    prompts = prompts.reshape(-1, len(self.templates), prompts.shape[-1]).mean(1)
    classifier = prompts / np.linalg.norm(prompts, axis=-1, keepdims=True)
    image, labels = predictions["image"], streams["image"].labels
    scores = image["features"] @ classifier.T
    unreadable = np.flatnonzero(~image["valid"])
    scores[unreadable, labels[unreadable]] = -np.inf
    values = {"zeroshot_top1": zeroshot.top1(scores, labels)}
    if len(classifier) >= _TOP5_CLASSES:
      values["zeroshot_top5"] = zeroshot.top_k(scores, labels, k=5)
    return values
