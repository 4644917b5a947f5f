"""Images and texts per second of ViT-B-16, beside `cn_clip` and `transformers` in PyTorch.

    pip install --no-deps cn_clip        # its other requirements are not needed here
    python benchmarks/features.py [--images 64] [--batch-size 32] [--repeats 3]

The three hold the same random weights, which is checked on their features, run in fp32 on the CPU
with the same number of threads, and take turns. "encode" starts from prepared arrays and ends with
features. "pipeline" goes from the data set's files to the file of features, in the way of each:
`ofa_jax.extract_features` from TSV; cn_clip's data sets (LMDB, one process) and transformers'
processor with the loop of the original's script. The fp32 matrix products of a block (XLA's and
PyTorch's MKL) are timed beside it, as that is what most of the time goes to.
"""

import argparse
import functools
import importlib.metadata
import io
import json
import os
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from input_pipeline import cpu_model, make_data
from PIL import Image
from torchvision_stand_in import stand_in_for_torchvision
from transformers import BertTokenizer, ChineseCLIPModel
from transformers.models.chinese_clip.image_processing_pil_chinese_clip import (
  ChineseCLIPImageProcessorPil,
)

from ofa_jax import api, extract_features, hub
from ofa_jax.convert import params
from ofa_jax.convert.cnclip import huggingface
from ofa_jax.convert.cnclip import table as convert
from ofa_jax.data.images import decode
from ofa_jax.data.pairs import PairData

VISION, TEXT = "ViT-B-16", "RoBERTa-wwm-ext-base-chinese"
CONTEXT = 52
GOAL = 0.9  # of the faster PyTorch, on a CPU


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--images", type=int, default=64, help="images, and as many texts")
  parser.add_argument("--batch-size", type=int, default=32)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
  args = parser.parse_args()
  torch.set_num_threads(args.threads)
  torch.set_grad_enabled(False)
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    make_data(folder, args.images)
    ways = sides(folder, args)
    seconds = {name: [] for name in ways}
    ratios = []
    for way in ways.values():
      way()  # compiles, fills the page cache
    for _ in range(args.repeats):
      for name, way in ways.items():
        begin = time.perf_counter()
        way()
        seconds[name].append(time.perf_counter() - begin)
      ratios.append(products(args.batch_size))
  rates = {name: args.images / statistics.median(values) for name, values in seconds.items()}
  over = {
    f"{job} / {other}": round(rates[f"{job}, ofa_jax"] / rates[f"{job}, {other}"], 2)
    for job in dict.fromkeys(name.split(", ")[0] for name in rates)
    for other in ("cn_clip", "transformers")
  }
  report = {
    "device": f"cpu-{args.threads}core",
    "cpu": cpu_model(),
    "load_average": os.getloadavg(),
    "versions": {
      name: importlib.metadata.version(name) for name in ("jax", "torch", "transformers", "cn_clip")
    },
    "model": f"{VISION}@{TEXT}",
    "precision": "fp32",
    "images": args.images,
    "batch_size": args.batch_size,
    "goal_encode": GOAL,
    "rows_per_second": {name: round(rate, 2) for name, rate in rates.items()},
    "all_seconds": {name: [round(x, 3) for x in values] for name, values in seconds.items()},
    "ofa_jax_over": over,
    "matrix_product_xla_over_mkl": {
      name: round(statistics.median(r[name] for r in ratios), 2) for name in ratios[0]
    },
  }
  for name, rate in rates.items():
    print(f"{name:32}{rate:8.2f} rows/s")
  print(
    json.dumps({k: report[k] for k in ("ofa_jax_over", "matrix_product_xla_over_mkl")}, indent=2)
  )
  args.out.mkdir(parents=True, exist_ok=True)
  path = args.out / f"features.{report['device']}.json"
  path.write_text(json.dumps(report, indent=2) + "\n")
  print(path)


def sides(folder: pathlib.Path, args: argparse.Namespace) -> dict:
  """What is timed: name -> function."""
  with stand_in_for_torchvision():
    from cn_clip.clip.utils import create_model
    from cn_clip.eval.data import EvalImgDataset, EvalTxtDataset

  cn = create_model(f"{VISION}@{TEXT}").float().eval()
  state = {k: v.numpy() for k, v in cn.state_dict().items() if "bert.pooler" not in k}
  config = convert.infer_config(state)
  weights = convert.from_torch(state, config)
  huggingface.save(folder / "hf", config, weights[0], context_length=CONTEXT)
  hf = ChineseCLIPModel.from_pretrained(folder / "hf").eval()
  source = hub.Source(
    config=config,
    load=functools.partial(params.place, *weights),
    form="torch",
    settings={"context_length": CONTEXT},
  )
  ours = api.CNCLIPModel(source)
  data = PairData.of(folder, "train")
  images, texts = data.load_images(), data.load_texts()
  processor = ChineseCLIPImageProcessorPil.from_pretrained(folder / "hf")
  bert = BertTokenizer.from_pretrained(folder / "hf")

  def batches(rows):
    return (rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size))

  def hf_images(files):
    pictures = [Image.open(io.BytesIO(file)) for file in files]
    return processor(images=pictures, return_tensors="pt")["pixel_values"]

  def hf_texts(captions):
    return dict(
      bert(captions, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt")
    )

  def hf_encode(job, inputs):
    name = f"get_{job}_features"
    inputs = {"pixel_values": inputs} if job == "image" else inputs
    outputs = getattr(hf, name)(**inputs)
    return outputs if isinstance(outputs, torch.Tensor) else outputs.pooler_output

  def store(job, ids, vectors, file):
    """The end of the original's loop."""
    vectors = vectors / vectors.norm(dim=-1, keepdim=True)
    for i, feature in zip(ids, vectors.tolist(), strict=True):
      file.write(json.dumps({f"{job}_id": int(i), "feature": feature}) + "\n")

  def cn_pipeline(job):
    if job == "image":
      rows = EvalImgDataset(str(folder / "lmdb" / "train" / "imgs"), ours.image_size)
    else:
      rows = EvalTxtDataset(str(folder / "train_texts.jsonl"), CONTEXT)
    encode = cn.encode_image if job == "image" else cn.encode_text
    with open(folder / "cn.jsonl", "w") as file:
      for ids, inputs in torch.utils.data.DataLoader(rows, batch_size=args.batch_size):
        store(job, ids, encode(inputs), file)

  def hf_pipeline(job):
    with open(folder / "hf.jsonl", "w") as file:
      for ids in batches(range(args.images)):
        if job == "image":
          inputs = hf_images([images.encoded(i) for i in ids])
        else:
          inputs = hf_texts([texts.texts[i] for i in ids])
        store(job, ids, hf_encode(job, inputs), file)

  def our_pipeline(job):
    extract = getattr(extract_features, f"extract_{job}s")
    rows = images if job == "image" else texts
    extract(ours, rows, output=folder / "ours.jsonl", batch_size=args.batch_size)

  files = [images.encoded(i) for i in range(args.images)]
  pixels = np.stack([decode(file, size=ours.image_size) for file in files])
  tokens = ours.tokenizer(texts.texts, context_length=CONTEXT)
  torch_pixels = torch.cat([hf_images(part) for part in batches(files)])
  torch_tokens = torch.from_numpy(tokens).long()
  hf_tokens = hf_texts(texts.texts)
  assert (hf_tokens["input_ids"] == torch_tokens).all()

  def each(encode, rows):
    return [np.asarray(encode(part)) for part in batches(rows)]

  def hf_text_batches():
    starts = range(0, args.images, args.batch_size)
    return [
      hf_encode("text", {k: v[i : i + args.batch_size] for k, v in hf_tokens.items()})
      for i in starts
    ]

  ways = {
    "encode images, ofa_jax": lambda: each(ours.encode_image, pixels),
    "encode images, cn_clip": lambda: each(cn.encode_image, torch_pixels),
    "encode images, transformers": lambda: each(lambda x: hf_encode("image", x), torch_pixels),
    "encode texts, ofa_jax": lambda: each(ours.encode_text, tokens),
    "encode texts, cn_clip": lambda: each(cn.encode_text, torch_tokens),
    "encode texts, transformers": hf_text_batches,
  }
  for job in ("image", "text"):
    ways |= {
      f"{job} pipeline, ofa_jax": functools.partial(our_pipeline, job),
      f"{job} pipeline, cn_clip": functools.partial(cn_pipeline, job),
      f"{job} pipeline, transformers": functools.partial(hf_pipeline, job),
    }
  for job in ("images", "texts"):
    expected = ways[f"encode {job}, cn_clip"]()[0]
    for other in ("ofa_jax", "transformers"):
      vectors = np.asarray(ways[f"encode {job}, {other}"]()[0])
      deviation = np.abs(vectors - expected).max() / np.abs(expected).max()
      assert deviation < 1e-3, f"{other} gives other features of {job}: {deviation}"
  return ways


def products(batch_size: int, repeats: int = 5) -> dict[str, float]:
  """XLA's speed over PyTorch's for the fp32 products of a ViT-B-16 block, in turn."""
  rng = np.random.default_rng(0)
  multiply = jax.jit(functools.partial(jnp.matmul, precision="highest"))
  ratios = {}
  for name, (inputs, outputs) in {"768x3072": (768, 3072), "3072x768": (3072, 768)}.items():
    a = rng.standard_normal((batch_size * 197, inputs), np.float32)
    b = rng.standard_normal((inputs, outputs), np.float32)
    pairs = (jnp.asarray(a), jnp.asarray(b)), (torch.from_numpy(a), torch.from_numpy(b))
    seconds = ([], [])
    for _ in range(repeats + 1):
      for times, product, pair in zip(
        seconds, (lambda *x: multiply(*x).block_until_ready(), torch.matmul), pairs, strict=True
      ):
        begin = time.perf_counter()
        product(*pair)
        times.append(time.perf_counter() - begin)
    ratios[name] = min(seconds[1][1:]) / min(seconds[0][1:])
  return ratios


if __name__ == "__main__":
  main()
