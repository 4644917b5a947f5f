"""Fine-tunes an OFA to caption pictures as yours are captioned.

  python -m ofa_jax.train --config=configs/ofa_custom.py:MODEL --workdir=D \
    --config.task.train=my.csv [--config.task.valid=my_valid.csv]

MODEL is what the weights come from, and sizes and tokenizer with them: a released name (OFA-base,
which is also the default, OFA-tiny, OFA-medium, OFA-large, OFA-huge), a model directory, a workdir,
or a .pt file with the tokenizer's files beside it.

The data: all forms of configs/cnclip_custom.py, and OFA's TSV of captions (`task.columns` says
where uniq_id, image_id, image and caption are). Without `task.valid` a tenth of the pictures is
held out and evaluated, which the log says. docs/custom.md has an example from the beginning.
"""

import dataclasses

from ofa_jax import hub
from ofa_jax.config import Config, Eval, MeshShape, Optim
from ofa_jax.data import images
from ofa_jax.models import ofa
from ofa_jax.tasks.caption import Caption

PIXELS = 480  # of the released models


def get_config(model: str = "OFA-base") -> Config:
  size, colours = model.removeprefix("OFA-"), {}
  if model in hub.RELEASES and size in ofa.SIZES:
    sizes, pixels = ofa.config(size), PIXELS
  else:
    source = hub.open_model(model)
    if source.family.name != "ofa":
      raise ValueError(
        f"Expected an OFA after the colon, found another in {model}: configs/cnclip_custom.py"
      )
    sizes, pixels = source.config, source.image_size
    if source.settings["imagenet_normalization"]:
      colours = {"pixel_mean": images.IMAGENET_MEAN, "pixel_std": images.IMAGENET_STD}
  task = Caption(
    tokenizer=model,
    image_size=pixels,
    source_length=16,
    smoothing=0.1,
    hold_out=0.1,
    **colours,
  )
  big = sizes.encoder_layers >= 12
  return Config(
    name=f"{model}: captions of your own pictures",
    init=model,
    model=dataclasses.replace(
      sizes, dropout=0.1, encoder_drop_path=0.1, decoder_drop_path=0.1, freeze_resnet=True
    ),
    task=task,
    batch_size=16,
    epochs=5,
    log_every=5,
    save_every=0,
    save_every_epochs=1.0,
    keep=1,
    best_metric="valid/cider",
    optim=Optim(
      lr=1e-5,
      adam="fairseq",
      weight_decay=0.01,
      clip_norm=1.0,
      schedule="polynomial",
      warmup_ratio=0.06,
      freeze=ofa.FREEZE["embedding"],
    ),
    mesh=MeshShape(data=1, fsdp=-1) if size == "huge" else MeshShape(),
    remat="full" if big else "none",
    evals=(Eval(name="valid", task=task, every_epochs=1.0),),
  )
