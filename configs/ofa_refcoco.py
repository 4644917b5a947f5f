"""Fine-tunes a pretrained OFA on visual grounding: RefCOCO, RefCOCO+, RefCOCOg, also in Chinese.

  python -m ofa_jax.train --config=configs/ofa_refcoco.py[:DATA,SIZE] --workdir=D
  python -m ofa_jax.train --config=configs/ofa_refcoco.py:large,prompt --workdir=D
  python -m ofa_jax.evaluate --config=configs/ofa_refcoco.py:refcoco+,large,testA --checkpoint=D
  python -m ofa_jax.evaluate --config=configs/ofa_refcoco.py:large,zeroshot --checkpoint=OFA-large

DATA is refcoco (the default), refcoco+ or refcocog; SIZE is tiny, medium, base (the default), large
or huge. The original publishes the scripts of base and large; tiny and medium follow that of base,
huge that of large. With testA or testB (RefCOCOg: test) the evaluation is of that split. With
"zeroshot" it is that of the original's script for a pretrained model, pictures of 480 pixels. With
"chinese" texts, prompt and vocabulary are Chinese; the original publishes models of base and large,
and no script that trains them. With "el" the encouraging loss is added, as in the original's
scripts of that name for large. With "prompt", "adapter", "bitfit" or "lora" few parameters are
trained (configs/ofa_tuning.py), by the original's 100 epochs of 1,024 rows, pictures of 480 pixels.

Data: `refcoco_data/refcoco_{train,val,testA,testB}.tsv`, `refcocoplus_data/refcocoplus_*.tsv`,
`refcocog_data/refcocog_{train,val,test}.tsv` under OFA_JAX_DATA, which is datasets/ where it is not
set, as the original distributes them; the Chinese ones are `refcoco_cn_data/` with the same names
in it, and other columns. The files are read in any order: no copies shuffled beforehand.
Hardware: the original's 4 GPUs with 4 rows each and 8 parts an update. Here any number of devices
gives the same updates, and `accum` makes them fit. BatchNorm has the statistics of a whole batch
(of a part, with `accum`), the original's those of each GPU.

  --config.task.clip=True        boxes that reach over their picture's edge end there

Published, Acc@0.5 in percent (not measured again here): RefCOCO and RefCOCO+ val, testA, testB;
RefCOCOg val-u, test-u:

  tiny      80.20 84.07 75.00   68.22 75.13 57.66   72.02 69.74
  medium    85.34 87.68 77.92   76.09 83.04 66.25   78.76 78.58
  base      88.48 90.67 83.30   81.39 87.15 74.29   82.29 82.31
  large     90.05 92.93 85.26   85.80 89.87 79.22   85.89 86.55
  huge      92.04 94.03 88.44   87.86 91.70 80.71   88.07 88.78
  chinese
    base    82.18 86.07 76.68   69.38 77.26 60.14   73.57 72.53
    large   82.84 86.54 76.50   71.30 78.56 61.85   71.96 71.30
"""

import dataclasses

from ofa_jax.config import Config, Eval
from ofa_jax.configs.ofa_finetune import BIG, finetune, folder, one_of, read, released, split
from ofa_jax.configs.ofa_tuning import KINDS, tuned
from ofa_jax.tasks.refcoco import RefCOCO

DATA = {"refcoco": "RefCOCO", "refcoco+": "RefCOCO+", "refcocog": "RefCOCOg"}
SPLITS = {"refcoco": ("testA", "testB"), "refcoco+": ("testA", "testB"), "refcocog": ("test",)}
WORDS = ("zeroshot", "chinese", "el")


def get_config(argument: str = "refcoco,base") -> Config:
  data = one_of(split(argument), tuple(DATA), what="data set") or "refcoco"
  size, words = read(argument, words=(*DATA, *SPLITS[data], *WORDS, *KINDS))
  kind = one_of(words, KINDS, what="way of tuning")
  test = one_of(words, SPLITS[data], what="split")
  chinese, big = "chinese" in words, size in BIG
  file = data.replace("+", "plus")
  place = folder("refcoco_cn_data" if chinese else f"{file}_data")
  task = RefCOCO(
    train=(f"{place}/{file}_train.tsv",),
    valid=(f"{place}/{file}_val.tsv",),
    test=(f"{place}/{file}_{test or SPLITS[data][0]}.tsv",),
    columns=(0, 3, 1, 2) if chinese else (0, 4, 2, 3),
    tokenizer=released(size, chinese=chinese),
    image_size=480 if kind or "zeroshot" in words else 512,
    smoothing=0.1,
    log_end=0.75 if "el" in words else None,
  )
  if test is not None:
    evaluation = Eval(name=test, task=task, split="test")
  else:  # the training scripts' --eval-args forbid no repetition; those of evaluations do
    free = dataclasses.replace(task.search, no_repeat_ngram_size=0)
    task = dataclasses.replace(task, search=free)
    evaluation = Eval(name="valid", task=task, every=500, every_epochs=1)
  config = finetune(
    size,
    task,
    name=DATA[data],
    batch_size=1024 if kind else 128,
    lr=3e-5 if big else 5e-5,
    drop_path=0.2 if big else 0.1,
    chinese=chinese,
  )
  config = dataclasses.replace(
    config,
    epochs=100 if kind else 12 if data == "refcocog" and not big else 10,
    save_every=500,
    save_every_epochs=1,
    keep=1,
    best_metric="valid/score" if test is None else None,
    evals=(evaluation,),
  )
  return tuned(config, kind) if kind else config
