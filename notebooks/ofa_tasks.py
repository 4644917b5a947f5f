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
# # What an OFA can be asked
#
# One model writes captions, answers questions, finds boxes, judges texts, names classes and fills
# in words. This page asks the quickstart's small world, which two CPU cores learn in some fifteen
# minutes: `python -m ofa_jax.train --config=configs/quickstart.py:world --workdir=runs/world`. A
# released model (`"OFA-base"`) is asked in the same way, about any picture.

# %%
import io
import os

import numpy as np
from PIL import Image, ImageDraw

import ofa_jax
from ofa_jax.data import quickstart, quickstart_world
from ofa_jax.tasks import infilling

MODEL = os.environ.get("OFA_JAX_NOTEBOOK_WORLD", "runs/world")
model, _ = ofa_jax.load_from_name(MODEL)

# %% [markdown]
# A picture that the model has not seen, of a combination of colour, shape and place that training
# never shows. A path, the bytes of a file or an array would do as well.

# %%
rng = np.random.default_rng(1)
scene = quickstart_world.scene(rng, novel=True)
picture, boxes = quickstart_world.draw(scene, rng)
print(quickstart_world.caption(scene))
picture.resize((192, 192))

# %% [markdown]
# ## Captions and questions
#
# Questions are answered with the best of the candidates that are given: this model was trained to
# choose among the small world's answers. A model whose training was not kept to any, such as
# `"OFA-base"`, answers in its own words without them. Scores are log-probabilities;
# [a calibration](../docs/confidence.md) makes probabilities of them that can be trusted.

# %%
print(model.caption([picture]))
thing = scene[0]
questions = [
  f"what colour is the {thing.shape}?",
  f"what is {thing.where}?",
  "how many things are there?",
]
answers = model.answer([picture] * 3, questions, quickstart_world.answers())
print(dict(zip(questions, answers, strict=True)))

# %%
chosen, scores = model.answer(
  [picture], [f"where is the {thing.name}?"], list(quickstart_world.CORNERS), return_scores=True
)
print(chosen, np.exp(scores).round(3))

# %% [markdown]
# ## Boxes
#
# In pixels of the picture that was given. `ground_all` finds several of a phrase.

# %%
phrase = f"the {thing.name}"
(box,) = model.ground([picture], [phrase])
print(phrase, box, "drawn at", np.round(boxes[0], 1))
framed = picture.copy()
if np.isfinite(box).all():  # NaN: the phrase is absent
  ImageDraw.Draw(framed).rectangle([*np.round(box)], outline="magenta")
framed.resize((192, 192))

# %% [markdown]
# ## Does the picture imply a text?

# %%
for seed in range(4):
  text, label = quickstart_world.hypothesis(scene, thing, np.random.default_rng(seed))
  print(f"{text}: {model.entail([picture], [text])[0]}, drawn as {label}")

# %% [markdown]
# ## Classes
#
# A scanned digit, whose class is chosen among all names.

# %%
files, labels = quickstart.scans()
scan = Image.open(io.BytesIO(files[42]))
print(model.classify([scan], list(quickstart_world.DIGITS)), "it is a", labels[42])

# %% [markdown]
# ## Texts alone
#
# Some tasks have no picture. `ask` takes what a task defines of itself, also a task of your own
# ([tasks](../docs/tasks.md)).

# %%
text = "red dot left of blue bar and blue bar right of <mask>"
print(model.ask(infilling.ANSWERING, {"text": [text]}))
