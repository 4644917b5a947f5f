"""Fine-tunes a pretrained OFA on a task of GLUE; see `ofa_jax/tasks/glue.py` for the seven.

  python -m ofa_jax.train --config=configs/ofa_glue.py:PART[,SIZE][,tfds] --workdir=D
  python -m ofa_jax.evaluate --config=configs/ofa_glue.py:cola,large,tfds,test --checkpoint=D@best
    --results=R

PART is cola, mnli, mrpc, qnli, qqp, rte or sst2; SIZE is tiny, medium, base, large (the default,
and the only one that the original publishes scripts of) or huge. With "test" no labels are known,
and the file for GLUE's server is written, such as `R/test_CoLA.tsv`; of MNLI two.

Data: `{part}_data/{part}_{train,dev,test}.tsv` under OFA_JAX_DATA, which is datasets/ where it is
not set, with the columns of the original's files (it distributes no test split); with "tfds" the
data set "glue/PART" of TensorFlow Datasets, downloaded to TFDS_DATA_DIR and read without
TensorFlow.
Hardware: the original's 2 GPUs for CoLA, MRPC and RTE, 4 for SST-2, 8 for the others. Here any
number of devices gives the same updates.

The original searches a grid of its rates, epochs and batch sizes, which are in `GRID`; here is one
point of it, and `--config.optim.lr=3e-5` another. It validates so often as `GRID` says; here at
least 20 updates lie between two evaluations, since each is stored.

A row has no picture, so that its text is the whole work: `--config.task.source_length=128
--config.task.target_length=136` is quicker than the room here, and says what it cuts.

OFA-Large in its paper, dev accuracy in percent. Of these figures only that of SST-2 could be looked
up again (a public list of results); nothing was measured again here:

  SST-2 96.6   RTE 91.0   MRPC 91.7   QQP 92.5   QNLI 94.8   MNLI 90.2
"""

import dataclasses

from ofa_jax.config import Config, Eval
from ofa_jax.configs.ofa_finetune import finetune, folder, one_of, read
from ofa_jax.tasks.glue import PARTS, Glue

# Rows of an update, those of one GPU times GPUs times parts, and updates between evaluations. The
# first number of rows is what is used here.
GRID = {
  "cola": ((64, 128, 32), 10),
  "mnli": ((256, 128), 1000),
  "mrpc": ((64, 128, 32), 10),
  "qnli": ((256, 128), 500),
  "qqp": ((256, 128), 1000),
  "rte": ((64, 128, 32), 10),
  "sst2": ((128, 64), 50),
}
RATES = (5e-5, 1e-4, 7e-5, 6e-5, 3e-5)
EPOCHS = (7, 5, 10)
LENGTHS = {"cola": 120, "sst2": 120, "mrpc": 184}  # of a question; others have what the task has


def get_config(argument: str = "cola") -> Config:
  size, words = read(argument, default="large", words=(*PARTS, "tfds", "test"))
  part = one_of(words, tuple(PARTS), what="part") or "cola"
  data = folder(f"{part}_data")
  files = {"train": "train", "valid": "dev", "test": "test"}
  named = {k: (f"{data}/{part}_{v}.tsv",) for k, v in files.items()}
  if "tfds" in words:
    named = dict.fromkeys(files, (f"tfds:glue/{part}",))
  length = LENGTHS.get(part, Glue.source_length)
  task = Glue(
    part=part, tokenizer=f"OFA-{size}", source_length=length, target_length=length + 8, **named
  )
  sizes, every = GRID[part]
  every = max(every, 20)
  evals = (Eval(name="valid", task=task, every=every),)
  if "test" in words:
    evals = (Eval(name="test", task=task, split="test"),)
    if part == "mnli":
      other = ("tfds:glue/mnli:test_mismatched",) if "tfds" in words else _mismatched(task.test)
      mismatched = dataclasses.replace(task, test=other, submission="MNLI-mm.tsv")
      evals += (Eval(name="test", task=mismatched, split="test"),)
  return dataclasses.replace(
    finetune(size, task, name=part, batch_size=sizes[0], lr=RATES[0]),
    epochs=EPOCHS[0],
    save_every=every,
    keep=1,
    best_metric=None if "test" in words else f"valid/{'mcc' if part == 'cola' else 'acc'}",
    evals=evals,
  )


def _mismatched(files: tuple[str, ...]) -> tuple[str, ...]:
  """Where MNLI's other test split is expected to lie."""
  return tuple(path.replace(".tsv", "_mismatched.tsv") for path in files)
