r"""Cross-modal retrieval from feature files, with the file formats of Chinese-CLIP's scripts.

  python -m ofa_jax.retrieve topk --image-feats=F --text-feats=F --output=F [--direction=t2i|i2t]
  python -m ofa_jax.retrieve recall --annotations=F --predictions=F --output=F [--direction=...]
  python -m ofa_jax.retrieve to-tr --input=F [--output=F]

`topk` finds the candidates with the highest dot products for every query, exactly; equal scores
keep the order of the candidates' file. `recall` scores such predictions (Recall@1/5/10 in percent,
and their mean). `to-tr` turns text-to-image annotations into image-to-text ones. `--help` after a
sub-command lists its flags.
"""

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec

from ofa_jax import cli, cli_help, storage, text_files
from ofa_jax.data.features import Features, raise_faults, read_features
from ofa_jax.data.tsv import check_files
from ofa_jax.engine import log
from ofa_jax.scoring import retrieval

Path = str | os.PathLike

DIRECTIONS = {"t2i": ("text", "image"), "i2t": ("image", "text")}  # query, candidate

_QUERIES = 4096  # rows of a block, for each device
_CANDIDATES = 8192
_GROUP = 64  # candidates of which only the best is looked at first


def topk(
  image_feats: Path, text_feats: Path, *, output: Path, k: int = 10, direction: str = "t2i"
) -> None:
  """Writes each query's `k` best candidates, in the order of the queries' file.

  Lines are {"text_id": 8000, "image_ids": [13, ...]}, or the other way round for "i2t".

  Args:
    image_feats, text_feats: feature files, `.jsonl` or `.npy`.
    output: JSONL file.
    k: how many.
    direction: "t2i" (texts are queries) or "i2t".

  Raises:
    ValueError: a faulty file, two widths, fewer than `k` candidates.
  """
  paths = {"image": os.fspath(image_feats), "text": os.fspath(text_feats)}
  check_files(list(paths.values()))
  queries, candidates = (_read(paths[kind], kind) for kind in DIRECTIONS[direction])
  widths = [features.vectors.shape[1] for features in (queries, candidates)]
  if widths[0] != widths[1]:
    raise ValueError(
      f"Expected features of one width, found {widths[0]} in {queries.path} and {widths[1]} in "
      f"{candidates.path}. Extract both with the same model."
    )
  if not 1 <= k <= len(candidates):
    raise ValueError(
      f"Expected --top-k from 1 to {len(candidates)}, the candidates in {candidates.path}; "
      f"found {k}"
    )
  query, candidate = DIRECTIONS[direction]
  num_queries = 0
  with (
    cli.writing(output) as file,
    cli.progress("top-k", total=len(queries), unit=f"{query}s") as advance,
  ):
    for rows in best_rows(queries.vectors, candidates.vectors, k=k, advance=advance):
      query_ids = queries.ids[num_queries : num_queries + len(rows)].tolist()
      for query_id, ids in zip(query_ids, candidates.ids[rows].tolist(), strict=True):
        file.write(f'{{"{query}_id": {query_id}, "{candidate}_ids": {ids}}}\n')
      num_queries += len(rows)
  print(f"Top-{k} predictions of {num_queries} {query}s are in {output}")


def best_rows(
  queries: np.ndarray,
  candidates: np.ndarray,
  *,
  k: int,
  advance: Callable[[float], None] = lambda queries: None,
) -> Iterator[np.ndarray]:
  """Yields int32[b, k] for blocks of queries: the rows of their best candidates, best first.

  Blocks of candidates pass over the devices and are merged into the best so far, so that no more
  than a block of scores exists. Among equal scores the lower row comes first.

  Args:
    queries: float[N, E].
    candidates: float[M, E], M >= k.
    k: how many.
    advance: called with the (fractional) number of queries done since its last call.
  """
  mesh = jax.make_mesh(
    (jax.local_device_count(),),
    ("data",),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.local_devices(),
  )
  split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
  num_queries = mesh.size * _bucket(-(-len(queries) // mesh.size), most=_QUERIES)
  num_candidates = _bucket(len(candidates), most=_CANDIDATES)
  merge = _merge_on(mesh, k)
  for start in range(0, len(queries), num_queries):
    block = _padded(queries[start : start + num_queries], num_queries)
    block = jax.device_put(block, split)
    scores = jax.device_put(np.full((num_queries, k), -np.inf, np.float32), split)
    rows = jax.device_put(np.zeros((num_queries, k), np.int32), split)
    size = min(num_queries, len(queries) - start)
    for first in range(0, len(candidates), num_candidates):
      part = candidates[first : first + num_candidates]
      part = jax.device_put(_padded(part, num_candidates), whole)
      scores.block_until_ready()  # the copy above overlaps with the product; one copy at a time
      scores, rows = merge(scores, rows, block, part, first, len(candidates))
      advance(size * min(num_candidates, len(candidates) - first) / len(candidates))
    yield np.asarray(rows)[:size]


def recall(annotations: Path, predictions: Path, *, direction: str = "t2i") -> dict:
  """Returns the score JSON of the original's evaluation.py.

  Args:
    annotations: JSONL with {"text_id": 1, "image_ids": [7]}; {"image_id": 7, "text_ids": [1]} for
      "i2t", as written by `to_tr`.
    predictions: JSONL of the same form, ten candidates a line, best first.
    direction: "t2i" or "i2t".

  Raises:
    ValueError: faulty lines, each named by file and line; queries without a right answer or without
      a prediction.
  """
  query, candidate = DIRECTIONS[direction]
  truth, lines = _read_ids(annotations, query)
  raise_faults(
    [f"{annotations}:{lines[i]} {query} {i} has none" for i, ids in truth.items() if not ids],
    f"{candidate}_ids in every annotation (without labels there is nothing to score)",
  )
  predicted, lines = _read_ids(predictions, query)
  most = retrieval.KS[-1]
  faults = []
  for i, ids in predicted.items():
    if len(ids) != most:
      faults.append(f"{predictions}:{lines[i]} {query} {i} has {len(ids)}")
    elif len(set(ids)) != most:
      faults.append(f"{predictions}:{lines[i]} {query} {i} has one twice")
  faults += [f"{predictions} has no line for {query} {i}" for i in truth if i not in predicted]
  raise_faults(faults, f"{most} different {candidate}_ids for every {query} of {annotations}")
  return retrieval.score_json(retrieval.recall_of_predictions(truth, predicted))


def to_tr(path: Path, *, output: Path | None = None) -> Path:
  """Turns {"text_id": 1, "image_ids": [7]} annotations into {"image_id": 7, "text_ids": [1]} ones.

  Images come in the order of their first appearance; those without a text do not come.

  Args:
    path: JSONL file.
    output: JSONL file; None is `path` with `.tr.jsonl` for `.jsonl`.

  Returns:
    The output's path.

  Raises:
    ValueError: faulty lines, or no text has an image.
  """
  output = output or _turned(path)
  texts_of = retrieval.transpose(_read_ids(path, "text")[0])
  if not texts_of:
    raise ValueError(
      f"Expected image_ids in {path}, found only empty lists (line 1 and all after it). "
      "Unlabelled texts cannot be turned round."
    )
  with cli.writing(output) as file:
    for image_id, text_ids in texts_of.items():
      file.write(json.dumps({"image_id": image_id, "text_ids": text_ids}) + "\n")
  return output


def _turned(path: Path) -> str:
  """The default name of what `to_tr` writes."""
  return os.fspath(path).removesuffix(".jsonl") + ".tr.jsonl"


def _read(path: str, kind: str) -> Features:
  megabytes = storage.stat(path).size / 1e6
  with cli.progress(f"reading {kind}s", total=megabytes, unit="MB") as advance:
    return read_features(path, kind=kind, advance=lambda size: advance(size / 1e6))


def _read_ids(path: Path, query: str) -> tuple[dict[int, list[int]], dict[int, int]]:
  """The ids of each query, and the line that they stand on."""
  check_files([os.fspath(path)])
  ids = retrieval.read_ids(path, query=query)
  lines, faults = {}, []
  for line, text in text_files.lines(path):
    if not text.strip():
      continue
    key = json.loads(text)[f"{query}_id"]
    if lines.setdefault(key, line) != line:
      faults.append(f"{path}:{line} repeats {query}_id {key} of line {lines[key]}")
  raise_faults(faults, f"every {query}_id once")
  return ids, lines


def _merge_on(mesh: jax.sharding.Mesh, k: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """The compiled `_merge`, queries divided among the devices of a mesh."""
  split, whole = PartitionSpec("data"), PartitionSpec()
  merge = jax.shard_map(
    functools.partial(_merge, k=k),
    mesh=mesh,
    in_specs=(split, split, split, whole, whole, whole),
    out_specs=(split, split),
  )
  return jax.jit(merge, donate_argnums=(0, 1))


def _merge(best, best_rows, queries, candidates, first, count, *, k):
  """The best `k` among the best so far and the candidates from row `first` on.

  Of the candidates only `k` groups are looked at: those with the highest members, the earlier ones
  among equals. Whatever lies in another group has `k` better or equal ones before it.
  """
  num_queries, num = queries.shape[0], candidates.shape[0]
  scores = jax.lax.dot_general(
    queries, candidates, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
  )
  scores = jnp.where(scores == 0, 0.0, scores)  # lax.top_k puts -0.0 behind 0.0
  rows = first + jnp.arange(num, dtype=jnp.int32)
  scores = jnp.where(rows < count, scores, -jnp.inf)
  size = _GROUP if num >= 4 * k * _GROUP else 1
  if size > 1:
    scores = scores.reshape(num_queries, num // size, size)
    groups = jnp.sort(jax.lax.top_k(scores.max(-1), k)[1])  # in the order of their rows
    scores = jnp.take_along_axis(scores, groups[..., None], axis=1).reshape(num_queries, -1)
    rows = (first + groups[..., None] * size + jnp.arange(size)).reshape(num_queries, -1)
  rows = jnp.concatenate([best_rows, jnp.broadcast_to(rows, scores.shape)], axis=1)
  # Equal scores keep their order (so lax.top_k promises), and the best so far have lower rows.
  best, places = jax.lax.top_k(jnp.concatenate([best, scores], axis=1), k)
  return best, jnp.take_along_axis(rows, places, axis=1)


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
  rows = np.asarray(rows, np.float32)
  return np.pad(rows, ((0, size - len(rows)), (0, 0))) if len(rows) < size else rows


def _bucket(size: int, *, most: int) -> int:
  """A power of two, so that small inputs of similar size share a compiled function."""
  return min(most, max(_GROUP, 1 << (size - 1).bit_length()))


def main() -> None:
  """The command."""
  commands = {"topk": _topk_command, "recall": _recall_command, "to-tr": _to_tr_command}
  name = sys.argv[1] if len(sys.argv) > 1 else ""
  if name not in commands:
    asked = cli_help.asked(sys.argv[:2])
    print(__doc__, file=sys.stdout if asked else sys.stderr)
    raise SystemExit(0 if asked else 1)
  cli.run(commands[name](), argv=[sys.argv[0], *sys.argv[2:]])


def _topk_command():
  image = cli.define_path("image-feats", "Image features, .jsonl or .npy.", required=True)
  text = cli.define_path("text-feats", "Text features, .jsonl or .npy.", required=True)
  output = cli.define_path("output", "JSONL file for the predictions.", required=True)
  k = flags.DEFINE_integer("top-k", 10, "Candidates for each query.", lower_bound=1)
  direction = _direction()

  def command():
    log.quiet_libraries()
    with cli.sole_writer(output.value, inputs=(image.value, text.value)):
      topk(image.value, text.value, output=output.value, k=k.value, direction=direction.value)

  return command


def _recall_command():
  annotations = cli.define_path(
    "annotations", "JSONL with right answers; for i2t as made by to-tr.", required=True
  )
  predictions = cli.define_path("predictions", "JSONL from topk.", required=True)
  output = cli.define_path("output", "JSON file for the scores.", required=True)
  direction = _direction()

  def command():
    with cli.sole_writer(output.value, inputs=(annotations.value, predictions.value)):
      work()

  def work():
    try:
      score = recall(annotations.value, predictions.value, direction=direction.value)
    except ValueError as error:
      score = {"errorDetail": str(error), "errorMsg": str(error), "score": 0, "scoreJson": {}}
      _write_score(output.value, score | {"success": False})
      raise
    _write_score(output.value, score)
    print(" ".join(f"{name} {value:.2f}" for name, value in score["scoreJson"].items()))

  return command


def _to_tr_command():
  path = cli.define_path("input", "JSONL with text_id and image_ids.", required=True)
  output = cli.define_path("output", "Default: the input's name with .tr.jsonl.")

  def command():
    place = output.value or _turned(path.value)
    with cli.sole_writer(place, inputs=(path.value,)):
      print(f"Annotations are in {to_tr(path.value, output=place)}")

  return command


def _direction() -> flags.FlagHolder:
  return flags.DEFINE_enum(
    "direction", "t2i", tuple(DIRECTIONS), "Texts are the queries (t2i), or images (i2t)."
  )


def _write_score(path: Path, score: dict) -> None:
  with cli.writing(path) as file:
    json.dump(score, file)


if __name__ == "__main__":
  main()
