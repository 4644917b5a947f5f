"""The page in a browser: every tab is used, and says what the API says; then in Chinese.

Models are the micro ones of the goldens. A person's steps: give a picture, fill in, press a button.
"""

import contextlib
import dataclasses
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse

import jax
import numpy as np
import pytest
from PIL import Image

from ofa_jax import api, calibrations, demo, hub, ports
from ofa_jax.calibrations import Calibration
from ofa_jax.convert.cnclip import table as convert
from ofa_jax.inference.cnclip import CNCLIPModel
from ofa_jax.inference.ofa import OFAModel
from ofa_jax.page import layout, server, words
from tests.cnclip_golden import micro_config, micro_state_dict
from tests.compiling import QUICK
from tests.ofa_directory import save_micro

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60_000  # milliseconds: programs are compiled
CHOICES = Calibration(temperature=1.0, rows=9, right=0.5, ece_before=0.2, ece_after=0.1)


@pytest.fixture(scope="module")
def one_device():
  """Which computes what a page asks, a row, without seven others beside it."""
  first = jax.devices()[:1]
  with pytest.MonkeyPatch.context() as patch:
    for name in ("devices", "local_devices"):
      patch.setattr(jax, name, lambda *_, **__: list(first))
    yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  folder = tmp_path_factory.mktemp("photos")
  rng = np.random.default_rng(0)
  for name in ("one.png", "two.png", "three.png"):
    blocks = rng.integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(blocks).resize((80, 60), Image.Resampling.NEAREST).save(folder / name)
  return folder


@pytest.fixture(scope="module")
def models(one_device, photos, tmp_path_factory):
  root = tmp_path_factory.mktemp("models")
  config = micro_config("micro_vit")
  weights = convert.from_torch(micro_state_dict("micro_vit"), config)
  hub.save_directory(root / "clip", config, *weights)
  directory = save_micro(root)
  calibrations.store(directory, {"refcoco/generated": CHOICES, "snli_ve/chosen": CHOICES})
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    loaded = demo.load([str(directory), str(root / "clip")], images=str(photos), precision="fp32")
  first = loaded.ofa.tokenizer.bin_id(0)  # the model has learnt nothing: it is kept to boxes
  boxes = {"allowed_range": (first, first + loaded.ofa.config.num_bins), "max_length": 4}
  loaded.ofa.searches["ground"] = dataclasses.replace(
    loaded.ofa.searches["ground"], min_length=4, **boxes
  )
  return loaded


@contextlib.contextmanager
def started():
  """A browser without a screen."""
  path = next(filter(None, map(shutil.which, BROWSERS)), None)
  if path is None:
    pytest.skip(f"no browser on this machine: {', '.join(BROWSERS)}")
  playwright = pytest.importorskip("playwright.sync_api", reason="no playwright, see [test]")
  with playwright.sync_playwright() as driver:
    browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def browser():
  with started() as browser:
    yield browser


@contextlib.contextmanager
def served(models, language):
  """The address of a page with the models."""
  uvicorn = pytest.importorskip("uvicorn", reason="no gradio, which is of the extra [demo]")
  pytest.importorskip("gradio", reason="no gradio, which is of the extra [demo]")
  said = words.LANGUAGES[language]
  with server.closed_gradio(), ports.listening("127.0.0.1", 0) as opened:
    app = server.application(layout.build(models, words=said), words=said)
    running = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    while not running.started:
      assert thread.is_alive()
      time.sleep(0.05)
    yield f"http://127.0.0.1:{opened.getsockname()[1]}"
    running.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


class Visitor:
  """Somebody before the page, who notes which places the browser asks for anything."""

  def __init__(self, browser, address, said, *, width=1100):
    self.page = browser.new_page(viewport={"width": width, "height": 900})
    self.said, self.hosts, self.errors = said, set(), []
    self.page.set_default_timeout(PATIENCE)
    self.page.on("request", lambda r: self.hosts.add(urllib.parse.urlsplit(r.url).netloc))
    self.page.on("pageerror", lambda e: self.errors.append(str(e)))
    self.page.goto(address)

  def open(self, *titles):
    """Opens a tab, and perhaps one in it."""
    for title in titles:
      self.page.get_by_role("tab", name=title, exact=True).click()

  def upload(self, picture):
    """Gives the open tab a picture."""
    self.seen("[role=tabpanel]").locator("input[type=file]").first.set_input_files(picture)
    self.seen("img[src*='file=']").first.wait_for()

  def fill(self, label, text):
    """Fills in a field of the open tab."""
    # What is said about a field belongs to its name.
    begins = re.compile(rf"^\s*{re.escape(label)}")
    self.page.get_by_label(begins).locator("visible=true").first.fill(text)

  def run(self, *, key=None):
    """Presses the button of the open tab, or a key; returns the new result's text."""
    before = self.page.evaluate(SAID)
    if key:
      self.page.keyboard.press(key)
    else:
      button = self.page.get_by_role("button", name=self.said.run, exact=True)
      button.locator("visible=true").click()
    self.page.wait_for_function(f"before => ({SAID})() !== before && ({SAID})()", arg=before)
    return self.seen(".said").first.inner_text().strip()

  def seen(self, selector):
    return self.page.locator(selector).locator("visible=true")

  def rows(self):
    """The cells of the table in the result."""
    lines = self.seen(".said tbody tr").all()
    return [[cell.inner_text().strip() for cell in line.locator("td").all()] for line in lines]

  def pictures(self):
    """What the pictures in the result show, by their texts for those who do not see them."""
    shown = self.seen(".said img").all()
    assert all(image.evaluate("x => x.complete && x.naturalWidth > 0") for image in shown)
    return [image.get_attribute("alt") for image in shown]


# What stands in the results that are seen.
SAID = (
  "() => [...document.querySelectorAll('.said')].filter(x => x.offsetParent)"
  ".map(x => x.innerHTML).join()"
)
TEXTS = ("一只猫", "a <b>dog</b> ${1+1} {{x}}", "数字三")


def use_ofa(visitor, ofa, upload):
  """The tabs of an OFA; what they say is what the API says."""
  said, picture = visitor.said, Image.open(upload)
  visitor.open(said.caption)
  assert visitor.run() == said.no_picture
  visitor.upload(upload)
  assert visitor.run() == (ofa.caption([picture])[0] or "—")

  visitor.open(said.question)
  visitor.upload(upload)
  assert visitor.run() == said.no_text.format(said.question_text)
  visitor.fill(said.question_text, "is it red?")
  assert visitor.run(key="Enter") == (ofa.answer([picture], ["is it red?"])[0] or "—")
  visitor.fill(said.answers, "the dog\na cat")
  chosen, scores = ofa.answer([picture], ["is it red?"], ["the dog", "a cat"], return_scores=True)
  expected = [chosen[0], said.among_choices.format(100 * np.exp(scores[0]))]
  assert visitor.run().split("\n\n") == expected

  visitor.open(said.grounding)
  visitor.upload(upload)
  visitor.fill(said.phrase, "the dog")
  assert visitor.run() == said.absent.format(50)
  assert visitor.pictures() == [said.boxes_drawn]
  visitor.fill(f"number input for {said.least}", "0")
  visitor.fill(f"number input for {said.most_boxes}", "2")
  visitor.run()
  (found,) = ofa.ground_all([picture], ["the dog"], most=2, min_probability=0)
  assert len(found.boxes) == 2
  corners = [", ".join(f"{x:.0f}" for x in box) for box in found.boxes]
  shares = [f"{100 * p:.1f} %" for p in found.probabilities]
  assert visitor.rows() == [["1", corners[0], shares[0]], ["2", corners[1], shares[1]]]
  assert visitor.pictures() == [said.boxes_drawn]

  visitor.open(said.entailment)
  visitor.upload(upload)
  visitor.fill(said.hypothesis, "a dog")
  visitor.fill(said.premise, "the dog")
  told, p = ofa.entail([picture], ["a dog"], ["the dog"], return_probabilities=True)
  expected = [said.entailments[told[0]], said.calibrated.format(100 * p[0])]
  assert visitor.run().split("\n\n") == expected

  visitor.open(said.classes)
  visitor.upload(upload)
  assert visitor.run() == said.no_lines.format(said.class_names)
  visitor.fill(said.class_names, "dog\ncat\nred")
  assert visitor.run().split("\n\n")[0] == ofa.classify([picture], ["dog", "cat", "red"])[0]


def use_clip(visitor, clip, library, upload):
  """The tabs of a Chinese-CLIP."""
  said = visitor.said
  visitor.open(said.search)
  assert visitor.seen(f"text={said.search_help.format(3)}").count() == 1
  visitor.fill(said.search_text, "一只猫")
  visitor.run()
  tokens = clip.tokenizer(["一只猫"], context_length=clip.context_length)
  query = clip.encode_text(tokens)[0]
  assert visitor.pictures() == [hit.name for hit in library.nearest(query, most=3)]
  visitor.open(said.by_picture)
  visitor.upload(upload)
  visitor.fill(f"number input for {said.number}", "1")
  assert visitor.run().split() == ["two.png", said.cosine, "1.000"]
  assert visitor.pictures() == ["two.png"]

  visitor.open(said.similarity)
  visitor.upload(upload)
  visitor.fill(said.texts, "\n".join(TEXTS))
  visitor.run()
  pixels = api.preprocess(str(upload), size=clip.image_size)[None]
  tokens = clip.tokenizer(list(TEXTS), context_length=clip.context_length)
  logits = clip.get_similarity(pixels, tokens)[0][0]
  rows = visitor.rows()
  assert [row[0] for row in rows] == [TEXTS[i] for i in np.argsort(-logits)]
  shares = np.exp(logits) / np.exp(logits).sum()
  found = [float(row[2].removesuffix(" %")) for row in rows]
  np.testing.assert_allclose(found, 100 * np.sort(shares)[::-1], atol=0.15)

  visitor.open(said.attention)
  visitor.upload(upload)
  share = clip.class_attention(pixels).mean(1).sum()
  assert visitor.run() == said.attention_far.format(100 * share)
  assert visitor.pictures() == [said.attention_drawn]


def test_every_tab_says_what_the_api_says(models, photos, browser):
  upload = photos / "two.png"
  with served(models, "en") as address:
    visitor = Visitor(browser, address, words.ENGLISH)
    use_ofa(visitor, models.ofa, upload)
    use_clip(visitor, models.clip, models.library, upload)
    assert visitor.page.title() == words.ENGLISH.title
  # What a browser has loaded for all this came from the page.
  assert visitor.hosts - {""} == {urllib.parse.urlsplit(address).netloc} and not visitor.errors


def test_the_page_in_chinese_on_a_phone(models, photos, browser):
  said = words.CHINESE
  with served(models, "zh") as address:
    visitor = Visitor(browser, address, said, width=390)
    visitor.open(said.caption)
    assert visitor.run() == said.no_picture
    text = visitor.page.locator("body").inner_text()
    assert "点击上传" in text  # Gradio's own words follow
    (photos.parent / "broken.png").write_bytes(b"no picture")
    visitor.upload(photos.parent / "broken.png")
    assert visitor.run() == said.bad_picture
    assert visitor.page.evaluate("() => document.documentElement.scrollWidth") <= 390
    assert visitor.page.locator("html").get_attribute("lang") == "zh-CN"


@pytest.mark.slow  # a process that imports JAX and Gradio, and loads a model: 10 seconds
def test_the_command_serves_until_it_is_told_to_end(models, photos, tmp_path):
  pytest.importorskip("gradio", reason="no gradio, which is of the extra [demo]")
  places = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
  command = [sys.executable, "-m", "ofa_jax.demo", f"--model={models.names[1]}", "--port=0"]
  process = subprocess.Popen(
    [*command, f"--images={photos}", "--language=zh"], env=os.environ | QUICK | places,
    stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  try:
    lines = list(itertools.takewhile(lambda line: "The page is at" not in line, process.stdout))
    assert any("3 of 3 pictures" in line for line in lines)
    (folder,) = tmp_path.glob("ofa_jax-page-*")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0 and not folder.exists()
  finally:
    process.kill()


def test_models_that_do_not_go_together(monkeypatch, tmp_path):
  ofa, clip = (object.__new__(kind) for kind in (OFAModel, CNCLIPModel))
  ofa.can_draw = lambda codec, judge: False
  known = {"ofa": ofa, "clip": clip}
  monkeypatch.setattr(api, "load_from_name", lambda name, *, precision: (known[name], None))
  found = demo.load(["clip", "ofa"], images=None, precision="fp32")
  assert (found.ofa, found.clip, found.library) == (ofa, clip, None) and not found.draws
  with pytest.raises(ValueError, match="one OFA and one Chinese-CLIP in --model, found 2 and 1"):
    demo.load(["ofa", "clip", "ofa"], images=None, precision="fp32")
  with pytest.raises(ValueError, match="Expected a Chinese-CLIP in --model to search"):
    demo.load(["ofa"], images=str(tmp_path), precision="fp32")
  with pytest.raises(ValueError, match="Expected an OFA in --model to draw"):
    demo.load(["clip"], images=None, precision="fp32", codec="v")


def test_without_gradio_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "gradio", None)
  with (
    pytest.raises(ValueError, match=r'found none. Install the extra: pip install -e ".\[demo\]"'),
    server.closed_gradio(),
  ):
    raise AssertionError
