"""The micro model of the goldens as a model directory, with its vocabulary."""

import pathlib

from ofa_jax import hub
from ofa_jax.convert.ofa import table as convert
from tests.ofa_files import GOLDEN, write_bpe
from tests.ofa_golden import micro_config, micro_state_dict


def write_words(folder: pathlib.Path) -> pathlib.Path:
  """Writes the tokenizer of the micro model's 112 symbols into a folder, and returns that."""
  write_bpe(folder)
  symbols = (GOLDEN / "tokenizer" / "dict_symbols.txt").read_text().split()
  (folder / "dict.txt").write_text("".join(f"{symbol} 1\n" for symbol in symbols[4:]))
  return folder


def save_micro(root: pathlib.Path) -> pathlib.Path:
  """Writes `root/model`, for images of 64 pixels, and returns its path."""
  words = write_words(root / "words")
  config = micro_config()
  weights = convert.from_torch(micro_state_dict(), config)
  hub.save_directory(root / "model", config, *weights, settings={"image_size": 64}, files=words)
  return root / "model"
