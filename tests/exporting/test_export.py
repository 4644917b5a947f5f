"""Exports of the micro models, and their use in a process that has no ofa_jax."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import ofa_jax
from ofa_jax import hub, trees
from ofa_jax.convert.cnclip import table as convert
from ofa_jax.exporting import beside, folder, parts
from ofa_jax.exporting.beside import exported
from ofa_jax.models import cnclip
from tests import forked
from tests.cnclip_golden import (
  MICRO,
  error,
  golden,
  images,
  micro_config,
  micro_state_dict,
  realsize_images,
  realsize_model,
)
from tests.ofa_directory import save_micro

FORMS = ("stablehlo", "onnx")
# A process in which nothing of ofa_jax can be imported.
ALONE = "import sys\nsys.modules['ofa_jax'] = None\n"


def needs(form):
  missing = folder.missing(form)
  if missing:
    pytest.skip(f'no {", ".join(missing)}, which the extra "export" brings')


def run_alone(path, code, **more):
  """Runs Python in a folder, without ofa_jax; returns what it prints."""
  env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", ALONE + code], cwd=path, env=env | more, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


def readme_code(path):
  """The lines of Python of an export's page."""
  (code,) = re.findall(r"```python\n(.*?)```", (path / "README.md").read_text(), re.DOTALL)
  assert len(code.splitlines()) <= 14
  return code


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
  """Model directories of the micro Chinese-CLIPs, by name."""
  root, made = tmp_path_factory.mktemp("clips"), {}
  for name in MICRO:
    config = micro_config(name)
    hub.save_directory(root / name, config, *convert.from_torch(micro_state_dict(name), config))
    made[name] = root / name
  return made


@pytest.fixture(scope="module")
def ofa(tmp_path_factory):
  return save_micro(tmp_path_factory.mktemp("ofa"))


def searching(model, **changes):
  """The model's search of captions, with some fields replaced."""
  return dataclasses.replace(model.searches["caption"], **changes)


# One of each is quick; the others are slow for the sake of the suite: a quarter of a minute each.
TOWERS = [("micro_vit", "stablehlo"), ("micro_rn50", "onnx")]
OTHERS = [
  pytest.param(*pair, marks=pytest.mark.slow) for pair in zip(MICRO, FORMS[::-1], strict=True)
]


@pytest.mark.parametrize(("name", "form"), [*TOWERS, *OTHERS])
def test_towers_are_the_originals_without_ofa_jax(clips, tmp_path, form, name):
  """Both of them, apart, at 1, 3 and 8 rows in a process of their own."""
  needs(form)
  written = folder.write(hub.open_model(clips[name]), tmp_path / "out", form=form)
  assert [part.name for part in written] == ["image", "text"]
  assert all(part.difference < 1e-5 for part in written)
  arrays = golden(name, "forward")
  pixels, tokens = images(arrays), arrays["token_ids"]
  np.savez(tmp_path / "given.npz", image=np.resize(pixels, (8, *pixels.shape[1:])), tokens=tokens)
  code = (
    "import numpy as np\nfrom exported import Model\nmodel = Model()\n"
    "given, found = np.load('../given.npz'), {}\n"
    "for n in (1, 3, 8):\n  found[f'image{n}'] = model.encode_image(given['image'][:n])\n"
    "found['text'] = model.encode_text(given['tokens'].astype(np.int32))\n"
    "found['logits'] = model.get_similarity(given['image'], given['tokens'].astype(np.int32))\n"
    "np.savez('../found.npz', **found)\n"
  )
  run_alone(tmp_path / "out", code)
  with np.load(tmp_path / "found.npz") as found:
    number = len(pixels)
    assert error(found["image8"][:number], arrays["image_features"]) < 1e-5
    for n in (1, 3):
      assert error(found[f"image{n}"], found["image8"][:n]) < 1e-5
    assert error(found["text"], arrays["text_features"]) < 1e-5
    assert error(found["logits"][:number], arrays["logits_per_image"]) < 1e-4


def test_the_page_of_a_chinese_clip_is_true(clips, tmp_path):
  """Its lines run in the folder, and give what the API gives."""
  folder.write(hub.open_model(clips["micro_vit"]), tmp_path / "out", form="stablehlo")
  rng = np.random.default_rng(0)
  picture = Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).convert("P")
  picture.save(tmp_path / "out" / "picture.png")
  code = readme_code(tmp_path / "out").replace("picture.jpg", "picture.png")
  code += "import numpy as np\nnp.savez('found.npz', logits=logits, image=image, tokens=tokens)\n"
  assert run_alone(tmp_path / "out", code).strip() in ("[0]", "[1]")
  model, preprocess = ofa_jax.load_from_name(clips["micro_vit"])
  image, tokens = preprocess(picture)[None], ofa_jax.tokenize(["一只猫", "一只狗"])
  with np.load(tmp_path / "out" / "found.npz") as found:
    np.testing.assert_array_equal(found["image"], image)
    np.testing.assert_array_equal(found["tokens"], tokens)
    assert error(found["logits"], model.get_similarity(image, tokens)[0]) < 1e-5


@pytest.mark.parametrize(
  "form",
  [pytest.param(form, marks=pytest.mark.slow) for form in FORMS],  # compile for a minute each
)
def test_captions_are_ours_token_by_token(ofa, tmp_path, form):
  needs(form)
  written = folder.write(hub.open_model(ofa), tmp_path / "out", form=form, max_length=24)
  assert [part.name for part in written] == ["encoder", "decoder"]
  rng = np.random.default_rng(1)
  pictures = [Image.fromarray(rng.integers(0, 256, (40, 80, 3), np.uint8)) for _ in range(3)]
  for number, picture in enumerate(pictures):
    picture.save(tmp_path / "out" / f"{number}.png")
  pictures[0].save(tmp_path / "out" / "picture.png")
  code = readme_code(tmp_path / "out").replace("picture.jpg", "picture.png") + (
    "import json\nimages = [model.preprocess(f'{i}.png') for i in range(3)]\n"
    "captions = model.caption(images)\n"
    "prompts = model.tokenize([' what is it?', ' is it red?', ' what colour is the ball?'])\n"
    "beams = model.generate_tokens(prompts, [images[0], None, images[2]], max_length=9,\n"
    "  num_beams=3, no_repeat_ngram_size=2)\n"
    "greedy = model.caption(images, num_beams=1)\n"
    "questions = ['what is it?', 'is it red?']\n"
    "answers = model.generate(images[:2], [f' {q}' for q in questions], read_prompt=True,\n"
    "  max_length=6, normalize_scores=False)\n"
    "beams = [[[x['tokens'].tolist(), x['score']] for x in row] for row in beams]\n"
    "json.dump([captions, greedy, answers, beams], open('found.json', 'w'))\n"
  )
  run_alone(tmp_path / "out", code)
  captions, greedy, answers, beams = json.loads((tmp_path / "out" / "found.json").read_text())
  model, preprocess = ofa_jax.load_from_name(ofa)
  assert captions == model.caption(pictures) and all(captions)
  search = searching(model, num_beams=1)
  assert greedy == model.caption(pictures, search=search)
  search = searching(model, max_length=6, no_repeat_ngram_size=0, normalize_scores=False)
  assert answers == model.answer(pictures[:2], ["what is it?", "is it red?"], search=search)
  prompts = [" what is it?", " is it red?", " what colour is the ball?"]
  prompts = [[0, *model.tokenizer.encode(text), 2] for text in prompts]
  ours = model.generate_tokens(
    prompts,
    np.stack([preprocess(picture) for picture in pictures]),
    np.array([True, False, True]),
    max_length=9,
    num_beams=3,
    no_repeat_ngram_size=2,
  )
  for row, expected in zip(beams, ours, strict=True):
    assert [tokens for tokens, _ in row] == [x["tokens"].tolist() for x in expected]
    for (_, score), x in zip(row, expected, strict=True):
      assert score == pytest.approx(x["score"], abs=1e-4)


@pytest.mark.parametrize(
  "form",
  ["onnx", pytest.param("stablehlo", marks=pytest.mark.slow)],  # for the sake of the suite
)
def test_both_towers_in_one_file_and_half_precision(clips, tmp_path, form):
  """Numbers of pictures and of texts differ; weights stand where they are wanted."""
  needs(form)
  source = hub.open_model(clips["micro_vit"])
  folder.write(source, tmp_path / "one", form=form, names=["both"], inside=form != "onnx")
  other = "weights.npz" if form == "stablehlo" else "both.onnx.data"
  assert (tmp_path / "one" / other).exists() == (form == "onnx")
  (half,) = folder.write(source, tmp_path / "half", form=form, names=["image"], dtype="fp16")
  assert 1e-5 < half.difference < 2e-2
  arrays = golden("micro_vit", "forward")
  model = exported.Model(tmp_path / "one")
  logits = model.get_similarity(images(arrays)[:2], arrays["token_ids"].astype(np.int32))
  assert error(logits, arrays["logits_per_image"][:2]) < 1e-4
  features = exported.Model(tmp_path / "half").encode_image(images(arrays))
  assert features.dtype == np.float32
  assert error(features, arrays["image_features"]) < 2e-2


def test_what_is_not_the_model_is_not_kept(clips, tmp_path):
  source = hub.open_model(clips["micro_vit"])
  with pytest.raises(ValueError, match=r"image_features of part image .* at 1 rows; .* not kept"):
    folder.write(
      source,
      tmp_path / "out",
      form="stablehlo",
      names=["image"],
      dtype="fp16",
      tolerance=1e-7,
    )
  assert not list(tmp_path.iterdir())


def test_a_difference_is_seen():
  expected = np.array([1.0, -4.0])
  assert parts.difference(np.array([1.0, -3.0]), expected) == 0.25
  assert not parts.difference(np.array([1.0, np.nan]), expected) <= 1


def test_options_that_do_not_fit_are_told(clips, ofa, tmp_path):
  clip, whole = hub.open_model(clips["micro_vit"]), hub.open_model(ofa)
  for source, options, text in (
    (clip, {"names": ["image", "sound"]}, "--parts out of image, text, both, found sound"),
    (clip, {"context_length": 900}, "--context-length from 2 to 64"),
    (clip, {"max_length": 9}, "Expected an OFA with --max-length, found a Chinese-CLIP"),
    (whole, {"names": ["image"]}, "--parts out of encoder, decoder, found image"),
    (whole, {"max_length": 5000}, "--max-length from 2 to 1025, found 5000"),
    # Before the weights are read.
    (
      dataclasses.replace(whole, files=None, load=None),
      {},
      "Expected the files of OFA's tokenizer",
    ),
  ):
    with pytest.raises(ValueError, match=re.escape(text)):
      folder.write(source, tmp_path / "out", form="stablehlo", **options)
  assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(monkeypatch):
  monkeypatch.setattr(folder.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r'no jax2onnx, onnx, onnxruntime; .*"\.\[export\]"'):
    folder.check_packages("onnx")


def test_the_command(clips, tmp_path):
  """What it says, and what a person may get wrong."""
  model = f"--model={clips['micro_rn50']}"
  (tmp_path / "there").mkdir()
  command = ["export", model, f"--output={tmp_path / 'out'}", "--format=stablehlo"]
  done, unknown, part, there = forked.run(
    [
      {"command": [*command, "--parts=text"]},
      {"command": [*command[:-1], "--format=coreml"]},
      {"command": [*command[:2], f"--output={tmp_path / 'x'}", command[3], "--parts=sound"]},
      {"command": [*command[:2], f"--output={tmp_path / 'there'}", command[3]]},
    ]
  )
  assert done[0] == 0, done[1]
  assert re.search(r"^text: [\d.]+ MB, within .* at 1, 3, 8 rows$", done[1], re.MULTILINE)
  assert {x.name for x in (tmp_path / "out").iterdir()} == {
    *("README.md", "config.json", "exported.py", "runtime.py"),
    *("text.stablehlo", "tokenizer", "weights.npz"),
  }
  for (status, output), text in (
    (unknown, "--format=coreml: value should be one of <stablehlo|onnx>"),
    (part, "Expected --parts out of image, text, both, found sound"),
    (there, f"{tmp_path / 'there'} exists already"),
  ):
    assert status == 1 and text in output and "Traceback" not in output, output
  assert not (tmp_path / "x").exists()


def test_what_stands_beside_a_model_imports_nothing_of_ours():
  for path in pathlib.Path(beside.__path__[0]).glob("*.py"):
    assert "ofa_jax." not in re.sub(r"`[^`]*`", "", path.read_text(encoding="utf-8")), path


@pytest.mark.slow  # 188 million parameters, traced, written and run at 1, 3 and 8 rows: minutes
@pytest.mark.parametrize("form", FORMS)
def test_a_model_of_true_size_is_the_original(tmp_path, form):
  """ViT-B-16 and RoBERTa-base, whose weights follow the goldens' rule."""
  needs(form)
  params, rest = trees.split(realsize_model("ViT-B-16"))[1:]
  config = cnclip.config(*cnclip.MODELS["ViT-B-16"])
  source = hub.Source(
    config=config,
    load=lambda shardings=None: (params, rest),
    form="drawn",
    settings={"context_length": 52},
  )
  written = folder.write(source, tmp_path / "out", form=form)
  assert all(part.difference < 1e-5 for part in written), written
  arrays = golden("realsize", "ViT-B-16.forward")
  model = exported.Model(tmp_path / "out")
  assert error(model.encode_image(realsize_images()), arrays["image_features"]) < 1e-4
  tokens = arrays["token_ids"].astype(np.int32)
  assert error(model.encode_text(tokens), arrays["text_features"]) < 1e-4
