"""Fine-tunes a pretrained Chinese OFA on captions of goods, MUGE's (ECommerce-IC).

  python -m ofa_jax.train --config=configs/ofa_muge.py[:SIZE] --workdir=D
  python -m ofa_jax.evaluate --config=configs/ofa_muge.py:large,test --checkpoint=D --results=R

SIZE is base (the default) or large. The original publishes fine-tuned models and how they are
searched with (8 beams, at most 128 tokens); how they were trained it does not say. Here it is as
with English captions, stage 1. With "test" the evaluation is of the test split, whose captions only
the benchmark has: `R/test_predict.json` holds the answers.

Data: `muge_caption_data/caption_{train,valid,test}.tsv` under OFA_JAX_DATA, which is datasets/
where it is not set, in the columns of the English files: uniq-id, image-id, caption, objects,
image.
Hardware: any number of devices gives the same updates, and `accum` makes them fit. BatchNorm has
the statistics of a whole batch (of a part, with `accum`).

Answers and what people wrote are compared character by character, without ASCII punctuation. CIDEr
counts document frequencies over the references of the evaluation.

Published by the original, BLEU-4, ROUGE-L and CIDEr-D (not measured again here; by the benchmark's
own cutting into words):

  base    26.23 58.95 50.70
  large   27.32 59.20 53.51
"""

import dataclasses
import os

from ofa_jax.config import Config, Eval, Optim
from ofa_jax.models import ofa
from ofa_jax.tasks.caption import ANSWERING, Caption

SIZES = ("base", "large")
CHINESE_WORDS = 30325


def get_config(argument: str = "base") -> Config:
  words = [word for word in argument.split(",") if word]
  unknown = [word for word in words if word not in (*SIZES, "test")]
  if unknown:
    raise ValueError(
      f"Expected a size out of {', '.join(SIZES)} and perhaps test, found {', '.join(unknown)}"
    )
  size = next((word for word in words if word in SIZES), "base")
  data = f"{os.environ.get('OFA_JAX_DATA', 'datasets')}/muge_caption_data"
  task = Caption(
    train=(f"{data}/caption_train.tsv",),
    valid=(f"{data}/caption_valid.tsv",),
    test=(f"{data}/caption_test.tsv",),
    tokenizer=f"OFA-CN-{size}",
    source_length=16,
    target_length=132,
    smoothing=0.1,
    drop_worst=0.2,
    drop_worst_after=2500 if size == "large" else 6000,
    search=dataclasses.replace(ANSWERING.search, num_beams=8, max_length=128),
  )
  evaluation = Eval(name="valid", task=task, every=500)
  if "test" in words:
    evaluation = Eval(name="test", task=task, split="test")
  return Config(
    name=f"OFA-CN-{size}: captions of MUGE",
    init=f"OFA-CN-{size}",
    model=ofa.config(
      size,
      dropout=0.1,
      encoder_drop_path=0.1,
      decoder_drop_path=0.1,
      vocab_size=CHINESE_WORDS,
    ),
    task=task,
    batch_size=128,
    epochs=2 if size == "large" else 5,
    seed=1,
    log_every=10,
    save_every=500,
    best_metric=None if "test" in words else "valid/cider",
    optim=Optim(
      lr=1e-5,
      adam="fairseq",
      weight_decay=0.01,
      clip_norm=1.0,
      schedule="polynomial",
      warmup_ratio=0.06,
      freeze=ofa.FREEZE["embedding"],
    ),
    remat="full" if size == "large" else "none",
    evals=(evaluation,),
  )
