"""OFA's tokenizer files for the tests, made of the part of GPT-2's that the goldens need."""

import json
import pathlib

GOLDEN = pathlib.Path(__file__).parent / "golden/ofa"


def write_bpe(directory):
  """dict.txt, encoder.json and vocab.bpe with GPT-2's own numbers and the released order.

  Every text of the goldens is cut as with the whole files. Pieces that these texts do not need are
  missing, and their lines in dict.txt hold the number of no piece.
  """
  part = json.loads((GOLDEN / "tokenizer/bpe.json").read_text())
  directory.mkdir(parents=True, exist_ok=True)
  encoder = {piece: number for piece, (number, _) in part["pieces"].items()}
  (directory / "encoder.json").write_text(json.dumps(encoder))
  (directory / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(part["merges"]) + "\n")
  lines = {place: number for number, place in part["pieces"].values()}
  symbols = (lines.get(place, f"unused{place}") for place in range(4, 50264))
  (directory / "dict.txt").write_text("".join(f"{symbol} 1\n" for symbol in symbols))
  return directory
