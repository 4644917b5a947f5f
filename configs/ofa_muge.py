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

Answers and what people wrote are compared character by character, without ASCII punctuation; of the
benchmark it is said that letters or digits in a row are one word to it. CIDEr counts document
frequencies over the references of the evaluation. The benchmark takes a line of JSON for each
picture, {"image_id", "text"}; the original writes a list of {"image_id", "caption"}, as here.

Published by the original, BLEU-4, ROUGE-L and CIDEr-D (not measured again here; by the benchmark):

  base    26.23 58.95 50.70
  large   27.32 59.20 53.51
"""

import dataclasses

from ofa_jax.config import Config, Eval
from ofa_jax.configs.ofa_finetune import CHINESE_SIZES, finetune, folder, read
from ofa_jax.tasks.caption import ANSWERING, Caption


def get_config(argument: str = "base") -> Config:
  size, words = read(argument, sizes=CHINESE_SIZES, words=("test",))
  data = folder("muge_caption_data")
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
  return dataclasses.replace(
    finetune(
      size,
      task,
      name="captions of MUGE",
      batch_size=128,
      lr=1e-5,
      chinese=True,
      freeze_embedding=True,
    ),
    epochs=2 if size == "large" else 5,
    save_every=500,
    best_metric=None if "test" in words else "valid/cider",
    evals=(evaluation,),
  )
