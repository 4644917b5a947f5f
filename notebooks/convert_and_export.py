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
# # Convert a model, and take it elsewhere
#
# A trained model becomes a directory for `transformers`, and files that run without `ofa_jax`:
# ONNX and StableHLO. Every export is compared with the model before it appears. Commands are
# started here as one types them, `python -m ofa_jax.convert ...`.

# %%
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import ofa_jax
from ofa_jax.configs import quickstart
from ofa_jax.train import train

WORK = Path(os.environ.get("OFA_JAX_NOTEBOOKS", "runs/notebooks"))
STEPS = int(os.environ.get("OFA_JAX_NOTEBOOK_STEPS", 150))


def run(*command):
  """Runs python -m ..., and prints what it says."""
  command = [sys.executable, "-m", *map(str, command)]
  done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  print(done.stdout, end="")
  assert done.returncode == 0


# %% [markdown]
# ## A model
#
# The quickstart's digits, which the first notebook has trained, or this one trains. `"ViT-B-16"`,
# a `.pt` file or a Hugging Face directory are taken in the same places.

# %%
config = quickstart.get_config()
config.steps, config.evals = STEPS, ()
train(config, str(WORK / "digits"))
model, _ = ofa_jax.load_from_name(str(WORK / "digits"))

# %% [markdown]
# ## Conversion
#
# `--to=hf` writes what `transformers` reads, `--to=torch` (with PyTorch) what `cn_clip` reads;
# without either it is a model directory of ours. Each way back gives the same numbers.

# %%
if not (WORK / "hf").exists():
  run("ofa_jax.convert", WORK / "digits", WORK / "hf", "--to=hf")
print(sorted(path.name for path in (WORK / "hf").iterdir()))

# %%
again, _ = ofa_jax.load_from_name(str(WORK / "hf"))
tokens = model.tokenizer(["数字三", "数字八"])
print(np.abs(again.encode_text(tokens) - model.encode_text(tokens)).max())

# %% [markdown]
# ## Export
#
# Both towers as ONNX, for any number of rows. Beside the files lie their tokenizer and
# `exported.py`, which needs NumPy and ONNX Runtime and nothing of ours. `--format=stablehlo` is
# for JAX on CPUs, GPUs and TPUs; [the page on exports](../docs/export.md) has sizes, speed and
# what else there is.

# %%
if not (WORK / "onnx").exists():
  run("ofa_jax.export", f"--model={WORK / 'digits'}", f"--output={WORK / 'onnx'}", "--format=onnx")
print({path.name: path.stat().st_size for path in sorted((WORK / "onnx").glob("*.onnx"))})

# %%
sys.path.insert(0, str(WORK / "onnx"))
from exported import Model

exported = Model(WORK / "onnx")
pictures = np.random.default_rng(0).standard_normal((3, 32, 32, 3)).astype(np.float32)
ours, theirs = model.encode_image(pictures), exported.encode_image(pictures)
print("largest difference:", np.abs(ours - theirs).max() / np.abs(ours).max())
assert np.allclose(ours, theirs, atol=1e-5 * np.abs(ours).max())
exported.get_similarity(pictures, exported.tokenize(["数字三", "数字八"])).round(2)
