"""OFA from Python: pictures and texts in; texts, boxes and their scores out.

  model, preprocess = load_from_name("OFA-base")
  model.caption([Image.open("pokemon.jpeg")])
  model.answer(images, ["how many pokemons are there?", "is it raining?"])

A list of N inputs gives a list of N results, and with `return_scores` also float32[N]: of what was
generated the search's score, of what was chosen the logarithm of its probability among the choices.
With `return_probabilities` another float32[N] is how likely each is right, by the temperatures that
`ofa_jax.calibrate` has stored with the model (`tasks/confidence.py`).
Prompts, searches and the cleaning of texts are the original's.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ofa_jax import calibrations, hub
from ofa_jax.data.text import REFERENCES
from ofa_jax.decode import candidates
from ofa_jax.decode.beam import Search
from ofa_jax.decode.trie import Trie
from ofa_jax.inference import inputs
from ofa_jax.inference.devices import itself
from ofa_jax.inference.drawing import Drawing
from ofa_jax.inference.grounding import Grounding
from ofa_jax.inference.identity import identity
from ofa_jax.inference.inputs import Picture
from ofa_jax.inference.reading import Reading
from ofa_jax.inference.results import Results, Returns, log_probability
from ofa_jax.inference.runner import Runner, as_lists
from ofa_jax.tasks import caption, free_text, gigaword, image_classify, ocr, refcoco, snli_ve, vqa
from ofa_jax.tasks.answering import Answering, read
from ofa_jax.tokenizers.ofa import OFATokenizer
from ofa_jax.tokenizers.special import BOS


class OFAModel(Reading, Grounding, Drawing):
  """An OFA, or several as an ensemble, on all local devices.

  Images are whatever `data.given.picture` takes (paths, Pillow images, arrays of 0 to 255 or of
  floats 0 to 1), which are resized; or float32[S, S, 3] of one size S, as from `preprocess`, which
  are taken as they are.

  Attributes:
    config: sizes of the (first) model.
    tokenizer: the (first) model's own; ValueError, which says what is missing, where it has none.
    image_size: side in pixels that images are resized to.
    searches: of "caption", "answer", "ground", "read", "summary"; of captions the model's own.
    preprocess: makes a Pillow image float32[S, S, 3], as the model wants it.
    num_params: scalars of all models.
    precision: what they compute in.
    calibrations: the temperatures of its probabilities, by `confidence.name_of`; an ensemble has
      none.
    identity: what else their results depend on, see `inference.identity`.
  """

  def __init__(
    self,
    *sources: hub.Source,
    precision: str = "fp32",
    image_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
  ):
    """Reads the weights onto the devices.

    Args:
      sources: from `hub.open_model`; the probabilities of several are averaged.
      precision: as for `api.load_from_name`.
      image_size: what the model was trained with; None: what it says itself.
      devices: of this machine; None: all.

    Raises:
      ValueError: the models' vocabularies differ; faulty files.
    """
    self.precision, self._num_models = precision, len(sources)
    self.image_size = image_size or sources[0].image_size
    self.identity = identity(sources, precision=precision, image_size=self.image_size)
    self._runner = Runner(sources, precision=precision, devices=devices)
    self.config, self.num_params = self._runner.config, self._runner.num_params
    self.calibrations = calibrations.load(sources[0]) if len(sources) == 1 else {}
    self._source, colours = sources[0], self._runner.colours
    self.preprocess = functools.partial(inputs.preprocess, size=self.image_size, colours=colours)
    asked = (x.ANSWERING for x in (caption, vqa, refcoco, ocr, gigaword))
    self.searches = {x.searched_as: dataclasses.replace(x.search) for x in asked}
    own = sources[0].settings["generation"]
    self.searches["caption"] = dataclasses.replace(self.searches["caption"], **own)
    self._plan = functools.lru_cache(maxsize=8)(self._make_plan)
    self._painter = functools.lru_cache(maxsize=2)(self._make_painter)

  def __repr__(self) -> str:
    more = f", models={self._num_models}" if self._num_models > 1 else ""
    more += f", calibrations={sorted(self.calibrations)}" if self.calibrations else ""
    return (
      f"{type(self).__name__}(num_params={self.num_params:_}, image_size={self.image_size}, "
      f"vocab_size={self.config.vocab_size}, precision={self.precision!r}{more})"
    )

  @property
  def looks_once(self) -> bool:
    """Whether equal pictures of a call are looked at once, see `Runner.looks_once`; may be set."""
    return self._runner.looks_once

  @looks_once.setter
  def looks_once(self, value: bool) -> None:
    self._runner.looks_once = value

  @functools.cached_property
  def tokenizer(self) -> OFATokenizer:
    return self._source.tokenizer

  def forward(
    self,
    source_tokens: Any,
    decoder_tokens: Any,
    images: np.ndarray | None = None,
    image_mask: np.ndarray | None = None,
    code_mask: np.ndarray | None = None,
    second_images: np.ndarray | None = None,
  ) -> np.ndarray:
    """Returns logits float32[N, T, V] of the token after each of `decoder_tokens`.

    Args:
      source_tokens: int32[N, S] or N lists of ids: 0, a text, 2, and then 1.
      decoder_tokens: int32[N, T] or N lists of ids: 0, a text, and then 1.
      images: float32[N, h, w, 3] as from `preprocess`, or uint8, normalised on the device.
      image_mask: bool[N], False where an input has no image; None: all have one.
      code_mask: bool[N], True where the decoder's tokens are image codes; None: nowhere.
      second_images: as `images`, for a model that sees two (`OFAConfig.max_images`).

    Raises:
      ValueError: another shape or type, or ids that are not in the vocabulary.
    """
    rows = self._rows(source_tokens, images, image_mask, second_images)
    rows["decoder"] = self._ids("decoder_tokens", decoder_tokens, rows=len(rows["source"]))
    if code_mask is not None:
      rows["code_mask"] = inputs.mask("code_mask", code_mask, rows=len(rows["source"]))
    return self._runner.forward(rows)

  def generate_tokens(
    self,
    source_tokens: Any,
    images: np.ndarray | None = None,
    image_mask: np.ndarray | None = None,
    *,
    num_beams: int = 5,
    max_length: int = 16,
    min_length: int = 1,
    length_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    temperature: float = 1.0,
    unk_penalty: float = 0.0,
    normalize_scores: bool = True,
    allowed_range: tuple[int, int] | None = None,
    prefix_tokens: Any = None,
    trie: Trie | None = None,
    gen_code: bool = False,
    mask_probs: bool = False,
    diverse_groups: int = 1,
    diversity_strength: float = 0.5,
    sample: bool = False,
    top_k: int = 0,
    top_p: float = 0.0,
    seed: int = 0,
  ) -> list[list[dict[str, Any]]]:
    """Searches for what follows.

    Args:
      source_tokens, images, image_mask: as for `forward`.
      prefix_tokens: int32[N, P] or N lists of ids that hypotheses begin with, without 0.
      trie: what may follow the prefix; from `ofa_jax.decode.trie.build`.
      seed: of samples.
      num_beams, max_length, min_length, length_penalty, no_repeat_ngram_size, temperature,
        unk_penalty, normalize_scores, allowed_range, gen_code, mask_probs, diverse_groups,
        diversity_strength, sample, top_k, top_p: see `ofa_jax.decode.beam.Search`.

    Returns:
      For each input its hypotheses, the best first: "tokens" int32[n] with the end, "score", and
      "positional_scores" float32[n].

    Raises:
      ValueError: options that contradict each other, more beams than the vocabulary has tokens, or
        inputs as for `forward`.
    """
    search = Search(
      num_beams=num_beams,
      max_length=max_length,
      min_length=min_length,
      length_penalty=length_penalty,
      normalize_scores=normalize_scores,
      temperature=temperature,
      unk_penalty=unk_penalty,
      no_repeat_ngram_size=no_repeat_ngram_size,
      allowed_range=allowed_range,
      gen_code=gen_code,
      mask_probs=mask_probs,
      diverse_groups=diverse_groups,
      diversity_strength=diversity_strength,
      sample=sample,
      top_k=top_k,
      top_p=top_p,
    )
    rows = self._rows(source_tokens, images, image_mask)
    if prefix_tokens is not None:
      rows["prefix"] = self._ids("prefix_tokens", prefix_tokens, rows=len(rows["source"]))
    return self._search(rows, search, trie=trie, seed=seed)

  def generate(
    self,
    images: Sequence[Picture | None] | np.ndarray | None,
    texts: Sequence[str],
    *,
    num_beams: int = 5,
    max_length: int = 16,
    no_repeat_ngram_size: int = 3,
    search: Search | None = None,
    seed: int = 0,
    return_scores: bool = False,
  ) -> Results:
    """Answers prompts in the user's own words.

    Args:
      images: one for each text; None where, or if nowhere, there is one.
      texts: prompts; longer ones than the model can read are cut, with a warning.
      num_beams, max_length, no_repeat_ngram_size: see `ofa_jax.decode.beam.Search`.
      search: its other fields; None: the defaults.
      seed: of samples.
      return_scores: whether to return (texts, scores).

    Raises:
      ValueError: an empty text; options that contradict each other.
    """
    given = {"num_beams": num_beams, "max_length": max_length}
    given["no_repeat_ngram_size"] = no_repeat_ngram_size
    search = dataclasses.replace(search or Search(), **given)
    texts = inputs.check_texts("texts", texts)
    rows = self._asked(free_text.ANSWERING, images, {"text": texts}, image_needed=False)
    returns = self._returns(free_text.ANSWERING, return_scores)
    return self._texts(self._search(rows, search, seed=seed), returns)

  def caption(
    self,
    images: Sequence[Picture] | np.ndarray,
    *,
    search: Search | None = None,
    return_scores: bool = False,
    return_probabilities: bool = False,
  ) -> Results:
    """Describes images.

    Args:
      images: what to describe.
      search: how; None: as in `searches`.
      return_scores, return_probabilities: whether to return these, too.

    Raises:
      ValueError: an image is missing; probabilities of a model that is not calibrated.
    """
    returns = self._returns(caption.ANSWERING, return_scores, return_probabilities)
    rows = self._asked(caption.ANSWERING, images)
    return self._texts(self._search(rows, search or self.searches["caption"]), returns)

  def answer(
    self,
    images: Sequence[Picture] | np.ndarray,
    questions: Sequence[str],
    candidates: Sequence[str] | None = None,
    *,
    objects: Sequence[Sequence[str]] | None = None,
    search: Search | None = None,
    prompt_decoder: bool = True,
    return_scores: bool = False,
    return_probabilities: bool = False,
  ) -> Results:
    """Answers questions about images.

    Args:
      images: one for each question.
      questions: a missing question mark is added; words beyond 80 are cut, with a warning.
      candidates: the answers to choose from, all of which are scored; None: any answer.
      objects: names of what a detector saw in each image, which stand behind the question, as they
        did when the original's models were fine-tuned; None: none.
      search: of any answer; its lengths do not count the question. None: as in `searches`.
      prompt_decoder: whether the decoder, too, reads the question before it answers, as it does in
        models that were fine-tuned by the original's scripts, but not in pretrained ones.
      return_scores, return_probabilities: whether to return these, too.

    Raises:
      ValueError: an empty question, no or empty candidates, an image is missing; probabilities of a
        model that is not calibrated for any answer, or for candidates.
    """
    chosen = candidates is not None
    returns = self._returns(vqa.ANSWERING, return_scores, return_probabilities, chosen=chosen)
    texts = {"text": inputs.check_texts("questions", questions)}
    if objects is not None:
      number = len(texts["text"])
      texts["objects"] = inputs.joined("objects", objects, rows=number, by=REFERENCES)
    rows = self._asked(vqa.ANSWERING, images, texts)
    if candidates is not None:
      candidates = inputs.check_texts("candidates", candidates)
      return returns.chosen(*self._choose(rows, candidates, reads=prompt_decoder))
    if prompt_decoder:
      rows["prompt"] = inputs.decoder_prompt(rows["source"])[:, 1:]
    return self._texts(self._search(rows, search or self.searches["answer"]), returns)

  def entail(
    self,
    images: Sequence[Picture] | np.ndarray,
    hypotheses: Sequence[str],
    premises: Sequence[str] | None = None,
    *,
    return_scores: bool = False,
    return_probabilities: bool = False,
  ) -> Results:
    """Says whether images imply texts: "entailment", "neutral" or "contradiction".

    Args:
      images: one for each hypothesis.
      hypotheses: words beyond 80 are cut, with a warning.
      premises: texts that are known to describe the images; None: there are none.
      return_scores, return_probabilities: whether to return these, too.

    Raises:
      ValueError: an empty text; an image is missing; probabilities of a model that is not
        calibrated.
    """
    hypotheses = inputs.check_texts("hypotheses", hypotheses)
    texts = {"text": hypotheses} | ({} if premises is None else {"premise": premises})
    returned = {"return_scores": return_scores, "return_probabilities": return_probabilities}
    return self.ask(snli_ve.ANSWERING, texts, images, **returned)

  def classify(
    self,
    images: Sequence[Picture] | np.ndarray,
    classes: Sequence[str],
    *,
    return_scores: bool = False,
    return_probabilities: bool = False,
  ) -> Results:
    """Chooses the class of each image by the names of all classes.

    Raises:
      ValueError: no class, one without a name, or an image is missing; probabilities of a model
        that is not calibrated.
    """
    answering = image_classify.ANSWERING
    returns = self._returns(answering, return_scores, return_probabilities, chosen=True)
    rows = self._asked(answering, images)
    classes = inputs.check_texts("classes", classes)
    return returns.chosen(*self._choose(rows, classes, reads=answering.reads_prompt))

  def ask(
    self,
    answering: Answering,
    texts: Mapping[str, Sequence[str]],
    images: Sequence[Picture] | np.ndarray | None = None,
    *,
    search: Search | None = None,
    return_scores: bool = False,
    return_probabilities: bool = False,
  ) -> Results:
    """Answers what a task asks: `glue.answering("rte")`, `gigaword.ANSWERING`, one of your own.

    Args:
      answering: the task's; out of its choices all are scored, and the best is told by its name.
      texts: of its prompt by name, one for each row.
      images: one for each row; None: the task has none.
      search: of what is not chosen; None: as in `searches`.
      return_scores, return_probabilities: whether to return these, too.

    Raises:
      ValueError: an empty or a missing text, an image is missing; probabilities of a model that is
        not calibrated.
    """
    chosen = answering.choices is not None
    returns = self._returns(answering, return_scores, return_probabilities, chosen=chosen)
    number = len(next(iter(texts.values()), ()))
    texts = {name: inputs.check_texts(name, x, rows=number) for name, x in texts.items()}
    needed = images is not None or "image" in answering.columns
    rows = self._asked(answering, images, texts, image_needed=needed)
    if answering.choices is None:
      search = search or self.searches.get(answering.searched_as, answering.search)
      if answering.reads_prompt:
        rows["prompt"] = inputs.decoder_prompt(rows["source"])[:, 1:]
      return self._texts(self._search(rows, search), returns)
    reads, ended = answering.reads_prompt, answering.ends_prompt
    best, scores = self._choose(rows, [*answering.choices], reads=reads, ended=ended)
    return returns.chosen([answering.called(answer) for answer in best], scores)

  def _rows(self, source_tokens, images, image_mask, second_images=None):
    rows = {"source": self._ids("source_tokens", source_tokens)}
    number = len(rows["source"])
    for name, pixels in (("image", images), ("second_image", second_images)):
      if pixels is not None:
        rows[name] = inputs.image_array(pixels, rows=number)
    if image_mask is not None:
      rows["image_mask"] = inputs.mask("image_mask", image_mask, rows=number)
    return rows

  def _ids(self, name, tokens, *, rows=None):
    return inputs.token_array(
      name, tokens, rows=rows, longest=inputs.MAX_TOKENS, vocab_size=self.config.vocab_size
    )

  def _asked(self, answering, images, texts=None, *, image_needed=True):
    sizes = {"image_size": self.image_size, "vocab_size": self.config.vocab_size}
    words = {"tokenizer": self.tokenizer, "image_needed": image_needed}
    return inputs.asked(answering, texts, images, **words, **sizes)

  def _search(self, rows, search, *, trie=None, seed=0):
    """For each row the hypotheses of `generate_tokens`."""
    if not len(rows["source"]):
      return []
    seed = inputs.check_seed(seed) if search.sample else None
    return as_lists(self._runner.generate(rows, search=search, trie=trie, seed=seed))

  def _returns(self, answering, scores, probabilities=False, *, chosen=False):
    """What a method gives back; ValueError where the model is not calibrated for it."""
    asked = {"scores": scores, "probabilities": probabilities}
    return Returns.of(self.calibrations, answering, chosen=chosen, **asked)

  def _texts(self, hypotheses, returns):
    """The text of the best hypothesis of each row; empty where there is none."""
    best = [x[0] if x else None for x in hypotheses]
    texts = ["" if x is None else read(self.tokenizer, x["tokens"]) for x in best]
    scores = np.array([-np.inf if x is None else x["score"] for x in best], np.float32)
    return returns.generated(texts, scores, np.array([log_probability(x) for x in best]))

  def _choose(self, rows, answers, *, reads, ended=False):
    """Each row's best answer, the first of equal ones, and the scores float32[N, A] of all."""
    plan = self._plan(tuple(answers))
    if not len(rows["source"]):
      return [], np.zeros((0, len(answers)), np.float32)
    rows["decoder"] = rows["source"] if ended else inputs.decoder_prompt(rows["source"])
    if not reads:
      rows["decoder"] = np.full((len(rows["source"]), 1), BOS, np.int32)
    scores = self._runner.score(rows, plan=plan)
    return [answers[i] for i in scores.argmax(axis=1)], scores

  def _make_plan(self, answers):
    space = "" if self.tokenizer.chinese else " "
    return candidates.plan([self.tokenizer.encode(space + text) for text in answers])

  eval = float = to = itself  # last, so that the types above are not meant
