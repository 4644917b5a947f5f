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

from ofa_jax.config import Config, Eval
from ofa_jax.configs.ofa_finetune import finetune, folder, read
from ofa_jax.tasks.vqa import VQA

SIZES = ("base", "large", "huge")


def get_config(argument: str = "base") -> Config:
  size, words = read(argument, sizes=SIZES, words=("test", "zeroshot"))
  data = folder("vqa_data")
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
  config = finetune(
    size,
    task,
    name="VQA",
    batch_size=512,
    lr=5e-5,
    drop_path=0.1 if size == "base" else 0.2,
    warmup_ratio=0.04,
    freeze_embedding=True,
  )
  schedule = {"epochs": 15}
  if size != "base":
    optim = dataclasses.replace(config.optim, warmup=1000, warmup_ratio=0.0)
    schedule = {"steps": 40_000, "optim": optim}
  evaluation = Eval(name="valid", task=task, every_epochs=1)
  if "test" in words:
    evaluation = Eval(name="test", task=task, split="test")
  return dataclasses.replace(
    config,
    **schedule,
    save_every=0,
    save_every_epochs=1,
    best_metric=None if "test" in words else "valid/vqa_score",
    ema=0.9999,
    evals=(evaluation,),
  )
