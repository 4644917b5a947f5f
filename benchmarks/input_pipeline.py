"""Images per second from base64 TSV to training batches, beside a PyTorch DataLoader.

    python benchmarks/input_pipeline.py [--images 768] [--repeats 7] [--workers 2]

Both sides read the same synthetic photographs (1/f noise, JPEG of quality 90) and have the same
number of workers. The DataLoader does what Chinese-CLIP does: LMDB, urlsafe base64, Pillow
decoding, bicubic resize to a square, RGB, float32, normalisation. Ours gives uint8 batches; they
are normalised on the device, inside the compiled step. Neither side tokenises. Files are in the
page cache, workers are started before the clock. The sides take turns; reported are the median
rate and the median of the ratios within a turn, which a busy machine disturbs less.
"""

import argparse
import base64
import contextlib
import io
import json
import operator
import os
import pathlib
import pickle
import platform
import statistics
import tempfile
import time

import lmdb
import numpy as np
import PIL
import simplejpeg
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from ofa_jax.data.images import CLIP_MEAN, CLIP_STD, decode
from ofa_jax.data.pairs import PairData, PairRows
from ofa_jax.data.pipeline import BadRows, train_batches

SIZE = 224
TOKENS = np.zeros(52, np.int32)
TARGETS = {"first epoch": 1.1, "cache warm": 5.0}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--images", type=int, default=768, help="photographs to make")
  parser.add_argument("--batch-size", type=int, default=128)
  parser.add_argument("--repeats", type=int, default=7)
  parser.add_argument("--workers", type=int, default=os.cpu_count())
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
  args = parser.parse_args()
  args.images -= args.images % args.batch_size  # whole batches, the same rows on both sides

  with tempfile.TemporaryDirectory() as folder:
    photographs = make_data(pathlib.Path(folder), args.images)
    rates = measure(pathlib.Path(folder), args)
  theirs = rates["torch DataLoader"]
  results = {
    name: {
      "images_per_second": round(statistics.median(values), 1),
      "over_torch": round(statistics.median(map(operator.truediv, values, theirs)), 2),
      "all": [round(value, 1) for value in values],
    }
    for name, values in rates.items()
  }
  report = {
    "device": f"cpu-{os.cpu_count()}core",
    "cpu": cpu_model(),
    "load_average": os.getloadavg(),
    "versions": versions(),
    "images": args.images,
    "image_kilobytes": round(sum(map(len, photographs)) / len(photographs) / 1000, 1),
    "size": SIZE,
    "batch_size": args.batch_size,
    "workers": args.workers,
    "repeats": args.repeats,
    "targets_over_torch": TARGETS,
    "results": results,
    "training_decode_deviation": {
      "1/f noise": deviation(photographs[:32]),
      "photographs": deviation(real_photographs()),
    },
  }
  for name, result in results.items():
    print(f"{name:36}{result['images_per_second']:10.0f} images/s{result['over_torch']:8.2f}x")
  for name, value in report["training_decode_deviation"].items():
    print(f"training decode against exact, {name}: {value}")
  args.out.mkdir(parents=True, exist_ok=True)
  path = args.out / f"input_pipeline.{report['device']}.json"
  path.write_text(json.dumps(report, indent=2) + "\n")
  print(path)


def measure(folder: pathlib.Path, args: argparse.Namespace) -> dict[str, list[float]]:
  """Images/s of every way, one pass over the data each, repeated in turn."""
  data = PairData.of(folder, "train")
  images, texts = data.load_images(), data.load_texts()

  def rows(**options):
    return PairRows(images, texts, size=SIZE, tokenize=lambda text: TOKENS, **options)

  def ours(data_rows, epoch):
    steps = args.images // args.batch_size
    bad = BadRows(0.0)
    with train_batches(
      data_rows,
      batch_size=args.batch_size,
      seed=0,
      start=epoch * steps,
      workers=args.workers,
      bad=bad,
    ) as batches:
      for _ in range(steps):
        batch = next(batches)
    assert batch["image"].shape == (args.batch_size, SIZE, SIZE, 3)

  loader = torch.utils.data.DataLoader(
    LmdbPairs(folder / "lmdb" / "train"),
    batch_size=args.batch_size,
    shuffle=True,
    num_workers=args.workers,
    persistent_workers=True,
  )

  def theirs(_):
    for image, _, _ in loader:
      assert image.shape == (args.batch_size, 3, SIZE, SIZE)

  def fill(epoch):
    with (
      tempfile.TemporaryDirectory(dir=folder) as place,
      contextlib.closing(rows(cache_dir=place)) as filling,
    ):
      ours(filling, epoch)

  raw, exact, augmented = rows(), rows(exact=True), rows(augment="crop")
  warm = rows(cache_dir=folder / "cache")
  warm_augmented = rows(cache_dir=folder / "cache", augment="crop")
  ways = {
    "torch DataLoader": theirs,
    "ours, first epoch": lambda epoch: ours(raw, epoch),
    "ours, first epoch, exact": lambda epoch: ours(exact, epoch),
    "ours, first epoch, augmented": lambda epoch: ours(augmented, epoch),
    "ours, first epoch, filling the cache": fill,
    "ours, cache warm": lambda epoch: ours(warm, epoch),
    "ours, cache warm, augmented": lambda epoch: ours(warm_augmented, epoch),
  }
  for way in (theirs, ways["ours, cache warm"], ways["ours, cache warm, augmented"]):
    way(0)  # starts the workers, fills the caches
  rates = {name: [] for name in ways}
  for epoch in range(1, args.repeats + 1):
    for name, way in ways.items():
      begin = time.perf_counter()
      way(epoch)
      rates[name].append(args.images / (time.perf_counter() - begin))
  warm.close()
  warm_augmented.close()
  return rates


class LmdbPairs(torch.utils.data.Dataset):
  """Chinese-CLIP's training data set over its LMDB folders, without augmentation."""

  def __init__(self, folder: pathlib.Path, *, size: int = SIZE):
    self._folder, self._size = folder, (size, size)
    self._environments = None
    with self._open("pairs") as pairs, pairs.begin() as transaction:
      self._length = int(transaction.get(b"num_samples"))

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int):
    if self._environments is None:  # in the worker: an environment must not cross a fork
      self._environments = self._open("pairs"), self._open("imgs")
    pairs, imgs = (environment.begin(buffers=True) for environment in self._environments)
    image_id, _, _ = pickle.loads(pairs.get(str(index).encode()))
    encoded = base64.urlsafe_b64decode(bytes(imgs.get(str(image_id).encode())))
    image = Image.open(io.BytesIO(encoded)).resize(self._size, Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    pixels = pixels.to(torch.float32).div(255)
    mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]
    return pixels.sub_(mean).div_(std), torch.from_numpy(TOKENS).long(), 0

  def _open(self, name: str) -> lmdb.Environment:
    return lmdb.open(
      str(self._folder / name), readonly=True, lock=False, readahead=False, meminit=False
    )


def make_data(folder: pathlib.Path, count: int) -> list[bytes]:
  """Writes the same data set as TSV + JSONL and as LMDB; returns the image files."""
  rng = np.random.default_rng(0)
  files = [jpeg(Image.fromarray(noise_photograph(rng))) for _ in range(count)]
  with (
    open(folder / "train_imgs.tsv", "wb") as tsv,
    open(folder / "train_texts.jsonl", "w") as texts,
  ):
    for i, file in enumerate(files):
      tsv.write(b"%d\t%s\n" % (i, base64.b64encode(file)))
      texts.write(json.dumps({"text_id": i, "text": f"图片{i}", "image_ids": [i]}) + "\n")
  records = {
    "imgs": {str(i): base64.urlsafe_b64encode(file) for i, file in enumerate(files)},
    "pairs": {str(i): pickle.dumps((i, i, f"图片{i}")) for i in range(count)},
  }
  records["imgs"]["num_images"] = records["pairs"]["num_samples"] = str(count).encode()
  for name, rows in records.items():
    place = folder / "lmdb" / "train" / name
    place.mkdir(parents=True)
    with lmdb.open(str(place), map_size=2**34) as environment, environment.begin(write=True) as out:
      for key, value in rows.items():
        out.put(key.encode(), value)
  return files


def noise_photograph(rng: np.random.Generator, height: int = 375, width: int = 500) -> np.ndarray:
  """uint8[height, width, 3] with the 1/f amplitude spectrum of photographs."""
  frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
  frequency[0, 0] = np.inf
  shape = (3, *frequency.shape)
  spectrum = (rng.normal(size=shape) + 1j * rng.normal(size=shape)) / frequency
  field = np.fft.irfft2(spectrum, s=(height, width)).transpose(1, 2, 0)
  field = 0.5 * field + 1.5 * field.mean(-1, keepdims=True)  # colours go together
  return np.clip(120 + 50 * field / field.std(), 0, 255).astype(np.uint8)


def real_photographs() -> list[bytes]:
  """scikit-learn's two sample photographs, made 500 pixels wide."""
  pictures = map(Image.fromarray, load_sample_images().images)
  return [jpeg(picture.resize((500, 334), Image.Resampling.LANCZOS)) for picture in pictures]


def jpeg(picture: Image.Image) -> bytes:
  file = io.BytesIO()
  picture.save(file, "JPEG", quality=90)
  return file.getvalue()


def deviation(files: list[bytes]) -> dict[str, float]:
  """Absolute difference of the training decode from the exact one, as a share of 255."""
  pairs = [[decode(f, size=SIZE, exact=e).astype(int) for e in (True, False)] for f in files]
  difference = np.abs([exact - fast for exact, fast in pairs]) / 255
  return {"mean": round(float(difference.mean()), 4), "max": round(float(difference.max()), 3)}


def cpu_model() -> str:
  lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  return next(line.split(": ")[1] for line in lines if line.startswith("model name"))


def versions() -> dict[str, str]:
  modules = {"torch": torch, "numpy": np, "pillow": PIL, "simplejpeg": simplejpeg, "lmdb": lmdb}
  return {"python": platform.python_version()} | {k: m.__version__ for k, m in modules.items()}


if __name__ == "__main__":
  main()
