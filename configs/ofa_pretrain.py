r"""Pretrains an OFA on all of its objectives, as the original's scripts do, from a released model.

  python -m ofa_jax.train --config=configs/ofa_pretrain.py[:SIZE] --workdir=D

SIZE is tiny, medium, base (the default), large or huge. The original has scripts for base and
large, which differ in the size alone; they go on from a released model. `--config.init=None` begins
from scratch. (Of what the released models themselves were trained with, only the paper tells.)

Data: `pretrain_data/{vision_language,text,image,detection}_examples.tsv` and
`pretrain_data/negative_sample/{type2ans.json,object.txt,all_captions.txt}` under OFA_JAX_DATA,
which is datasets/ where it is not set, as the original distributes its examples. What is in them,
files of your own, and what is repaired: docs/pretraining.md.

  --config.task.text=()                  leaves texts out, and so for task.image, task.detection
  --config.task.augment_by=epoch         the original's fault: one augmentation for all of an epoch

Hardware: the original's single GPU with four pairs an update, every second of which has two texts,
a picture and a detection besides; here every update of eight pairs has them. N devices want
--config.batch_size=8N or more, and `accum` makes it fit.
"""

import dataclasses

from ofa_jax.config import Config
from ofa_jax.configs.ofa_finetune import finetune, folder, read, released
from ofa_jax.tasks.pretrain import Pretrain


def get_config(argument: str = "base") -> Config:
  size, _ = read(argument)
  data = folder("pretrain_data")
  task = Pretrain(
    train=(f"{data}/vision_language_examples.tsv",),
    text=(f"{data}/text_examples.tsv",),
    image=(f"{data}/image_examples.tsv",),
    detection=(f"{data}/detection_examples.tsv",),
    negatives=f"{data}/negative_sample",
    tokenizer=released(size),
  )
  config = finetune(size, task, name="pretraining", batch_size=8, lr=1e-4, warmup_ratio=0.01)
  return dataclasses.replace(
    config,
    epochs=50,
    save_every=6000,
    keep=15,
    optim=dataclasses.replace(config.optim, clip_norm=5.0),
  )
