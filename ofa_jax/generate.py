r"""What an OFA says: captions, answers, boxes and labels, for one input or a file of them.

  python -m ofa_jax.generate --model=M --task=caption --image=F
  python -m ofa_jax.generate --model=M --task=vqa --image=F --text="what is on the table?"
  python -m ofa_jax.generate --model=M --task=caption --input=caption_test.tsv --output=F.jsonl

Tasks: caption; vqa (questions); refcoco (phrases to boxes); snli_ve (hypotheses and perhaps
premises to labels); classify; text (prompts in your own words, with or without an image).

The input is the original's TSV of the task, or one with other `--columns`. The output has one JSON
object a row, in the order of the rows, with the keys of the original's results and a "score", or an
"error" where the row cannot be read. Threads decode images while the devices compute. A run that
was killed continues where it stopped and ends with the same bytes.
"""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from ofa_jax import api, cli, lock, log
from ofa_jax.data import pipeline
from ofa_jax.data.images import BadImage, decode
from ofa_jax.data.text import remove_punctuation
from ofa_jax.data.tsv import BadRow, Table
from ofa_jax.decode.beam import Search
from ofa_jax.ofa_api import OFAModel

TEXTS = ("id", "text", "premise")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """A task of the command.

  Attributes:
    columns: what a row has, and where in the original's files, from 0.
    id: what the row's id is called in the results.
    result: what the prediction is called.
    search: which of `OFAModel.searches` it is.
  """

  columns: Mapping[str, int]
  id: str
  result: str
  search: str = "answer"


TASKS: dict[str, Task] = {
  "caption": Task(columns={"id": 1, "image": 4}, id="image_id", result="caption", search="caption"),
  "vqa": Task(columns={"id": 0, "image": 5, "text": 2}, id="question_id", result="answer"),
  "refcoco": Task(
    columns={"id": 0, "image": 4, "text": 2}, id="uniq_id", result="box", search="ground"
  ),
  "snli_ve": Task(
    columns={"id": 0, "image": 2, "text": 3, "premise": 4}, id="uniq_id", result="label"
  ),
  "classify": Task(columns={"id": 1, "image": 0}, id="id", result="class"),
  "text": Task(columns={"id": 0, "text": 1}, id="id", result="text", search="caption"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How predictions are made.

  Attributes:
    search: how texts and boxes are searched for.
    candidates: the answers or classes to choose from.
    prompt_decoder: see `OFAModel.answer`.
  """

  search: Search
  candidates: tuple[str, ...] | None = None
  prompt_decoder: bool = True


def predict(
  model: OFAModel,
  task: str,
  images: Sequence[Any] | None,
  texts: Mapping[str, Sequence[str]],
  *,
  options: Options,
) -> tuple[list, np.ndarray]:
  """Returns the predictions of some rows, as they are written, and their scores.

  Args:
    model: from `load_from_name`.
    task: one of `TASKS`.
    images: of each row; None: without images.
    texts: "text" and perhaps "premise" of each row.
    options: how to.

  Raises:
    ValueError: what the task needs is missing.
  """
  search = options.search
  if task == "caption":
    found, scores = model.caption(images, search=search, return_scores=True)
    return [remove_punctuation(text).strip() for text in found], scores
  if task == "vqa":
    return model.answer(
      images,
      texts["text"],
      options.candidates,
      search=search,
      prompt_decoder=options.prompt_decoder,
      return_scores=True,
    )
  if task == "refcoco":
    boxes, scores = model.ground(images, texts["text"], search=search, return_scores=True)
    return [box.tolist() for box in boxes], scores
  if task == "snli_ve":
    return model.entail(images, texts["text"], texts.get("premise"), return_scores=True)
  if task == "classify":
    if options.candidates is None:
      raise ValueError("Expected --candidates, a file with the names of all classes, found none")
    return model.classify(images, options.candidates, return_scores=True)
  return model.generate(
    images,
    texts["text"],
    num_beams=search.num_beams,
    max_length=search.max_length,
    no_repeat_ngram_size=search.no_repeat_ngram_size,
    search=search,
    return_scores=True,
  )


class TaskRows:
  """The rows of a table: "image" as pixels, its "size" (w, h) before, and `TEXTS` as strings.

  Args:
    table: with the columns of a task.
    size: side of the images given, in pixels.
    begin: rows that are left out at the beginning.
  """

  def __init__(self, table: Table, *, size: int, begin: int = 0):
    self._table, self._size, self._begin = table, size, begin

  def __len__(self) -> int:
    return len(self._table) - self._begin

  def example(self, i: int, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    """One row. Raises BadRow when it cannot be read."""
    del rng
    i += self._begin
    example = self.blank()
    for place, name in enumerate(TEXTS):
      if name in self._table.columns:
        example["texts"][place] = text = self._table.text(i, name)
        if not text.strip() and name != "id":
          raise BadRow(self._table.name(i), f"the {name} is empty")
    if "image" in example:
      encoded = self._table.encoded(i)
      try:
        example["image"] = decode(encoded, size=self._size, rgb_first=True)
      except BadImage as error:
        raise BadRow(self._table.name(i), str(error)) from error
      with Image.open(io.BytesIO(encoded)) as image:
        example["size"] = np.array(image.size, np.float32)
    return example

  def blank(self) -> dict[str, np.ndarray]:
    """What stands in a batch where a row is bad."""
    blank = {"texts": np.array([""] * len(TEXTS), object)}
    if "image" in self._table.columns:
      blank["image"] = np.zeros((self._size, self._size, 3), np.uint8)
      blank["size"] = np.full(2, self._size, np.float32)
    return blank


def predict_file(
  model: OFAModel,
  task: str,
  table: Table,
  *,
  output: str | os.PathLike,
  options: Options,
  batch_size: int = 16,
  max_bad_rate: float = 0.01,
) -> int:
  """Writes the predictions of all rows; returns how many there are.

  Args:
    model: from `load_from_name`.
    task: one of `TASKS`.
    table: with its columns.
    output: JSONL file; until it is complete its name ends with ".partial".
    options: how to.
    batch_size: rows predicted together.
    max_bad_rate: the largest share of unreadable rows (of at least 1000).

  Raises:
    ValueError: what the task needs is missing.
    TooManyBadRows: more rows are unreadable.
  """
  output = pathlib.Path(output)
  partial = output.with_name(f"{output.name}.partial")
  output.parent.mkdir(parents=True, exist_ok=True)

  def batches(begin: int, bad: pipeline.BadRows) -> Iterator[list[bytes]]:
    rows = TaskRows(table, size=model.image_size, begin=begin)
    with pipeline.eval_batches(rows, batch_size=batch_size, bad=bad) as found:
      for batch in found:
        yield _lines(model, task, table, batch, begin=begin, options=options, bad=bad)

  done = 0
  if partial.exists():
    lines = partial.read_bytes().splitlines(keepends=True)
    done = sum(line.endswith(b"\n") for line in lines) // batch_size * batch_size
    # What is there is taken up if today's first batch is the same.
    if done:
      with contextlib.closing(batches(0, pipeline.BadRows(1.0))) as first:
        done *= next(first) == lines[:batch_size]
    partial.write_bytes(b"".join(lines[:done]))
  bad = pipeline.BadRows(max_bad_rate, print)
  with (
    open(partial, "ab") as file,
    cli.progress(task, total=len(table), done=done, unit="rows") as advance,
  ):
    for lines in batches(done, bad) if done < len(table) else ():
      file.writelines(lines)
      file.flush()
      advance(len(lines))
  written = partial.read_bytes().splitlines()
  os.replace(partial, output)
  return sum("error" not in json.loads(line) for line in written)


def _lines(model, task, table, batch, *, begin, options, bad) -> list[bytes]:
  """The lines of a batch's rows, in their order."""
  job, good = TASKS[task], batch["weight"] > 0
  results = {}
  if good.any():
    texts = dict(zip(TEXTS, batch["texts"][good].T.tolist(), strict=True))
    images = list(batch["image"][good]) if "image" in batch else None
    if "premise" not in table.columns:
      del texts["premise"]
    found, scores = predict(model, task, images, texts, options=options)
    if task == "refcoco":
      scale = np.tile(batch["size"][good] / model.image_size, 2)
      found = (np.array(found) * scale).tolist()
    results = dict(zip(np.flatnonzero(good).tolist(), zip(found, scores, strict=True), strict=True))
  lines = []
  for place in np.flatnonzero(batch["index"] >= 0).tolist():
    row = begin + int(batch["index"][place])
    line = {job.id: _id(task, table, row)}
    if place in results:
      value, score = results[place]
      if np.isfinite(score):
        line |= {job.result: value, "score": float(score)}
      else:  # no hypothesis, or none that is a box; JSON has no NaN
        line |= {job.result: None, "score": None}
    else:
      name = table.name(row)
      line["error"] = next(reason for reason in bad.names if reason.startswith(name))
    lines.append(f"{json.dumps(line, ensure_ascii=False)}\n".encode())
  return lines


def _id(task, table, row) -> str | int:
  """As in the original's results: a question's id is a number; without ids, the row's number."""
  if "id" not in table.columns:
    return row
  try:
    text = table.text(row, "id")
  except BadRow:
    return row
  return int(text) if task == "vqa" and text.isdecimal() else text


def main() -> None:
  """The command."""
  name = cli.define_paths(
    "model",
    "A released name, model directory, workdir, .pt or HF directory; several: an ensemble.",
    required=True,
  )
  task = flags.DEFINE_enum("task", None, list(TASKS), "What to do.", required=True)
  image = cli.define_path("image", "Image file, for one input.")
  text = flags.DEFINE_string("text", None, "Question, phrase, hypothesis or prompt, for one input.")
  premise = flags.DEFINE_string("premise", None, "A text known to describe the image (snli_ve).")
  input_ = cli.define_paths("input", "TSV files.")
  output = cli.define_path("output", "JSONL file of the predictions.")
  columns = flags.DEFINE_list(
    "columns",
    None,
    "Places of the columns in the TSV, from 0: --columns=id:0,image:3,text:1. Default: as in the "
    "original's files of the task; without an id, rows are numbered.",
  )
  candidates = cli.define_path(
    "candidates", "File of the answers to choose from, one a line (vqa, classify)."
  )
  prompt_decoder = flags.DEFINE_bool(
    "prompt-decoder", True, "The decoder reads questions too (vqa); not in pretrained models."
  )
  image_size = flags.DEFINE_integer("image-size", None, "Pixels a side; default: the model's.")
  batch_size = flags.DEFINE_integer("batch-size", 16, "Rows predicted together.", lower_bound=1)
  precision = cli.define_precision()
  max_bad_rate = flags.DEFINE_float("max-bad-rate", 0.01, "Share of unreadable rows allowed.")
  searched = {
    "num_beams": flags.DEFINE_integer("num-beams", None, "Hypotheses; default: the task's."),
    "max_length": flags.DEFINE_integer("max-length", None, "Tokens before the end, at most."),
    "min_length": flags.DEFINE_integer("min-length", None, "Tokens before the end, at least."),
    "length_penalty": flags.DEFINE_float("length-penalty", None, "Exponent of the length."),
    "temperature": flags.DEFINE_float("temperature", None, "Divides the logits."),
    "no_repeat_ngram_size": flags.DEFINE_integer(
      "no-repeat-ngram-size", None, "N-grams of this size occur once; 0: as often as they like."
    ),
  }

  def command():
    log.quiet_libraries()
    table = None
    if input_.value:
      if not output.value or image.value or text.value:
        raise ValueError("Expected --output, and neither --image nor --text, beside --input")
      table = Table(input_.value, columns=_columns(task.value, columns.value))
    elif not image.value and not text.value:
      raise ValueError("Expected --input, or --image, --text or both, found none of them")
    pictures = [_open(image.value)] if image.value else None
    choices = _read_candidates(candidates.value) if candidates.value else None
    model, _ = api.load_from_name(
      name.value, precision=precision.value, image_size=image_size.value
    )
    if not isinstance(model, OFAModel):
      raise ValueError(f"Expected an OFA in --model, found {type(model.config).__name__}")
    changes = {field: flag.value for field, flag in searched.items() if flag.value is not None}
    options = Options(
      search=dataclasses.replace(model.searches[TASKS[task.value].search], **changes),
      candidates=choices,
      prompt_decoder=prompt_decoder.value,
    )
    if table is not None:
      with lock.one_writer(output.value, file=True):
        count = predict_file(
          model,
          task.value,
          table,
          output=output.value,
          options=options,
          batch_size=batch_size.value,
          max_bad_rate=max_bad_rate.value,
        )
      print(f"{count} predictions of {len(table)} rows are stored in {output.value}")
      return
    texts = {"text": [text.value or ""]}
    if premise.value:
      texts["premise"] = [premise.value]
    (found,), scores = predict(model, task.value, pictures, texts, options=options)
    result = {TASKS[task.value].result: found, "score": float(scores[0])}
    print(json.dumps(result, ensure_ascii=False))

  cli.run(command, interrupted="with --input, the same command goes on where it stopped")


def _columns(task: str, given: Sequence[str] | None) -> dict[str, int]:
  """The columns of a task's files, or those that were given as name:place.

  Raises:
    ValueError: no such column, or no place.
  """
  known = ("id", "image", "text", "premise")
  if not given:
    return dict(TASKS[task].columns)
  columns = {}
  for part in given:
    column, _, place = part.partition(":")
    if column not in known or not place.isdecimal():
      raise ValueError(f"Expected --columns=name:place, names {', '.join(known)}; found {part!r}")
    columns[column] = int(place)
  return columns


def _read_candidates(path: str) -> tuple[str, ...]:
  """The lines of a file.

  Raises:
    ValueError: it cannot be read, or has none.
  """
  try:
    lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(f"Expected a text file in --candidates, found: {error}") from error
  answers = tuple(line.strip() for line in lines if line.strip())
  if not answers:
    raise ValueError(f"Expected one answer a line in {path}, found none")
  return answers


def _open(path: str) -> Image.Image:
  try:
    with Image.open(path) as image:
      return image.convert("RGB")
  except (OSError, Image.DecompressionBombError) as error:
    raise ValueError(f"Expected an image in {path}, found: {error}") from error


if __name__ == "__main__":
  main()
