r"""Turns pictures into image codes, the data of text to image: a TSV of id, codes, caption.

  python -m ofa_jax.tokenize_images --images=photos.csv --codec=models/vqgan --output=train.tsv

Pictures are whatever training reads: a folder, a table (.csv, .tsv) with captions under `title`,
.tar shards, OFA's TSV with --columns=id:0,image:1,text:2, Chinese-CLIP's `_imgs.tsv`. Rows without
a caption have two columns. Each picture becomes a square: its middle, the shorter side being scaled
to --size (--fit=crop), or the whole of it, squashed (--fit=squash). The original's script scales
the shorter side, and so has as many codes as its task wants of squares only.

Codes are the likeliest ones, or with --noise drawn, as the original's always are; what is drawn
depends on --seed and the row alone. Rows whose picture cannot be read are named, counted, and left
out. A run that was killed goes on where it stopped; --shard=0/4 and so on share the rows among
jobs, --shard=merge/4 makes one file of theirs.
"""

import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx
from PIL import Image

from ofa_jax import cli, hub, jobs, partial, shards
from ofa_jax.data import codes, images, pipeline, sources
from ofa_jax.data.protocols import TextImages
from ofa_jax.data.tsv import IMAGE, BadRow
from ofa_jax.engine import log, sharding
from ofa_jax.inference import batches
from ofa_jax.models.abstract import abstract
from ofa_jax.models.patches import PatchCodecConfig
from ofa_jax.models.vqgan import VQGANConfig

FITS = ("crop", "squash")
COLUMNS = {"id": 0, IMAGE: 1, "text": 2}


class Tokenizer:
  """A codec on all local devices.

  Attributes:
    config: its sizes.
    identity: what tells its codes from those of another, as JSON.

  Args:
    name: a VQGAN, as `hub.open_model` takes it.

  Raises:
    ValueError: the model is of another kind.
  """

  def __init__(self, name: str):
    source = hub.open_model(name)
    if not isinstance(source.config, VQGANConfig | PatchCodecConfig):
      raise ValueError(f"Expected a VQGAN in --codec, found {name}: {source.family.title}")
    self.config, self.identity = source.config, partial.fingerprint(source.stored())
    self._mesh = sharding.make_mesh((jax.local_device_count(), 1, 1), devices=jax.local_devices())
    self._weights = source.load(sharding.replicated(self._mesh))
    graph = abstract(source.config)[0]

    @functools.partial(jax.jit, static_argnames="noise")
    def encode(weights, rows, key, *, noise):
      model = nnx.merge(graph, *weights)
      pixels = rows["image"].astype(np.float32) / 255 * 2 - 1
      keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows["row"]) if noise else None
      return model.encode(pixels, rngs=keys)

    self._encode = encode

  def __call__(
    self, pictures: np.ndarray, *, rows: np.ndarray, seed: int | None, batch_size: int
  ) -> np.ndarray:
    """The codes int32[N, h, w] of pictures uint8[N, S, S, 3].

    Args:
      pictures: of one size.
      rows: int[N], their numbers, from which noise is drawn.
      seed: of the noise; None: there is none.
      batch_size: pictures that a device encodes at once.
    """
    key = jax.random.key(seed or 0)
    with jax.default_matmul_precision("highest"):
      return batches.run(
        lambda batch: self._encode(self._weights, batch, key, noise=seed is not None),
        {"image": pictures, "row": np.asarray(rows, np.uint32)},
        mesh=self._mesh,
        most=batch_size,
      )


def square(image: Image.Image, *, size: int, fit: str) -> np.ndarray:
  """uint8[size, size, 3] of a picture, by Lanczos' filter as in the original.

  Args:
    image: of any size and mode.
    size: pixels a side.
    fit: one of `FITS`.
  """
  image = image.convert("RGB")
  if fit == "squash":
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))
  image = shorter_side(image, size=size)
  left, top = ((side - size) // 2 for side in image.size)
  return np.asarray(image)[top : top + size, left : left + size]


def shorter_side(image: Image.Image, *, size: int) -> Image.Image:
  """The picture whose shorter side has so many pixels, the other being cut to whole ones."""
  width, height = image.size
  scaled = (
    (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
  )
  return image.resize(scaled, Image.Resampling.LANCZOS)


class Squares:
  """The pictures of rows as squares, for `pipeline.eval_batches`."""

  notes = ()

  def __init__(self, table: TextImages, *, size: int, fit: str, begin: int, end: int):
    self._table, self._size, self._fit = table, size, fit
    self._begin, self._end = begin, end

  def __len__(self) -> int:
    return self._end - self._begin

  def example(self, i: int, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    """Raises BadRow where the picture cannot be read."""
    del rng
    try:
      with images.opened(self._table.encoded(self._begin + i)) as image:
        return {"image": square(image, size=self._size, fit=self._fit)}
    except images.BadImage as error:
      raise BadRow(self._table.name(self._begin + i), str(error)) from error

  def blank(self) -> dict[str, np.ndarray]:
    """What stands in a batch where a row is bad."""
    return {"image": np.zeros((self._size, self._size, 3), np.uint8)}

  def close(self) -> None:
    """Nothing is cached."""


def tokenize_file(
  tokenizer: Tokenizer,
  table: TextImages,
  *,
  output: str | os.PathLike,
  size: int,
  fit: str = "crop",
  seed: int | None = None,
  batch_size: int = 16,
  max_bad_rate: float = 0.01,
  shard: shards.Shard | None = None,
) -> int:
  """Writes the codes of all rows, or of a shard of them; returns of how many.

  Args:
    tokenizer: of which codec.
    table: with the pictures.
    output: TSV file.
    size: side of the squares in pixels.
    fit: one of `FITS`.
    seed: of the noise; None: the likeliest codes.
    batch_size: pictures that are read together.
    max_bad_rate: the largest share of unreadable rows.
    shard: of the rows.

  Raises:
    ValueError: a size that is no multiple of the pixels of a code.
    TooManyBadRows: more rows are unreadable.
  """
  side = tokenizer.config.reduction
  if size < side or size % side:
    raise ValueError(f"Expected --size as a multiple of {side}, a code's pixels, found {size}")
  output = shard.place(output) if shard else output
  start, end = shard.rows(len(table), batch_size=batch_size) if shard else (0, len(table))
  work = {
    "input": partial.fingerprint(table.files),
    "columns": dict(table.columns),
    "codec": tokenizer.identity,
    "size": size,
    "fit": fit,
    "seed": seed,
    "batch size": batch_size,
    **(shard.work() if shard else {}),
  }

  def lines(begin: int, bad: pipeline.BadRows) -> Iterator[list[bytes]]:
    rows = Squares(table, size=size, fit=fit, begin=start + begin, end=end)
    with pipeline.eval_batches(rows, batch_size=batch_size, bad=bad) as read:
      for batch in read:
        real = np.flatnonzero(batch["index"] >= 0)
        numbers = start + begin + batch["index"][real]
        found = tokenizer(
          batch["image"][real], rows=numbers, seed=seed, batch_size=batch_size
        ).reshape(len(real), -1)
        good = batch["weight"][real] > 0
        yield [
          _line(table, int(i), x if there else None)
          for i, x, there in zip(numbers, found, good, strict=True)
        ]

  written = jobs.write_lines(
    output,
    lines,
    total=end - start,
    batch_size=batch_size,
    work=work,
    title="codes",
    unit="pictures",
    max_bad_rate=max_bad_rate,
    is_bad=_is_bad,
    shard=shard,
    kept=lambda line: not _is_bad(line),
  )
  return sum(not _is_bad(line) for line in written)


def _line(table: TextImages, row: int, found: np.ndarray | None) -> bytes:
  """A row of the output; without codes, one that was not read."""
  try:
    name = table.text(row, "id") if "id" in table.columns else str(row)
    caption = table.text(row, "text") if "text" in table.columns else None
  except BadRow:
    name, caption, found = str(row), None, None
  cells = [name, "" if found is None else codes.written(found)]
  cells += [] if caption is None else [caption]
  return ("\t".join(" ".join(cell.split()) for cell in cells) + "\n").encode()


def _is_bad(line: bytes) -> bool:
  return not line.split(b"\t")[1].strip()


def _opened(paths: list[str], columns: Mapping[str, Any]) -> TextImages:
  table = sources.open_rows(paths, columns=columns, places=COLUMNS)
  if IMAGE not in table.columns:
    raise ValueError(f"Expected pictures in {', '.join(paths)}, found the columns {table.columns}")
  return table


def main() -> None:
  """The command."""
  pictures = cli.define_paths("images", "The pictures, see above.", required=True)
  codec = cli.define_path("codec", "Model directory of the VQGAN.", required=True)
  output = cli.define_path("output", "TSV file of the codes.", required=True)
  columns = flags.DEFINE_list(
    "columns", None, "Places, or names in a table with a header, of id, image and text."
  )
  size = flags.DEFINE_integer("size", None, "Side in pixels; default: the codec's own.")
  fit = flags.DEFINE_enum("fit", "crop", FITS, "How a picture becomes a square.")
  noise = flags.DEFINE_bool("noise", False, "Codes are drawn, as the original's are.")
  seed = flags.DEFINE_integer("seed", 0, "Of the noise.", lower_bound=0)
  batch_size = flags.DEFINE_integer("batch-size", 16, "Pictures read together.", lower_bound=1)
  max_bad_rate = cli.define_max_bad_rate("rows")
  shard_ = cli.define_shard()
  cli.define_stage()

  def command():
    log.quiet_libraries()
    shard = shards.parse(shard_.value, environ=os.environ)
    merges = shard is not None and shard.index is None
    place = output.value if shard is None or merges else shard.place(output.value)
    with cli.sole_writer(place, inputs=(*pictures.value, codec.value)):
      if merges:
        print(f"{shards.merge(output.value, shard)} parts are together in {output.value}")
        return
      table = _opened(pictures.value, _columns(columns.value))
      tokenizer = Tokenizer(codec.value)
      count = tokenize_file(
        tokenizer,
        table,
        output=output.value,
        size=size.value or tokenizer.config.image_size,
        fit=fit.value,
        seed=seed.value if noise.value else None,
        batch_size=batch_size.value,
        max_bad_rate=max_bad_rate.value,
        shard=shard,
      )
    print(f"The codes of {count} pictures of {len(table)} are stored in {place}")

  cli.run(command, interrupted="the same command goes on where it stopped")


def _columns(given: list[str] | None) -> dict[str, int | str]:
  """The columns as name:place or name:header."""
  columns = {}
  for part in given or ():
    column, _, place = part.partition(":")
    if column not in COLUMNS or not place:
      raise ValueError(f"Expected --columns=name:place, names {', '.join(COLUMNS)}; found {part!r}")
    columns[column] = int(place) if place.isdecimal() else place
  return columns


if __name__ == "__main__":
  main()
