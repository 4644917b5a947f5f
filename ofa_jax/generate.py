r"""What an OFA says: captions, answers, boxes and labels, for one input or a file of them.

  python -m ofa_jax.generate --model=M --task=caption --image=F
  python -m ofa_jax.generate --model=M --task=vqa --image=F --text="what is on the table?"
  python -m ofa_jax.generate --model=M --task=caption --input=caption_test.tsv --output=F.jsonl

Tasks: caption; vqa (questions); refcoco (phrases to boxes); snli_ve (hypotheses and perhaps
premises to labels); classify; ocr and ocr_document (the texts in a picture, or in a long line of a
document); text (prompts in your own words, with or without an image); and of texts alone cola,
mnli, mrpc, qnli, qqp, rte, sst2 (labels), gigaword (articles to summaries), infilling (texts in
which <mask> hides words) and image (captions to pictures: PNG files in the folder --output).

  python -m ofa_jax.generate --model=M --task=image --text="a red boat" --codec=V --judge=C \
    --samples=24 --top=4 --output=D

The input is the original's TSV of the task, or one with other `--columns`; or pictures in any form
that training reads: a folder, a table (.csv, .tsv) whose columns go by name
(--columns=image:filepath,text:question), .tar shards, Chinese-CLIP's `_imgs.tsv` or LMDB. The
output has one JSON object a row, in the order of the rows, with the keys of the original's results
and a "score", and a "probability" where the model is calibrated for the task (`ofa_jax.calibrate`),
or an "error" where the row cannot be read. Threads decode images while the devices
compute. A run that was killed continues where it stopped and ends with the same bytes. Several
jobs share the rows with --shard=0/4, --shard=1/4, ... beside the same flags; then the same command
with --shard=merge/4 makes of their files the one file, byte for byte.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from ofa_jax import api, cli, draw_files, jobs, partial, shards
from ofa_jax.data import answers, pipeline, sources
from ofa_jax.data.given import picture
from ofa_jax.data.protocols import TextImages
from ofa_jax.data.text import REFERENCES
from ofa_jax.data.tsv import IMAGE, BadRow
from ofa_jax.engine import log
from ofa_jax.inference.ofa import OFAModel
from ofa_jax.inference.predict import TASKS, Options, calibration_of, predict, told
from ofa_jax.inference.rows import TEXTS, TaskRows
from ofa_jax.tasks import image_gen

DRAWS = image_gen.ANSWERING.name


def predict_file(
  model: OFAModel,
  task: str,
  table: TextImages,
  *,
  output: str | os.PathLike,
  options: Options,
  batch_size: int = 16,
  max_bad_rate: float = 0.01,
  shard: shards.Shard | None = None,
) -> int:
  """Writes the predictions of all rows, or of a shard of them; returns how many there are.

  Args:
    model: from `load_from_name`.
    task: one of `TASKS`.
    table: with its columns.
    output: JSONL file; until it is complete its name ends with ".partial", and what a killed run
      has left there of the same work is taken up.
    options: how to.
    batch_size: rows predicted together.
    max_bad_rate: the largest share of unreadable rows; see `pipeline.BadRows`.
    shard: of the rows, for its own file beside `output`.

  Raises:
    ValueError: what the task needs is missing.
    TooManyBadRows: more rows are unreadable.
  """
  output = shard.place(output) if shard else output
  start, end = shard.rows(len(table), batch_size=batch_size) if shard else (0, len(table))
  work = {
    "input": partial.fingerprint(table.files),
    "columns": dict(table.columns),
    **model.identity,
    "task": task,
    "options": dataclasses.asdict(options),
    "batch size": batch_size,
    **_calibration(model, task, options),
    **(shard.work() if shard else {}),
  }

  def batches(begin: int, bad: pipeline.BadRows) -> Iterator[list[bytes]]:
    square = TASKS[task].square
    rows = TaskRows(table, size=model.image_size, begin=start + begin, end=end, square=square)
    with pipeline.eval_batches(rows, batch_size=batch_size, bad=bad) as read:
      for batch in read:
        yield _lines(model, task, table, batch, begin=start + begin, options=options, bad=bad)

  written = jobs.write_lines(
    output,
    batches,
    total=end - start,
    batch_size=batch_size,
    work=work,
    title=task,
    unit="rows",
    max_bad_rate=max_bad_rate,
    is_bad=lambda line: "error" in json.loads(line),
    shard=shard,
  )
  return sum("error" not in json.loads(line) for line in written)


def _lines(model, task, table, batch, *, begin, options, bad) -> list[bytes]:
  """The lines of a batch's rows, in their order."""
  answering, good = TASKS[task], batch["weight"] > 0
  results = {}
  if good.any():
    texts = dict(zip(TEXTS, batch["texts"][good].T.tolist(), strict=True))
    images = list(batch[IMAGE][good]) if IMAGE in batch else None
    texts = {name: column for name, column in texts.items() if name in table.columns}
    predictions = predict(model, task, images, texts, options=options)
    results = dict(zip(np.flatnonzero(good).tolist(), zip(*predictions, strict=True), strict=True))
  lines = []
  for place in np.flatnonzero(batch["index"] >= 0).tolist():
    row = begin + int(batch["index"][place])
    line = {answering.id: _id(answering, table, row)}
    if place in results:
      scale = batch["size"][place] / model.image_size if "size" in batch else np.ones(2)
      line |= told(answering, *results[place], scale=scale)
    else:
      name = table.name(row)
      line["error"] = f"{name}: {bad.reasons[name]}"
    lines.append(f"{json.dumps(line, ensure_ascii=False)}\n".encode())
  return lines


def _calibration(model, task, options) -> dict[str, Any]:
  """What the probabilities that are written depend on."""
  if not options.probabilities:
    return {}
  return {"calibration": dataclasses.asdict(calibration_of(model, task, options))}


def _given(options: Mapping[str, flags.FlagHolder]) -> str:
  """Which of some flags the command line has, for a message."""
  return ", ".join(f"--{name}" for name, flag in options.items() if flag.present)


def _id(answering, table, row) -> str | int:
  """As in the original's results; without ids, the row's number."""
  if "id" not in table.columns:
    return row
  try:
    return answering.told_id(table.text(row, "id"))
  except BadRow:
    return row


def main() -> None:
  """The command."""
  name = cli.define_paths(
    "model",
    "A released name, model directory, workdir, .pt or HF directory; several: an ensemble.",
    required=True,
  )
  task = flags.DEFINE_enum("task", None, [*TASKS, DRAWS], "What to do.", required=True)
  image = cli.define_path("image", "Image file, for one input.")
  text = flags.DEFINE_string("text", None, "Question, phrase, hypothesis or prompt, for one input.")
  text2 = flags.DEFINE_string("text2", None, "The other sentence, for one input (GLUE's tasks).")
  premise = flags.DEFINE_string("premise", None, "A text known to describe the image (snli_ve).")
  objects = flags.DEFINE_list("objects", None, "Names of what is in the image (vqa).")
  input_ = cli.define_paths("input", "TSV files, or one source of pictures, see above.")
  output = cli.define_path("output", "JSONL file of the predictions.")
  columns = flags.DEFINE_list(
    "columns",
    None,
    "Places of the columns in the TSV, from 0: --columns=id:0,image:3,text:1; or their names in a "
    "table with a header. Default: as in the original's files of the task, in a table filepath, id "
    "and text; without an id, rows are numbered.",
  )
  candidates = cli.define_path(
    "candidates", "File of the answers to choose from, one a line (vqa, classify)."
  )
  prompt_decoder = flags.DEFINE_bool(
    "prompt-decoder", True, "The decoder reads questions too (vqa); not in pretrained models."
  )
  image_size = flags.DEFINE_integer("image-size", None, "Pixels a side; default: the model's.")
  batch_size = flags.DEFINE_integer("batch-size", 16, "Rows predicted together.", lower_bound=1)
  tokenizer = flags.DEFINE_string(
    "tokenizer", None, "Folder of the tokenizer's files; default: those beside the model."
  )
  precision = cli.define_precision()
  cli.define_stage()
  shard_ = cli.define_shard()
  max_bad_rate = cli.define_max_bad_rate("rows")
  min_probability = flags.DEFINE_float(
    "min-probability",
    None,
    "Of a box (refcoco): below it the phrase is absent, and its box null. Of a calibrated model.",
    lower_bound=0.0,
    upper_bound=1.0,
  )
  most_boxes = flags.DEFINE_integer(
    "most-boxes",
    None,
    "Boxes of a phrase (refcoco), of which those that overlap by half are one; default: the best.",
    lower_bound=1,
  )
  samples = flags.DEFINE_integer(
    "samples",
    None,
    "Hypotheses that are drawn, not searched for (with --most-boxes); pictures (image: 24).",
    lower_bound=1,
  )
  codec = flags.DEFINE_string("codec", None, "VQGAN that makes pictures (image).")
  judge = flags.DEFINE_string(
    "judge", None, "CLIP or Chinese-CLIP that chooses among pictures (image)."
  )
  top = flags.DEFINE_integer("top", 1, "Pictures of a caption that are kept.", lower_bound=1)
  guidance = flags.DEFINE_float(
    "guidance", 1.0, "Above 1 captions weigh more (image); not the original's."
  )
  top_k = flags.DEFINE_integer("top-k", 256, "Likeliest codes to draw from (image).")
  top_p = flags.DEFINE_float(
    "top-p",
    0.0,
    "Share of the probability to draw codes from (image); above 0 it goes before --top-k.",
    lower_bound=0.0,
    upper_bound=1.0,
  )
  seed = flags.DEFINE_integer("seed", 0, "Of what is drawn.", lower_bound=0)
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

  # By which task reads them.
  of_pictures = {
    "codec": codec, "judge": judge, "top": top, "guidance": guidance, "top-k": top_k,
    "top-p": top_p,
  }  # fmt: skip
  of_boxes = {"min-probability": min_probability, "most-boxes": most_boxes}
  of_texts = {
    "image": image, "text2": text2, "premise": premise, "objects": objects, "shard": shard_,
    "candidates": candidates, "prompt-decoder": prompt_decoder, "image-size": image_size,
    **{name.replace("_", "-"): x for name, x in searched.items() if name != "temperature"},
  }  # fmt: skip

  def draw():
    if strange := _given(of_boxes | of_texts):
      raise ValueError(f"Expected {strange} with another task, found --task={DRAWS}")
    options = {
      "samples": samples.value or image_gen.ANSWERING.search.num_beams,
      "top": top.value,
      "codec": codec.value,
      "judge": judge.value,
      "guidance": guidance.value,
      "temperature": searched["temperature"].value or 1.0,
      "top_k": top_k.value,
      "top_p": top_p.value,
      "seed": seed.value,
    }
    draw_files.command(
      name.value,
      text=text.value,
      paths=input_.value,
      columns=_columns(DRAWS, columns.value) if columns.value else {},
      output=output.value,
      options=options,
      batch_size=batch_size.value,
      max_bad_rate=max_bad_rate.value,
      given={"precision": precision.value, "tokenizer": tokenizer.value},
    )

  def command():
    log.quiet_libraries()
    if task.value == DRAWS:
      draw()
      return
    if strange := _given(of_pictures):
      raise ValueError(f"Expected {strange} with --task={DRAWS}, found {task.value}")
    strange = _given(of_boxes | {"samples": samples})
    if strange and task.value != "refcoco":
      raise ValueError(f"Expected {strange} with --task=refcoco, found {task.value}")
    if samples.value and most_boxes.value is None:
      raise ValueError("Expected --most-boxes beside --samples, found none")
    if samples.value and searched["num_beams"].value is not None:
      raise ValueError("Expected --samples or --num-beams, found both")
    if input_.value:
      if not output.value or image.value or text.value:
        raise ValueError("Expected --output, and neither --image nor --text, beside --input")
    elif shard_.value:
      raise ValueError("Expected --input beside --shard, found none")
    elif not image.value and not text.value:
      raise ValueError("Expected --input, or --image, --text or both, found none of them")
    pictures = [picture(image.value)] if image.value else None
    choices = answers.load(candidates.value) if candidates.value else None

    def load():
      model, _ = api.load_from_name(
        name.value,
        precision=precision.value,
        image_size=image_size.value,
        tokenizer=tokenizer.value,
      )
      if not isinstance(model, OFAModel):
        raise ValueError(f"Expected an OFA in --model, found {type(model.config).__name__}")
      changes = {field: flag.value for field, flag in searched.items() if flag.value is not None}
      if samples.value:
        changes |= {"sample": True, "num_beams": samples.value}
      answering = TASKS[task.value]
      search = model.searches.get(answering.searched_as, answering.search)
      options = Options(
        search=dataclasses.replace(search, **changes),
        candidates=choices,
        prompt_decoder=prompt_decoder.value,
        min_probability=min_probability.value,
        most_boxes=most_boxes.value,
        seed=seed.value,
      )
      known = calibration_of(model, task.value, options)
      if known is not None:
        print(known.says(", ".join(name.value), search=options.search), file=sys.stderr)
      return model, dataclasses.replace(options, probabilities=known is not None)

    if input_.value:
      inputs = (*input_.value, *name.value, candidates.value)
      shard = shards.parse(shard_.value, environ=os.environ)
      merges = shard is not None and shard.index is None
      place = output.value if shard is None or merges else shard.place(output.value)
      with cli.sole_writer(place, inputs=inputs):
        if merges:
          print(f"{shards.merge(output.value, shard)} parts are together in {output.value}")
          return
        table = _open_table(input_.value, task=task.value, columns=columns.value)
        model, options = load()
        count = predict_file(
          model,
          task.value,
          table,
          output=output.value,
          options=options,
          batch_size=batch_size.value,
          max_bad_rate=max_bad_rate.value,
          shard=shard,
        )
      print(f"{count} predictions of {len(table)} rows are stored in {place}")
      return
    model, options = load()
    if pictures and (square := TASKS[task.value].square):
      pictures = [square(pictures[0].convert("RGB"), model.image_size)]
    texts = {"text": [text.value or ""]}
    if text2.value:
      texts["text2"] = [text2.value]
    if premise.value:
      texts["premise"] = [premise.value]
    if objects.value:
      texts["objects"] = [REFERENCES.join(objects.value)]
    predictions = predict(model, task.value, pictures, texts, options=options)
    line = told(TASKS[task.value], *(values[0] for values in predictions), scale=np.ones(2))
    print(json.dumps(line, ensure_ascii=False))

  cli.run(command, interrupted="with --input, the same command goes on where it stopped")


def _open_table(paths: Sequence[str], *, task: str, columns: Sequence[str] | None) -> TextImages:
  """The rows of `--input`.

  Raises:
    ValueError: faulty files or columns, or the task reads a text that they do not have.
  """
  places = TASKS[task].columns
  given = _columns(task, columns) if columns else {}
  table = sources.open_rows(paths, columns=given, places=places)
  missing = [c for c in places if c in (IMAGE, "text", "text2") and c not in table.columns]
  if missing:
    raise ValueError(
      f"Expected the columns {', '.join(places)} for {task}, found no "
      f"{' and no '.join(missing)} in {', '.join(paths)}. Give their places, or their "
      "names in a table with a header: "
      f"--columns={','.join(f'{c}:...' for c in missing)}"
    )
  return table


def _columns(task: str, given: Sequence[str] | None) -> dict[str, int | str]:
  """The columns of a task's files, or those that were given as name:place or name:header.

  Raises:
    ValueError: no such column, or no place.
  """
  known = (IMAGE, *TEXTS)
  if not given:
    return dict(TASKS[task].columns)
  columns = {}
  for part in given:
    column, _, place = part.partition(":")
    if column not in known or not place:
      raise ValueError(f"Expected --columns=name:place, names {', '.join(known)}; found {part!r}")
    columns[column] = int(place) if place.isdecimal() else place
  return columns


if __name__ == "__main__":
  main()
