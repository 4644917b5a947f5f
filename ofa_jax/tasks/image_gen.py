"""Pictures of captions (OFA, arXiv 2202.03052, section 3.3): what is the complete image?

A picture is 32 x 32 codes of a VQGAN, which the decoder writes one after the other, row by row.
Training needs the codes alone; an evaluation draws several samples of each caption, has a codec
decode them and a CLIP choose the best, all on the device and for many captions at once. What
leaves the device of a picture are its codes, its scores and its features, not its pixels.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ofa_jax import hub, pictures
from ofa_jax.data import codes as codes_lib
from ofa_jax.data import judged, prompts
from ofa_jax.data.tsv import IMAGE, BadRow
from ofa_jax.decode import answers, codes
from ofa_jax.decode.beam import Hypotheses, Search
from ofa_jax.losses_policy import token_log_probs
from ofa_jax.losses_vocabulary import InBlocks
from ofa_jax.models.inception import WIDTH as POOLED
from ofa_jax.models.inception import InceptionConfig
from ofa_jax.models.layers import split_rngs
from ofa_jax.scoring import clip_scores, fid
from ofa_jax.tasks import drawn
from ofa_jax.tasks.answering import Answering
from ofa_jax.tasks.frozen import Frozen
from ofa_jax.tasks.seq2seq import MAX_POSITIONS, Seq2Seq
from ofa_jax.tokenizers.special import PAD

# Columns by how many there are, in the original's order.
FIELDS = {2: ("id", "text"), 3: ("id", "text", "codes"), 4: ("id", IMAGE, "text", "codes")}
JUDGED_BY = ("text", "image")  # the original's --eval-clip-method: ti_sim, ii_sim
FID_NAMES = {"torchvision": "fid_ofa", "pytorch_fid": "fid_pytorch_fid"}
SHOWN = 96  # pixels of a picture on the page
METRICS = ("score", "nll", "clipsim", "cmmd", "fid_ofa", "fid_pytorch_fid", "inception_score")
ANSWERING = Answering(
  name="image",
  prompt=lambda texts, chinese: prompts.picture(texts["text"], chinese=chinese),
  columns={"id": 0, "text": 1},
  id="id",
  result="images",
  searched_as="image",
  search=Search(
    num_beams=24, max_length=1024, min_length=1024, gen_code=True, sample=True, top_k=256
  ),
)


# Captions and pictures uint8[N, S, S, 3] to metrics.
Scorer = Callable[[Sequence[str], np.ndarray], Mapping[str, float]]


@dataclasses.dataclass(kw_only=True)
class ImageGen(Seq2Seq):
  """Captions and the codes of their pictures.

  Rows have 2, 3 or 4 columns (`FIELDS`), as `columns` has places. Without codes there is nothing to
  learn but from a reward (`tasks/image_reward.py`); the original then has 1,024 zeros, as here.

  Attributes:
    image_size: side in pixels of the pictures.
    target_length: their codes, and one more.
    max_words: of a caption; longer ones are cut.
    search: how codes are drawn in evaluations, `num_beams` samples of each caption.
    guidance: of classifier-free guidance in evaluations, see `decode/codes.py`; 1: none, as in the
      original.
    drop_caption: share of the training rows that have no caption, for guidance later; the original
      has none.
    codec: the VQGAN that makes pictures of codes, as `hub.open_model` takes it; None: evaluations
      make none.
    judge: the CLIP of OpenAI's or Chinese-CLIP that chooses among samples; None: the likeliest one
      is the best.
    judged_by: what a picture is compared with, "text" or (the row's) "image".
    inception: the Inception that FID and the inception score need; None: there are none.
    statistics: .npz of the mean ("mu") and covariance ("sigma") of real pictures, for FID; None:
      those of the rows' own, where these are `compared`.
    compared: whether evaluations compare with the rows' own pictures (4 columns): CMMD, and FID
      without `statistics`.
    decode_batch: pictures that a device decodes at once.
    scorer: what else judges the best pictures: `(captions, uint8[N, S, S, 3]) -> metrics`, a
      function or an object with the names of these in `metrics`; None: nothing does. Then the
      pictures themselves are collected, 196 kB each of 256 pixels.
    page: rows of an evaluation that a page shows.
  """

  answering: ClassVar[None] = None  # what is told of pictures is not a text
  most_targets: ClassVar[int] = MAX_POSITIONS + 1

  columns: tuple[int, ...] = (0, 1, 2)
  image_size: int = 256
  source_length: int = 112
  target_length: int = 1025
  max_words: int = prompts.MAX_PICTURE_WORDS
  search: Search = dataclasses.field(default_factory=lambda: dataclasses.replace(ANSWERING.search))
  guidance: float = 1.0
  drop_caption: float = 0.0
  codec: str | None = None
  judge: str | None = None
  judged_by: str = "text"
  inception: str | None = None
  statistics: str | None = None
  compared: bool = False
  decode_batch: int = 8
  scorer: Scorer | None = None
  page: int = 24

  @property
  def metrics(self) -> tuple[str, ...]:
    """The names that `score` may give."""
    return (*METRICS, *getattr(self.scorer, "metrics", ()))

  @property
  def fields(self) -> tuple[str, ...]:
    """Names of the columns, by their number."""
    return FIELDS.get(len(self.columns), FIELDS[4])

  @property
  def num_codes(self) -> int:
    """Codes of a picture."""
    return self.target_length - 1

  def example(self, row, rng):
    caption = " ".join(row["text"].split()[: self.max_words])
    if not caption:
      raise BadRow(row.name, "the caption is empty")
    told = caption
    if rng is not None and self.drop_caption and rng.random() < self.drop_caption:
      told = ""
    example = {
      "source": self.encode(self.prompt(told)),
      "target": (self._codes(row) + self.words.code_id(0)).tolist(),
    }
    if self.judge is not None:
      try:
        text = caption if rng is not None else caption.replace("/", "")
        example["caption"] = drawn.judge_tokens(self.judge, [text])[0]
      except ValueError as error:
        raise BadRow(row.name, f"the caption is too long for {self.judge}: {error}") from error
    if self.compared and self.judge is not None:
      example["reference"] = row.cropped(drawn.judge_size(self.judge))
    if self.compared and self.inception is not None:
      prepare = judged.FOR_FID[drawn.inception_variant(self.inception)]
      example["real"] = prepare(row.image())
    return example

  def prompt(self, caption: str) -> str:
    """What the model is asked for a caption, "" for any picture."""
    return prompts.picture(caption, chinese=self.words.chinese, max_words=self.max_words)

  def blank(self):
    example = self.assemble({"source": [], "target": []})
    example["target"] = np.full_like(example["target"], PAD)
    if self.judge is not None:
      example["caption"] = np.zeros(drawn.judge_length(self.judge), np.int32)
    if self.compared and self.judge is not None:
      side = drawn.judge_size(self.judge)
      example["reference"] = np.zeros((side, side, 3), np.uint8)
    if self.compared and self.inception is not None:
      example["real"] = judged.no_picture(drawn.inception_variant(self.inception))
    return example

  def check(self, config):
    faults = super().check(config)
    window = config.model.code_window
    if self.num_codes != window**2:
      faults.append(
        f"task.target_length: expected {window**2 + 1} (model.code_image_size "
        f"{config.model.code_image_size}), found {self.target_length}"
      )
    if not config.model.num_codes:
      faults.append("model.num_codes: expected image codes, found none")
    if self.allowed_range is not None:
      faults.append(
        "task.allowed_range: expected None, as nothing but codes follows anyway, found "
        f"{self.allowed_range}"
      )
    if not self.search.sample or not self.search.gen_code:
      faults.append("task.search: expected sample=True and gen_code=True, found a beam search")
    faults += self._check_lengths("search", self.search)
    if not 0 <= self.drop_caption < 1:
      faults.append(
        f"task.drop_caption: expected a share from 0 to below 1, found {self.drop_caption}"
      )
    if self.judged_by not in JUDGED_BY:
      faults.append(f"task.judged_by: expected {' or '.join(JUDGED_BY)}, found {self.judged_by!r}")
    if self.compared and IMAGE not in self.fields:
      faults.append(
        "task.compared: expected four columns, of which one is the pictures', found "
        f"{len(self.columns)}"
      )
    if self.judged_by == "image" and not (self.compared and self.judge):
      faults.append("task.judged_by: expected compared=True and a judge beside 'image'")
    if (self.judge or self.inception or self.scorer) and self.codec is None:
      faults.append("task.codec: expected the VQGAN that makes pictures to judge, found None")
    if self.inception and not (self.statistics or self.compared):
      faults.append("task.statistics: expected those of real pictures beside inception, found None")
    return faults

  def frozen(self, mesh, *, precision, training=True, load=True):
    """The weights of the helpers that an evaluation has; training needs none."""
    if training:
      return None
    helpers = {name: self.helper(name) for name in ("codec", "judge", "inception")}
    return drawn.load_helpers(helpers, mesh, precision=precision, load=load)

  def helper(self, name: str) -> Frozen | None:
    """The "codec", "judge" or "inception"; None: there is none.

    Raises:
      ValueError: the model is of another kind or size than what is asked of it.
    """
    stored = getattr(self, name)
    if stored is None:
      return None
    # As in the original the codec computes in float32 whatever the run does.
    model = Frozen.of(stored, precision=None if name == "judge" else "fp32")
    if name == "inception" and not isinstance(model.config, InceptionConfig):
      title = hub.family_of(model.config).title
      raise ValueError(f"task.inception {stored}: expected an Inception, found {title}")
    if name == "codec":
      drawn.check_codec(stored, model.config)
      side = drawn.picture_side(model.config, self.num_codes)
      if side != self.image_size:
        raise ValueError(
          f"task.image_size: expected {side}, the pictures that the codec {stored} makes of "
          f"{self.num_codes} codes, found {self.image_size}"
        )
    return model

  def loss(self, model, batch, *, rngs, chunks=1):
    del chunks
    taught = self.taught(batch)
    source, previous = (taught.inputs[name] for name in ("tokens", "decoder_tokens"))
    encode_key, decode_key = split_rngs(rngs, 2)
    encoded = model.encode(source, rngs=encode_key)
    hidden = model.hidden(encoded, previous, code_mask=True, rngs=decode_key)
    return self.cost(self.code_logits(model, hidden), model.code_places(taught.targets), batch)

  def code_logits(self, model: Any, hidden: jax.Array) -> jax.Array | InBlocks:
    """The logits of what has a probability in the original's range; no other is computed.

    Args:
      model: an OFA.
      hidden: float[..., D], of its decoder.
    """
    if self.vocab_blocks == 1:
      return model.code_logits(hidden)
    return InBlocks(hidden, model.code_table, self.vocab_blocks)

  def draw(
    self, model: Any, batch: Mapping[str, jax.Array], *, rngs: jax.Array, search: Search
  ) -> Hypotheses:
    """Draws samples for the captions of a batch.

    Args:
      model: an OFA.
      batch: of `blank`'s fields.
      rngs: PRNG keys [B].
      search: how.
    """
    source = batch["source"]
    if self.guidance != 1:
      untold = self.assemble({"source": self.encode(self.prompt("")), "target": []})["source"]
      source = jnp.concatenate([source, jnp.broadcast_to(untold, source.shape)])
    return codes.generate(
      model, model.encode(source), search=search, rngs=rngs, guidance=self.guidance
    )

  def predict(self, model, batch, *, rngs, frozen):
    """Of each row its best sample's "codes", all samples' "score", and what metrics need.

    Drawn by the row's own key: the same on any mesh and in any batch.
    """
    rows = {"batch": dict(batch), "keys": answers.row_keys(rngs, batch["index"])}
    return answers.on_each_device(self._evaluated)(model, rows, frozen)

  def streams(self, split):
    _ = self._real  # its faults are told before anything is compiled
    return super().streams(split)

  def score(self, predictions, streams):
    """The original's "score", the mean of the best similarities, and the metrics of pictures.

    "nll" is of the codes that rows have. CMMD and FID say how far the best samples are from the
    rows' own pictures or `statistics`; "fid_ofa" is the original's, "fid_pytorch_fid" that of
    papers.
    """
    rows = predictions["examples"]
    kept = np.flatnonzero(rows["valid"])
    known = {name: np.asarray(values)[kept] for name, values in rows.items()}
    told = {}
    if self.judge is not None:
      told["score"] = float(np.mean(known["score"][:, 0]))
      told["clipsim"] = clip_scores.clipsim(known["clip"], known["clip_text"])
    if "codes" in self.fields:
      told["nll"] = float(np.mean(known["nll"]))
    if "clip_reference" in known and len(kept) > 1:
      told["cmmd"] = clip_scores.cmmd(known["clip_reference"], known["clip"])
    if "probabilities" in known:
      told["inception_score"] = fid.inception_score(known["probabilities"])[0]
    if "pool" in known and len(kept) > 1:
      real = self._real or fid.Moments.of(known["pool_reference"]).statistics
      name = FID_NAMES[self.helper("inception").config.variant]
      told[name] = fid.frechet_distance(real, fid.Moments.of(known["pool"]).statistics)
    if "picture" in known:
      captions = [streams["examples"].row(i)["text"] for i in kept]
      told |= self.scorer(captions, known["picture"])
    return told

  def results(self, predictions, streams):
    """`predict.json`: id, caption, codes of the best sample, scores of all; and a page of them."""
    rows, told = streams["examples"], predictions["examples"]
    readable = np.flatnonzero(told["valid"])
    lines = [
      {
        "id": rows.row(i)["id"],
        "caption": rows.row(i)["text"],
        "codes": codes_lib.written(told["codes"][i]),
        "scores": [round(float(x), 6) for x in told["score"][i]],
      }
      for i in readable
    ]
    files = {"predict.json": json.dumps(lines, ensure_ascii=False).encode()}
    if not self.page or "shown" not in told or not len(readable):
      return files
    cells = [
      pictures.Cell(image=told["shown"][i], lines=((rows.row(i)["text"], "black"),))
      for i in readable[: self.page]
    ]
    return files | pictures.page("page", pictures.in_rows(cells))

  def pages(self, predictions, streams):
    """Part of `results`."""
    del predictions, streams
    return {}

  def drawings(self, codes: jax.Array, weights: Any, *, num_codes: int) -> jax.Array:
    """Codes int32[B, M, C] to pictures uint8[B, M, S, S, 3].

    Args:
      codes: of squares.
      weights: the codec's, of `frozen`.
      num_codes: that the model draws from.

    Raises:
      ValueError: the codec has another number of codes.
    """
    helper = self.helper("codec")
    drawn.check_codec(self.codec, helper.config, codes=num_codes)
    return drawn.decoded(helper.merge(weights), codes, batch_size=self.decode_batch)

  @property
  def _real(self):
    """The statistics of real pictures in a file; None: there is none."""
    if self.statistics is None:
      return None
    found = fid.load(self.statistics)
    if len(found.mean) != POOLED:
      raise ValueError(
        f"task.statistics {self.statistics}: expected the mean of {POOLED} features, as Inception "
        f"gives them, found {len(found.mean)}"
      )
    return found

  def _codes(self, row):
    """The codes that a row has, or zeros."""
    if "codes" not in self.fields:
      return np.zeros(self.num_codes, np.int32)
    try:
      return codes_lib.parse(row["codes"], count=self.num_codes, num_codes=self.words.num_codes)
    except ValueError as error:
      raise BadRow(row.name, str(error)) from error

  def _check_lengths(self, name, search):
    wrong = [x for x in (search.max_length, search.min_length) if x != self.num_codes]
    if not wrong:
      return []
    return [
      f"task.{name}: expected min_length and max_length {self.num_codes}, the codes of a picture, "
      f"found {search.min_length} and {search.max_length}"
    ]

  def _evaluated(self, model, rows, frozen):
    """What `predict` gives, of one device's rows."""
    batch, frozen = rows["batch"], frozen or {}
    found = self.draw(model, batch, rngs=rows["keys"], search=self.search)
    own = found.tokens[..., :-1] - model.first_code
    told = {"nll": self._nll(model, batch)} if "codes" in self.fields else {}
    if "codec" not in frozen:
      return {**told, "codes": own[:, 0], "score": found.scores}
    drawings = self.drawings(own, frozen["codec"], num_codes=model.num_codes)
    scores = found.scores
    if "judge" in frozen:
      scores, judged = self._judged(frozen["judge"], drawings, batch)
    order = jnp.argsort(-scores, axis=1, stable=True)

    def best(x):
      place = order[:, :1].reshape(-1, *[1] * (x.ndim - 1))
      return jnp.take_along_axis(x, place, axis=1)[:, 0]

    told |= {"codes": best(own), "score": jnp.take_along_axis(scores, order, axis=1)}
    if "judge" in frozen:
      told |= {**judged, "clip": best(judged["clip"])}
    if "inception" in frozen:
      told |= self._inception(frozen["inception"], best(drawings), batch)
    if self.scorer is not None:
      told["picture"] = best(drawings)
    if self.page:
      shape = (len(own), SHOWN, SHOWN, 3)
      shown = jax.image.resize(best(drawings).astype(jnp.float32), shape, "linear")
      told["shown"] = shown.astype(jnp.uint8)
    return told

  def _judged(self, weights, drawings, batch):
    """The similarity [B, M] of pictures with their captions, or references, and the features."""
    helper = self.helper("judge")
    judge, size = helper.merge(weights), helper.config.vision.image_size
    clip = drawn.image_features(judge, drawings, size=size)
    told = {"clip": clip, "clip_text": drawn.text_features(judge, batch["caption"])}
    if self.compared:
      told["clip_reference"] = drawn.image_features(judge, batch["reference"], size=size)
    with_ = told["clip_text" if self.judged_by == "text" else "clip_reference"]
    return jnp.einsum("bme,be->bm", clip, with_, precision="highest"), told

  def _inception(self, weights, drawings, batch):
    """Features for FID, and of torchvision's Inception the classes' probabilities."""
    helper = self.helper("inception")
    model = helper.merge(weights)
    told = {"pool": drawn.pooled(model, drawings, variant=helper.config.variant)}
    if self.compared:
      told["pool_reference"] = drawn.pooled(model, batch["real"], variant=helper.config.variant)
    if helper.config.variant == "torchvision":
      told["probabilities"] = jax.nn.softmax(drawn.classes(model, drawings))
    return told

  def _nll(self, model, batch):
    """Nats a token of the codes that rows have, float32[B]."""
    hidden = model.hidden(model.encode(batch["source"]), batch["previous"], code_mask=True)
    places = model.code_places(batch["target"])
    log_probs = token_log_probs(self.code_logits(model, hidden), places)
    return -jnp.mean(log_probs, axis=1)
