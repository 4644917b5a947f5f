"""Fine-tunes a pretrained Chinese OFA on reading: the texts in pictures of scenes or documents.

  python -m ofa_jax.train --config=configs/ofa_ocr.py[:SIZE[,document]] --workdir=D
  python -m ofa_jax.evaluate --config=configs/ofa_ocr.py:large,test --checkpoint=D --results=R

SIZE is base (the default) or large. With "document" pictures are long lines of documents, which are
cut into four pieces that stand one over the other. The original publishes fine-tuned models and how
they are searched with; how they were trained stands in its paper (arXiv 2212.09297) in part only.
Here it is as with English captions, stage 1, and the embeddings are trained. With "test" the
evaluation is of the test split.

Data: `ocr_data/ocr_{scene,document}_{train,val,test}.tsv` under OFA_JAX_DATA, which is datasets/
where it is not set, with three columns: id, image, text. It needs OpenCC:
`pip install opencc-python-reimplemented`.
Hardware: any number of devices gives the same updates, and `accum` makes them fit. BatchNorm has
the statistics of a whole batch (of a part, with `accum`).

The original publishes figures of its fine-tuned models in that paper; nothing was measured again
here.
"""

import os

from ofa_jax.config import Config, Eval, Optim
from ofa_jax.models import ofa
from ofa_jax.tasks.ocr import OCR

SIZES = ("base", "large")
CHINESE_WORDS = 30325


def get_config(argument: str = "base") -> Config:
  words = [word for word in argument.split(",") if word]
  unknown = [word for word in words if word not in (*SIZES, "document", "test")]
  if unknown:
    raise ValueError(
      f"Expected a size out of {', '.join(SIZES)} and perhaps document or test, found "
      f"{', '.join(unknown)}"
    )
  size = next((word for word in words if word in SIZES), "base")
  kind = "document" if "document" in words else "scene"
  data = f"{os.environ.get('OFA_JAX_DATA', 'datasets')}/ocr_data"
  task = OCR(
    train=(f"{data}/ocr_{kind}_train.tsv",),
    valid=(f"{data}/ocr_{kind}_val.tsv",),
    test=(f"{data}/ocr_{kind}_test.tsv",),
    tokenizer=f"OFA-CN-{size}",
    document=kind == "document",
    smoothing=0.1,
  )
  split = "test" if "test" in words else "valid"
  return Config(
    name=f"OFA-CN-{size}: OCR, {kind}",
    init=f"OFA-CN-{size}",
    model=ofa.config(
      size,
      dropout=0.1,
      encoder_drop_path=0.1,
      decoder_drop_path=0.1,
      vocab_size=CHINESE_WORDS,
    ),
    task=task,
    batch_size=128,
    epochs=10,
    seed=1,
    log_every=10,
    save_every=0,
    save_every_epochs=1,
    best_metric="valid/acc" if split == "valid" else None,
    optim=Optim(
      lr=5e-5,
      adam="fairseq",
      weight_decay=0.01,
      clip_norm=1.0,
      schedule="polynomial",
      warmup_ratio=0.06,
    ),
    remat="full" if size == "large" else "none",
    evals=(Eval(name=split, task=task, split=split, every_epochs=1),),
  )
