"""Fine-tunes a pretrained OFA on visual entailment, SNLI-VE.

  python -m ofa_jax.train --config=configs/ofa_snli_ve.py[:SIZE[,test]] --workdir=D
  python -m ofa_jax.evaluate --config=configs/ofa_snli_ve.py:base,zeroshot --checkpoint=OFA-base

SIZE is tiny, medium, base (the default), large or huge. The original publishes the scripts of base
and large; tiny and medium follow that of base, huge that of large. With "test" the evaluation is
of the test split. With "zeroshot" it is that of the original's script for a pretrained model:
without the premise, pictures of 384 pixels.

Data: `snli_ve_data/snli_ve_{train,dev,test}.tsv` under OFA_JAX_DATA, which is datasets/ where it
is not set, as the original distributes them. The files are read in any order.
Hardware: the original's 8 GPUs with 4 rows each and 8 parts an update. Here any number of devices
gives the same updates, and `accum` makes them fit. BatchNorm has the statistics of a whole batch
(of a part, with `accum`), the original's those of each GPU.

  --config.task.premise=False      the picture alone
  --config.task.prompt=none        the decoder does not read the question; or src, with its end

Published, dev and test accuracy in percent (not measured again here):

  tiny 85.3 85.2   medium 86.6 87.0   base 89.3 89.2   large 90.3 90.2   huge 91.0 91.2
"""

import dataclasses

from ofa_jax.config import Config, Eval
from ofa_jax.configs.ofa_finetune import BIG, finetune, folder, read
from ofa_jax.tasks.snli_ve import SnliVE


def get_config(argument: str = "base") -> Config:
  size, words = read(argument, words=("test", "zeroshot"))
  data, big = folder("snli_ve_data"), size in BIG
  task = SnliVE(
    train=(f"{data}/snli_ve_train.tsv",),
    valid=(f"{data}/snli_ve_dev.tsv",),
    test=(f"{data}/snli_ve_test.tsv",),
    tokenizer=f"OFA-{size}",
  )
  if "zeroshot" in words:
    task = dataclasses.replace(task, premise=False, image_size=384)
  split = "test" if "test" in words else "valid"
  lr, drop_path = (2e-5, 0.2) if big else (5e-5, 0.1)
  return dataclasses.replace(
    finetune(size, task, name="SNLI-VE", batch_size=256, lr=lr, drop_path=drop_path),
    epochs=6 if big else 5,
    save_every=0,
    save_every_epochs=1,
    best_metric="valid/snli_score" if split == "valid" else None,
    evals=(Eval(name=split, task=task, split=split, every_epochs=1),),
  )
