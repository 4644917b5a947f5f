"""`zeroshot`: the original's ELEVATER files and top-1, TensorFlow Datasets, faults."""

import io
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from ofa_jax import api, zeroshot
from ofa_jax.data.pipeline import TooManyBadRows
from ofa_jax.data.tfds import TfdsRows
from ofa_jax.scoring.templates import templates_for
from tests.compiling import QUICK
from tests.evaluation_golden import MODELS, ZEROSHOT, save_model, unpack_zeroshot

pytestmark = pytest.mark.usefixtures("two_devices")
GOLDEN = sorted(
  (folder, path.stem)
  for folder in ("vit", "rn50", "vit_indexed")
  for path in (ZEROSHOT / folder).glob("*.json")
)
FLOAT64 = ZEROSHOT.with_name("zeroshot_float64")
TOP1 = json.loads((ZEROSHOT / "top1.json").read_text())


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
  folder = tmp_path_factory.mktemp("models")
  return {name: save_model(folder, name) for name in MODELS}


@pytest.fixture(scope="module")
def models(directories):
  return {name: api.load_from_name(path)[0] for name, path in directories.items()}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
  return unpack_zeroshot(tmp_path_factory.mktemp("datasets"))


def compare(found: pathlib.Path, expected: pathlib.Path):
  """The same file, but for 2 units of the sixth decimal.

  The scale of 100 carries float32's rounding there: cn_clip, run again on another CPU, with other
  threads or batch sizes, differs from these files in a tenth to a half of the numbers, by as much.
  """
  found, expected = (json.loads(path.read_text()) for path in (found, expected))
  assert list(found) == list(expected)
  a, b = (np.array(x.pop("predictions")) for x in (found, expected))
  assert found == expected
  np.testing.assert_array_equal(a.argmax(-1), b.argmax(-1))
  np.testing.assert_allclose(a, b, rtol=0, atol=2.5e-6)
  assert (a == np.round(a, 6)).all()


def classified(model, path, folder, *, output, batch_size=5):
  """Writes what the original has in `folder` for the data set at `path`; returns its scores."""
  rows, classes = zeroshot.open_rows(str(path), split="test", size=model.image_size)
  names = zeroshot.read_names(path / "label_cn.txt", count=len(classes))
  weights = zeroshot.classifier(model, names, templates_for(path.name))
  probabilities, labels = zeroshot.classify(model, rows, weights=weights, batch_size=batch_size)
  index = None
  if folder.endswith("indexed"):
    index = zeroshot.read_index(path / "index.json", count=len(rows))
  zeroshot.write_submission(
    output,
    probabilities,
    model=model,
    name=MODELS[folder.split("_")[0]][1],
    dataset=path.name,
    index=index,
  )
  return zeroshot.scores(probabilities, labels, dataset=path.name)


@pytest.mark.parametrize(("folder", "dataset"), GOLDEN)
def test_golden(models, datasets, tmp_path, folder, dataset):
  model = models[folder.split("_")[0]]
  found = classified(model, datasets / dataset, folder, output=tmp_path / "a.json")
  compare(tmp_path / "a.json", ZEROSHOT / folder / f"{dataset}.json")
  assert found["zeroshot-top1"] == TOP1[f"{folder}/{dataset}"]
  if dataset == "oxford-flower-102":
    assert list(found) == ["zeroshot-top1", "mean_per_class"]


@pytest.mark.parametrize("batch_size", (1, pytest.param(5, marks=pytest.mark.slow), 64))
@pytest.mark.parametrize("name", MODELS)
def test_files_in_float64_are_the_originals_in_float64(
  directories, datasets, tmp_path, name, batch_size
):
  """Byte for byte, for any batches: `FLOAT64` is what the original's functions give in float64."""
  with jax.enable_x64(True):
    model, _ = api.load_from_name(directories[name], precision="fp64")
    for folder, dataset in GOLDEN:
      if folder.split("_")[0] == name:
        output = tmp_path / folder / f"{dataset}.json"
        classified(model, datasets / dataset, folder, output=output, batch_size=batch_size)
        assert output.read_bytes() == (FLOAT64 / folder / f"{dataset}.json").read_bytes()


def run(*arguments, **environment):
  command = [sys.executable, "-m", "ofa_jax.zeroshot", *map(str, arguments)]
  return subprocess.run(
    command, capture_output=True, text=True, env=os.environ | QUICK | environment
  )


def test_command(directories, datasets, tmp_path):
  flags = f"--model={directories['vit']}", f"--output={tmp_path / 'a.json'}"
  data = datasets / "cifar-10"
  done = run(*flags, f"--data={data}", f"--index={data / 'index.json'}")
  assert done.returncode == 0, done.stderr
  assert f"zeroshot-top1: {TOP1['vit/cifar-10']}\n" in done.stdout
  assert "cifar-10: 12 images, 4 classes, 183 templates" in done.stdout
  compare(tmp_path / "a.json", ZEROSHOT / "vit_indexed" / "cifar-10.json")
  done = run(*flags, f"--data={data}", f"--index={data / 'index.json'}", "--precision=fp64")
  assert done.returncode == 0, done.stderr
  expected = FLOAT64 / "vit_indexed" / "cifar-10.json"
  assert (tmp_path / "a.json").read_bytes() == expected.read_bytes()
  done = run(*flags, f"--data={data}", f"--label-file={datasets / 'country211' / 'label_cn.txt'}")
  assert done.returncode == 1
  assert "Expected 4 class names" in done.stderr and "found 3" in done.stderr


def test_metric_beside_top1():
  probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]], np.float32)
  labels = np.array([0, 1, 1])
  found = zeroshot.scores(probabilities, labels, dataset="voc-2007-classification")
  assert list(found) == ["zeroshot-top1", "mean_average_precision"]
  assert found["mean_average_precision"] == pytest.approx(1.0)
  found = zeroshot.scores(probabilities, labels, dataset="hateful-memes")
  assert found == {"zeroshot-top1": pytest.approx(2 / 3), "roc_auc": 1.0}
  assert list(zeroshot.scores(probabilities, labels, dataset="dtd")) == ["zeroshot-top1"]


@pytest.fixture(scope="module")
def tiny_tfds(tmp_path_factory, datasets):
  """The images of cifar-10's golden as a TensorFlow data set, prepared without TensorFlow."""
  import tensorflow_datasets as tfds

  folder = datasets / "cifar-10"
  files = [(i, p) for i in range(4) for p in sorted((folder / "test" / str(i)).iterdir())]

  class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    __module__ = "tiny"  # else tfds looks for its metadata in the package `tests`

    def _info(self):
      label = tfds.features.ClassLabel(names=(folder / "label_cn.txt").read_text().split())
      features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": label})
      return tfds.core.DatasetInfo(
        builder=self, features=features, supervised_keys=("image", "label")
      )

    def _split_generators(self, download):
      return {"test": self._generate_examples()}

    def _generate_examples(self):
      for label, path in files:
        png = io.BytesIO()
        Image.open(path).save(png, "PNG")
        png.seek(0)
        yield f"{label}/{path.name}", {"image": png, "label": label}

  directory = tmp_path_factory.mktemp("tfds")
  builder = Tiny(data_dir=directory, file_format="array_record")
  builder.download_and_prepare()
  return directory


def test_tfds(directories, tiny_tfds, tmp_path):
  done = run(
    f"--model={directories['vit']}",
    "--data=tfds:tiny",
    "--dataset=cifar-10",
    f"--output={tmp_path / 'a.json'}",
    TFDS_DATA_DIR=str(tiny_tfds),
  )
  assert done.returncode == 0, done.stderr
  assert f"zeroshot-top1: {TOP1['vit/cifar-10']}\n" in done.stdout
  # The same images; the data set has shuffled them.
  found, expected = (
    np.array(json.loads(path.read_text())["predictions"][0])
    for path in (tmp_path / "a.json", ZEROSHOT / "vit" / "cifar-10.json")
  )
  order = [np.lexsort(np.round(x, 4).T) for x in (found, expected)]
  np.testing.assert_allclose(found[order[0]], expected[order[1]], rtol=0, atol=2.5e-6)


def test_tfds_faults(monkeypatch):
  with pytest.raises(ValueError, match="'cifra10'"):
    TfdsRows("cifra10", split="test", size=32)


def test_faults(models, tmp_path):
  with pytest.raises(ValueError, match="found no folder"):
    zeroshot.open_rows(str(tmp_path), split="test", size=32)
  (tmp_path / "index.json").write_text("[0, 1, 1]")
  with pytest.raises(ValueError, match=r"every number from 0 to 2 once.*\[0, 1, 1\]"):
    zeroshot.read_index(tmp_path / "index.json", count=3)
  (tmp_path / "index.json").write_text("[0, 1, ")
  with pytest.raises(ValueError, match=r"JSON list of integers in .*index.json"):
    zeroshot.read_index(tmp_path / "index.json", count=3)
  for i in range(2):
    (tmp_path / "test" / str(i)).mkdir(parents=True)
    (tmp_path / "test" / str(i) / "a.png").write_text("no image")
  rows, _ = zeroshot.open_rows(str(tmp_path), split="test", size=32)
  with pytest.raises(TooManyBadRows, match=r"test/0/a.png"):
    zeroshot.classify(models["vit"], rows, weights=np.ones((2, 24), np.float32))


def test_captions_of_pairs_are_classes(datasets, tmp_path):
  """A table of pictures and classes is the folder of class folders."""
  folder = next(path for path in sorted(pathlib.Path(datasets).iterdir()) if path.is_dir())
  expected, classes = zeroshot.open_rows(str(folder), split="test", size=32)
  lines = ["filepath,title"]
  for path in sorted((folder / "test").rglob("*")):
    if path.is_file():
      lines.append(f"{path},{path.relative_to(folder / 'test').parts[0]}")
  (tmp_path / "test.csv").write_text("\n".join(lines), encoding="utf-8")
  for data in (tmp_path / "test.csv", tmp_path):
    rows, names = zeroshot.open_rows(str(data), split="test", size=32)
    assert names == classes and rows.labels.tolist() == expected.labels.tolist()
    for i in (0, len(rows) - 1):
      np.testing.assert_array_equal(
        rows.example(i, None)["image"], expected.example(i, None)["image"]
      )
  (tmp_path / "test.csv").write_text("\n".join([*lines, f"{lines[1].split(',')[0]},other"]))
  with pytest.raises(ValueError, match=r"one class for every image, found 1 .*also other"):
    zeroshot.open_rows(str(tmp_path), split="test", size=32)
