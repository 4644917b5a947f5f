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

import dataclasses

from ofa_jax.config import Config, Eval
from ofa_jax.configs.ofa_finetune import CHINESE_SIZES, finetune, folder, read
from ofa_jax.tasks.ocr import OCR


def get_config(argument: str = "base") -> Config:
  size, words = read(argument, sizes=CHINESE_SIZES, words=("document", "test"))
  kind = "document" if "document" in words else "scene"
  data = folder("ocr_data")
  task = OCR(
    train=(f"{data}/ocr_{kind}_train.tsv",),
    valid=(f"{data}/ocr_{kind}_val.tsv",),
    test=(f"{data}/ocr_{kind}_test.tsv",),
    tokenizer=f"OFA-CN-{size}",
    document=kind == "document",
    smoothing=0.1,
  )
  split = "test" if "test" in words else "valid"
  return dataclasses.replace(
    finetune(size, task, name=f"OCR, {kind}", batch_size=128, lr=5e-5, chinese=True),
    epochs=10,
    save_every=0,
    save_every_epochs=1,
    best_metric="valid/acc" if split == "valid" else None,
    evals=(Eval(name=split, task=task, split=split, every_epochs=1),),
  )
