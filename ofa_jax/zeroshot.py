r"""Zero-shot classification as Chinese-CLIP's script does it, with ELEVATER's metrics beside it.

  python -m ofa_jax.zeroshot --model=M --data=DATASET_DIR --output=F.json
  python -m ofa_jax.zeroshot --model=M --data=tfds:cifar100 --label-file=F.txt --output=F.json

DATASET_DIR holds `test/<class>/*` and `label_cn.txt`, one class name a line in the order of the
sorted class folders. Its name, or `--dataset`, chooses the prompt templates and the official
metric. DATASET_DIR may also be a table of pictures and their classes (.csv, .tsv: filepath, title)
or another form of pairs that training reads, the captions being the classes. The output is an
ELEVATER submission: every image's probabilities of all classes.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags

from ofa_jax import api, cli, storage, text_files
from ofa_jax.data import pipeline, values
from ofa_jax.data.folder import FolderRows, ImageFolder
from ofa_jax.data.labelled import LabelledRows
from ofa_jax.data.pairs import PairData
from ofa_jax.data.protocols import Rows
from ofa_jax.data.table import EXTENSIONS
from ofa_jax.data.text import normalize_caption
from ofa_jax.data.tfds import TfdsRows
from ofa_jax.data.tsv import check_files
from ofa_jax.engine import log
from ofa_jax.scoring import zeroshot
from ofa_jax.scoring.templates import templates_for

SCALE = 100.0  # of the cosines; the original does not use the model's own logit_scale

_PROMPTS = 4096  # encoded before they are averaged


def open_rows(data: str, *, split: str, size: int) -> tuple[Rows, list[str]]:
  """Opens labelled images.

  Args:
    data: a folder with `<split>/<class>/*`; "tfds:NAME"; or pairs of images and classes as
      `PairData.of` takes them, whose classes are in sorted order.
    split: "test" in the original's layout.
    size: side of the images in pixels.

  Returns:
    Rows with `image` and `label`, and the names that the classes have in the data set itself.

  Raises:
    ValueError: what is expected is not there.
  """
  if data.startswith("tfds:"):
    rows = TfdsRows(data.removeprefix("tfds:"), split=split, size=size)
    return rows, rows.classes
  place = storage.of(data) / split
  pairs = PairData.of(data) if data.endswith((*EXTENSIONS, ".tar")) else None
  if not storage.is_dir(place) or storage.exists(place / "imgs" / "data.mdb"):
    with contextlib.suppress(ValueError):  # else class folders are what is missing
      pairs = pairs or PairData.of(data, split)
  if pairs is not None:
    rows = LabelledRows(*pairs.load(), size=size)
    return rows, rows.classes
  folder = ImageFolder(place)
  return FolderRows(folder, size=size), folder.classes


def classifier(
  model: api.CNCLIPModel,
  names: Sequence[str],
  templates: Sequence[str],
  *,
  context_length: int | None = None,
) -> np.ndarray:
  """Returns float64[C, E]: of each class the normalised mean of its normalised prompts.

  Args:
    model: from `load_from_name`.
    names: of the C classes.
    templates: prompts with `{}` for the name.
    context_length: tokens of a prompt; None is the model's own.
  """
  context_length = context_length or model.context_length
  at_once = max(1, _PROMPTS // len(templates))
  weights = []
  with cli.progress("classifier", total=len(names), unit="classes") as advance:
    for start in range(0, len(names), at_once):
      part = names[start : start + at_once]
      prompts = [normalize_caption(t.replace("{}", name)) for name in part for t in templates]
      tokens = model.tokenizer(prompts, context_length=context_length)
      features = _unit(model.encode_text(tokens)).reshape(len(part), len(templates), -1)
      weights.append(_unit(features.mean(1)))
      advance(len(part))
  return np.concatenate(weights)


def classify(
  model: api.CNCLIPModel, rows: Rows, *, weights: np.ndarray, batch_size: int = 256
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the probabilities float64[N, C] of all images, and their labels int32[N].

  Args:
    model: from `load_from_name`.
    rows: from `open_rows`.
    weights: from `classifier`.
    batch_size: images encoded together, on all devices.

  Raises:
    TooManyBadRows: an image cannot be read; a submission needs them all.
  """
  probabilities = np.empty((len(rows), len(weights)))
  labels = np.empty(len(rows), np.int32)
  with (
    pipeline.eval_batches(rows, batch_size=batch_size, bad=pipeline.BadRows(0.0, print)) as batches,
    cli.progress("images", total=len(rows), unit="images") as advance,
  ):
    for batch in batches:
      index = batch["index"][batch["index"] >= 0]
      features = _unit(model.encode_image(batch["image"])[: len(index)])
      probabilities[index] = _softmax(SCALE * features @ weights.T)
      labels[index] = batch["label"][: len(index)]
      advance(len(index))
  return probabilities, labels


def scores(probabilities: np.ndarray, labels: np.ndarray, *, dataset: str) -> dict[str, float]:
  """Returns top-1 and the data set's official metric where that is another, as fractions."""
  metric = zeroshot.metric_for(dataset)
  values = {"zeroshot-top1": zeroshot.top1(probabilities, labels)}
  if metric is zeroshot.mean_average_precision:
    labels = np.eye(probabilities.shape[1], dtype=bool)[labels]
  if metric is not zeroshot.top1:
    values[metric.__name__] = metric(probabilities, labels)
  return values


def write_submission(
  path: str | os.PathLike,
  probabilities: np.ndarray,
  *,
  model: api.CNCLIPModel,
  name: str,
  dataset: str,
  index: Sequence[int] | None = None,
) -> None:
  """Writes the JSON file that the original writes for ELEVATER's server, with 6 decimals.

  Args:
    path: JSON file.
    probabilities: float[N, C].
    model: whose parameters are counted.
    name: of the image tower, as "ViT-B-16".
    dataset: its name.
    index: row `i` of the file is image `index[i]`; None keeps their order.
  """
  if index is not None:
    probabilities = probabilities[list(index)]
  header = {
    "model_name": f"CN-CLIP-{name}",
    "dataset_name": dataset,
    "num_trainable_params": 0,
    "num_params": model.num_params,
    "num_visual_params": model.num_visual_params,
    "num_backbone_params": model.num_params,
    "n_shot": 0,
    "rnd_seeds": [123],
  }
  with cli.writing(path) as file:
    file.write(json.dumps(header)[:-1] + ', "predictions": [[')
    for i, row in enumerate(np.asarray(probabilities, np.float64)):
      file.write(", " * (i > 0) + json.dumps(np.round(row, 6).tolist()))
    file.write("]]}")


def read_names(path: str | os.PathLike, *, count: int) -> list[str]:
  """Reads the class names, one a line.

  Raises:
    ValueError: not `count` of them.
  """
  check_files([os.fspath(path)])
  names = [line.strip() for line in text_files.read(path).split("\n")]
  while names and not names[-1]:
    names.pop()
  if len(names) != count or not all(names):
    raise ValueError(
      f"Expected {count} class names in {path}, one for each class in sorted order, found "
      f"{sum(map(bool, names))} in {len(names)} lines"
    )
  return names


def read_index(path: str | os.PathLike, *, count: int) -> list[int]:
  """Reads the order that a submission wants its images in, a JSON list.

  Raises:
    ValueError: not a permutation of 0, ..., `count` - 1.
  """
  check_files([os.fspath(path)])
  try:
    index = json.loads(text_files.read(path))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"Expected a JSON list of integers in {path}, found: {error}") from error
  numbers = [values.whole(i) for i in index] if isinstance(index, list) else []
  if None in numbers or sorted(numbers) != list(range(count)) or not isinstance(index, list):
    raise ValueError(
      f"Expected a JSON list in {path} with every number from 0 to {count - 1} once, one for each "
      f"image; found {text_files.shown(index)}"
    )
  return numbers


def _unit(features: np.ndarray) -> np.ndarray:
  # In float64: the scale of 100 would carry float32's rounding into the sixth decimal.
  features = features.astype(np.float64)
  return features / np.linalg.norm(features, axis=-1, keepdims=True)


def _softmax(logits: np.ndarray) -> np.ndarray:
  exp = np.exp(logits - logits.max(-1, keepdims=True))
  return exp / exp.sum(-1, keepdims=True)


def main() -> None:
  """The command."""
  name = cli.define_path(
    "model", "A released name, model directory, workdir, .pt or HF directory.", required=True
  )
  data = cli.define_path("data", "Data set folder, or tfds:NAME.", required=True)
  dataset = flags.DEFINE_string("dataset", None, "Its name; default: the folder's, or NAME.")
  split = flags.DEFINE_string("split", "test", "Folder within --data, or tfds split.")
  label_file = cli.define_path(
    "label-file", "Class names, one a line; default: label_cn.txt in --data, or tfds' own."
  )
  index = cli.define_path("index", "JSON list: the submission's order of the images.")
  output = cli.define_path("output", "JSON file for the predictions.", required=True)
  batch_size = flags.DEFINE_integer("batch-size", 256, "Images encoded together.", lower_bound=1)
  precision = cli.define_precision()
  cli.define_stage()
  context_length = flags.DEFINE_integer(
    "context-length", None, "Tokens of a prompt; default: the model's.", lower_bound=2
  )

  def command():
    log.quiet_libraries()
    inputs = (name.value, label_file.value, index.value)
    with cli.sole_writer(output.value, inputs=inputs):
      work()

  def work():
    model = api.load_clip(name.value, precision=precision.value)
    rows, names = open_rows(data.value, split=split.value, size=model.image_size)
    labels_from = label_file.value
    if labels_from is None and isinstance(rows, FolderRows):
      labels_from = os.path.join(data.value, "label_cn.txt")
    if labels_from is not None:
      names = read_names(labels_from, count=len(names))
    title = storage.of(storage.absolute(data.value.removeprefix("tfds:")))
    title = dataset.value or (title.stem if storage.is_file(title) else title.name)
    order = read_index(index.value, count=len(rows)) if index.value else None
    templates = templates_for(title)
    print(f"{title}: {len(rows)} images, {len(names)} classes, {len(templates)} templates")
    weights = classifier(model, names, templates, context_length=context_length.value)
    probabilities, labels = classify(model, rows, weights=weights, batch_size=batch_size.value)
    tower = model.config.name.split("@")[0] or pathlib.Path(name.value).stem
    write_submission(
      output.value, probabilities, model=model, name=tower, dataset=title, index=order
    )
    for metric, value in scores(probabilities, labels, dataset=title).items():
      print(f"{metric}: {value}")
    print(f"Predictions are in {output.value}")

  cli.run(command)


if __name__ == "__main__":
  main()
