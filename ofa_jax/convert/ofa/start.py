"""Weights that an OFA starts training from though they are not all of its weights, or too many.

As the original's `upgrade_state_dict`: an OFA of other options (adapters, prompts, a larger
vocabulary), or BART's encoder and decoder, from which OFA's pretraining starts.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from flax import nnx

from ofa_jax import trees
from ofa_jax.convert import rules
from ofa_jax.convert.ofa.table import IGNORED, RULES, TIED, WORDS, shapes_of, standard_names
from ofa_jax.models.abstract import abstract
from ofa_jax.models.ofa.model import OFAConfig

_CELLS = tuple(f"{side}.embed_image_positions.weight" for side in ("encoder", "decoder"))
_TYPES = "encoder.type_embedding.weight"
_HEADS = r"^classification_heads\."


def complete(
  state_dict: Mapping[str, np.ndarray],
  config: OFAConfig,
  *,
  seed: int,
  answers: Sequence[Sequence[int]] | None = None,
  say: Callable[[str], None] = lambda line: None,
) -> dict[str, np.ndarray]:
  """Makes a state dict that `ofa.from_torch` takes of one that lacks parts of the model.

  What is missing is drawn as a new model is. Tables of image positions and of tokens that are too
  short get new rows, N(0, 1 / width); a table of tokens that is one too long loses the last, which
  is `<mask>`. A head that the model has not is left out.

  Args:
    state_dict: arrays by PyTorch name, in either layout.
    config: the model's sizes.
    seed: draws what is new.
    answers: for each new token the tokens whose mean it starts as, such as an answer's pieces.
    say: takes a line on each part that is not the stored one: drawn anew, longer, left out.

  Raises:
    ValueError: there is nothing of an OFA in it, or `answers` are not one for each new token.
  """
  tensors = standard_names(state_dict)
  others = [n for n in (WORDS, *TIED, *_CELLS) if n in tensors and not rules.is_float(tensors[n])]
  if others:
    raise ValueError(
      f"Expected floating-point tables, found {others[0]} {tensors[others[0]].dtype}"
    )
  words = next((tensors[name] for name in (WORDS, *TIED) if name in tensors), None)
  if words is None:
    raise ValueError(f"Expected {WORDS} to start from, found {list(state_dict)[:3]}")
  tensors = {name: x for name, x in tensors.items() if name not in TIED}
  rng = np.random.default_rng(seed)
  tensors[WORDS] = _fit_words(words, config.vocab_size, rng=rng, answers=answers)
  _tell_length("tokens", len(words), len(tensors[WORDS]), say, means=answers is not None)
  for name in _CELLS:
    if name in tensors:
      stored = tensors[name]
      tensors[name] = _lengthened(stored, config.image_bucket_size**2 + 1, rng=rng)
      title = f"image positions of the {name.partition('.')[0]}"
      _tell_length(title, len(stored), len(tensors[name]), say)
  if _TYPES in tensors:
    stored = tensors[_TYPES]
    tensors[_TYPES] = _lengthened(stored, 1 + config.max_images, rng=rng)
    _tell_length("types of images", len(stored), len(tensors[_TYPES]), say)
  _, params, rest = abstract(config)
  shapes = {**shapes_of(params), **shapes_of(rest)}
  needed = rules.needed_tensors(RULES, shapes)
  if config.classifier is None:
    heads = sorted({n.split(".")[1] for n in tensors if re.search(_HEADS, n)})
    for head in heads:
      say(f"classification head {head} left out")
    tensors = {name: x for name, x in tensors.items() if not re.search(_HEADS, name)}
  missing = [tensor for tensor in needed if tensor.name not in tensors]
  fresh = _fresh({tensor.path for tensor in missing}, config, seed=seed)
  for line in _drawn(missing, shapes):
    say(line)
  for tensor in missing:
    tensors[tensor.name] = tensor.transform.to_torch(fresh[tensor.path][tensor.index])
  return {name: x for name, x in tensors.items() if not any(re.search(p, name) for p, _ in IGNORED)}


def _tell_length(
  title: str, stored: int, now: int, say: Callable[[str], None], *, means: bool = False
) -> None:
  if now > stored:
    how = "means of others" if means else "drawn anew"
    say(f"{title}: {now - stored} rows behind the {stored} stored ones, {how}")
  elif now < stored:
    say(f"{title}: the last of {stored} rows left out")


def _drawn(missing: Sequence[rules.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
  """A line on what is drawn anew, by module, with its layers where some are stored."""
  places: dict[str, set[int]] = {}
  for tensor in missing:
    first = tensor.index[0] if tensor.index else None
    places.setdefault(tensor.path, set()).update({first} if isinstance(first, int) else ())
  lines: dict[str, None] = {}
  for path, drawn in places.items():
    some = f"[{', '.join(map(str, sorted(drawn)))}]" if 0 < len(drawn) < shapes[path][0] else ""
    lines[f"{path.rpartition('/')[0] or path}{some} drawn anew"] = None
  return list(lines)


def _fit_words(
  table: np.ndarray, size: int, *, rng: np.random.Generator, answers: Sequence[Sequence[int]] | None
) -> np.ndarray:
  if len(table) == size + 1:
    return table[:size]
  new = size - len(table)
  if answers is None or new <= 0:
    return _lengthened(table, size, rng=rng)
  if len(answers) != new:
    raise ValueError(f"Expected an answer for each of the {new} new tokens, found {len(answers)}")
  means = [np.asarray(table[list(tokens)], np.float32).mean(0) for tokens in answers]
  return np.concatenate([np.asarray(table, np.float32), np.stack(means)])


def _lengthened(table: np.ndarray, length: int, *, rng: np.random.Generator) -> np.ndarray:
  if len(table) >= length:
    return table
  width = table.shape[1]
  new = rng.standard_normal((length - len(table), width), np.float32) * np.float32(width**-0.5)
  return np.concatenate([np.asarray(table, np.float32), new])


def _fresh(paths: set[str], config: OFAConfig, *, seed: int) -> dict[str, np.ndarray]:
  """These parameters of a new model; the others are not computed."""

  @jax.jit
  def draw(key):
    _, params, rest = nnx.split(config.build(rngs=nnx.Rngs(key)), nnx.Param, ...)
    flat = {**trees.flatten(nnx.to_pure_dict(params)), **trees.flatten(nnx.to_pure_dict(rest))}
    return {path: flat[path] for path in paths}

  return jax.device_get(draw(jax.random.key(seed))) if paths else {}
