"""The tabs of the page, made with Gradio of the functions in `asking` and `comparing`."""

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ofa_jax import api
from ofa_jax.inference.ofa import OFAModel
from ofa_jax.page import asking, comparing, given, shown
from ofa_jax.page.library import Library
from ofa_jax.page.words import Words

if TYPE_CHECKING:
  import gradio

_HEIGHT = 320  # pixels of a picture that is given
_WIDTH = 280  # pixels of a column; on smaller screens they are one below the other
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models:
  """What the page shows.

  Attributes:
    ofa: an OFA, or None.
    clip: a Chinese-CLIP, or None.
    library: the pictures that it searches, or None.
    names: of the models, as a person gave them.
    draws: whether the OFA draws pictures.
    codec, judge: what it draws with; None: what its run names.
  """

  ofa: OFAModel | None = None
  clip: api.CNCLIPModel | None = None
  library: Library | None = None
  names: Sequence[str] = ()
  draws: bool = False
  codec: str | None = None
  judge: str | None = None

  @property
  def tabs(self) -> tuple[str, ...]:
    """What there is a tab for."""
    ofa = () if self.ofa is None else asking.tabs(self.ofa, draws=self.draws)
    clip = () if self.clip is None else comparing.tabs(self.clip, self.library)
    return (*ofa, *clip)


def build(models: Models, *, words: Words) -> "gradio.Blocks":
  """The page with a tab for everything that the models can do."""
  import gradio

  with gradio.Blocks(
    title=words.title,
    analytics_enabled=False,
    delete_cache=(600, 3600),  # seconds: what was uploaded is removed after an hour
  ) as page:
    named = ", ".join(f"`{_last(name)}`" for name in models.names)
    gradio.Markdown(f"# {words.title}\n\n{words.model.format(named)}")
    with gradio.Tabs():
      for name in models.tabs:
        _TABS[name](models, words)
  page.queue(max_size=64, api_open=False)
  # Else Gradio would let requests name any file of this machine where the page is mounted.
  page.has_launched = True
  return page


def _last(name: str) -> str:
  """A model's name without the folders that it lies in, which are nobody's business."""
  return pathlib.PurePath(name).name.replace("`", "")


def told(function: Callable[..., str], *, words: Words) -> Callable[..., str]:
  """A function that gives HTML, or in its place that of a sentence about what went wrong."""

  def run(*values):
    try:
      return function(*values)
    except given.Fault as fault:
      return shown.fault(str(fault))
    except ValueError as error:  # of the API: what was given does not suit the model
      return shown.fault(words.refused.format(str(error).splitlines()[0]))
    except Exception:  # a fault of the program: its words, with paths in them, are for the log only
      _log.exception("A tab of the page failed")
      return shown.fault(words.failed)

  return run


class _Tab:
  """A tab: on the left what a person gives, on the right what comes of it."""

  def __init__(self, title: str, text: str, *, words: Words):
    import gradio

    self._gradio, self._words, self._text = gradio, words, text
    self._tab = gradio.Tab(title)
    self._inputs, self._events = [], []

  def __enter__(self) -> "_Tab":
    self._tab.__enter__()
    if self._text:
      self._gradio.Markdown(self._text)
    self._row = self._gradio.Row()
    self._row.__enter__()
    self._column = self._gradio.Column(min_width=_WIDTH)
    self._column.__enter__()
    return self

  def __exit__(self, *error: Any) -> None:
    self._row.__exit__(*error)
    self._tab.__exit__(*error)

  def picture(self) -> None:
    """A picture to be given: its file, which `given.picture` opens and nothing before."""
    component = self._gradio.Image(
      label=self._words.picture,
      type="filepath",
      image_mode=None,
      sources=["upload", "clipboard"],
      buttons=["fullscreen"],
      height=_HEIGHT,
    )
    component.preprocess = lambda payload: payload and payload.path
    self._inputs.append(component)

  def text(self, label: str, *, lines: int = 1, info: str | None = None, example: str = "") -> None:
    """A text to be given; Enter runs the tab where it is of one line."""
    component = self._gradio.Textbox(
      label=label, lines=lines, max_lines=max(lines, 12), info=info, placeholder=example
    )
    self._inputs.append(component)
    if lines == 1:
      self._events.append(component.submit)

  def slider(
    self, label: str, low: float, high: float, value: float, *, step: float, info: str | None = None
  ) -> None:
    """A number to be given."""
    component = self._gradio.Slider(low, high, value, step=step, label=label, info=info)
    self._inputs.append(component)

  def runs(self, function: Callable[..., str]) -> None:
    """Ends what is given: a button calls the function with all of it, which gives HTML."""
    button = self._gradio.Button(self._words.run, variant="primary")
    self._column.__exit__()
    with self._gradio.Column(min_width=_WIDTH):
      result = self._gradio.HTML(label=self._words.result, padding=False)
    self._gradio.on(
      [button.click, *self._events],
      told(function, words=self._words),
      inputs=self._inputs,
      outputs=result,
      api_visibility="private",
      concurrency_limit=1,  # the devices are shared by all who look at the page
      concurrency_id="models",
    )


def _caption(models, words):
  with _Tab(words.caption, words.caption_help, words=words) as tab:
    tab.picture()
    tab.runs(lambda *x: shown.answer(asking.caption(models.ofa, *x, words=words), words=words))


def _question(models, words):
  with _Tab(words.question, words.question_help, words=words) as tab:
    tab.picture()
    tab.text(words.question_text, example=words.question_example)
    tab.text(words.answers, lines=3, info=words.answers_help)
    tab.runs(lambda *x: shown.answer(asking.answer(models.ofa, *x, words=words), words=words))


def _grounding(models, words):
  def ground(picture, phrase, most, least=asking.LEAST):
    found = asking.ground(models.ofa, picture, phrase, most, least, words=words)
    return shown.boxes(found, least=least, words=words)

  with _Tab(words.grounding, words.grounding_help, words=words) as tab:
    tab.picture()
    tab.text(words.phrase, example=words.phrase_example)
    tab.slider(words.most_boxes, 1, asking.MOST_BOXES, 3, step=1)
    if asking.is_calibrated(models.ofa, "refcoco"):
      tab.slider(words.least, 0, 1, asking.LEAST, step=0.05, info=words.least_help)
    tab.runs(ground)


def _entailment(models, words):
  with _Tab(words.entailment, words.entailment_help, words=words) as tab:
    tab.picture()
    tab.text(words.hypothesis, example=words.hypothesis_example)
    tab.text(words.premise, info=words.premise_help)
    tab.runs(lambda *x: shown.answer(asking.entail(models.ofa, *x, words=words), words=words))


def _classes(models, words):
  with _Tab(words.classes, words.classes_help, words=words) as tab:
    tab.picture()
    tab.text(words.class_names, lines=5, info=words.class_example)
    tab.runs(lambda *x: shown.answer(asking.classify(models.ofa, *x, words=words), words=words))


def _drawing(models, words):
  def draw(text, *numbers):
    told = {"codec": models.codec, "judge": models.judge, "words": words}
    return shown.drawings(asking.draw(models.ofa, text, *numbers, **told), text)

  with _Tab(words.drawing, words.drawing_help, words=words) as tab:
    tab.text(words.drawing_text, example=words.drawing_example)
    tab.slider(words.samples, 1, asking.MOST_SAMPLES, asking.SAMPLES, step=1)
    tab.slider(words.drawn, 1, asking.MOST_SAMPLES, asking.DRAWN, step=1)
    tab.slider(words.seed, 0, 99, 0, step=1)
    tab.runs(draw)


def _search(models, words):
  import gradio

  given_to = models.clip, models.library
  with gradio.Tab(words.search):
    gradio.Markdown(words.search_help.format(len(models.library)))
    with gradio.Tabs():
      with _Tab(words.by_text, "", words=words) as tab:
        tab.text(words.search_text, example=words.search_example)
        tab.slider(words.number, 1, comparing.MOST_HITS, 12, step=1)
        tab.runs(lambda *x: shown.hits(comparing.by_text(*given_to, *x, words=words), words=words))
      with _Tab(words.by_picture, "", words=words) as tab:
        tab.picture()
        tab.slider(words.number, 1, comparing.MOST_HITS, 12, step=1)
        tab.runs(
          lambda *x: shown.hits(comparing.by_picture(*given_to, *x, words=words), words=words)
        )


def _similarity(models, words):
  model = models.clip
  learnt = float(np.exp(model.logit_scale))
  low, high = comparing.SCALES
  with _Tab(words.similarity, words.similarity_help, words=words) as tab:
    tab.picture()
    tab.text(words.texts, lines=5)
    info = words.scale_help.format(learnt)
    low, high = min(low, learnt), max(high, learnt)
    tab.slider(words.scale, low, high, round(learnt, 2), step=0.01, info=info)
    tab.runs(lambda *x: shown.likenesses(comparing.similarity(model, *x, words=words), words=words))


def _attention(models, words):
  with _Tab(words.attention, words.attention_help, words=words) as tab:
    tab.picture()
    tab.runs(
      lambda *x: shown.attention(*comparing.attention(models.clip, *x, words=words), words=words)
    )


_TABS = {
  "caption": _caption,
  "vqa": _question,
  "refcoco": _grounding,
  "snli_ve": _entailment,
  "classify": _classes,
  "image": _drawing,
  "search": _search,
  "similarity": _similarity,
  "attention": _attention,
}
