"""The model of this folder, which `python -m ofa_jax.export` wrote; ofa_jax itself is not needed.

  import sys; sys.path.insert(0, "FOLDER")
  from exported import Model
  model = Model()

It needs NumPy and what `runtime.py` beside it needs; Pillow to prepare pictures, and `tokenizers`
to prepare texts. `config.json` says what the files are, and what their inputs and outputs are.
"""

import functools
import importlib.util
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

BOS, PAD, EOS = range(3)


class Model:
  """An exported model.

  Attributes:
    config: what `config.json` says.
    parts: the functions of the files by name: arrays by name in, arrays by name out.
  """

  def __init__(self, folder: str | pathlib.Path | None = None, **options: Any):
    """Opens the files.

    Args:
      folder: None: that of this file.
      options: of `runtime.load`, such as ONNX Runtime's `providers`.
    """
    self.folder = pathlib.Path(folder or pathlib.Path(__file__).parent)
    self.config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
    load = _module(self.folder / "runtime.py").load
    self.parts = {
      name: load(self.folder, described, **options)
      for name, described in self.config["parts"].items()
    }

  @functools.cached_property
  def tokenizer(self) -> Any:
    """The model's tokenizer, which needs the package `tokenizers`."""
    package = _module(self.folder / "tokenizer" / "__init__.py")
    return package.open_tokenizer(self.folder / "tokenizer")

  def preprocess(self, image: Any) -> np.ndarray:
    """Resizes and normalises a picture, float32[S, S, 3]; needs Pillow.

    Args:
      image: a path, or a Pillow image.
    """
    from PIL import Image

    wanted = self.config["image"]
    picture = image if isinstance(image, Image.Image) else Image.open(image)
    if wanted["convert_to_rgb"] == "first":
      picture = picture.convert("RGB")
    size = (wanted["size"], wanted["size"])
    picture = picture.resize(size, Image.Resampling.BICUBIC).convert("RGB")
    pixels = np.asarray(picture).astype(np.float32) / np.float32(255)
    return (pixels - np.float32(wanted["mean"])) / np.float32(wanted["std"])

  def tokenize(self, texts: Sequence[str]) -> np.ndarray:
    """The ids int32[N, T] of texts.

    Raises:
      ValueError: of an OFA: a text is longer than the encoder was exported for.
    """
    length = self.config["text"]["length"]
    if self.config["family"] == "cnclip":
      return self.tokenizer(list(texts), context_length=length)
    tokens = np.full((len(texts), length), PAD, np.int32)
    for row, text in zip(tokens, texts, strict=True):
      ids = [BOS, *self.tokenizer.encode(text), EOS]
      if len(ids) > length:
        raise ValueError(
          f"Expected texts of at most {length} tokens, found {len(ids)}: {text[:40]!r}; export "
          "with a larger --context-length"
        )
      row[: len(ids)] = ids
    return tokens

  # Chinese-CLIP

  def encode_image(self, image: np.ndarray) -> np.ndarray:
    """Features float32[N, E], not normalised, of images float32[N, S, S, 3]."""
    return np.asarray(self._part("image")(image=image)["image_features"])

  def encode_text(self, tokens: np.ndarray) -> np.ndarray:
    """Features float32[N, E], not normalised, of tokens int32[N, T]."""
    return np.asarray(self._part("text")(tokens=tokens)["text_features"])

  def get_similarity(self, image: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The logits float32[N, M] of N images with M texts; those of texts with images transposed."""
    if "both" in self.parts:
      return np.asarray(self.parts["both"](image=image, tokens=tokens)["logits_per_image"])
    image_features, text_features = (
      x / np.linalg.norm(x, axis=1, keepdims=True)
      for x in (self.encode_image(image), self.encode_text(tokens))
    )
    return np.exp(np.float32(self.config["logit_scale"])) * (image_features @ text_features.T)

  # OFA

  def caption(self, images: Sequence[np.ndarray], **search: Any) -> list[str]:
    """Describes images float32[S, S, 3]; `search` replaces fields of the model's own search."""
    texts = [self.config["prompts"]["caption"]] * len(images)
    return self.generate(images, texts, **{**self.config["search"], **search})

  def generate(
    self,
    images: Sequence[np.ndarray | None] | None,
    texts: Sequence[str],
    *,
    read_prompt: bool = False,
    batch_size: int = 8,
    **search: Any,
  ) -> list[str]:
    """Answers prompts, spelled as in training: most begin with a space.

    Args:
      images: float32[S, S, 3] for each text, as from `preprocess`; None where there is none.
      texts: the prompts.
      read_prompt: whether the decoder, too, reads the prompt before it answers, as in models that
        were fine-tuned to questions.
      batch_size: inputs that are answered together.
      search: fields of `search.Search`.
    """
    images = [None] * len(texts) if images is None else images
    answers = []
    for begin in range(0, len(texts), batch_size):
      part = slice(begin, begin + batch_size)
      tokens = self.tokenize(texts[part])
      prompts = None
      if read_prompt:
        prompts = np.where(tokens == EOS, PAD, tokens)[:, 1:]
        # Of ofa_jax's own widths, since an answer may be as long as `max_length` and the padding.
        width = max(8, 1 << (int((prompts != PAD).sum(axis=1).max()) - 1).bit_length())
        wider = max(0, width - prompts.shape[1])
        prompts = np.pad(prompts, ((0, 0), (0, wider)), constant_values=PAD)[:, :width]
      for found in self.generate_tokens(tokens, images[part], prompts=prompts, **search):
        answers.append(self.tokenizer.decode(found[0]["tokens"]).strip() if found else "")
    return answers

  def generate_tokens(
    self,
    tokens: np.ndarray,
    images: Sequence[np.ndarray | None],
    *,
    prompts: np.ndarray | None = None,
    **search: Any,
  ) -> list[list[dict[str, Any]]]:
    """For each input its hypotheses, see `search.generate`.

    Args:
      tokens: int32[B, S], 0, a text, 2, filled up with 1.
      images: of each input, or None.
      prompts: int32[B, P], what the decoder reads first, without 0, filled up with 1.
      search: fields of `search.Search`.

    Raises:
      ValueError: more positions than the decoder was exported for.
    """
    module = _module(self.folder / "search.py")
    options = module.Search(**search)
    needed = options.max_length + 1 + (0 if prompts is None else prompts.shape[1])
    most = self.config["max_length"]
    if needed > most:
      raise ValueError(
        f"Expected at most {most} positions of the decoder, found {needed}; export with a larger "
        "--max-length, or search for less"
      )
    size = self.config["image"]["size"]
    blank = np.zeros((size, size, 3), np.float32)
    cache = self._part("encoder")(
      tokens=tokens,
      image=np.stack([blank if image is None else image for image in images]),
      image_mask=np.array([image is not None for image in images]),
    )
    decode, beams = self._part("decoder"), options.num_beams
    # The hypotheses of an input share what the encoder said of it.
    cache = {
      name: x if name.startswith("memory") else np.repeat(np.asarray(x), beams, axis=1)
      for name, x in cache.items()
    }
    for tensor in self.config["parts"]["decoder"]["inputs"]:
      name, shape = tensor["name"], (len(tokens), beams, *tensor["shape"][2:])
      if name not in ("tokens", "position", *cache):
        cache[name] = np.zeros(shape, tensor["dtype"])
    rows = np.arange(len(tokens))[:, None]

    def step(cache, words, position):
      made = decode(tokens=words, position=np.int32(position), **cache)
      logits = np.asarray(made.pop("logits"))
      return logits, cache | {name.removeprefix("new_"): x for name, x in made.items()}

    def reorder(cache, parents):
      return {
        name: x if name.startswith("memory") else x[rows, parents] for name, x in cache.items()
      }

    return module.generate(step, reorder, cache, batch=len(tokens), search=options, prompts=prompts)

  def _part(self, name: str) -> Any:
    if name not in self.parts:
      raise ValueError(f"Expected the part {name} in this folder, found {', '.join(self.parts)}")
    return self.parts[name]


def _module(path: pathlib.Path) -> Any:
  """A module, or a package, by its path, so that two folders do not meet in `sys.modules`."""
  name = "exported_" + "".join(c if c.isalnum() else "_" for c in str(path.resolve()))
  if name not in sys.modules:
    below = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=below)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
  return sys.modules[name]
