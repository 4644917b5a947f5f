"""Pictures of the page for docs/demo.md, of models that were trained.

  python -m tests.page.screenshots WORLD DIGITS OUTPUT

WORLD and DIGITS are the workdirs of two quickstarts; the pictures to search are of their data.
"""

import io
import pathlib
import sys
import tempfile

import numpy as np
from PIL import Image

from ofa_jax import demo
from ofa_jax.data import quickstart, quickstart_world
from ofa_jax.page import words
from tests import test_demo

MOST = 120_000  # bytes


def main() -> None:
  world, digits, output = sys.argv[1:]
  with tempfile.TemporaryDirectory() as place:
    photos = pathlib.Path(place) / "photos"
    photos.mkdir()
    files, labels = quickstart.scans()
    for number in range(60):
      (photos / f"{labels[number]}_{number:02}.png").write_bytes(files[number])
    rng = np.random.default_rng(1)
    scene = quickstart_world.scene(rng, novel=True)
    asked = pathlib.Path(place) / "things.png"
    quickstart_world.draw(scene, rng)[0].resize((384, 384), Image.Resampling.NEAREST).save(asked)
    models = demo.load([world, digits], images=str(photos), precision="fp32")
    with test_demo.started() as browser:
      for language in ("en", "zh"):
        with test_demo.served(models, language) as address:
          said = words.LANGUAGES[language]
          visitor = test_demo.Visitor(browser, address, said, width=900)
          steps = (
            show_ofa(visitor, asked, scene) if language == "en" else show_clip(visitor, photos)
          )
          for name in steps:
            keep(visitor, pathlib.Path(output) / f"page_{name}.png")


def show_ofa(visitor, asked, scene):
  said, thing = visitor.said, scene[0]
  visitor.open(said.question)
  visitor.upload(asked)
  visitor.fill(said.question_text, f"what colour is the {thing.shape}?")
  visitor.run()
  yield "question"
  visitor.open(said.grounding)
  visitor.upload(asked)
  visitor.fill(said.phrase, f"the {thing.name}")
  visitor.run()
  yield "grounding"


def show_clip(visitor, photos):
  said, picture = visitor.said, sorted(photos.iterdir())[3]
  visitor.open(said.search)
  visitor.fill(said.search_text, "手写的三")
  visitor.run()
  yield "search"
  visitor.open(said.similarity)
  visitor.upload(picture)
  visitor.fill(said.texts, "\n".join(f"数字{name}" for name in quickstart.CLASS_NAMES))
  visitor.run()
  yield "similarity"


def keep(visitor, path):
  """What the browser shows, in few colours."""
  visitor.page.wait_for_timeout(500)
  seen = Image.open(io.BytesIO(visitor.page.screenshot(full_page=True))).convert("RGB")
  seen.quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)
  assert path.stat().st_size < MOST, path
  print(path, seen.size, path.stat().st_size)


if __name__ == "__main__":
  main()
