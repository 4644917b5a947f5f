"""The README.md of an export: what is in the folder, and a few lines that use it."""

from collections.abc import Mapping, Sequence
from typing import Any

_NEEDS = {
  "onnx": "`pip install numpy onnxruntime pillow tokenizers`",
  "stablehlo": "`pip install numpy jax flatbuffers pillow tokenizers` (for GPUs `jax[cuda13]`, "
  "for TPUs `jax[tpu]`)",
}
_TOWERS = """\
image = model.preprocess(Image.open("picture.jpg"))[None]  # float32 [1, {size}, {size}, 3]
tokens = model.tokenize(["一只猫", "一只狗"])  # int32 [2, {length}]
image_features = model.encode_image(image)  # float32 [1, {embed_dim}], not normalised
text_features = model.encode_text(tokens)
logits = model.get_similarity(image, tokens)  # [1, 2]
print(logits.argmax(axis=1))
"""
_BOTH = """\
image = model.preprocess(Image.open("picture.jpg"))[None]  # float32 [1, {size}, {size}, 3]
tokens = model.tokenize(["一只猫", "一只狗"])  # int32 [2, {length}]
found = model.parts["both"](image=image, tokens=tokens)
print({{name: x.shape for name, x in found.items()}})  # both features, not normalised, and logits
print(model.get_similarity(image, tokens).argmax(axis=1))
"""
_IMAGE = """\
image = model.preprocess(Image.open("picture.jpg"))[None]  # float32 [1, {size}, {size}, 3]
features = model.encode_image(image)  # float32 [1, {embed_dim}], not normalised
print(features.shape)
"""
_TEXT = """\
tokens = model.tokenize(["一只猫", "一只狗"])  # int32 [2, {length}]
features = model.encode_text(tokens)  # float32 [2, {embed_dim}], not normalised
print(features.shape)
"""
_OFA = """\
images = [model.preprocess(Image.open("picture.jpg"))]  # float32 [{size}, {size}, 3] each
print(model.caption(images))  # as model.caption(images, num_beams=1), which is greedy
print(model.generate(images, [" what is in the image?"], max_length=8))
"""
_ENCODER = """\
images = [model.preprocess(Image.open("picture.jpg"))]  # float32 [{size}, {size}, 3] each
print(list(model.parts))  # functions of arrays by name
"""


def text(config: Mapping[str, Any], parts: Sequence[str]) -> str:
  """The page.

  Args:
    config: what `config.json` says.
    parts: names of the parts.
  """
  family, form = config["family"], config["format"]
  title = {"cnclip": "A Chinese-CLIP", "ofa": "An OFA"}[family]
  sizes = {"size": config["image"]["size"], "length": config["text"]["length"]}
  code = _example(family, parts).format(**sizes, embed_dim=config.get("embed_dim"))
  imports = "from PIL import Image\n\n" if "Image.open" in code else ""
  rows = "\n".join(
    f"| `{x['file']}` | {_tensors(x['inputs'])} | {_tensors(x['outputs'])} |"
    for x in config["parts"].values()
  )
  return f"""\
# {title} as {"ONNX" if form == "onnx" else "StableHLO"}, {config["dtype"]}

Written by `python -m ofa_jax.export`, which is not needed to use it: {_NEEDS[form]}.

```python
import sys

sys.path.insert(0, ".")  # this folder
from exported import Model
{imports}model = Model(".")
{code}```

| file | inputs | outputs |
|---|---|---|
{rows}

Letters are numbers of rows, any from 1 on. Pictures are RGB, the colours last, resized as a whole
to a square and normalised: `config.json` has the mean and the standard deviation of each colour,
and `Model.preprocess` does it. The same files run without `exported.py`: {_without(form)}.
"""


def _example(family: str, parts: Sequence[str]) -> str:
  if family == "ofa":
    return _OFA if len(parts) == 2 else _ENCODER
  if "both" in parts:
    return _BOTH
  return _TOWERS if len(parts) == 2 else {"image": _IMAGE, "text": _TEXT}[parts[0]]


def _tensors(described: Sequence[Mapping[str, Any]]) -> str:
  shown = [f"`{x['name']}` {x['dtype']} {_shape(x['shape'])}" for x in described]
  if len(shown) > 6:
    shown = [*shown[:4], f"... and {len(shown) - 4} of the cache, see `config.json`"]
  return ", ".join(shown)


def _shape(shape: Sequence[int | str]) -> str:
  return "[" + ", ".join(map(str, shape)) + "]"


def _without(form: str) -> str:
  if form == "onnx":
    return "they are plain ONNX of opset 18"
  return (
    "`jax.export.deserialize` reads them, and `call` takes a list of the weights, in the order of "
    "`config.json`, and a list of the inputs"
  )
