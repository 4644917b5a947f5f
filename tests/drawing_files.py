"""What text to image needs in the tests, all of it tiny: rows, a codec, judges."""

import dataclasses
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np

from ofa_jax import hub
from ofa_jax.config import Config
from ofa_jax.data import codes, quickstart_draw
from ofa_jax.data.quickstart_world import caption, draw, scene
from ofa_jax.decode.beam import Search
from ofa_jax.models.abstract import abstract
from ofa_jax.models.patches import PatchCodecConfig
from ofa_jax.tokenizers.ofa import OFATokenizer
from tests import tiny

RECIPE = pathlib.Path(__file__).parent.parent / "configs" / "ofa_image_gen.py"
NUM_CODES, SIDE = 24, 64
CODES = (SIDE // quickstart_draw.PATCH) ** 2
SEARCH = Search(
  num_beams=2, max_length=CODES, min_length=CODES, gen_code=True, sample=True, top_k=8
)


def pictures(number: int, *, first: int = 0) -> list[tuple[str, np.ndarray]]:
  """Captions and pictures uint8[64, 64, 3] of the small world."""
  made = []
  for i in range(first, first + number):
    rng = np.random.default_rng((9, i))
    shown = scene(rng, novel=False)
    made.append((caption(shown), np.asarray(draw(shown, rng)[0])))
  return made


def write(folder: pathlib.Path) -> dict[str, object]:
  """Writes rows, a tokenizer and a codec into a folder; returns fields of `ImageGen`."""
  rows = {"train": pictures(24), "valid": pictures(5, first=24)}
  patches = quickstart_draw.learn(
    np.stack([quickstart_draw.cut(image) for _, image in rows["train"]]), number=NUM_CODES
  )
  for split, made in rows.items():
    lines = (
      f"{i}\t{codes.written(quickstart_draw.encode(image, patches).ravel())}\t{said}\n"
      for i, (said, image) in enumerate(made)
    )
    (folder / f"{split}.tsv").write_text("".join(lines))
  texts = [f" what is the complete image? caption: {said}" for said, _ in rows["train"]]
  words = OFATokenizer.train(texts, vocab_size=340 + NUM_CODES, num_codes=NUM_CODES)
  words.save(folder / "words")
  config = PatchCodecConfig(image_size=SIDE, patch_size=quickstart_draw.PATCH, num_codes=NUM_CODES)
  table = jnp.asarray(patches.reshape(NUM_CODES, -1))
  hub.save_directory(folder / "codec", config, {"patches": {"embedding": table}}, {})
  return fields(folder)


def fields(folder: pathlib.Path) -> dict[str, object]:
  """Fields of `ImageGen` for what `write` has written, with the judge that is beside it."""
  judge = folder / "cnclip"
  return {
    "judge": str(judge) if judge.is_dir() else None,
    "train": (str(folder / "train.tsv"),),
    "valid": (str(folder / "valid.tsv"),),
    "columns": (0, 2, 1),
    "tokenizer": str(folder / "words"),
    "codec": str(folder / "codec"),
    "image_size": SIDE,
    "source_length": 48,
    "target_length": CODES + 1,
    "search": SEARCH,
    "page": 4,
  }


def save_random(folder: pathlib.Path, config, **settings) -> str:
  """A model directory of random weights."""
  _, params, rest = abstract(config)
  rng = np.random.default_rng(0)
  draw_one = lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape).astype(x.dtype))  # noqa: E731
  rest = jax.tree.map(lambda x: jnp.abs(draw_one(x)) + 1, rest)
  hub.save_directory(folder, config, jax.tree.map(draw_one, params), rest, **settings)
  return str(folder)


def chinese_clip(folder: pathlib.Path) -> str:
  """A Chinese-CLIP of no size, which reads the released vocabulary."""
  text = dataclasses.replace(tiny.BERT, max_positions=64)
  return save_random(folder / "cnclip", dataclasses.replace(tiny.MODEL, text=text))


def config(fields: dict[str, object], argument: str = "base", **changes) -> Config:
  """The recipe with these files and a model as small."""
  recipe = runpy.run_path(str(RECIPE))["get_config"](argument)
  words = OFATokenizer.from_directory(fields["tokenizer"])
  own = {k: v for k, v in fields.items() if k != "sampling"}
  rewarded = "sampling" in recipe.task.__dataclass_fields__
  task = {**own, "sampling": SEARCH} if rewarded else {**own, "codec": None, "judge": None}
  evaluated = [dataclasses.replace(e.task, **own) for e in recipe.evals]
  return dataclasses.replace(
    recipe,
    init=None,
    model=dataclasses.replace(
      tiny.OFA,
      image_bucket_size=8,
      code_image_size=SIDE,
      vocab_size=words.vocab_size,
      num_codes=NUM_CODES,
      freeze_resnet=True,
    ),
    task=dataclasses.replace(recipe.task, **task),
    batch_size=8,
    steps=3,
    log_every=1,
    save_every=2,
    optim=dataclasses.replace(recipe.optim, lr=1e-3, eps=1e-4, warmup=1),
    precision="fp32",
    remat="none",
    evals=tuple(
      dataclasses.replace(e, task=task, every=2, every_epochs=0, batch_size=8)
      for e, task in zip(recipe.evals, evaluated, strict=True)
    ),
    **changes,
  )
