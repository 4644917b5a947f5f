"""The page in a browser: every tab is used, and says what the API says; then in Chinese.

Models are the micro ones of the goldens. A person's steps: give a picture, fill in, press a button.
"""

import contextlib
import re
import shutil
import threading
import time
import urllib.parse

import jax
import numpy as np
import pytest
from PIL import Image

from ofa_jax import api, calibrations, demo, hub
from ofa_jax.calibrations import Calibration
from ofa_jax.convert.cnclip import table as convert
from ofa_jax.page import layout, server, words
from tests.cnclip_golden import micro_config, micro_state_dict
from tests.ofa_directory import save_micro

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 120_000  # milliseconds: programs are compiled
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
    yield demo.load([str(directory), str(root / "clip")], images=str(photos), precision="fp32")


@pytest.fixture(scope="module")
def browser():
  path = next(filter(None, map(shutil.which, BROWSERS)), None)
  if path is None:
    pytest.skip(f"no browser on this machine: {', '.join(BROWSERS)}")
  playwright = pytest.importorskip("playwright.sync_api", reason="no playwright, see [test]")
  with playwright.sync_playwright() as driver:
    browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
    yield browser
    browser.close()


@contextlib.contextmanager
def served(models, language):
  """The address of a page with the models."""
  uvicorn = pytest.importorskip("uvicorn", reason="no gradio, which is of the extra [demo]")
  pytest.importorskip("gradio", reason="no gradio, which is of the extra [demo]")
  said = words.LANGUAGES[language]
  with server.closed_gradio(), server.listen("127.0.0.1", 0) as opened:
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

  def give(self, picture=None, **texts):
    """Fills in what stands in the open tab, and presses its button; returns the result's text."""
    if picture is not None:
      remove = self.visible("button[aria-label='Clear'], button[aria-label='Remove Image']")
      if remove.count():
        remove.first.click()
      self.page.locator("input[type=file]").locator("visible=true").or_(
        self.page.locator("[role=tabpanel]:visible input[type=file]")
      ).last.set_input_files(picture)
      self.visible("img[src*='file=']").first.wait_for()
    for label, text in texts.items():
      self.page.get_by_label(getattr(self.said, label), exact=True).locator(
        "visible=true"
      ).first.fill(text)
    return self.run()

  def run(self):
    before = self.results()
    self.page.get_by_role("button", name=self.said.run, exact=True).locator("visible=true").click()
    self.page.wait_for_function(
      "before => [...document.querySelectorAll('[role=status], [role=alert]')]"
      ".filter(x => x.offsetParent).map(x => x.innerHTML).join() !== before",
      arg=before,
    )
    return self.shown().inner_text()

  def shown(self):
    return self.visible("[role=status], [role=alert]").first

  def results(self):
    return self.page.evaluate(
      "() => [...document.querySelectorAll('[role=status], [role=alert]')]"
      ".filter(x => x.offsetParent).map(x => x.innerHTML).join()"
    )

  def visible(self, selector):
    return self.page.locator(selector).locator("visible=true")


def test_every_tab_of_the_page_says_what_the_api_says(models, photos, browser):
  said, ofa, clip = words.ENGLISH, models.ofa, models.clip
  upload = photos / "two.png"
  picture = Image.open(upload)
  with served(models, "en") as address:
    visitor = Visitor(browser, address, said)
    visitor.open(said.caption)
    assert visitor.run() == said.no_picture
    assert visitor.give(upload) == (ofa.caption([picture])[0] or "—")

    visitor.open(said.question)
    assert visitor.give(upload) == said.no_text.format(said.question_text)
    assert visitor.give(question_text="is it red?") == (
      ofa.answer([picture], ["is it red?"])[0] or "—"
    )
    chosen, scores = ofa.answer([picture], ["is it red?"], ["the dog", "a cat"], return_scores=True)
    found = visitor.give(answers="the dog\na cat")
    assert found.splitlines()[0] == chosen[0]
    assert said.among_choices.format(100 * np.exp(scores[0])) in found
  assert visitor.hosts == {urllib.parse.urlsplit(address).netloc} and not visitor.errors
  assert clip is not None and re and api
