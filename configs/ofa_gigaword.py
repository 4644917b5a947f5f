"""Fine-tunes a pretrained OFA on summaries of articles, Gigaword.

  python -m ofa_jax.train --config=configs/ofa_gigaword.py[:SIZE] --workdir=D
  python -m ofa_jax.evaluate --config=configs/ofa_gigaword.py:large,test --checkpoint=D@best

SIZE is tiny, medium, base, large (the default, and the only one that the original publishes a
script of) or huge. With "test" the evaluation is of the test split, and ROUGE is told as in the
original's last evaluation, too: by the median of resampled means. It needs `pip install
rouge-score`.

Data: `gigaword_data/gigaword_{train,dev,test}.tsv` under OFA_JAX_DATA, which is datasets/ where it
is not set, as the original distributes them.
Hardware: the original's 4 GPUs with 64 rows each and 2 parts an update. Here any number of devices
gives the same updates, and `accum` makes them fit.

A row has no picture, so that its text is the whole work: `--config.task.source_length=128` is
quicker than the original's 512 tokens, and says what it cuts.

Published for OFA-Large on the test split: ROUGE-L 36.43 (not measured again here).
"""

import os

from ofa_jax.config import Config, Eval, MeshShape, Optim
from ofa_jax.models import ofa
from ofa_jax.tasks.gigaword import Gigaword


def get_config(argument: str = "large") -> Config:
  words = [word for word in argument.split(",") if word]
  unknown = [word for word in words if word not in (*ofa.SIZES, "test")]
  if unknown:
    raise ValueError(
      f"Expected a size out of {', '.join(ofa.SIZES)} and perhaps test, found {', '.join(unknown)}"
    )
  size = next((word for word in words if word in ofa.SIZES), "large")
  big = size in ("large", "huge")
  split = "test" if "test" in words else "valid"
  data = f"{os.environ.get('OFA_JAX_DATA', 'datasets')}/gigaword_data"
  task = Gigaword(
    train=(f"{data}/gigaword_train.tsv",),
    valid=(f"{data}/gigaword_dev.tsv",),
    test=(f"{data}/gigaword_test.tsv",),
    tokenizer=f"OFA-{size}",
    smoothing=0.1,
    noise=0.2,
    bootstrap=split == "test",
  )
  return Config(
    name=f"OFA-{size}: Gigaword",
    init=f"OFA-{size}",
    model=ofa.config(size, dropout=0.1, encoder_drop_path=0.1, decoder_drop_path=0.1),
    task=task,
    batch_size=512,
    epochs=6,
    seed=1,
    log_every=10,
    save_every=2500,
    best_metric="valid/rougeL_f1" if split == "valid" else None,
    optim=Optim(
      lr=1e-4,
      adam="fairseq",
      weight_decay=0.01,
      clip_norm=1.0,
      schedule="polynomial",
      warmup_ratio=0.06,
    ),
    mesh=MeshShape(data=1, fsdp=-1) if size == "huge" else MeshShape(),
    remat="full" if big else "none",
    evals=(Eval(name=split, task=task, split=split, every=2500),),
  )
