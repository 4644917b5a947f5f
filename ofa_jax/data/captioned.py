"""Image-text pairs in a folder: pictures, and of each a .txt of the same name with its caption.

photos/cat.jpg  photos/cat.txt
"""

import os

from ofa_jax import staging, storage, text_files
from ofa_jax.data.folder import EXTENSIONS, ImageFiles, image_files
from ofa_jax.data.table import Captions
from ofa_jax.data.tsv import Texts


def has_captions(directory: str | os.PathLike) -> bool:
  """Whether any picture below a folder has a .txt file beside it."""
  there = storage.looker()
  return any(there(_caption_file(path)) for path in image_files(storage.of(directory)))


def read_captioned(directory: str | os.PathLike) -> tuple[ImageFiles, Texts]:
  """Reads the pictures and captions of a folder and the folders in it, each line a caption.

  Pictures without a caption are left out and named.

  Raises:
    ValueError: no picture has one, or a caption is not UTF-8 (all are counted, the first five
      named).
  """
  images, captions, without, damaged = [], Captions(), [], []
  files, there = image_files(storage.of(directory)), storage.looker()
  for path in files:
    file = _caption_file(path)
    raw = storage.read_bytes(staging.staged(file)) if there(file) else b""
    try:
      text = text_files.text_of(raw)
    except ValueError as reason:
      damaged.append(f"{text_files.shown(file, 300)} ({reason})")
      continue
    lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
      without.append(path)
      continue
    for number, line in lines:
      captions.add(line, image=storage.absolute(path), place=(len(images), number))
    images.append(storage.absolute(path))
  if damaged:
    raise ValueError(
      f"Expected captions in UTF-8, found {len(damaged)} files of something else: "
      f"{', '.join(damaged[:5])}. Save them again as UTF-8, or get them again."
    )
  if not images:
    raise ValueError(
      f"Expected pictures ({', '.join(EXTENSIONS)}) with a .txt file of the same name beside each "
      f"in {directory}, found {len(files)} pictures and no caption."
    )
  note = f"Left out {len(without)} pictures without a caption: {'; '.join(without[:5])}"
  notes = (note,) if without else ()
  texts = [_caption_file(path) for path in images]
  return ImageFiles(images), captions.texts(texts, notes=notes)


def _caption_file(path: str) -> str:
  return f"{os.path.splitext(path)[0]}.txt"
