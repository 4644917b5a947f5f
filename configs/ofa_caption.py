r"""Fine-tunes a pretrained OFA on captions, both stages of the original's run scripts.

  python -m ofa_jax.train --config=configs/ofa_caption.py[:SIZE[,el|el_db]] --workdir=D
  python -m ofa_jax.train --config=configs/ofa_caption.py:SIZE,scst --workdir=E \
    --config.init=D@best

SIZE is tiny, medium, base (the default), large or huge. The original publishes the scripts of base
and large; tiny and medium follow that of base, huge that of large. With "el" the encouraging loss
is added (arXiv 2110.06537), with "el_db" the tokens that cost least are left out as well; in the
original's script of that name they are not, since its option does nothing. Both are published for
large. "scst" is the second stage: from what the first one left, the model learns from the CIDEr-D
of the captions that it writes itself. Unlike the original's, BatchNorm keeps its statistics:
--config.model.freeze_resnet=False trains it.

Data: `caption_data/caption_{stage1_train,stage2_train,val,test}.tsv` under OFA_JAX_DATA, which is
datasets/ where it is not set, and the document frequencies in `caption_data/cider_cached_tokens/`,
all as the original distributes them. The files are read in any order: no copies shuffled
beforehand.
Hardware: the original's 4 GPUs with 8 images each and 4 parts an update. Here any number of devices
gives the same updates, and `accum` makes them fit; sizes on TPUs are in docs/scaling.md. BatchNorm
has the statistics of a whole batch (of a part, with `accum`), the original's those of each GPU.

Published after this stage, COCO Karpathy test split, CIDEr:

  tiny 119.0   medium 130.4   base 138.2   large 142.2   huge 145.3
  large,el 140.3   large,el_db 140.4   (the scripts' own figures; none is measured again here)

After the second one, of the same README:

  tiny 128.7   medium 140.3   base 146.7   large 150.7   huge 154.9
"""

import dataclasses

from ofa_jax.config import Config, Eval
from ofa_jax.configs.ofa_finetune import BIG, finetune, folder, one_of, read
from ofa_jax.scoring.rewards import CiderD
from ofa_jax.tasks.caption import ANSWERING, Caption
from ofa_jax.tasks.reward import SelfCritical

LOSSES = ("el", "el_db", "scst")


def get_config(argument: str = "base") -> Config:
  size, words = read(argument, words=LOSSES)
  variant = one_of(words, LOSSES, what="loss")
  if variant == "scst":
    return _second_stage(size)
  data, big = folder("caption_data"), size in BIG
  task = Caption(
    train=(f"{data}/caption_stage1_train.tsv",),
    smoothing=0.1,
    drop_worst=0.2,
    drop_worst_after=2500 if big else 6000,
    **_evaluated(size),
  )
  if variant:
    worst = {"drop_worst": 0.05, "drop_worst_after": 2500}
    best = {"drop_best": 0.05, "drop_best_after": 2500} if variant == "el_db" else {}
    task = dataclasses.replace(task, log_end=0.75, **worst, **best)
  return dataclasses.replace(
    finetune(size, task, name="captions, stage 1", batch_size=128, lr=1e-5, freeze_embedding=True),
    epochs=2 if big else 5,
    save_every=500,
    best_metric="valid/cider",
    evals=(Eval(name="valid", task=task, every=500),),
  )


def _second_stage(size: str) -> Config:
  """Learning from CIDEr-D: the scripts of base and large differ in the last rate alone."""
  data = folder("caption_data")
  evaluated = _evaluated(size)
  task = SelfCritical(
    train=(f"{data}/caption_stage2_train.tsv",),
    reward=CiderD(frequencies=f"{data}/cider_cached_tokens/coco-train-words.p"),
    **evaluated,
  )
  config = finetune(
    size,
    task,
    name="captions, stage 2",
    batch_size=64,
    lr=1e-5,
    drop_path=0.0,
    freeze_embedding=True,
  )
  return dataclasses.replace(
    config,
    init=f"runs/ofa_caption_{size}@best",
    model=dataclasses.replace(config.model, dropout=0.0, freeze_resnet=True),
    optim=dataclasses.replace(config.optim, end_lr=2e-7 if size in BIG else 0.0),
    epochs=3,
    save_every=500,
    best_metric="valid/cider",
    evals=(Eval(name="valid", task=Caption(**evaluated), every=500),),
  )


def _evaluated(size: str) -> dict[str, object]:
  """What both stages are evaluated with."""
  data = folder("caption_data")
  wider = {"num_beams": 10, "temperature": 0.98, "length_penalty": 0.98} if size == "huge" else {}
  return {
    "valid": (f"{data}/caption_val.tsv",),
    "test": (f"{data}/caption_test.tsv",),
    "tokenizer": f"OFA-{size}",
    "frequencies": f"{data}/cider_cached_tokens/coco-valid-words.p",
    "search": dataclasses.replace(ANSWERING.search, **wider),
  }
