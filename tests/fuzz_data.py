"""Mutated data files: each row is read, or left out with its reason, or the file is refused.

    python -m tests.fuzz_data [--seed=0] [--rows=1000] [--lines=300]

Nothing else may happen: no other exception, no hang above 5 s of computing, no control character in
a message, no memory beyond a bound, and no other number: a row that is read has the picture or the
caption that an independent reading of its bytes has. A quick part of it is a test.
"""

import argparse
import base64
import collections
import csv
import io
import json
import math
import pathlib
import resource
import tempfile
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from ofa_jax.data import images, pairs
from ofa_jax.data.rows import Row
from ofa_jax.data.table import read_table
from ofa_jax.data.tsv import BadRow, Table, read_texts
from ofa_jax.tokenizers.bert import ChineseBertTokenizer

SECONDS, MEGABYTES = 5, 1200
SIZE = 16
COLUMNS = {"id": 0, "image": 1, "text": 2}
GOOD = "一只猫 and a dog"
Counts = collections.Counter


def main() -> None:
  """The command."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--rows", type=int, default=1000, help="mutated rows of TSV files")
  parser.add_argument("--lines", type=int, default=300, help="of JSONL, and as many of CSV")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    for kind, (run, count) in {
      "tsv": (rows_of_tsv, args.rows),
      "jsonl": (lines_of_jsonl, args.lines),
      "csv": (lines_of_csv, args.lines),
    }.items():
      results = run(pathlib.Path(folder), count=count, seed=args.seed)
      print(f"{kind}: {dict(results)}")
  print(f"peak memory {peak():,.0f} MB")


def rows_of_tsv(folder: pathlib.Path, *, count: int, seed: int = 0) -> Counts:
  """Rows `id, picture, text`, one mutated row a file beside good ones, as OFA's tasks read them."""
  rng, counts = np.random.default_rng((seed, 0)), Counts()
  good = b"7\t%s\t%s\n" % (base64.b64encode(picture(rng)), GOOD.encode())
  tokenizer = ChineseBertTokenizer()
  for number in range(count):
    row = mutated_row(rng)
    path = folder / "rows.tsv"
    path.write_bytes(good + row + b"\n" + good)

    def read(row=row, path=path):
      table = Table([path], columns=COLUMNS, width=3, index_dir=str(folder / "index"))
      return [one_row(table, i, row, tokenizer) for i in range(len(table))]

    found = bounded(read, f"row {number}: {row[:200]!r}")
    if isinstance(found, str):
      counts["file refused"] += 1
      continue
    assert found[0] == found[-1] == "read", f"row {number} spoilt its neighbours: {row[:200]!r}"
    counts.update(found[1:-1])
  return counts


def one_row(table: Table, i: int, raw: bytes, tokenizer: ChineseBertTokenizer) -> str:
  """What becomes of a row; its picture and text are compared with another reading."""
  row = Row(table, i, reader=None)
  try:
    text, encoded = row["text"], table.encoded(i)
    tokens = tokenizer.encode(text)
    pixels = images.decode(encoded, size=SIZE, rgb_first=True)
  except (BadRow, images.BadImage) as fault:
    printable(str(fault))
    return "left out"
  assert tokens.shape == (52,) and pixels.shape == (SIZE, SIZE, 3)
  lines = [line.removesuffix(b"\r") for line in raw.split(b"\n")]
  if 0 < i < len(table) - 1:
    own = next(line for line in lines if line and line.split(b"\t")[2:] == [text.encode()])
    stored = base64.urlsafe_b64decode(own.split(b"\t")[1].replace(b"+", b"-").replace(b"/", b"_"))
    with Image.open(io.BytesIO(stored)) as image:
      other = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    assert (np.asarray(other) == pixels).all()
  return "read"


def lines_of_jsonl(folder: pathlib.Path, *, count: int, seed: int = 0) -> Counts:
  """Lines of captions, one mutated line a file beside good ones."""
  rng, counts = np.random.default_rng((seed, 1)), Counts()
  good = json.dumps({"text_id": 1, "text": GOOD, "image_ids": [7]}).encode()
  for number in range(count):
    line = mutated_line(rng)
    path = folder / "texts.jsonl"
    path.write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    found = bounded(lambda path=path: read_texts([path]), f"line {number}: {line[:200]!r}")
    if isinstance(found, str):
      counts["file refused"] += 1
      continue
    assert found.texts[0] == found.texts[-1] == GOOD
    for place in range(1, len(found) - 1):
      row = json.loads(line.split(b"\n")[found.places[place][1] - 2])
      text, ids = row["text"], row["image_ids"]
      assert isinstance(text, str | int | float) and not isinstance(text, bool), text
      assert isinstance(text, str | int) or math.isfinite(text), text
      assert found.texts[place] == str(text)
      assert [float(a) if is_number(a) else a for a in found.image_ids[place]] == [
        float(b) if is_number(str(b)) else b for b in ids
      ]
    counts["read"] += 1
  return counts


def lines_of_csv(folder: pathlib.Path, *, count: int, seed: int = 0) -> Counts:
  """Lines of a table of pictures and captions, one mutated line a file beside good ones."""
  rng, counts = np.random.default_rng((seed, 2)), Counts()
  (folder / "a.png").write_bytes(picture(rng))
  for number in range(count):
    text = words(rng)
    fields = ["a.png", text]
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(fields)
    line = damaged(out.getvalue().rstrip("\n").encode("utf-8", "replace"), rng)
    path = folder / "table.csv"
    path.write_bytes(b"filepath,title\na.png,%s\n%s\na.png,end\n" % (GOOD.encode(), line))
    found = bounded(lambda path=path: read_table([path]), f"line {number}: {line[:200]!r}")
    if isinstance(found, str):
      counts["file refused"] += 1
      continue
    parsed = list(csv.reader(io.StringIO(line.decode(), newline="")))
    captions = {row[1].strip() for row in parsed if row}
    assert set(found[1].texts) == captions | {GOOD, "end"}, line
    rows = pairs.PairRows(*found, size=SIZE, tokenize=ChineseBertTokenizer().encode)
    bounded(lambda rows=rows: [rows.example(i, None) for i in range(len(rows))], repr(line[:200]))
    counts["read"] += 1
  return counts


def picture(rng: np.random.Generator) -> bytes:
  """An image file of a random kind."""
  pixels = rng.integers(0, 256, (rng.integers(1, 20), rng.integers(1, 20), 3), dtype=np.uint8)
  image = Image.fromarray(pixels)
  kind, mode = [("JPEG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("GIF", "P"), ("WEBP", "RGB")][
    rng.integers(5)
  ]
  file = io.BytesIO()
  image.convert(mode).save(file, kind)
  return file.getvalue()


def words(rng: np.random.Generator) -> str:
  """A caption of anything, a few of them of megabytes."""
  some = ["猫", "dog ", "“", '"', ",", "\u0301", "😀", "İ", " ", ";", "'", "=1+1", "\u2028", "NaN"]
  text = "".join(some[i] for i in rng.integers(0, len(some), rng.integers(1, 30)))
  return text * int(rng.choice([1, 1, 1, 1, 1, 1, 1, 1, 1, 20_000]))


def mutated_row(rng: np.random.Generator) -> bytes:
  """A row of a TSV file with one thing wrong, or nothing."""
  image = picture(rng)
  if rng.random() < 0.3:
    image = damaged(image, rng)
  encode = base64.urlsafe_b64encode if rng.random() < 0.3 else base64.b64encode
  columns = [str(rng.integers(-9, 2**62)).encode(), encode(image), words(rng).encode()]
  match rng.integers(10):
    case 0:
      columns = columns[: rng.integers(1, 3)]
    case 1:
      columns += [b""] * int(rng.choice([1, 20]))
    case 2:
      columns[rng.integers(3)] = b""
    case 3:
      columns[1] += bytes(rng.choice([b" ", b"=", b"\r", b"\x0b", b"%"]))
    case 4:
      columns[1] = columns[1][: -rng.integers(1, 4)]
    case 5:
      columns[2] = "图片描述".encode(rng.choice(["gbk", "utf-16", "gb18030"]))
    case 6:
      columns = columns[::-1]
  row = b"\t".join(columns)
  return damaged(row, rng) if rng.random() < 0.3 else row


def mutated_line(rng: np.random.Generator) -> bytes:
  """A line of JSONL with a strange value in one field, or damaged."""
  values = [
    *(None, True, 7, 7.0, 7.5, -1, 2**63, 10**40, 1e300, math.nan, math.inf, "", "x", "\ud800"),
    *([], [1], ["一", "二"], {}, {"zh": "猫"}, [[1]], words(rng), "\x1b[31m", "\0"),
  ]
  row = {"text_id": int(rng.integers(100)), "text": words(rng), "image_ids": [1]}
  field = str(rng.choice([*row, "more"]))
  value = values[rng.integers(len(values))]
  row[field] = [value] if field == "image_ids" and rng.random() < 0.7 else value
  if rng.random() < 0.1:
    del row[field]
  line = json.dumps(row, ensure_ascii=bool(rng.random() < 0.5)).encode("utf-8", "surrogatepass")
  return damaged(line, rng) if rng.random() < 0.3 else line


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
  """Bytes with some replaced, cut off, repeated or put in."""
  at = int(rng.integers(len(data) + 1))
  match rng.integers(5):
    case 0:
      return data[:at]
    case 1:
      return data[:at] + rng.bytes(int(rng.integers(1, 9))) + data[at:]
    case 2:
      return data[:at] + data[at + int(rng.integers(1, 9)) :]
    case 3:
      return data[:at] + data[: int(rng.integers(1, 40))] + data[at:]
    case _:
      changed = bytearray(data)
      for place in rng.integers(0, max(len(data), 1), 3):
        if data:
          changed[place] ^= 1 << rng.integers(8)
      return bytes(changed)


def bounded(read: Callable, what: str):
  """What `read` gives, or the message with which it refuses its file; nothing else may happen."""
  begin, before = time.process_time(), peak()
  try:
    return read()
  except ValueError as error:
    if isinstance(error, UnicodeError):
      raise AssertionError(f"{what}: {error!r}") from error
    printable(str(error))
    return str(error)
  except AssertionError:
    raise
  except Exception as error:
    raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
  finally:
    assert time.process_time() - begin < SECONDS, f"{what}: more than {SECONDS} s"
    assert peak() - before < MEGABYTES, f"{what}: more than {MEGABYTES} MB"


def printable(message: str) -> None:
  """Asserts that a message is short and can be put on a terminal."""
  assert len(message) < 2500, message[:300]
  assert all(c.isprintable() or c == "\n" for c in message), ascii(message)


def is_number(text: str) -> bool:
  """Whether a text is a number, however it is written."""
  try:
    float(text)
  except ValueError:
    return False
  return True


def peak() -> float:
  """The most memory that this process has had, in MB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
  main()
