r"""Image and text features of a data set, in the file formats of Chinese-CLIP's script.

  python -m ofa_jax.extract_features --model=M --images=D/test_imgs.tsv --texts=D/test_texts.jsonl \
    --output=D [--format=jsonl|npy]

writes D/test_imgs.img_feat.jsonl and D/test_texts.txt_feat.jsonl with L2-normalised features.
Both flags take what training reads, too: a folder of pictures (captions in .txt files of the same
names), a table (.csv, .tsv), .tar shards, LMDB folders. Pictures that are named by paths are
numbered in their order: D/NAME.images.jsonl says which is which, D/NAME.texts.jsonl has captions
with the numbers of their pictures, as `retrieve recall` reads them. Threads decode while the
devices compute. A run that was killed continues where it stopped and ends with the same bytes.

Several jobs share the rows with --shard=0/4, --shard=1/4, ... beside the same flags; then the same
command with --shard=merge/4 makes of their files the one file, byte for byte.
"""

import collections
import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from ofa_jax import api, cli, outputs, partial, shards, storage
from ofa_jax.data import features, pairs, pipeline, sources, tsv, values
from ofa_jax.data.protocols import Images, Rows
from ofa_jax.data.text import normalize_caption
from ofa_jax.engine import log
from ofa_jax.files import write_text

_AT_ONCE = 2  # batches being encoded: one computes, the other is on its way in or out


def extract_images(
  model: api.CNCLIPModel,
  images: Images,
  *,
  output: str | os.PathLike,
  batch_size: int = 256,
  order: str = "id",
  max_bad_rate: float = 0.01,
  shard: shards.Shard | None = None,
) -> int:
  """Writes the features of all images; returns how many.

  Unreadable images are named and left out.

  Args:
    model: from `load_from_name`.
    images: the table.
    output: `.jsonl` or `.npy` file.
    batch_size: images encoded together, on all devices.
    order: "id", the byte order of the ids, in which the original reads its LMDB; or "file".
    max_bad_rate: the largest share of unreadable images; see `pipeline.BadRows`.
    shard: of the rows, for its own file beside `output`.

  Images whose ids are paths have their numbers from 0 as ids, and the order of their files.

  Raises:
    ValueError: ids that are not integers, or that the format cannot hold.
    TooManyBadRows: more images are unreadable.
  """
  ids = images.ids
  if sources.ids_are_paths(images):
    ids, order = [str(i) for i in range(len(ids))], "file"
  faults = [images.name(i) for i, text in enumerate(ids) if not values.is_integer(text)]
  features.raise_faults(faults, "integers as image ids")
  names = [images.name(i) for i in range(len(ids))]
  features.check_ids([int(i) for i in ids], names, form=features.form_of(output))
  # UTF-8 keeps the order of code points, so that strings sort as their bytes.
  rows = sorted(range(len(ids)), key=ids.__getitem__) if order == "id" else range(len(ids))
  return _extract(
    pairs.ImageRows(images, size=model.image_size),
    rows,
    ids=[int(ids[i]) for i in rows],
    encode=lambda batch: model.encode_image(batch["image"]),
    writer=features.FeatureWriter(
      shard.place(output) if shard else output, kind="image", width=model.config.embed_dim
    ),
    batch_size=batch_size,
    bad=pipeline.BadRows(max_bad_rate, print),
    work=_work(model, images.files, rows=ids, order=order),
    shard=shard,
  )


def extract_texts(
  model: api.CNCLIPModel,
  texts: tsv.Texts,
  *,
  output: str | os.PathLike,
  batch_size: int = 256,
  context_length: int | None = None,
  shard: shards.Shard | None = None,
) -> int:
  """Writes the features of all texts, in the order of their file; returns how many.

  Args:
    model: from `load_from_name`.
    texts: from `read_texts`.
    output: `.jsonl` or `.npy` file.
    batch_size: texts encoded together, on all devices.
    context_length: tokens of a text; None is the model's own.
    shard: of the rows, for its own file beside `output`.

  Raises:
    ValueError: ids that are not integers.
  """
  faults = [texts.name(i) for i, text_id in enumerate(texts.text_ids) if type(text_id) is not int]
  features.raise_faults(faults, "integers as text ids")
  names = [texts.name(i) for i in range(len(texts))]
  features.check_ids(texts.text_ids, names, form=features.form_of(output))
  length = context_length or model.context_length
  return _extract(
    pairs.TextRows(
      texts.texts, tokenize=lambda t: model.tokenizer.encode(normalize_caption(t), length)
    ),
    range(len(texts)),
    ids=texts.text_ids,
    encode=lambda batch: model.encode_text(batch["tokens"]),
    writer=features.FeatureWriter(
      shard.place(output) if shard else output, kind="text", width=model.config.embed_dim
    ),
    batch_size=batch_size,
    bad=pipeline.BadRows(),
    work=_work(model, texts.files, rows=[*texts.text_ids, *texts.texts], context_length=length),
    shard=shard,
  )


def _work(
  model: api.CNCLIPModel, files: Sequence[str], *, rows: Sequence[str | int], **options: str | int
) -> dict[str, Any]:
  """What the features depend on, besides the batch size and the form of the file."""
  return {
    "input": partial.fingerprint(files),
    "rows": partial.digest(rows),
    **model.identity,
    **options,
  }


class _Selected:
  """Some rows of a data set, in an order of their own."""

  def __init__(self, rows: Rows, selected: Sequence[int]):
    self.notes = rows.notes
    self._rows, self._selected = rows, selected

  def __len__(self) -> int:
    return len(self._selected)

  def example(self, i: int, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    return self._rows.example(self._selected[i], rng)

  def blank(self) -> dict[str, np.ndarray]:
    return self._rows.blank()

  def close(self) -> None:
    self._rows.close()


def _extract(
  rows: Rows,
  order: Sequence[int],
  *,
  ids: Sequence[int],
  encode: Callable[[dict[str, np.ndarray]], np.ndarray],
  writer: features.FeatureWriter,
  batch_size: int,
  bad: pipeline.BadRows,
  work: Mapping[str, Any],
  shard: shards.Shard | None,
) -> int:
  """Writes the features of `rows[i] for i in order`, whose ids are `ids`; returns how many.

  Of a shard, those of its rows only.
  """
  work = {**work, "batch size": batch_size}
  if shard is not None:
    begin, end = shard.rows(len(ids), batch_size=batch_size)
    order, ids, work = order[begin:end], ids[begin:end], {**work, **shard.work()}

  def lines(batch, begin):
    good = batch["weight"] > 0
    vectors = encode(batch)[good]
    vectors = np.float32(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    names = [ids[begin + i] for i in batch["index"][good]]
    if not np.isfinite(vectors).all():
      worst = names[int(np.argmin(np.isfinite(vectors).all(1)))]
      raise ValueError(
        f"Expected finite features, found NaN or infinity for the {writer.kind} {worst}. Are the "
        "weights sound? Does --precision=fp32 help?"
      )
    return writer.encode(names, vectors)

  def encoded(begin, end, bad):
    """The lines of each batch, several of them being encoded at once."""
    part = _Selected(rows, order[begin:end])
    waiting = collections.deque()
    with (
      pipeline.eval_batches(part, batch_size=batch_size, bad=bad) as batches,
      concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool,
    ):
      for batch in batches:
        waiting.append(pool.submit(lines, batch, begin))
        if len(waiting) > _AT_ONCE:
          yield waiting.popleft().result()
      yield from (future.result() for future in waiting)

  goes_on = partial.taken_up(writer.partial, work) and len(ids) > 0
  with partial.tidied(writer.partial, header=writer.header), writer:
    first = next(encoded(0, batch_size, pipeline.BadRows(1.0))) if goes_on else []
    left = writer.partial.stat().st_size > 0
    done = writer.resume(ids, first=first, multiple=batch_size)
    if left and not done and len(ids):
      print(f"Starting anew: of {writer.partial} no whole batch would be the same now")
    bad.carry(done - writer.count, seen=done)
    unit = f"{writer.kind}s"
    with cli.progress(unit, total=len(ids), done=done, unit=unit) as advance:
      for written in encoded(done, len(ids), bad) if done < len(ids) else ():
        writer.write(written)
        advance(batch_size)
    if shard is not None:
      shards.note(writer.path, work)
    return writer.finish()


def main() -> None:
  """The command."""
  name = cli.define_path(
    "model", "A released name, model directory, workdir, .pt or HF directory.", required=True
  )
  images = cli.define_path("images", "TSV file, or any of the forms above.")
  texts = cli.define_path("texts", "JSONL file with text_id and text, or any of these.")
  output = cli.define_path("output", "Folder for the feature files.", required=True)
  format_ = flags.DEFINE_enum(
    "format", "jsonl", features.FORMATS, "npy is a fifth of the size and needs no parsing."
  )
  batch_size = flags.DEFINE_integer("batch-size", 256, "Rows encoded together.", lower_bound=1)
  precision = cli.define_precision()
  cli.define_stage()
  order = flags.DEFINE_enum(
    "order", "id", ("id", "file"), "Images by the bytes of their ids, as the original's, or not."
  )
  context_length = flags.DEFINE_integer(
    "context-length", None, "Tokens of a text; default: the model's.", lower_bound=2
  )
  shard_ = cli.define_shard()
  max_bad_rate = cli.define_max_bad_rate("images")

  def command():
    log.quiet_libraries()
    if not images.value and not texts.value:
      raise ValueError("Expected --images, --texts or both, found neither")
    outputs.check_folder(output.value)
    folder = storage.of(output.value)
    # Faults of the files come before the model is loaded.
    table = texts_ = None
    inputs = (images.value, texts.value, name.value)
    shard = shards.parse(shard_.value, environ=os.environ)
    kinds = {"img": images.value, "txt": texts.value}
    paths = {
      kind: folder / f"{_stem(value)}.{kind}_feat.{format_.value}"
      for kind, value in kinds.items()
      if value
    }
    with contextlib.ExitStack() as open_:
      for path in paths.values():
        one = shard is not None and shard.index is not None
        open_.enter_context(cli.sole_writer(shard.place(path) if one else path, inputs=inputs))
      if shard is not None and shard.index is None:
        for path in paths.values():
          count = shards.merge(path, shard, join=features.join_of(path))
          print(f"{count} parts are together in {path}")
        return
      if images.value:
        table = sources.open_images(images.value)
      if texts.value:
        texts_ = sources.open_texts(texts.value)
      model = api.load_clip(name.value, precision=precision.value)
      first = shard is None or shard.index == 0  # the files beside are of all rows
      if table is not None:
        count = extract_images(
          model,
          table,
          output=paths["img"],
          batch_size=batch_size.value,
          order=order.value,
          max_bad_rate=max_bad_rate.value,
          shard=shard,
        )
        path = shard.place(paths["img"]) if shard else paths["img"]
        print(f"{count} image features of {len(table)} images are stored in {path}")
        if first and sources.ids_are_paths(table):
          path = folder / f"{_stem(images.value)}.images.jsonl"
          rows = ({"image_id": i, "image": name} for i, name in enumerate(table.ids))
          _write_lines(path, rows)
          print(f"Their numbers are in {path}")
      if texts_ is not None:
        count = extract_texts(
          model,
          texts_,
          output=paths["txt"],
          batch_size=batch_size.value,
          context_length=context_length.value,
          shard=shard,
        )
        path = shard.place(paths["txt"]) if shard else paths["txt"]
        print(f"{count} text features are stored in {path}")
        if first and not texts.value.endswith(".jsonl"):
          path = folder / f"{_stem(texts.value)}.texts.jsonl"
          _write_lines(path, _annotations(texts_, table))
          print(f"The texts are in {path}")

  cli.run(command, interrupted="the same command goes on where it stopped")


def _annotations(texts: tsv.Texts, images: Images | None) -> Iterator[dict[str, Any]]:
  """The lines of Chinese-CLIP's file of captions, pictures numbered as in their features."""
  for text_id, text, names in zip(texts.text_ids, texts.texts, texts.image_ids, strict=True):
    ids = []
    if images is not None:
      rows = images.find(names)
      ids = rows[rows >= 0].tolist()
      if not sources.ids_are_paths(images):
        ids = [int(name) for name, row in zip(names, rows, strict=True) if row >= 0]
    yield {"text_id": text_id, "text": text, "image_ids": ids}


def _write_lines(path: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
  lines = (json.dumps(row, ensure_ascii=False) for row in rows)
  write_text(path, "".join(f"{line}\n" for line in lines))


def _stem(path: str) -> str:
  """The original's beginning of the output's name; that of an LMDB folder S/imgs is S_imgs."""
  path = storage.of(storage.absolute(path))
  if storage.is_dir(path):
    lmdb = storage.exists(path / "data.mdb")
    return f"{path.parent.name}_{path.name}" if lmdb else path.name
  return re.sub(r"[^\w.-]+", "_", path.stem).strip("_")


if __name__ == "__main__":
  main()
