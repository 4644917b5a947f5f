"""Fine-tunes a Chinese-CLIP on your own pictures and captions.

  python -m ofa_jax.train --config=configs/cnclip_custom.py:MODEL --workdir=D \
    --config.task.train=my.csv [--config.task.valid=my_valid.csv]

MODEL is what the weights come from, and the sizes with them: a released name (ViT-B-16, which is
also the default, ViT-L-14, ViT-L-14-336, ViT-H-14, RN50), a model directory, a workdir, a Hugging
Face directory or a .pt file.

The data: a table of image files and captions (.csv, .tsv; columns `filepath` and `title`), .tar
shards of WebDataset, `NAME_imgs.tsv` beside `NAME_texts.jsonl`, or a folder: of the split `train`
in any of these forms, or of pictures with a .txt of the same name beside each. Without
`task.valid` the split `valid` of that folder is evaluated, or else a tenth of the pictures, which
is then not trained on; the log says so. docs/custom.md has an example from the beginning.

The recipe is for hundreds to ten thousands of pairs: a low rate with warm-up, pairs with one
caption as positives of each other, an evaluation and a checkpoint an epoch, the best one kept by
the recall of pictures by their captions.
"""

from ofa_jax import hub
from ofa_jax.config import Config, Eval, Optim
from ofa_jax.models import cnclip
from ofa_jax.models.clip_resnet import ResNetConfig
from ofa_jax.tasks.contrastive import Contrastive


def get_config(model: str = "ViT-B-16") -> Config:
  sizes, settings = hub.sizes_of(model)
  if hub.family_of(sizes).name != "cnclip":
    raise ValueError(
      f"Expected a Chinese-CLIP after the colon, found an OFA in {model}: configs/ofa_custom.py"
    )
  resnet = isinstance(sizes.vision, ResNetConfig)
  task = Contrastive(
    image_size=sizes.vision.image_size,
    context_length=settings["context_length"],
    augment="crop",
    multi_positive=True,
    hold_out=0.1,
  )
  return Config(
    name=f"Chinese-CLIP {model} on your own pictures",
    init=model,
    model=sizes,
    task=task,
    batch_size=32,
    epochs=10,
    log_every=5,
    save_every=0,
    save_every_epochs=1.0,
    keep=1,
    best_metric="valid/t2i_mean_recall",
    optim=Optim(
      lr=1e-5,
      b2=0.999 if resnet else 0.98,
      eps=1e-8 if resnet else 1e-6,
      weight_decay=0.001,
      no_decay=cnclip.NO_DECAY,
      warmup_ratio=0.1,
      clip_norm=1.0,
      clamp=cnclip.LOGIT_SCALE_BOUNDS,
    ),
    evals=(Eval(name="valid", task=task, every_epochs=1.0),),
  )
