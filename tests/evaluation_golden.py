"""Model directories and data of the originals' evaluations, for the tests of the commands.

The micro models are those of `cnclip_golden`; `evaluation_words.npz` has the word embeddings that
the evaluations' texts and prompts use.
"""

import json
import pathlib
import zipfile

import numpy as np

from ofa_jax import hub
from ofa_jax.convert.cnclip import table as convert
from tests import cnclip_golden

DIR = pathlib.Path(__file__).parent / "golden" / "cnclip"
RETRIEVAL = DIR / "retrieval"
ZEROSHOT = DIR / "zeroshot"
MODELS = {"vit": ("micro_vit", "Micro-ViT"), "rn50": ("micro_rn50", "Micro-RN50")}


def save_model(folder: pathlib.Path, model: str) -> pathlib.Path:
  """Writes a micro model ("vit", "rn50") as a model directory named as its image tower."""
  golden, tower = MODELS[model]
  weights, config = evaluation_weights(golden), cnclip_golden.micro_config(golden)
  hub.save_directory(folder / tower, config, *convert.from_torch(weights, config))
  return folder / tower


def evaluation_weights(golden: str) -> dict[str, np.ndarray]:
  """The state dict of a micro model ("micro_vit") with the words of the evaluations' texts."""
  weights = dict(cnclip_golden.micro_state_dict(golden))
  name = "module.bert.embeddings.word_embeddings.weight"
  with np.load(DIR / "evaluation_words.npz") as words:
    weights[name] = weights[name].copy()
    weights[name][words["rows"]] = words[golden]
  return weights


def unpack_zeroshot(folder: pathlib.Path) -> pathlib.Path:
  """The four small data sets, in the original's layout."""
  with zipfile.ZipFile(ZEROSHOT / "datasets.zip") as archive:
    archive.extractall(folder)
  return folder


def read_jsonl(path: pathlib.Path) -> list[dict]:
  """The objects of a JSONL file."""
  return [json.loads(line) for line in path.read_text().splitlines()]
