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

import dataclasses

from ofa_jax.config import Config, Eval
from ofa_jax.configs.ofa_finetune import finetune, folder, read
from ofa_jax.tasks.gigaword import Gigaword


def get_config(argument: str = "large") -> Config:
  size, words = read(argument, default="large", words=("test",))
  split = "test" if "test" in words else "valid"
  data = folder("gigaword_data")
  task = Gigaword(
    train=(f"{data}/gigaword_train.tsv",),
    valid=(f"{data}/gigaword_dev.tsv",),
    test=(f"{data}/gigaword_test.tsv",),
    tokenizer=f"OFA-{size}",
    smoothing=0.1,
    noise=0.2,
    bootstrap=split == "test",
  )
  return dataclasses.replace(
    finetune(size, task, name="Gigaword", batch_size=512, lr=1e-4),
    epochs=6,
    save_every=2500,
    best_metric="valid/rougeL_f1" if split == "valid" else None,
    evals=(Eval(name=split, task=task, split=split, every=2500),),
  )
