"""OFA's tokenizer files for the tests, made of the part of GPT-2's that the goldens need."""

import json
import pathlib

import numpy as np

from ofa_jax import tokenizers
from ofa_jax.data import images

GOLDEN = pathlib.Path(__file__).parent / "golden/ofa"
VOCAB = pathlib.Path(tokenizers.__path__[0]) / "vocab.txt"


def write_bpe(directory):
  """dict.txt, encoder.json and vocab.bpe with GPT-2's own numbers and the released order.

  Every text of the goldens is cut as with the whole files. Pieces that these texts do not need are
  missing, and their lines in dict.txt hold the number of no piece.
  """
  part = {"pieces": {}, "merges": set()}
  for path in GOLDEN.glob("tokenizer/bpe*.json"):
    stored = json.loads(path.read_text())
    part["pieces"] |= stored["pieces"]
    part["merges"] |= set(stored["merges"])
  # GPT-2 numbers its pieces in the order of the merges that make them.
  order = {merge: part["pieces"][merge.replace(" ", "")][0] for merge in part["merges"]}
  directory.mkdir(parents=True, exist_ok=True)
  encoder = {piece: number for piece, (number, _) in part["pieces"].items()}
  (directory / "encoder.json").write_text(json.dumps(encoder))
  (directory / "vocab.bpe").write_text(
    "#version: 0.2\n" + "\n".join(sorted(order, key=order.get)) + "\n"
  )
  lines = {place: number for number, place in part["pieces"].values()}
  symbols = (lines.get(place, f"unused{place}") for place in range(4, 50264))
  (directory / "dict.txt").write_text("".join(f"{symbol} 1\n" for symbol in symbols))
  return directory


def write_chinese(directory):
  """The released Chinese files: vocab.txt, and dict.txt with its lines stripped."""
  directory.mkdir(parents=True, exist_ok=True)
  text = VOCAB.read_text(encoding="utf-8")
  (directory / "vocab.txt").write_bytes(VOCAB.read_bytes())
  symbols = [line.strip() for line in text.split("\n")[: text.count("\n")]]
  lines = "".join(f"{symbol} 1\n" for symbol in symbols)
  (directory / "dict.txt").write_text(lines, encoding="utf-8")
  return directory


def check_rows(task, golden, *, rng=None, first=0, ddof=1):
  """The examples of a task's rows, which are those of a golden: ids and the image's statistics.

  Args:
    task: with the rows as training data.
    golden: the original's items.
    rng: for the rows.
    first: the row of the first item.
    ddof: what the golden's deviation was divided by less than the number of values.
  """
  rows = task.examples("train")
  blank = rows.blank()
  examples = []
  for i, item in enumerate(golden["items"]):
    example = rows.example(first + i, rng)
    assert {k: (v.shape, v.dtype) for k, v in example.items()} == {
      k: (v.shape, v.dtype) for k, v in blank.items()
    }
    for ours, theirs in (
      ("source", "source"), ("previous", "prev_output_tokens"), ("target", "target")
    ):  # fmt: skip
      ids, length = item[theirs]["ids"], len(example[ours])
      assert example[ours].tolist() == ids + [1] * (length - len(ids)), ours
    check_image(task, example["image"], item["patch_image"], ddof=ddof)
    examples.append(example)
  return rows, examples


def check_image(task, image, stored, *, ddof=1):
  """An image uint8[S, S, 3], normalised as the task does, has a golden's shape and statistics."""
  pixels = images.normalize(image, mean=task.pixel_mean, std=task.pixel_std)
  assert list(pixels.shape) == [*stored["shape"][1:], 3]
  assert (pixels.min(), pixels.max()) == (stored["min"], stored["max"])
  np.testing.assert_allclose(np.mean(pixels, dtype=np.float64), stored["mean"], atol=1e-7)
  np.testing.assert_allclose(np.std(pixels, dtype=np.float64, ddof=ddof), stored["std"], rtol=1e-6)
