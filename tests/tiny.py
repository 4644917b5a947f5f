"""Small configs for the tests of the engine, on the quickstart's data."""

import dataclasses

from ofa_jax.config import Config, Eval, Optim
from ofa_jax.data import quickstart
from ofa_jax.data.pairs import PairData
from ofa_jax.decode.beam import Search
from ofa_jax.models.bert import BertConfig
from ofa_jax.models.clip_resnet import ResNetConfig
from ofa_jax.models.cnclip import CNCLIPConfig
from ofa_jax.models.ofa import OFAConfig
from ofa_jax.models.vit import ViTConfig
from ofa_jax.tasks.caption import Caption
from ofa_jax.tasks.contrastive import Contrastive
from ofa_jax.tasks.vqa import VQA
from ofa_jax.tasks.zeroshot import ZeroShot
from ofa_jax.tokenizers.ofa import OFATokenizer

BERT = BertConfig(
  width=32, layers=2, heads=4, mlp=64, max_positions=16, dropout=0.0, attention_dropout=0.0
)
MODEL = CNCLIPConfig(
  vision=ViTConfig(image_size=16, patch_size=8, width=32, layers=2, head_width=8),
  text=BERT,
  embed_dim=16,
)
RESNET = CNCLIPConfig(
  vision=ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=8, head_width=8),
  text=BERT,
  embed_dim=16,
)
OFA = OFAConfig(
  width=32,
  mlp=64,
  encoder_layers=1,
  decoder_layers=1,
  heads=4,
  stages=(1, 1, 1),
  vocab_size=64,
  num_codes=0,
  num_bins=0,
  token_bucket_size=16,
  image_bucket_size=4,
  code_image_size=32,
  orig_patch_image_size=64,
)

OFA_OPTIM = Optim(
  lr=1e-3,
  adam="fairseq",
  eps=1e-4,
  weight_decay=0.01,
  schedule="polynomial",
  warmup_ratio=0.2,
  clip_norm=1.0,
)


def config(data, *, model=MODEL, task=None, evals=False, **changes) -> Config:
  """A run of a few seconds; `data` is the folder that `quickstart.digits` made."""
  size = {"image_size": model.vision.image_size, "context_length": 12}
  contrastive = Contrastive(
    train=(PairData.of(data, "train"),), valid=(PairData.of(data, "valid"),), **size, **(task or {})
  )
  prompts = ZeroShot(directory=str(data / "zeroshot"), templates=quickstart.TEMPLATES, **size)
  base = Config(
    name="tiny",
    model=model,
    task=contrastive,
    batch_size=32,
    steps=6,
    log_every=2,
    save_every=3,
    optim=Optim(lr=1e-3, eps=1e-4, weight_decay=0.1, no_decay=(r"(scale|bias)$",), clip_norm=1.0),
    precision="fp32",
    evals=(
      Eval(name="valid", task=contrastive), Eval(name="valid", task=prompts, split="test")
    ) if evals else (),
  )  # fmt: skip
  return dataclasses.replace(base, **changes)


def caption_config(data, *, model=None, task=None, evals=False, **changes) -> Config:
  """A run of a few seconds of OFA; `data` is the folder that `quickstart_ofa.shapes` made.

  Of pictures of 32 pixels the last stage sees 2x2: XLA turns the gradient of a kernel that is
  larger into a convolution for which the CPU has only slow loops.
  """
  tokenizer = data / "tokenizer"
  size = OFATokenizer.from_directory(tokenizer).vocab_size
  caption = Caption(
    train=(str(data / "train.tsv"),),
    valid=(str(data / "valid.tsv"),),
    tokenizer=str(tokenizer),
    image_size=48,
    target_length=20,
    smoothing=0.1,
    search=Search(num_beams=2, max_length=8, no_repeat_ngram_size=3),
    **(task or {}),
  )
  base = Config(
    name="tiny captions",
    model=dataclasses.replace(model or OFA, vocab_size=size),
    task=caption,
    batch_size=16,
    steps=6,
    log_every=2,
    save_every=3,
    optim=OFA_OPTIM,
    precision="fp32",
    evals=(Eval(name="valid", task=caption, batch_size=64),) if evals else (),
  )
  return dataclasses.replace(base, **changes)


def vqa_config(folder, *, task=None, evals=False, **changes) -> Config:
  """A run of a few seconds of VQA; `folder` is what `vqa_files.write` made."""
  size = OFATokenizer.from_directory(folder / "tokenizer").vocab_size
  vqa = VQA(
    train=(str(folder / "train.tsv"),),
    valid=(str(folder / "valid.tsv"),),
    tokenizer=str(folder / "tokenizer"),
    answers=str(folder / "answers.json"),
    image_size=48,
    source_length=24,
    target_length=32,
    max_objects=2,
    answer_length=8,
    smoothing=0.1,
    search=Search(num_beams=2, max_length=8, normalize_scores=False),
  )
  vqa = dataclasses.replace(vqa, **(task or {}))
  free = dataclasses.replace(vqa, inference="beamsearch")
  base = Config(
    name="tiny questions",
    model=dataclasses.replace(OFA, vocab_size=size, freeze_resnet=True),
    task=vqa,
    batch_size=16,
    steps=6,
    log_every=2,
    save_every=3,
    optim=OFA_OPTIM,
    precision="fp32",
    ema=0.9,
    evals=(Eval(name="valid", task=vqa), Eval(name="beam", task=free)) if evals else (),
  )
  return dataclasses.replace(base, **changes)
