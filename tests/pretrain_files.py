"""Tiny files of pretraining in the original's formats, and a run on them; also a config.

  python -m ofa_jax.train --config=tests/pretrain_files.py:FOLDER --workdir=D

writes the files into FOLDER if they are not there. Pictures are those of the small world
(`data/quickstart_world.py`), whose things have boxes; image codes are the colours of cells. Beside
them are validation files of three tasks that pretraining is evaluated by.
"""

import base64
import dataclasses
import json
import pathlib

import numpy as np
from PIL import Image

from ofa_jax.config import Config
from ofa_jax.data import prompts, quickstart
from ofa_jax.data import quickstart_world as world
from ofa_jax.data.text import REFERENCES
from ofa_jax.scoring.vqa import CONFIDENCE
from ofa_jax.tasks.pretrain import Pretrain
from ofa_jax.tokenizers.ofa import OFATokenizer
from tests import tiny

ROWS = {"train": 24, "valid": 8}  # pictures, each with a row of every type
CODES, BINS = 8, 32
HIDDEN = 32  # pixels of a picture's side that are filled in


def write(folder: pathlib.Path) -> pathlib.Path:
  """Writes all files; returns the folder."""
  folder.mkdir(parents=True, exist_ok=True)
  told = {name: [] for name in ("vl", "text", "image", "detection")}
  captions, texts = [], ["maybe"]
  for split, count in ROWS.items():
    others = {name: [] for name in ("vqa", "refcoco", "snli_ve")}
    for i in range(count):
      rng = np.random.default_rng((len(split), i))
      scene = world.scene(rng, novel=False)
      image, boxes = world.draw(scene, rng)
      picture, number = _encoded(image), str(i)
      said, objects = world.caption(scene), REFERENCES.join(thing.name for thing in scene)
      asked, answer = world.question(scene, scene[0], rng)
      region, box = world.region(scene, scene[0], rng), ",".join(f"{x:.2f}" for x in boxes[0])
      implied, label = world.hypothesis(scene, scene[0], rng)
      answers = f"0.8{CONFIDENCE}{answer}{REFERENCES}0.2{CONFIDENCE}nothing"
      others["vqa"].append((number, f"{i}.png", asked, answers, objects, picture))
      others["refcoco"].append((number, f"{i}.png", region, box, picture))
      others["snli_ve"].append((number, f"{i}.png", picture, implied, said, label))
      texts += [said, asked, answer, region, implied, prompts.ANSWER_MATCHING]
      if split != "train":
        continue
      captions.append(said)
      told["vl"] += [
        (number, picture, said, "", "", objects, "coco", "caption"),
        (number, picture, "", asked, answers, "", "vqa", "qa"),
        (number, picture, region, "", box, "", "refcoco", "visual_grounding"),
      ]
      told["text"].append((number, world.sentence(rng).capitalize()))
      told["image"].append((number, picture, " ".join(map(str, _codes(image)))))
      told["detection"].append((number, picture, _objects(scene, boxes)))
    if split != "train":
      for name, rows in others.items():
        _write(folder / f"{name}.tsv", rows)
  for name, rows in told.items():
    _write(folder / f"{name}.tsv", rows)
  negative = folder / "negative_sample"
  negative.mkdir(exist_ok=True)
  names = [thing.name for thing in world.things()]
  answers = {"how many": list(world.DIGITS[:3]), "other": ["nothing", *world.answers()]}
  (negative / "type2ans.json").write_text(json.dumps(answers))
  (negative / "object.txt").write_text("\n".join(dict.fromkeys(names)) + "\n")
  (negative / "all_captions.txt").write_text("\n".join(captions) + "\n")
  (folder / "answers.json").write_text(json.dumps(world.answers()))
  texts += [prompts.caption(), prompts.MIDDLE, prompts.OBJECTS, prompts.REGION_CAPTION]
  texts += [
    *prompts.WHOLE_TEXT,
    prompts.MATCHING,
    prompts.REGION,
    *(text for _, text in told["text"]),
  ]
  OFATokenizer.train(
    [f" {text.strip().lower()}" for text in texts], vocab_size=700, num_codes=CODES, num_bins=BINS
  ).save(folder / "tokenizer")
  return folder


def task(folder: pathlib.Path, **changes) -> Pretrain:
  """The task on the files of a folder, with the shapes of a model as small as `tiny.OFA`."""
  files = {"train": "vl", "text": "text", "image": "image", "detection": "detection"}
  return dataclasses.replace(
    Pretrain(
      **{field: (str(folder / f"{name}.tsv"),) for field, name in files.items()},
      negatives=str(folder / "negative_sample"),
      tokenizer=str(folder / "tokenizer"),
      image_size=48,
      code_image_size=HIDDEN,
      num_patches=6,
      source_length=48,
      target_length=24,
      text_length=32,
      prompt_length=24,
      objects_length=24,
      box_size=64,
    ),
    **changes,
  )


def config(folder: pathlib.Path, *, fields: dict | None = None, **changes) -> Config:
  """A run of a few seconds on the files of a folder."""
  words = OFATokenizer.from_directory(folder / "tokenizer")
  base = Config(
    name="tiny pretraining",
    model=dataclasses.replace(
      tiny.OFA, vocab_size=words.vocab_size, num_codes=CODES, num_bins=BINS, freeze_resnet=True
    ),
    task=task(folder, **(fields or {})),
    batch_size=16,
    steps=4,
    log_every=1,
    save_every=2,
    optim=dataclasses.replace(tiny.OFA_OPTIM, warmup=1, warmup_ratio=0.0, clip_norm=5.0),
    precision="fp32",
  )
  return dataclasses.replace(base, **changes)


def get_config(folder: str) -> Config:
  """A run of a minute, in which all losses fall."""
  place = pathlib.Path(folder)
  if not (place / "tokenizer").exists():
    write(place)
  return config(place, steps=120, log_every=2, save_every=20, batch_size=32)


def _encoded(image: Image.Image) -> str:
  return base64.urlsafe_b64encode(quickstart.png(image)).decode()


def _codes(image: Image.Image) -> list[int]:
  """Of each 8 x 8 cell of the middle which of red, green and blue it has more than half of."""
  begin = (world.SIZE - HIDDEN) // 2
  middle = np.asarray(image)[begin : begin + HIDDEN, begin : begin + HIDDEN]
  cells = middle.reshape(HIDDEN // 8, 8, HIDDEN // 8, 8, 3).mean((1, 3)) > 127
  return (cells @ [4, 2, 1]).ravel().tolist()


def _objects(scene, boxes) -> str:
  told = zip(scene, boxes, strict=True)
  return REFERENCES.join(
    ",".join([*(f"{x:.2f}" for x in box), "/m/0", thing.name]) for thing, box in told
  )


def _write(path: pathlib.Path, rows) -> None:
  path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
