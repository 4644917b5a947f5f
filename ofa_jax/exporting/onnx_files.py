"""Parts as ONNX by jax2onnx: opset 18, any number of rows, the layers written out one by one."""

import contextlib
import logging
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ofa_jax.exporting.parts import Part, symbolic
from ofa_jax.exporting.programs import written_out

OPSET = 18
NEEDED = ("jax2onnx", "onnx", "onnxruntime")
# Operations that are in float16 where that is asked for.
_NARROW = {"MatMul", "Gemm", "Einsum", "Conv", "Transpose", "Reshape", "Concat", "Slice", "Gather"}
_NARROW |= {"Squeeze", "Unsqueeze", "Expand", "Pad", "Shape"}
_MOST = 1_900_000_000  # bytes of a protocol buffer, which ends at 2 GiB


def write(
  parts: Sequence[Part], folder: pathlib.Path, *, dtype: str, inside: bool | None
) -> dict[str, dict[str, Any]]:
  """Writes a file for each part, checked by ONNX' own checker; returns what they are.

  Args:
    parts: what to write, in float32.
    folder: where to.
    dtype: "fp32", or "fp16": products and their weights; sums of squares, exponentials and the
      inputs and outputs stay in float32.
    inside: whether the weights are in the files; False: beside, in FILE.data; None: inside where
      they fit.

  Raises:
    ValueError: the weights of a part are too large to be inside, or jax2onnx does not know one of
      its operations.
  """
  import onnx

  described = {}
  for part in parts:
    path = folder / f"{part.name}.onnx"
    try:
      with _quiet("jax2onnx", "onnx_ir"):
        model = _converted(part)
        model = _halved(model) if dtype == "fp16" else model
    except Exception as error:  # of libraries, which raise anything where they know no operation
      raise ValueError(
        f"Expected jax2onnx to convert part {part.name}, found {type(error).__name__}: {error}. "
        "--format=stablehlo needs no conversion"
      ) from error
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if inside and size > _MOST:
      raise ValueError(
        f"Expected at most {_MOST:,} bytes of weights inside a file, found {size:,} of part "
        f"{part.name}; give --weights=beside"
      )
    beside = size > _MOST if inside is None else not inside
    _save(model, path, beside=beside)
    onnx.checker.check_model(str(path), full_check=True)
    described[part.name] = {
      "file": path.name,
      "files": [path.name, f"{path.name}.data"] if beside else [path.name],
      "inputs": [tensor.to_json() for tensor in part.inputs],
      "outputs": [_output(value) for value in model.graph.outputs],
      "opset": OPSET,
    }
  return described


def _converted(part: Part) -> Any:
  """The part as a model of `onnx_ir`."""
  import jax2onnx

  shapes = symbolic(part)

  def function(*inputs):
    tensors = {tensor.name: x for tensor, x in zip(part.inputs, inputs, strict=True)}
    found = part.function(part.weights, tensors)
    return tuple(found[name] for name in part.outputs)

  # Traced before jax2onnx puts its own functions in the place of JAX's: its gelu is an operation of
  # a later opset.
  program = jax.make_jaxpr(function)(*shapes)
  return jax2onnx.to_onnx(
    lambda *inputs: written_out(program.jaxpr, program.consts, inputs),
    shapes,
    model_name=part.name,
    opset=OPSET,
    return_mode="ir",
    input_names=[tensor.name for tensor in part.inputs],
    output_names=list(part.outputs),
  )


def _halved(model: Any) -> Any:
  """The model with its products, and what only moves numbers, in float16."""
  import onnx_ir
  from onnxruntime.transformers.float16 import convert_float_to_float16

  proto = onnx_ir.to_proto(model)
  wide = sorted({node.op_type for node in proto.graph.node} - _NARROW)
  halved = convert_float_to_float16(proto, keep_io_types=True, op_block_list=wide)
  del halved.graph.value_info[:]  # the types of before
  model = onnx_ir.from_proto(halved)
  model.graph.sort()  # casts were put at its end
  return model


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
  """Warnings of libraries on parts of theirs that are not used here are not shown."""
  loggers = [logging.getLogger(name) for name in names]
  levels = [logger.level for logger in loggers]
  for logger in loggers:
    logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    for logger, level in zip(loggers, levels, strict=True):
      logger.setLevel(level)


def _save(model: Any, path: pathlib.Path, *, beside: bool) -> None:
  import onnx_ir

  with _quiet("onnx_ir"):
    onnx_ir.save(model, path, external_data=f"{path.name}.data" if beside else None)


def _output(value: Any) -> dict[str, Any]:
  shape = [n if isinstance(n, int) else str(n) for n in value.shape]
  return {"name": value.name, "shape": shape, "dtype": np.dtype(value.dtype.numpy()).name}
