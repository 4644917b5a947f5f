"""What users hand to an OFA: checked, and made the arrays that it runs on."""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ofa_jax.data import given, images
from ofa_jax.data.given import Picture
from ofa_jax.tasks.answering import Answering
from ofa_jax.text_files import shown
from ofa_jax.tokenizers.ofa import OFATokenizer
from ofa_jax.tokenizers.special import BOS, EOS, PAD

MAX_TOKENS = 1024  # of a text: the original's --max-source-positions


class Colours(NamedTuple):
  """What is taken out of the pixels' colours, from 0 to 1: (red, green, blue) each."""

  mean: tuple[float, ...] = images.HALF_MEAN
  std: tuple[float, ...] = images.HALF_STD


def preprocess(image: Picture, *, size: int, colours: Colours) -> np.ndarray:
  """Resizes and normalises a picture as the original does, float32[size, size, 3].

  It is converted to RGB, and the whole of it is squashed to a square.

  Args:
    image: see `data.given.picture`.
    size: pixels a side.
    colours: what to take out.

  Raises:
    ValueError: no picture.
  """
  return images.normalize(resized(given.picture(image), size), **colours._asdict())


def resized(image: Image.Image, size: int) -> np.ndarray:
  """The pixels uint8[size, size, 3]."""
  return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def pictures(values: Sequence[Picture | None], size: int) -> list[Image.Image | np.ndarray | None]:
  """Pictures as Pillow images; arrays as from `preprocess` and None stay as they are.

  Such an array is float32[S, S, 3]: with S = `size`, or with numbers outside 0 to 1; other floats
  are pixels from 0 to 1.

  Raises:
    ValueError: something that is no picture, by its number.
  """
  made, faults = [], []
  for number, value in enumerate(values):
    try:
      made.append(value if value is None else _picture(value, size))
    except ValueError as error:
      faults.append((number, error))
  if faults:
    number, error = faults[0]
    more = f" ({len(faults)} of {len(values)} are none)" if len(faults) > 1 else ""
    raise ValueError(f"images: number {number}{more}: {error}") from error
  return made


def _picture(value, size):
  if isinstance(value, Image.Image) or not hasattr(value, "__array__"):
    return given.picture(value)
  array = given.as_array(value)
  if array.dtype != np.float32 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
    return given.picture(array)
  low, high, shape = float(array.min()), float(array.max()), f"float32{list(array.shape)}"
  if low >= 0 and high <= 1:
    if array.shape[:2] != (size, size):
      return given.picture(array)
    warnings.warn(
      f"Took an array {shape} from 0 to 1 as made by `preprocess`; give uint8 if these are pixels"
    )
  elif _is_bytes(array, low, high) or not np.isfinite([low, high]).all():
    return given.picture(array)
  elif array.shape[0] != array.shape[1]:
    raise ValueError(
      "Expected normalised arrays to be square, as from `preprocess`, found "
      f"{shape} from {low:.3g} to {high:.3g}"
    )
  return array


def _is_bytes(array, low, high):
  return low >= 0 and 2 < high <= 255 and bool((array == np.floor(array)).all())


def image_stack(values: Sequence[Picture | None], size: int) -> np.ndarray:
  """Pictures resized to uint8[N, size, size, 3], or float32[N, S, S, 3] as they are; None: black.

  Raises:
    ValueError: as `pictures`; or float32 arrays of several sizes, or mixed with pictures.
  """
  values = pictures(values, size)
  filled = [x for x in values if x is not None]
  ready = [isinstance(x, np.ndarray) for x in filled]
  if any(ready):
    shapes = sorted({np.shape(x) for x in filled})
    if not all(ready) or len(shapes) > 1:
      raise ValueError(
        "Expected pictures, or arrays float32[S, S, 3] as from `preprocess` all of one size, found "
        f"float32 among shapes {shapes}"
      )
    blank = np.zeros(shapes[0], np.float32)
    return np.stack([blank if x is None else x for x in values])
  blank = np.zeros((size, size, 3), np.uint8)
  return np.stack([blank if x is None else resized(x, size) for x in values])


def image_array(array: Any, *, rows: int) -> np.ndarray:
  """Checks images float32 or uint8 [rows, h, w, 3].

  Raises:
    ValueError: another shape or type.
  """
  array = given.as_array(array)
  right = array.ndim == 4 and array.shape[0] == rows and array.shape[3] == 3
  if not right or array.dtype not in (np.uint8, np.float32):
    raise ValueError(
      f"Expected images uint8 or float32 {(rows, 'h', 'w', 3)}, found {array.dtype} {array.shape}"
    )
  return array


def token_array(
  name: str, tokens: Any, *, rows: int | None, longest: int, vocab_size: int
) -> np.ndarray:
  """Makes ids int32[N, T] of such an array or of N lists, which are filled up with 1.

  Raises:
    ValueError: another shape or type, another N than `rows`, ids that are not in the vocabulary.
  """
  if not hasattr(tokens, "__array__"):
    lists = [_whole_numbers(name, number, ids) for number, ids in enumerate(as_list(name, tokens))]
    tokens = np.full((len(lists), max(map(len, lists), default=1)), PAD, np.int64)
    for row, ids in zip(tokens, lists, strict=True):
      row[: len(ids)] = ids
  tokens = np.asarray(tokens)
  if tokens.ndim != 2 or not 0 < tokens.shape[1] <= longest or tokens.dtype.kind not in "iu":
    raise ValueError(
      f"Expected {name} of a whole-number type ('N', 0 < T <= {longest}), "
      f"found {tokens.dtype} {tokens.shape}"
    )
  if rows is not None and len(tokens) != rows:
    raise ValueError(f"Expected {name} of {rows} inputs, found {len(tokens)}")
  if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
    raise ValueError(
      f"Expected ids 0 to {vocab_size - 1} in {name}, found {tokens.min()}, {tokens.max()}"
    )
  return tokens.astype(np.int32)


def mask(name: str, values: Any, *, rows: int) -> np.ndarray:
  """Checks a mask bool[rows].

  Raises:
    ValueError: another shape or type.
  """
  values = np.asarray(values)
  if values.shape != (rows,) or values.dtype != bool:
    raise ValueError(f"Expected {name} bool[{rows}], found {values.dtype} {values.shape}")
  return values


def as_list(name: str, values: Any) -> list:
  """Makes a list; ValueError for a single text or image, or what has no order or no entries."""
  one = isinstance(values, str | bytes | os.PathLike | Image.Image)
  if values is None or one or isinstance(values, Set | Mapping) or not isinstance(values, Iterable):
    kind = "none" if values is None else f"{'one ' * one}{type(values).__name__}"
    raise ValueError(f"Expected a list of {name}, found {kind}")
  return list(values)


def check_number(name: str, values: Sequence[Any], *, rows: int) -> None:
  """Raises ValueError for another number of values than of rows."""
  if len(values) != rows:
    raise ValueError(f"Expected {rows} {name}, found {len(values)}")


def check_pictures(pictures: Sequence[Picture | None], *, rows: int, needed: bool) -> None:
  """Raises ValueError for another number of images than of rows, or for missing ones if needed."""
  if len(pictures) != rows:
    raise ValueError(f"Expected {rows} images, one for each text, found {len(pictures)}")
  missing = [str(i) for i, picture in enumerate(pictures) if picture is None]
  if missing and needed:
    raise ValueError(
      f"Expected an image with each prompt, found {len(missing)} without: numbers "
      f"{', '.join(missing[:5])}"
    )


def check_texts(
  name: str, texts: Any, *, rows: int | None = None, may_be_empty: bool = False
) -> list[str]:
  """The texts as a list of some length with words in each, unless they may be empty.

  Raises:
    ValueError: a single text, another number than `rows`, entries that are no or empty texts.
  """
  texts = as_list(name, texts)
  if rows is not None:
    check_number(name, texts, rows=rows)
  others = [i for i, text in enumerate(texts) if not isinstance(text, str)]
  if others:
    first = texts[others[0]]
    raise ValueError(
      f"Expected {name} to be texts, found {len(others)} others: number {others[0]} is "
      f"{type(first).__name__}, {shown(first, 40)}"
    )
  empty = [str(i) for i, text in enumerate(texts) if not text.strip()]
  if empty and not may_be_empty:
    raise ValueError(
      f"Expected {name} with words in them, found {len(empty)} empty: "
      f"numbers {', '.join(empty[:5])}"
    )
  return texts


def sentence(tokenizer: OFATokenizer, text: str, *, longest: int, marks: bool = False) -> list[int]:
  """The ids of a text between 0 and 2, `longest` at most; what is cut is warned of."""
  encode = tokenizer.encode_marked if marks else tokenizer.encode
  ids, room = encode(text, most=4 * longest), longest - 2
  if len(ids) > room:
    warnings.warn(f"Cut a text of {len(ids)} tokens to {room}: {text[:40]!r} ...")
  return [BOS, *ids[:room], EOS]


def asked(
  answering: Answering,
  texts: Mapping[str, Sequence[str]] | None,
  images: Sequence[Picture | None] | np.ndarray | None,
  *,
  tokenizer: OFATokenizer,
  image_size: int,
  vocab_size: int,
  image_needed: bool = True,
) -> dict[str, np.ndarray]:
  """Rows of a task's prompts, and of images, which may be missing only where they are allowed to.

  Args:
    answering: the task's.
    texts: by name, one for each row; None: the prompt has none.
    images: one for each row; None: there are none, where they are not needed.
    tokenizer: the model's.
    image_size: side of the images in pixels.
    vocab_size: the model's.
    image_needed: whether a row without an image is a fault.

  Raises:
    ValueError: an image is missing, or their number is another than that of the texts.
  """
  columns = {name: list(column) for name, column in (texts or {}).items()}
  if images is None and not image_needed:
    images = [None] * len(next(iter(columns.values())))
  pictures = as_list("images", images)
  number = len(next(iter(columns.values()))) if columns else len(pictures)
  check_pictures(pictures, rows=number, needed=image_needed)
  told = ({name: column[i] for name, column in columns.items()} for i in range(number))
  try:
    prompts = [answering.prompt(row, tokenizer.chinese) for row in told]
  except KeyError as error:
    known = ", ".join(columns) or "none"
    raise ValueError(f"Expected a text {error} for the prompt, found {known}") from error
  marks = {"longest": MAX_TOKENS, "marks": answering.marks}
  sentences = [sentence(tokenizer, text, **marks) for text in prompts]
  source = token_array(
    "texts", sentences or [[BOS]], rows=None, longest=MAX_TOKENS, vocab_size=vocab_size
  )
  rows = {"source": source}
  if not prompts:
    return {"source": rows["source"][:0]}
  if any(image is not None for image in pictures):
    rows["image"] = image_stack(pictures, image_size)
    rows["image_mask"] = np.array([image is not None for image in pictures])
  return rows


def check_seed(seed: Any) -> int:
  """The seed; ValueError for what is no whole number from 0 to 2^32 - 1."""
  whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
  if not whole or not 0 <= seed < 2**32:  # JAX would take another, silently
    raise ValueError(f"Expected a seed from 0 to 2^32 - 1, found {shown(seed, 40)}")
  return int(seed)


def joined(name: str, texts: Any, *, rows: int, by: str) -> list[str]:
  """The texts of each of `rows` lists as one; ValueError where they are something else."""
  lists = as_list(name, texts)
  check_number(name, lists, rows=rows)
  return [
    by.join(check_texts(name, as_list(f"{name} of each input", x), may_be_empty=True))
    for x in lists
  ]


def _whole_numbers(name: str, number: int, ids: Any) -> np.ndarray:
  """One list of ids as int64[n]."""
  ids = as_list(f"ids in {name}", ids) if not hasattr(ids, "__array__") else np.asarray(ids)
  if any(isinstance(i, bool | np.bool_) or not isinstance(i, int | np.integer) for i in ids):
    raise ValueError(f"Expected whole numbers in {name}, found number {number}: {shown(ids, 60)}")
  if any(abs(int(i)) >= 2**31 for i in ids):
    raise ValueError(f"Expected ids below 2^31 in {name}, found number {number}: {shown(ids, 60)}")
  return np.array([int(i) for i in ids], np.int64)


def decoder_prompt(source: np.ndarray) -> np.ndarray:
  """Source tokens int32[N, S] without the end, bos first, as what the decoder reads before it."""
  return np.where(source == EOS, PAD, source)[:, :-1]
