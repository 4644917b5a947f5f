"""Fine-tunes a pretrained OFA on questions about images, VQA v2.

  python -m ofa_jax.train --config=configs/ofa_vqa.py[:SIZE[,test]] --workdir=D
  python -m ofa_jax.evaluate --config=configs/ofa_vqa.py:large,test --checkpoint=D --results=R
  python -m ofa_jax.evaluate --config=configs/ofa_vqa.py:large,zeroshot --checkpoint=OFA-large

SIZE is base (the default), large or huge. The original publishes the scripts of base and large;
huge follows that of large. With "test" the evaluation is of the test split, whose answers only
EvalAI has: `R/test_predict.json` is the file to send there. With "zeroshot" it is that of a
pretrained model: any answer, by 20 beams, and the decoder does not read the question.

Data: `vqa_data/vqa_{train,val,test}.tsv` and the list of 3,129 answers
`vqa_data/trainval_ans2label.pkl` under OFA_JAX_DATA, which is datasets/ where it is not set, all as
the original distributes them. The files are read in any order: no copies shuffled beforehand.
Hardware: the original's 32 GPUs (4 nodes of 8) with 4 rows each and 4 parts an update; the large
one is said to take 36 hours on A100s. Here any number of devices gives the same updates, and
`accum` makes them fit. BatchNorm has the statistics of a whole batch (of a part, with `accum`), the
original's those of each GPU.

Other evaluations are the same config with other fields:

  --config.task.inference=beamsearch                                     search in the list
  --config.task.inference=beamsearch --config.task.answers=None          any answer; in training
                                                                         "unconstrained"

Published, VQA v2, all answers scored with the moving average (not measured again here):

  base    test-dev 78.0   test-std 78.1
  large   test-dev 80.4   test-std 80.7   (the released weights: val 80.82, 79.87, 80.02; by beam
                                           search 80.15, 79.36, 79.48)
  huge    test-dev 82.0   test-std 82.0
"""

import dataclasses
import os

from ofa_jax.config import Config, Eval, MeshShape, Optim
from ofa_jax.models import ofa
from ofa_jax.tasks.vqa import VQA

SIZES = ("base", "large", "huge")


def get_config(argument: str = "base") -> Config:
  words = [word for word in argument.split(",") if word]
  unknown = [word for word in words if word not in (*SIZES, "test", "zeroshot")]
  if unknown:
    raise ValueError(
      f"Expected a size out of {', '.join(SIZES)} and perhaps test or zeroshot, found "
      f"{', '.join(unknown)}"
    )
  size = next((word for word in words if word in SIZES), "base")
  drop_path = 0.1 if size == "base" else 0.2
  data = f"{os.environ.get('OFA_JAX_DATA', 'datasets')}/vqa_data"
  task = VQA(
    train=(f"{data}/vqa_train.tsv",),
    valid=(f"{data}/vqa_val.tsv",),
    test=(f"{data}/vqa_test.tsv",),
    answers=f"{data}/trainval_ans2label.pkl",
    tokenizer=f"OFA-{size}",
    smoothing=0.1,
  )
  if "zeroshot" in words:
    search = dataclasses.replace(task.search, num_beams=20)
    any_answer = {"answers": None, "inference": "beamsearch", "prompt": "none", "max_objects": 0}
    task = dataclasses.replace(task, search=search, **any_answer)
  schedule = {"epochs": 15} if size == "base" else {"steps": 40_000}
  evaluation = Eval(name="valid", task=task, every_epochs=1)
  if "test" in words:
    evaluation = Eval(name="test", task=task, split="test")
  return Config(
    name=f"OFA-{size}: VQA",
    init=f"OFA-{size}",
    model=ofa.config(size, dropout=0.1, encoder_drop_path=drop_path, decoder_drop_path=drop_path),
    task=task,
    batch_size=512,
    **schedule,
    seed=1,
    log_every=10,
    save_every=0,
    save_every_epochs=1,
    best_metric=None if "test" in words else "valid/vqa_score",
    optim=Optim(
      lr=5e-5,
      adam="fairseq",
      weight_decay=0.01,
      clip_norm=1.0,
      schedule="polynomial",
      warmup=0 if size == "base" else 1000,
      warmup_ratio=0.04 if size == "base" else 0.0,
      freeze=ofa.FREEZE["embedding"],
    ),
    mesh=MeshShape(data=1, fsdp=-1) if size == "huge" else MeshShape(),
    remat="none" if size == "base" else "full",
    ema=0.9999,
    evals=(evaluation,),
  )
