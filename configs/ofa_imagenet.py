"""Fine-tunes a pretrained OFA on ImageNet-1K: the class of a picture, among the names of all.

  python -m ofa_jax.train --config=configs/ofa_imagenet.py[:SIZE[,tfds]] --workdir=D
  python -m ofa_jax.evaluate --config=configs/ofa_imagenet.py:large,test --checkpoint=D --results=R

SIZE is tiny, medium, base, large (the default) or huge. The original publishes the script of large,
which the others follow. It validates on a fifth of the validation pictures; with "test" the
evaluation is of all 50,000.

Data: `imagenet_1k_data/imagenet_1k_{train,val_subset,val}.tsv` and the names of the classes,
`imagenet_1k_data/class2label_new.pkl`, under OFA_JAX_DATA, which is datasets/ where it is not set,
all as the original distributes them. The files are read in any order: no copies shuffled
beforehand. With "tfds" the pictures are those of TensorFlow Datasets, `imagenet2012`, which
prepares them once from the archives of image-net.org; the names are those of the same file, in the
order of its numbers, which have to be the places of the classes n01440764 to n15075141.
Hardware: the original's 16 GPUs (2 nodes of 8) with 4 rows each and 4 parts an update. Here any
number of devices gives the same updates, and `accum` makes them fit. BatchNorm has the statistics
of a whole batch (of a part, with `accum`), the original's those of each GPU.

  --config.task.augment=repaired    AutoContrast that does not make bright pictures white
  --config.ema=0.9999               evaluates a moving average, which the original's can, too

Published, top-1 of all validation pictures in percent (not measured again here): large 85.0; with
the encouraging loss (--config.task.log_end=0.75) 85.6.
"""

import dataclasses

from ofa_jax.config import Config, Eval
from ofa_jax.configs.ofa_finetune import finetune, folder, read
from ofa_jax.tasks.image_classify import ImageClassify


def get_config(argument: str = "large") -> Config:
  size, words = read(argument, default="large", words=("test", "tfds"))
  data = folder("imagenet_1k_data")
  files = {
    "train": (f"{data}/imagenet_1k_train.tsv",),
    "valid": (f"{data}/imagenet_1k_val_subset.tsv",),
    "test": (f"{data}/imagenet_1k_val.tsv",),
  }
  if "tfds" in words:
    files = {
      "train": ("tfds:imagenet2012",),
      "valid": ("tfds:imagenet2012:validation[:20%]",),
      "test": ("tfds:imagenet2012:validation",),
    }
  task = ImageClassify(
    **files,
    answers=f"{data}/class2label_new.pkl",
    tokenizer=f"OFA-{size}",
    smoothing=0.1,
  )
  split = "test" if "test" in words else "valid"
  config = finetune(size, task, name="ImageNet-1K", batch_size=256, lr=5e-5, freeze_embedding=True)
  return dataclasses.replace(
    config,
    steps=160_000,
    save_every=0,
    save_every_epochs=1,
    best_metric="valid/score" if split == "valid" else None,
    optim=dataclasses.replace(config.optim, warmup=1000, warmup_ratio=0.0),
    evals=(Eval(name=split, task=task, split=split, every_epochs=1),),
  )
