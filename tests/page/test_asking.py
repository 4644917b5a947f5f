"""The tabs of an OFA ask by the API with its searches and calibrations, and show what it says."""

import dataclasses
import types

import numpy as np
import pytest
from PIL import Image

from ofa_jax.calibrations import Calibration
from ofa_jax.decode.beam import Search
from ofa_jax.inference.grounding import Boxes
from ofa_jax.page import asking, given, layout, shown
from ofa_jax.page.words import CHINESE, ENGLISH

CALIBRATION = Calibration(temperature=2.0, rows=9, right=0.5, ece_before=0.2, ece_after=0.1)
SEARCHES = {"caption": Search(num_beams=2), "answer": Search(num_beams=3), "ground": Search()}


@dataclasses.dataclass
class Model:
  """Stands for an OFA: keeps what it was asked, and says what it is told to."""

  says: object = None
  calibrations: dict = dataclasses.field(default_factory=dict)
  num_bins: int = 8
  score: float = float(np.log(0.75))

  def __post_init__(self):
    self.asked, self.searches = {}, SEARCHES
    self.config = types.SimpleNamespace(num_bins=self.num_bins)

  def _answer(self, **asked):
    self.asked = asked
    more = ([0.25],) if asked["return_probabilities"] else ()
    return [self.says], np.float32([self.score]), *more

  def caption(self, images, *, search, return_scores, return_probabilities=False):
    return self._answer(images=images, search=search, return_probabilities=return_probabilities)

  def answer(self, images, questions, candidates, *, objects, search, prompt_decoder,
             return_scores, return_probabilities=False):  # fmt: skip
    assert prompt_decoder and objects is None
    told = {"candidates": candidates, "return_probabilities": return_probabilities}
    return self._answer(images=images, questions=questions, search=search, **told)

  def entail(self, images, hypotheses, premises, *, return_scores, return_probabilities=False):
    told = {"premises": premises, "return_probabilities": return_probabilities}
    return self._answer(images=images, hypotheses=hypotheses, **told)

  def classify(self, images, classes, *, return_scores, return_probabilities=False):
    return self._answer(images=images, classes=classes, return_probabilities=return_probabilities)

  def draw(self, texts, *, samples, top, seed, codec, judge):
    self.asked = {"texts": texts, "samples": samples, "top": top, "seed": seed, "codec": codec}
    return [[Image.new("RGB", (32, 32), (i, 0, 0)) for i in range(top)]]

  def ground_all(self, images, phrases, *, most, min_probability, search, seed):
    self.asked = {"phrases": phrases, "most": most, "min_probability": min_probability}
    return [self.says]


@pytest.fixture
def upload(tmp_path):
  Image.new("RGB", (40, 20), (9, 9, 9)).save(tmp_path / "x.png")
  return str(tmp_path / "x.png")


def test_what_a_model_can_do_has_a_tab():
  everything = ("caption", "vqa", "refcoco", "snli_ve", "classify")
  assert asking.tabs(Model()) == everything
  assert asking.tabs(Model(num_bins=0)) == ("caption", "vqa", "snli_ve", "classify")


def test_captions_and_free_answers_have_a_probability_where_they_are_calibrated(upload):
  model = Model("a dog")
  assert asking.caption(model, upload, words=ENGLISH) == asking.Answer("a dog")
  assert model.asked["search"] == SEARCHES["caption"]
  assert model.asked["images"][0].size == (40, 20)
  model = Model("two", calibrations={"vqa/generated": CALIBRATION})
  found = asking.answer(model, upload, " how many? ", "", words=ENGLISH)
  assert found == asking.Answer("two", 0.25, calibrated=True)
  assert model.asked["questions"] == ["how many?"] and model.asked["candidates"] is None
  assert model.asked["search"] == SEARCHES["answer"]


def test_what_is_chosen_has_its_share_of_all_choices(upload):
  model = Model("two", calibrations={"vqa/generated": CALIBRATION})
  found = asking.answer(model, upload, "how many?", "one\ntwo", words=ENGLISH)
  assert (found.text, found.calibrated) == ("two", False)
  assert found.probability == pytest.approx(0.75)
  assert model.asked["candidates"] == ("one", "two")
  model = Model("cat", calibrations={"classify/chosen": CALIBRATION})
  found = asking.classify(model, upload, "dog\ncat\n", words=ENGLISH)
  assert found == asking.Answer("cat", 0.25, calibrated=True)
  assert model.asked["classes"] == ("dog", "cat")


def test_entailment_is_named_in_the_language_of_the_page(upload):
  model = Model("contradiction")
  found = asking.entail(model, upload, "a dog", " ", words=CHINESE)
  assert found.text == "矛盾" and found.probability == pytest.approx(0.75)
  assert model.asked["premises"] is None
  asking.entail(model, upload, "a dog", "a cat", words=ENGLISH)
  assert model.asked["premises"] == ["a cat"] and model.asked["hypotheses"] == ["a dog"]


def test_several_boxes_are_drawn_in_their_colours(upload):
  boxes = np.float32([[4, 2, 20, 10], [24, 8, 36, 18]])
  model = Model(Boxes(boxes, np.float32([-1, -2]), None))
  found = asking.ground(model, upload, "a dog", 2, 0.9, words=ENGLISH)
  assert model.asked == {"phrases": ["a dog"], "most": 2, "min_probability": None}
  assert found.drawn.shape == (224, 448, 3)
  for colour, (x0, y0, x1, y1) in zip(asking.COLOURS, boxes * 11.2, strict=False):
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    y, x = np.nonzero((found.drawn == rgb).all(-1))
    np.testing.assert_allclose([x.min(), x.max(), y.min(), y.max()], [x0, x1, y0, y1], atol=1)
  page = shown.boxes(found, least=0.9, words=ENGLISH)
  assert "4, 2, 20, 10" in page and "24, 8, 36, 18" in page and "%" not in page
  assert f'alt="{ENGLISH.boxes_drawn}"' in page


def test_a_phrase_is_absent_where_a_calibrated_model_is_not_sure_enough(upload):
  sure = Boxes(np.float32([[4, 2, 20, 10]]), np.float32([-1]), np.float32([0.82]))
  model = Model(sure, calibrations={"refcoco/generated": CALIBRATION})
  found = asking.ground(model, upload, "a dog", 3, 0.6, words=ENGLISH)
  assert model.asked["min_probability"] == 0.6
  assert "82.0 %" in shown.boxes(found, least=0.6, words=ENGLISH)
  none = Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.float32))
  model.says = none
  found = asking.ground(model, upload, "a dog", 3, 0.6, words=ENGLISH)
  assert "Absent: no box reaches 60 %" in shown.boxes(found, least=0.6, words=ENGLISH)
  model = Model(Boxes(none.boxes, none.scores, None))
  found = asking.ground(model, upload, "a dog", 3, 0.6, words=CHINESE)
  assert CHINESE.no_box in shown.boxes(found, least=0.6, words=CHINESE)


def test_pictures_are_drawn_where_there_is_a_codec():
  model = Model()
  assert asking.tabs(model, draws=True)[-1] == "image"
  told = {"codec": "vqgan", "judge": None, "words": ENGLISH}
  found = asking.draw(model, " a boat ", 2, 4, 7, **told)
  asked = {"texts": ["a boat"], "samples": 2, "top": 2, "seed": 7, "codec": "vqgan"}
  assert model.asked == asked and [int(x[0, 0, 0]) for x in found] == [0, 1]
  page = shown.drawings(found, "a <boat>")
  assert page.count("<img") == 2 and 'alt="a &lt;boat&gt; (2)"' in page
  with pytest.raises(given.Fault, match="Text to draw"):
    asking.draw(model, "", 2, 4, 7, **told)


def test_faults_stand_in_the_place_of_results(upload, caplog):
  def run(error):
    def fail():
      raise error

    return layout.told(fail, words=ENGLISH)()

  sentence = run(given.Fault("Please <i>{give}</i> $one."))
  assert sentence == (
    '<p class="said fault" role="alert">Please &lt;i&gt;&#123;give&#125;&lt;/i&gt; &#36;one.</p>'
  )
  assert "The model cannot do this: Expected A, found B<" in run(
    ValueError("Expected A, found B\nC")
  )
  said = run(OSError("no such file /home/me/secret"))
  assert ENGLISH.failed in said and "secret" not in said
  assert "secret" in caplog.text  # the terminal has it
  told = layout.told(
    lambda *x: shown.answer(asking.caption(Model("a <b>"), *x, words=ENGLISH), words=ENGLISH),
    words=ENGLISH,
  )
  assert "a &lt;b&gt;" in told(upload) and "alert" not in told(upload)
  assert ENGLISH.no_picture in told(None)


def test_probabilities_are_told_with_what_they_are():
  sure = shown.answer(asking.Answer("yes", 0.873, calibrated=True), words=ENGLISH)
  assert "87.3 % likely to be right (calibrated)" in sure
  own = shown.answer(asking.Answer("yes", 0.873), words=ENGLISH)
  assert "87.3 % of the probability of all choices" in own and "not calibrated" in own
  assert "%" not in shown.answer(asking.Answer("yes"), words=ENGLISH)
