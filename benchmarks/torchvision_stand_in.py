"""The parts of torchvision that `cn_clip` imports, for machines without it."""

import contextlib
import functools
import sys
import types
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image


@contextlib.contextmanager
def stand_in_for_torchvision() -> Iterator[None]:
  """Gives cn_clip the parts of torchvision that it imports, with Pillow and PyTorch."""

  class Resize:
    def __init__(self, size, interpolation):
      self.size, self.interpolation = size[::-1], interpolation

    def __call__(self, image):
      return image.resize(self.size, self.interpolation)

  class ToTensor:
    def __call__(self, image):
      pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
      return pixels.to(torch.float32).div(255)

  class Normalize:
    def __init__(self, mean, std):
      self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def __call__(self, tensor):
      return tensor.sub(self.mean).div(self.std)

  class Compose:
    def __init__(self, steps):
      self.steps = steps

    def __call__(self, image):
      return functools.reduce(lambda x, step: step(x), self.steps, image)

  transforms = types.ModuleType("torchvision.transforms")
  for part in (Resize, ToTensor, Normalize, Compose):
    setattr(transforms, part.__name__, part)
  transforms.InterpolationMode = Image.Resampling
  datasets = types.ModuleType("torchvision.datasets")
  torchvision = types.ModuleType("torchvision")
  torchvision.transforms, torchvision.datasets = transforms, datasets
  modules = {module.__name__: module for module in (torchvision, transforms, datasets)}
  sys.modules |= modules
  yield
  for name in modules:  # transformers would take it for the real one
    del sys.modules[name]
