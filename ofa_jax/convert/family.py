"""What differs between the families of models: one `Family` for each, all of them in `hub`."""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

import numpy as np

from ofa_jax.convert import rules
from ofa_jax.convert.params import ModelConfig, Weights
from ofa_jax.convert.releases import Release

C = TypeVar("C", bound=ModelConfig)
Settings = dict[str, Any]  # what a model directory says besides the sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFace(Generic[C]):
  """How a family is stored in Hugging Face directories.

  Attributes:
    model_type: of their `config.json`.
    in_transformers: transformers has this model.
    infer: (directory, its `config.json`) -> sizes and settings; ValueError if it is of another.
    load: (directory, sizes) -> weights, NumPy; ValueError if they are not of these sizes.
    save: (directory, sizes, weights, settings=, files=) writes a new one.
  """

  model_type: str
  in_transformers: bool
  infer: Callable[[pathlib.Path, Mapping[str, Any]], tuple[C, Settings]]
  load: Callable[[pathlib.Path, C], Weights]
  save: Callable[..., None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizers(Generic[C]):
  """How a family's tokenizer is stored.

  Attributes:
    read: (folder or None, sizes) -> the tokenizer; ValueError where there is none, or none of a
      model of these sizes.
    save: (folder or None, directory, sizes) copies it into a model directory, and returns what its
      `config.json` says of it; ValueError as `read`, but for a folder without one.
    beside_weights: a `.pt` has it in its folder.
  """

  read: Callable[[pathlib.Path | None, C], Any]
  save: Callable[[pathlib.Path | None, pathlib.Path, C], Settings]
  beside_weights: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family(Generic[C]):
  """One family of models: its names, its files, and what they say besides the weights.

  Attributes:
    name: in `config.json`.
    title: for messages, with its article.
    paper: where it is from.
    config: the class of its sizes.
    marks: patterns of tensors' names; a checkpoint in which each is there is of this family, and
      of no other.
    settings: what `config.json` says besides the sizes, as in the released models.
    read_settings: the same of a model directory's `config.json`, or of the task of a run's.
    to_json, from_json: sizes as JSON and back.
    infer: (tensors, options) -> sizes and settings; ValueError where they do not show.
    from_torch: (tensors, sizes) -> weights; ValueError if they are not of these sizes.
    save_torch: (path, sizes, weights, settings=) writes a checkpoint that the original loads.
    image_size: (sizes, settings) -> side in pixels of the images that it was trained with.
    card: what a page on the Hugging Face Hub says of any such model.
    releases: the public models, by name.
    released: sizes of a public model, for what needs no download; None: they show in its files.
    huggingface: None: there are no such directories.
    tokenizers: None: the family reads no text.
    complete: (tensors, sizes, seed=, say=) -> all tensors, for starting from a model that lacks
      some, of which `say` is told; None: it starts from the same model only.
    beside: folder of a checkpoint -> options out of the files beside it, for `infer`, which count
      before the checkpoint's own; ValueError for faulty ones. None: there are none.
    fitted: (source, sizes) -> a `hub.Source` for images or texts of other sizes, and a line on each
      change; None: its parameters do not depend on them.
  """

  name: str
  title: str
  paper: str
  config: type[C]
  marks: tuple[str, ...]
  settings: Mapping[str, Any]
  read_settings: Callable[[Mapping[str, Any]], Settings]
  to_json: Callable[[C], dict[str, Any]]
  from_json: Callable[[Mapping[str, Any]], C]
  infer: Callable[[Mapping[str, np.ndarray], Mapping[str, Any]], tuple[C, Settings]]
  from_torch: Callable[[Mapping[str, np.ndarray], C], Weights]
  save_torch: Callable[..., None]
  image_size: Callable[[C, Mapping[str, Any]], int]
  card: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  releases: Mapping[str, Release] = dataclasses.field(default_factory=dict)
  released: Callable[[str], C] | None = None
  huggingface: HuggingFace[C] | None = None
  tokenizers: Tokenizers[C] | None = None
  complete: Callable[..., dict[str, np.ndarray]] | None = None
  beside: Callable[[pathlib.Path], dict[str, Any]] | None = None
  fitted: Callable[[Any, C], tuple[Any, list[str]]] | None = None

  def wrote(self, names: Iterable[str]) -> bool:
    """Whether a state dict with these names is one of this family."""
    return _all_match(self.marks, names)


# Models that are taken for ours or given by mistake, and what to do with them: (title, the marks of
# its tensors, a hint). The first whose marks are all there is told.
OTHERS: tuple[tuple[str, tuple[str, ...], str], ...] = (
  (
    "a VQGAN of another kind",
    (r"quantize\.", r"encoder\.down\.\d+\.", r"decoder\.up\.\d+\."),
    "its codes come without Gumbel-softmax, which the one of text to image has",
  ),
  (
    "a CLIP of transformers",
    (r"vision_model\.", r"text_model\."),
    "give the directory with its config.json, not the file",
  ),
  (
    "a BERT",
    (r"(bert\.)?embeddings\.word_embeddings\.weight$", r"(bert\.)?encoder\.layer\.\d+\."),
    "a Chinese-CLIP starts from it and an OpenAI CLIP: python -m ofa_jax.convert with --bert",
  ),
  (
    "a BART or another Transformer of fairseq",
    (r"(model\.)?encoder\.layers\.\d+\.", r"(model\.)?decoder\.layers\.\d+\.encoder_attn"),
    "an OFA starts training from it, by --config.init",
  ),
  ("an image tower alone", (r"visual\.",), ""),
)


def guess(names: Iterable[str]) -> str:
  """What a state dict with these names seems to be, and what to do with it; "" if unknown."""
  names = list(names)
  for title, marks, hint in OTHERS:
    if _all_match(marks, names):
      return f"{title}; {hint}" if hint else title
  return ""


def explain(path: pathlib.Path, function: Callable[..., Any], *args: Any) -> Any:
  """Calls a function and puts the file's name before what it complains of."""
  try:
    return function(*args)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def _all_match(patterns: Iterable[str], names: Iterable[str]) -> bool:
  names = list(rules.plain_names(dict.fromkeys(names)))
  return all(any(re.match(pattern, name) for name in names) for pattern in patterns)


def of_mixture(task: Mapping[str, Any]) -> Mapping[str, Any]:
  """What the task of a run says of its model; a mixture's is that of its tasks.

  The first of them that says something counts, one that learns captions before the others.
  """
  parts = task.get("tasks")
  if not isinstance(parts, Mapping):
    return task
  told = {}
  for part in sorted(parts.values(), key=lambda x: not learns_captions(x)):
    told = {**part, **told}
  return told


def learns_captions(task: Mapping[str, Any]) -> bool:
  """Whether a run's description of its task is that of captions, learnt from people or rewards."""
  return str(task.get("_class")).endswith((".Caption", ".SelfCritical"))
