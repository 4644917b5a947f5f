# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Search in your own pictures
#
# A Chinese-CLIP is fine-tuned on a CSV of pictures and captions, evaluated before and after, and
# asked for pictures by a text and by a picture. So that nothing is downloaded it begins with the
# quickstart's small model, which learns scanned digits first. With `MODEL = "ViT-B-16"` the same
# cells begin with a released model, and with your own `my.csv` they are about your pictures: [the
# guide](../docs/custom.md) has more on both.

# %%
import csv
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

import ofa_jax
from ofa_jax import evaluate
from ofa_jax.configs import cnclip_custom, quickstart
from ofa_jax.data.quickstart import CLASS_NAMES, scans
from ofa_jax.train import train

WORK = Path(os.environ.get("OFA_JAX_NOTEBOOKS", "runs/notebooks"))
STEPS = int(os.environ.get("OFA_JAX_NOTEBOOK_STEPS", 150))  # of each training

# %% [markdown]
# ## A model to begin with
#
# It knows digits by their Chinese names. A run is a folder, and a model for everything that takes
# one; who starts a run again that is finished has it at once.

# %%
config = quickstart.get_config()
config.steps, config.evals = STEPS, ()
train(config, str(WORK / "digits"))
MODEL = str(WORK / "digits")

# %% [markdown]
# ## Your pictures
#
# A CSV with the columns `filepath` and `title` is all that has to be prepared. This one is of 400
# scans in red or blue ink. The model knows the digits, and has never seen a colour.

# %%
photos = WORK / "photos"
photos.mkdir(parents=True, exist_ok=True)
inks = {"红色": (230, 40, 40), "蓝色": (60, 90, 255)}
files, labels = scans()
with open(WORK / "my.csv", "w", encoding="utf-8", newline="") as table:
  rows = csv.writer(table)
  rows.writerow(["filepath", "title"])
  for number in range(400):
    colour = list(inks)[number % 2]
    grey = np.asarray(Image.open(io.BytesIO(files[number])), np.float32) / 255
    Image.fromarray(np.uint8(grey * inks[colour])).save(photos / f"{number:03}.png")
    rows.writerow([f"photos/{number:03}.png", f"{colour}的数字{CLASS_NAMES[labels[number]]}"])
print((WORK / "my.csv").read_text(encoding="utf-8")[:120])

# %% [markdown]
# ## Fine-tuning
#
# The recipe for one's own pictures takes sizes and weights of the model, holds a tenth of the
# pictures out, and keeps the checkpoint that found most of these by their captions. Its learning
# rate is for models of true size; this one is small and takes a larger one. On the command line
# it is `python -m ofa_jax.train --config=configs/cnclip_custom.py:MODEL --workdir=D
# --config.task.train=my.csv`.

# %%
recipe = cnclip_custom.get_config(MODEL)
recipe.task.train = (str(WORK / "my.csv"),)
recipe.task.augment = "none"
recipe.optim.lr = 5e-4
recipe.steps, recipe.precision = STEPS, "fp32"
shown = ("t2i_r1", "t2i_r5", "i2t_r1")
before = evaluate.run(recipe, MODEL)
print({name: round(before[f"valid/{name}"], 3) for name in shown})

# %%
after = train(recipe, str(WORK / "mine"))
print({name: round(after[f"valid/{name}"], 3) for name in shown})

# %% [markdown]
# ## Search
#
# Features of all pictures once; a question is then one product. For a million pictures there are
# `ofa_jax.extract_features` and `ofa_jax.retrieve`.

# %%
model, preprocess = ofa_jax.load_from_name(str(WORK / "mine@best"))
paths = sorted(photos.glob("*.png"))
features = model.encode_image(np.stack([preprocess(path) for path in paths]))
features /= np.linalg.norm(features, axis=1, keepdims=True)


def nearest(query, number=6):
  """The pictures whose features have the largest cosines with a query's, side by side."""
  cosines = features @ (query / np.linalg.norm(query))
  best = np.argsort(-cosines)[:number]
  print([f"{paths[i].name} {cosines[i]:.2f}" for i in best])
  return Image.fromarray(np.hstack([np.asarray(Image.open(paths[i])) for i in best]))


# %%
nearest(model.encode_text(model.tokenizer(["蓝色的数字三"]))[0])

# %%
nearest(features[7])  # by a picture

# %% [markdown]
# `python -m ofa_jax.demo --model=D --images=photos` is the same as a page in the browser, and
# `python -m ofa_jax.serve --model=D` as a service.
