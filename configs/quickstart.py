r"""The embedded defaults: small models of both families learn from nothing, without a download.

  python -m ofa_jax.train --config=configs/quickstart.py --workdir=runs/digits
  python -m ofa_jax.train --config=configs/quickstart.py:ofa --workdir=runs/shapes
  python -m ofa_jax.train --config=configs/quickstart.py:ofa --workdir=runs/shapes_200 \
    --config.steps=200
  python -m ofa_jax.train --config=configs/quickstart.py:scst --workdir=runs/shapes_scst
  python -m ofa_jax.train --config=configs/quickstart.py:world --workdir=runs/world
  python -m ofa_jax.train --config=configs/quickstart.py:world_scst --workdir=runs/world_scst
  python -m ofa_jax.train --config=configs/quickstart.py:draw --workdir=runs/draw
  python -m ofa_jax.train --config=configs/quickstart.py:judge --workdir=runs/judge

`digits`: a Chinese-CLIP on real images (scikit-learn's 1,797 scanned digits) with Chinese captions,
in Chinese-CLIP's own file formats. `ofa`: an OFA that captions drawn pictures of coloured shapes,
in OFA's, with a byte-level BPE of its own. `scst`: one that learnt for 200 steps goes on with the
CIDEr-D of the captions that it writes itself. `world`: an OFA that learns captions, questions,
boxes, entailment, digits and the filling in of texts at once, and is evaluated on each, also on
pictures of combinations that it never saw. `world_scst`: its captions, as they were after 1000
steps, go on with CIDEr-D. `draw`: an OFA that draws the pictures of that world from their captions,
judged by what their pixels show. `judge`: a Chinese-CLIP of the same pictures and captions, which
tells how far the drawn ones are from them, and chooses among several. The data is made once under
OFA_JAX_DATA, or the user's cache folder.
"""

import dataclasses
import functools
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ofa_jax import hub
from ofa_jax.config import Config, Eval, Optim
from ofa_jax.data import quickstart, quickstart_draw, quickstart_ofa, quickstart_world
from ofa_jax.data.images import HALF_MEAN, HALF_STD
from ofa_jax.data.pairs import PairData
from ofa_jax.decode.beam import Search
from ofa_jax.models.bert import BertConfig
from ofa_jax.models.cnclip import LOGIT_SCALE_BOUNDS, NO_DECAY, CNCLIPConfig
from ofa_jax.models.ofa import OFAConfig
from ofa_jax.models.ofa.config import CODE_PIXELS
from ofa_jax.models.patches import PatchCodecConfig
from ofa_jax.models.vit import ViTConfig
from ofa_jax.tasks.caption import Caption
from ofa_jax.tasks.contrastive import Contrastive
from ofa_jax.tasks.image_classify import ImageClassify
from ofa_jax.tasks.image_gen import ImageGen
from ofa_jax.tasks.infilling import Infilling
from ofa_jax.tasks.mixture import Mixture
from ofa_jax.tasks.refcoco import RefCOCO
from ofa_jax.tasks.reward import SelfCritical
from ofa_jax.tasks.snli_ve import SnliVE
from ofa_jax.tasks.vqa import VQA
from ofa_jax.tasks.zeroshot import ZeroShot
from ofa_jax.tokenizers.ofa import OFATokenizer


def get_config(family: str = "digits") -> Config:
  families = {
    "digits": digits,
    "ofa": ofa,
    "scst": scst,
    "world": world,
    "world_scst": world_scst,
    "draw": draw,
    "judge": judge,
  }
  if family not in families:
    raise ValueError(f"Expected a quickstart out of {', '.join(families)}, found {family!r}")
  return families[family](os.environ.get("OFA_JAX_DATA") or Path.home() / ".cache" / "ofa_jax")


def digits(folder: str | Path) -> Config:
  """Contrastive learning: retrieval and zero-shot classification of held-out digits."""
  data = quickstart.digits(folder)
  size = {"image_size": 32, "context_length": 16}
  task = Contrastive(
    train=(PairData.of(data, "train"),),
    valid=(PairData.of(data, "valid"),),
    multi_positive=True,
    **size,
  )
  return Config(
    name="quickstart: handwritten digits",
    model=CNCLIPConfig(
      vision=ViTConfig(image_size=32, patch_size=8, width=128, layers=4, head_width=32),
      text=BertConfig(
        width=128, layers=2, heads=4, mlp=512, max_positions=64, dropout=0.0, attention_dropout=0.0
      ),
      embed_dim=64,
    ),
    task=task,
    batch_size=128,
    steps=600,
    log_every=20,
    save_every=50,
    optim=Optim(
      lr=1e-3,
      b2=0.98,
      eps=1e-6,
      weight_decay=0.05,
      no_decay=NO_DECAY,
      warmup=50,
      clip_norm=1.0,
      clamp=LOGIT_SCALE_BOUNDS,
    ),
    precision="fp32",  # what a CPU computes fastest
    evals=(
      Eval(name="valid", task=task, every=50),
      Eval(
        name="valid",
        task=ZeroShot(directory=str(data / "zeroshot"), templates=quickstart.TEMPLATES, **size),
        split="test",
        every=50,
      ),
    ),
  )


def ofa(folder: str | Path) -> Config:
  """Captioning: drawn pictures that were never seen in training."""
  data = quickstart_ofa.shapes(folder)
  tokenizer = data / "tokenizer"
  task = Caption(
    train=(str(data / "train.tsv"),),
    valid=(str(data / "valid.tsv"),),
    tokenizer=str(tokenizer),
    image_size=32,
    target_length=12,
    search=Search(num_beams=3, max_length=10),
  )
  return Config(
    name="quickstart: captions of drawn shapes",
    model=OFAConfig(
      width=128,
      mlp=512,
      encoder_layers=2,
      decoder_layers=2,
      heads=4,
      stages=(1, 1, 1),
      vocab_size=OFATokenizer.from_directory(tokenizer).vocab_size,
      num_codes=0,
      num_bins=0,
      token_bucket_size=16,
      image_bucket_size=8,
      code_image_size=64,
      orig_patch_image_size=64,
      name="quickstart",
    ),
    task=task,
    batch_size=32,
    steps=800,
    log_every=50,
    save_every=200,
    optim=Optim(
      lr=5e-4,
      adam="fairseq",
      b2=0.98,
      weight_decay=0.01,
      schedule="polynomial",
      warmup=50,
      clip_norm=1.0,
    ),
    precision="fp32",  # what a CPU computes fastest
    evals=(Eval(name="valid", task=task, every=200),),
  )


def scst(folder: str | Path) -> Config:
  """Self-critical training from a run of `ofa` of 200 steps, 300 steps."""
  config = ofa(folder)
  train = (str(quickstart_ofa.shapes(folder) / "train_all.tsv"),)
  return dataclasses.replace(
    config,
    name="quickstart: captions learnt from CIDEr-D",
    init="runs/shapes_200",
    model=dataclasses.replace(config.model, freeze_resnet=True),
    task=self_critical(config.task, sampling=Search(num_beams=5, max_length=10), train=train),
    steps=300,
    log_every=25,
    save_every=150,
    optim=dataclasses.replace(config.optim, lr=2e-5, warmup=20),
    evals=(dataclasses.replace(config.evals[0], every=150),),
  )


def self_critical(task: Caption, **changes: object) -> SelfCritical:
  """Captions of the same data that a reward judges; `changes` are fields of `SelfCritical`."""
  fields = {f.name: getattr(task, f.name) for f in dataclasses.fields(task)}
  return SelfCritical(**{**fields, **changes})


def world(folder: str | Path) -> Config:
  """All tasks of OFA at once, learnt by one model from nothing."""
  data = quickstart_world.world(folder)

  def files(task: str) -> dict[str, object]:
    """The splits of a task; "novel" is its test."""
    paths = {"train": "train", "valid": "valid", "test": "novel"}
    paths = {split: data / f"{task}_{name}.tsv" for split, name in paths.items()}
    given = {split: (str(path),) for split, path in paths.items() if path.exists()}
    return {**given, "tokenizer": str(data / "tokenizer"), "image_size": 32}

  asked = {"source_length": 16, "target_length": 20, "answer_length": 4}
  tasks = {
    "caption": Caption(**files("caption"), target_length=13),
    "vqa": VQA(
      **files("vqa"),
      **asked,
      answers=str(data / "answers.txt"),
      columns=(0, 5, 2, 3),
      max_objects=0,
      page=12,
    ),
    "refcoco": RefCOCO(**files("refcoco"), source_length=16, page=12),
    "snli_ve": SnliVE(**files("snli_ve"), **asked, premise=False, page=12),
    "digits": ImageClassify(
      **files("digits"),
      answers=str(data / "digits.txt"),
      pixel_mean=HALF_MEAN,
      pixel_std=HALF_STD,
      target_length=4,
      answer_length=2,
      augment="none",
      page=12,
    ),
    "infilling": Infilling(
      **files("infilling"), source_length=28, target_length=20, search=Search(max_length=20)
    ),
  }
  evals = []
  for name, split in (("valid", "valid"), ("novel", "test")):
    evals += [
      Eval(name=name, label="" if label == "caption" else label, task=task, split=split)
      for label, task in tasks.items()
      if getattr(task, split)
    ]
  return Config(
    name="quickstart: a small world for every task",
    model=OFAConfig(
      width=128,
      mlp=512,
      encoder_layers=2,
      decoder_layers=2,
      heads=8,
      stages=(1, 1, 1),
      vocab_size=OFATokenizer.from_directory(data / "tokenizer").vocab_size,
      num_codes=0,
      num_bins=quickstart_world.NUM_BINS,
      token_bucket_size=32,
      image_bucket_size=8,
      code_image_size=64,
      orig_patch_image_size=64,
      name="world",
    ),
    task=Mixture(
      tasks=tasks,
      shares={"caption": 1, "vqa": 3, "refcoco": 2, "snli_ve": 2, "digits": 1, "infilling": 1},
      multiple=4,
    ),
    # What relates a text to a picture is learnt by many updates, however few rows each has.
    batch_size=4,
    steps=4500,
    log_every=50,
    save_every=500,
    keep=9,  # all of them: `world_scst` begins with the second
    optim=Optim(
      lr=4e-4,  # at 7e-4 a thing is found by its colour later
      adam="fairseq",
      b2=0.98,
      weight_decay=0.01,
      schedule="polynomial",
      warmup=200,
      clip_norm=1.0,
    ),
    precision="fp32",  # what a CPU computes fastest
    unroll=2,
    evals=tuple(evals),
  )


def world_scst(folder: str | Path) -> Config:
  """Self-critical training of the captions of a run of `world`, from its step 1000, 300 steps.

  A guard that keeps it near: --config.task.kl=0.05 --config.task.kl_model=runs/world@1000.
  """
  config = world(folder)
  captions = config.task.tasks["caption"]
  return dataclasses.replace(
    config,
    name="quickstart: captions of the small world learnt from CIDEr-D",
    init="runs/world@1000",
    model=dataclasses.replace(config.model, freeze_resnet=True),
    task=self_critical(captions, sampling=Search(num_beams=5, max_length=14)),
    batch_size=8,
    steps=300,
    log_every=25,
    save_every=300,
    optim=dataclasses.replace(config.optim, lr=2e-5, lr_scale=(), warmup=20),
    evals=(Eval(name="valid", task=captions, every=300),),
  )


def draw(folder: str | Path) -> Config:
  """Captions to pictures: a mosaic of patches, one after the other.

  Further scores, of a judge: --config.evals[0].task.judge=runs/judge.
  """
  data = _drawn(folder)
  words, side = data / "tokenizer", quickstart_world.SIZE
  number = quickstart_draw.WIDTH**2
  task = ImageGen(
    train=(str(data / "train.tsv"),),
    valid=(str(data / "valid.tsv"),),
    test=(str(data / "novel.tsv"),),
    tokenizer=str(words),
    image_size=side,
    source_length=32,
    target_length=number + 1,
    codec=str(data / "codec"),
    search=Search(
      num_beams=1,
      max_length=number,
      min_length=number,
      gen_code=True,
      sample=True,
      top_p=0.9,
      temperature=0.7,
    ),
    scorer=quickstart_draw.Truth(),
    page=24,
  )
  shown = dataclasses.replace(task, columns=(0, 1, 2, 3), compared=True)
  return Config(
    name="quickstart: pictures drawn from captions",
    model=OFAConfig(
      width=128,
      mlp=512,
      encoder_layers=2,
      decoder_layers=3,
      heads=4,
      stages=(1, 1, 1),
      vocab_size=OFATokenizer.from_directory(words).vocab_size,
      num_codes=quickstart_draw.NUM_CODES,
      num_bins=0,
      token_bucket_size=32,
      image_bucket_size=8,
      code_image_size=CODE_PIXELS * quickstart_draw.WIDTH,
      orig_patch_image_size=64,
      name="draw",
    ),
    task=task,
    # As in `world`: many updates of few rows.
    batch_size=16,
    steps=3000,
    log_every=50,
    save_every=500,
    optim=Optim(
      lr=7e-4,
      adam="fairseq",
      b2=0.98,
      weight_decay=0.01,
      schedule="polynomial",
      warmup=200,
      clip_norm=1.0,
      freeze=(r"^encoder/(image|image_proj|image_norm)/",),
    ),
    precision="fp32",  # what a CPU computes fastest
    unroll=3,
    evals=(
      Eval(name="valid", task=shown, batch_size=128),
      Eval(name="novel", task=shown, split="test", batch_size=128),
    ),
  )


def judge(folder: str | Path) -> Config:
  """Contrastive learning of the pictures and captions that `draw` learns from."""
  data, config = _drawn(folder), digits(folder)
  task = Contrastive(
    train=(PairData.of(data, "train"),),
    valid=(PairData.of(data, "valid"),),
    multi_positive=True,
    image_size=quickstart_world.SIZE,
    context_length=32,
  )
  vision = dataclasses.replace(config.model.vision, image_size=task.image_size, patch_size=16)
  return dataclasses.replace(
    config,
    name="quickstart: a judge of drawn pictures",
    model=dataclasses.replace(config.model, vision=vision),
    task=task,
    batch_size=64,
    save_every=200,
    evals=(Eval(name="valid", task=task, every=200),),
  )


def _drawn(folder: str | Path) -> Path:
  """The data of `draw` and `judge`."""
  name = f"draw-v{quickstart_draw.VERSION}-world-v{quickstart_world.VERSION}"
  return quickstart.make_once(folder, name, functools.partial(_write_draw, folder))


def _write_draw(folder: str | Path, path: Path) -> None:
  """The codes of the world's pictures, and the model that makes pictures of them."""
  quickstart_draw.write(path, quickstart_world.world(folder))
  table = np.load(path / "patches.npy")
  codec = PatchCodecConfig(
    image_size=quickstart_world.SIZE,
    patch_size=quickstart_draw.PATCH,
    num_codes=len(table),
  )
  params = {"patches": {"embedding": jnp.asarray(table.reshape(len(table), -1))}}
  hub.save_directory(path / "codec", codec, params, {})
