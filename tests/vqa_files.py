"""Questions about the pictures of OFA's quickstart, in the original's files."""

import json
import pathlib

from ofa_jax.tokenizers.ofa import OFATokenizer

ROWS = {"train": 96, "valid": 24}


def write(folder: pathlib.Path, shapes: pathlib.Path) -> pathlib.Path:
  """`{train,valid}.tsv`, `answers.json` and `tokenizer/` in a folder; returns it.

  Questions are after the colour or the whole name of the first thing in a picture, with the
  confidences of one or two answers.
  """
  answers = {}
  for split, count in ROWS.items():
    lines = (shapes / f"{split}.tsv").read_text(encoding="utf-8").splitlines()[:count]
    rows = []
    for number, line in enumerate(lines):
      _, image_id, _, objects, image = line.split("\t")
      colour, shape = objects.split("&&")[0].split()
      asked, answer = (f"what colour is the {shape}", colour), ("what is it?", f"{colour} {shape}")
      question, answer = (asked, answer)[number % 2]
      answers.setdefault(answer)
      said = f"0.3|!+no&&{1.0 if number % 3 else 0.6}|!+{answer}"
      rows.append("\t".join((str(number), image_id, question, said, objects, image)))
    (folder / f"{split}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
  listed = {text: i for i, text in enumerate([*answers, "no"])}
  (folder / "answers.json").write_text(json.dumps(listed))
  OFATokenizer.from_directory(shapes / "tokenizer").save(folder / "tokenizer")
  return folder
