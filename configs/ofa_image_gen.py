r"""Teaches a pretrained OFA to draw pictures of captions, both stages of the original's scripts.

  python -m ofa_jax.train --config=configs/ofa_image_gen.py[:SIZE] --workdir=D
  python -m ofa_jax.train --config=configs/ofa_image_gen.py:SIZE,clip --workdir=E \
    --config.init=D@best
  python -m ofa_jax.evaluate --config=configs/ofa_image_gen.py:SIZE,test --checkpoint=E --results=R

SIZE is base (the default) or large; the original publishes the scripts of large, base follows it.
The first stage learns the 1,024 codes of each picture. "clip" is the second one: the model draws
five pictures of each caption, and learns from what a CLIP thinks of them. With "test" the
evaluation is of the test split, with FID and the inception score. With "chinese" the model and the
captions are Chinese and a Chinese-CLIP judges: nobody has published such a model, and the prompt is
ours.

Data: `image_gen_data/{train,valid,test}.tsv` under OFA_JAX_DATA, which is datasets/ where it is not
set, in the columns of the original's files: id, codes, caption ("chinese": in the folder
`image_gen_data_chinese`). `tools/tokenize_images.py` makes them of pictures and captions.

Models beside the trained one, each a model directory under `image_gen_models` there, from
`tools/convert_torch_weights.py`: `vqgan` (the original's vqgan/last.ckpt with its model.yaml),
`clip` (OpenAI's ViT-B-16.pt) and, with "test", `inception` (torchvision's) and the original's
`gt_stat.npz`.

Hardware: the original's 32 GPUs, with 4 captions each and 4 parts an update in the first stage, 1
in the second. Here any number of devices gives the same updates, and `accum` makes them fit.

Published (not measured again here): a CLIP similarity of about 0.325 after the first stage and
0.340 after the second (the scripts' own figures, Large, the best of 24 pictures); in the paper,
COCO test split, FID 10.5, CLIPSIM 34.4 and inception score 31.1.
"""

import dataclasses

from ofa_jax.config import Config, Eval
from ofa_jax.configs.ofa_finetune import CHINESE_SIZES, finetune, folder, read, released
from ofa_jax.tasks.image_gen import ImageGen
from ofa_jax.tasks.image_reward import ImageReward

STEPS, WARMUP = 40_000, 2000
REWARDED_STEPS = 5000
CHINESE_CLIP = "ViT-B-16"


def get_config(argument: str = "base") -> Config:
  size, words = read(argument, sizes=CHINESE_SIZES, words=("clip", "chinese", "test"))
  chinese, rewarded = "chinese" in words, "clip" in words
  models = folder("image_gen_models")
  data = folder("image_gen_data_chinese" if chinese else "image_gen_data")
  files = {
    **{split: (f"{data}/{split}.tsv",) for split in ("train", "valid", "test")},
    "columns": (0, 2, 1),
    "tokenizer": released(size, chinese=chinese),
  }
  helpers = {
    "codec": f"{models}/vqgan",
    "judge": CHINESE_CLIP if chinese else f"{models}/clip",
  }
  evaluated = ImageGen(**files, **helpers)
  if "test" in words:
    measures = {"inception": f"{models}/inception", "statistics": f"{models}/gt_stat.npz"}
    evaluated = dataclasses.replace(evaluated, **measures)
  task = ImageReward(**files, **helpers) if rewarded else ImageGen(**files)
  config = finetune(
    size,
    task,
    name=f"text to image, stage {1 + rewarded}",
    batch_size=32 if rewarded else 512,
    lr=1e-6 if rewarded else 1e-3,
    drop_path=0.0 if rewarded else 0.1,
    warmup_ratio=0.0,
    chinese=chinese,
  )
  model = dataclasses.replace(config.model, code_image_size=task.image_size)
  evaluation = Eval(name="valid", task=evaluated, every_epochs=3, batch_size=64)
  if rewarded:
    model = dataclasses.replace(model, dropout=0.0, freeze_resnet=True)
    evaluation = dataclasses.replace(evaluation, every_epochs=0, every=200, batch_size=None)
  if "test" in words:
    evaluation = Eval(name="test", task=evaluated, split="test", batch_size=64)
  return dataclasses.replace(
    config,
    init=f"runs/ofa_image_gen_{size}@best" if rewarded else config.init,
    model=model,
    optim=dataclasses.replace(config.optim, warmup=0 if rewarded else WARMUP),
    steps=REWARDED_STEPS if rewarded else STEPS,
    save_every=200 if rewarded else 1000,
    best_metric=None if "test" in words else "valid/score",
    remat="full",
    accum=1,
    evals=(evaluation,),
  )
