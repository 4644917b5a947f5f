"""Runs the files of this folder by ONNX Runtime; needs onnxruntime and NumPy."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime


def load(
  folder: pathlib.Path, described: Mapping[str, Any], *, providers: Sequence[str] | None = None
) -> Callable[..., dict[str, np.ndarray]]:
  """Makes a part of the model a function of arrays by name.

  Args:
    folder: that of the files.
    described: the part in `config.json`.
    providers: of ONNX Runtime; None: all that are there, the CPU last, but TensorRT, which takes
      minutes to start.
  """
  there = onnxruntime.get_available_providers()
  providers = providers or [name for name in there if not name.startswith("Tensorrt")]
  session = onnxruntime.InferenceSession(str(folder / described["file"]), providers=providers)
  names = [output["name"] for output in described["outputs"]]

  def call(**inputs: np.ndarray) -> dict[str, np.ndarray]:
    inputs = {name: np.asarray(x) for name, x in inputs.items()}
    return dict(zip(names, session.run(names, inputs), strict=True))

  return call
