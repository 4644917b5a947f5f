"""What the tasks of OFA share (arXiv 2202.03052): a prompt and perhaps an image in, tokens out.

A task says which columns its rows have and what source and target a row makes; `Seq2Seq` reads the
files, assembles arrays, computes the loss, and generates. `docs/tasks.md` shows a new task.

Shapes are static: sources and targets are filled up to `source_length` and `target_length`. Length
buckets would save little, since the image is nearly all of the work: a caption of 13 tokens, the
usual length, filled up to 48 adds 3.6 % to the operations of a step (Base, 480 pixels, counted from
the jaxpr), and every bucket would be one more program.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ofa_jax import hub, losses, pictures
from ofa_jax.data import images
from ofa_jax.data.cache import DEFAULT_MAX_BYTES
from ofa_jax.data.rows import Row
from ofa_jax.data.tsv import IMAGE, Table
from ofa_jax.decode import answers
from ofa_jax.decode.beam import Hypotheses, Search
from ofa_jax.decode.trie import Trie
from ofa_jax.losses_vocabulary import InBlocks
from ofa_jax.tasks import confidence
from ofa_jax.tasks.answering import Answering, read
from ofa_jax.tasks.base import Confidences, Predictions, Task, normalized, spec_of
from ofa_jax.tasks.example_rows import Rows
from ofa_jax.tasks.taught import Taught, cut, filled, learnt_places, logits, twice
from ofa_jax.tasks.words import check_tokenizer, load_tokenizer, tokenizer_folder
from ofa_jax.tokenizers.ofa import OFATokenizer, layout_files
from ofa_jax.tokenizers.special import BOS, EOS, PAD

PAGE_PIXELS = 180  # a side of a picture on a page
MAX_POSITIONS = 1024  # the original's --max-source-positions and --max-target-positions


@dataclasses.dataclass(kw_only=True)
class Seq2Seq(Task):
  """The defaults that the tasks of OFA keep; a task adds at least `fields` and `example`.

  Attributes:
    fields: names of the columns that a row is read from; "image" is the one in base64.
    answering: what is asked and how answers are told; None where the task says it otherwise.
    prompts: whether examples have a "prompt", which the decoder is given before the answer.
    target_ends: False where the answer is learnt without the end after it.
    most_targets: the largest `target_length`.
    train, valid, test: TSV files of each split.
    columns: places of `fields` in the files, from 0 (the original's --selected-cols).
    tokenizer: folder of the tokenizer's files, or a model that has them, as `hub.open_model` takes
      it.
    image_size: pixels a side.
    pixel_mean, pixel_std: what is taken out of the pixels' colours, from 0 to 1.
    num_patches: cells of an image's grid that are drawn for each row in training; None: all.
    source_length, target_length: tokens of a source and a target; longer ones are cut.
    smoothing: of the labels.
    drop_worst, drop_worst_after: share of the tokens, those that cost most, that is left out once
      so many updates are done.
    drop_best, drop_best_after: the same of those that cost least, which the original's option of
      this name does not do.
    log_end: adds the encouraging loss, see `losses.label_smoothed`; None: it is not there.
    rdrop: weight of the divergence between two dropouts of one batch; None: one dropout.
    sentence_avg: the loss is a mean over rows, not over tokens.
    ignore_prefix, ignore_eos: the first so many tokens, or the ends, cost nothing.
    allowed_range: ids (first, end) that have a probability beside the special ones; None: all.
    vocab_blocks: parts of the vocabulary that have logits at a time in the loss: the same numbers,
      for less memory and one product of states and words more. Not with `log_end` or `rdrop`,
      which need whole logits.
    search: how answers are generated in evaluations; lengths do not count the decoder's prompts.
    cache_dir, cache_bytes: folder and limit of the decode cache; None: off.
    temperatures: at which evaluations give the probability of each answer (`tasks/confidence.py`);
      set by the commands that calibrate a model or evaluate a calibrated one. (): not at all.
    page: rows of an evaluation that a page shows with their pictures, see `cell`; 0: none.
  """

  fields: ClassVar[tuple[str, ...]]
  answering: ClassVar[Answering | None] = None
  prompts: ClassVar[bool] = False
  target_ends: ClassVar[bool] = True
  most_targets: ClassVar[int] = MAX_POSITIONS

  train: tuple[str, ...] = ()
  valid: tuple[str, ...] = ()
  test: tuple[str, ...] = ()
  columns: tuple[int, ...] = ()
  tokenizer: str
  image_size: int = 480
  pixel_mean: tuple[float, ...] = images.HALF_MEAN
  pixel_std: tuple[float, ...] = images.HALF_STD
  num_patches: int | None = None
  source_length: int = 80
  target_length: int = 48
  smoothing: float = 0.0
  drop_worst: float = 0.0
  drop_worst_after: int = 0
  drop_best: float = 0.0
  drop_best_after: int = 0
  log_end: float | None = None
  rdrop: float | None = None
  sentence_avg: bool = False
  ignore_prefix: int = 0
  ignore_eos: bool = False
  allowed_range: tuple[int, int] | None = None
  vocab_blocks: int = 1
  search: Search = dataclasses.field(default_factory=Search)
  cache_dir: str | None = None
  cache_bytes: int = DEFAULT_MAX_BYTES
  temperatures: tuple[float, ...] = ()
  page: int = 0

  def example(self, row: Row, rng: np.random.Generator | None) -> dict[str, Any]:
    """What a row asks and what is right.

    Args:
      row: its texts by the names of their columns, `row.size` and `row.image()` of its picture.
      rng: the row's own generator; None outside training.

    Returns:
      "source" and "target", with `prompts` "prompt", and perhaps "seen", what the decoder sees
      instead of "target": token ids without begin and end; "image" where `fields` has it, as from
      `image`. Anything else goes into the batch as it is and has its place in `blank`.
    """
    raise NotImplementedError

  def image(self, row: Row, rng: np.random.Generator | None) -> np.ndarray:
    """A row's picture as the model sees it, uint8[S, S, 3]: the whole of it, squashed to a square.

    A task that crops, mirrors or recolours overrides it, or makes the picture in `example`, beside
    the boxes that move with it; such pictures do not go through the decode cache.
    """
    return row.square(rng)

  def blank(self) -> dict[str, np.ndarray]:
    """The fields of an example and their shapes; a row like this changes nothing, and is finite."""
    example = self.assemble({"source": [], "target": []})
    example["target"] = np.full_like(example["target"], PAD)
    if IMAGE in self.fields:
      example[IMAGE] = np.zeros((self.image_size, self.image_size, 3), np.uint8)
    return example

  def allowed(self, batch: Mapping[str, jax.Array], *, vocab_size: int) -> jax.Array | None:
    """Which ids may be each target, bool[B, T, V], or [B, `learnt_tokens`, V]; None: all."""
    del batch, vocab_size
    return None

  @property
  def learnt_tokens(self) -> int | None:
    """At most so many tokens behind the prompt are learnt, and have logits; None: all places."""
    return None

  @property
  def words(self) -> OFATokenizer:
    """The tokenizer; ValueError where its files are missing."""
    return load_tokenizer(self.tokenizer)

  def encode(self, text: str) -> list[int]:
    """Token ids of a text, more than any sequence holds; prompts, answers begin with a space."""
    return self.words.encode(text, most=4 * MAX_POSITIONS)

  def model_files(self) -> dict[str, bytes]:
    """The tokenizer's files, so that a workdir is a model wherever it is moved to."""
    folder = tokenizer_folder(self.tokenizer)
    return {
      f"{hub.TOKENIZER}/{name}": (folder / name).read_bytes() for name in layout_files(folder)
    }

  def asked(self, texts: Mapping[str, str]) -> list[int]:
    """Token ids of the prompt for a row with these texts."""
    return self.encode(self.answering.prompt(texts, self.words.kind == "bert-chinese"))

  def texts(self, predictions: Predictions) -> dict[int, str]:
    """The answers by row, of all rows that could be read."""
    rows = predictions["examples"]
    return {int(i): read(self.words, rows["tokens"][i]) for i in np.flatnonzero(rows["valid"])}

  def told(self, predictions: Predictions) -> dict[int, Any]:
    """The answers by row as result files have them, of all rows that could be read."""
    names, whole = self.answering, np.ones(2)
    texts = self.texts(predictions)
    return {i: names.tell(names.called(text), whole) for i, text in texts.items()}

  def results(self, predictions, streams):
    """`predict.json`: id and answer of all rows that could be read, as the original writes it."""
    if self.answering is None:
      return {}
    rows, names = streams["examples"], self.answering
    field = names.id if names.id in self.fields else "id"
    told = [
      {names.id: names.told_id(rows.row(i)[field]), names.result: answer}
      for i, answer in self.told(predictions).items()
    ]
    return {"predict.json": json.dumps(told, ensure_ascii=False).encode()} | self.pages(
      predictions, streams
    )

  def pages(self, predictions: Predictions, streams: Mapping[str, Rows]) -> dict[str, bytes]:
    """`page.png`, the first `page` rows that could be read."""
    if not self.page:
      return {}
    rows, told = streams["examples"], list(self.told(predictions).items())[: self.page]
    cells = [self.cell(rows.row(i), x, image=rows.image(i, size=PAGE_PIXELS)) for i, x in told]
    return pictures.page("page", pictures.in_rows(cells)) if cells else {}

  def cell(self, row: Row, answer: Any, *, image: np.ndarray) -> pictures.Cell:
    """A row on the page: the answer as of `told`, its picture uint8[P, P, 3], P = PAGE_PIXELS."""
    raise NotImplementedError  # `check` has refused a page

  @property
  def calibrated_as(self) -> str | None:
    """The name of the calibration that its answers' probabilities are by; None: there is none."""
    return None if self.answering is None else confidence.name_of(self.answering, chosen=False)

  def right(self, predictions: Predictions, streams: Mapping[str, Rows]) -> dict[int, float]:
    """How right answers are, from 0 to 1, by row, of those whose references are known."""
    del predictions, streams
    return {}

  def probabilities(self, predictions: Predictions) -> np.ndarray:
    """The probabilities float64[N, T] of the answers of all rows at `temperatures`."""
    return confidence.probabilities(
      predictions["examples"]["log_probability"], temperatures=self.temperatures
    )

  def confidences(self, predictions, streams):
    """See `Evaluates`; "told" has row, answer and, of one temperature, "probability"."""
    if not self.temperatures:
      return None
    told, right = self.told(predictions), self.right(predictions, streams)
    chosen = self.probabilities(predictions)[list(told)]
    lines = [{"row": i, self.answering.result: answer} for i, answer in told.items()]
    if len(self.temperatures) == 1:
      for line, value in zip(lines, chosen[:, 0], strict=True):
        line["probability"] = float(value)
    return Confidences(chosen, np.array([right.get(i, np.nan) for i in told], float), lines)

  def assemble(self, example: Mapping[str, Any], *, warn: bool = False) -> dict[str, np.ndarray]:
    """Begin, end and padding put to the ids of an example.

    Args:
      example: from `example`.
      warn: whether to say that something was cut.

    Returns:
      source int32[S]; previous int32[T], what the decoder sees; target int32[T], what comes after
      each of its tokens, with padding where nothing is learnt.
    """
    prompt = list(example.get("prompt", ()))[: self.target_length - 2]
    source = cut("source", example["source"], self.source_length - 2, warn=warn)
    room = self.target_length - 1 - len(prompt)
    answer = cut("target", example["target"], room, warn=warn)
    seen = list(example.get("seen", answer))[: len(answer)]
    end = [EOS] if self.target_ends else []
    arrays = {
      "source": filled([BOS, *source, EOS], self.source_length),
      "previous": filled([BOS, *prompt, *seen][: self.target_length], self.target_length),
      "target": filled([PAD] * len(prompt) + answer + end, self.target_length),
    }
    ids = ("source", "target", "prompt", "seen")
    return {k: v for k, v in example.items() if k not in ids} | arrays

  def check(self, config: Any) -> list[str]:
    faults = []
    if len(self.columns) != len(self.fields):
      faults.append(
        f"task.columns: expected one column for each of {', '.join(self.fields)}, found "
        f"{self.columns}"
      )
    cells = config.model.image_bucket_size
    if IMAGE in self.fields and not 1 <= -(-self.image_size // 16) <= cells:
      faults.append(
        f"task.image_size: expected 1 to {16 * cells} (the model's cells), found {self.image_size}"
      )
    lengths = (("source_length", 3, MAX_POSITIONS), ("target_length", 2, self.most_targets))
    for field, low, high in lengths:
      if not low <= (length := getattr(self, field)) <= high:
        faults.append(f"task.{field}: expected {low} to {high}, found {length}")
    for field in ("smoothing", "drop_worst", "drop_best"):
      if not 0 <= (share := getattr(self, field)) < 1:
        faults.append(f"task.{field}: expected a share from 0 to below 1, found {share}")
    own = type(self)
    if self.page and own.cell is Seq2Seq.cell and own.pages is Seq2Seq.pages:
      faults.append(f"task.page: expected 0, as this task has no page, found {self.page}")
    if self.temperatures and self.calibrated_as is None:
      faults.append(
        f"task.temperatures: expected (), as nothing is asked, found {self.temperatures}"
      )
    if any(not t > 0 for t in self.temperatures):
      faults.append(f"task.temperatures: expected numbers above 0, found {self.temperatures}")
    whole = self.log_end is not None or self.rdrop is not None
    if self.vocab_blocks < 1 or (whole and self.vocab_blocks > 1):
      faults.append(
        f"task.vocab_blocks: expected at least 1, and 1 with task.log_end or task.rdrop, which "
        f"need whole logits, found {self.vocab_blocks}"
      )
    if self.log_end is not None and not 0 < self.log_end <= 1:
      faults.append(f"task.log_end: expected None or 0 < log_end <= 1, found {self.log_end}")
    try:
      dataclasses.replace(self.search)  # fields may have been overridden since it was made
    except ValueError as e:
      faults += [f"task.search: {line}" for line in str(e).splitlines()]
    return faults + check_tokenizer(self.tokenizer, config)

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    return spec_of(self.blank(), batch_size)

  def examples(self, split: str) -> Rows:
    files = {"train": self.train, "valid": self.valid, "test": self.test}.get(split)
    if not files:
      raise ValueError(f"Expected data for the split {split!r} in task.{split}, found none")
    _ = self.words  # its faults are told before anything is compiled
    table = Table(files, columns=dict(zip(self.fields, self.columns, strict=True)))
    return Rows(self, table)

  def prepare(self, model, batch, *, rngs, step, frozen):
    """Adds whether the worst tokens, and the best, are left out by now."""
    del model, rngs, frozen
    by_now = {}
    if self.drop_worst:
      by_now["dropping"] = step > self.drop_worst_after
    if self.drop_best:
      by_now["dropping_best"] = step > self.drop_best_after
    return {**batch, **by_now}

  def loss(self, model, batch, *, rngs, chunks=1):
    del chunks
    taught = self.taught(batch)
    options = {"blocks": self.vocab_blocks, "num_patches": self.num_patches, "rngs": rngs}
    return self.cost(logits(model, taught.inputs, **options), taught.targets, batch)

  def taught(self, batch: Mapping[str, jax.Array]) -> Taught:
    """What the model is given of a batch, and what it is to say."""
    names = ("source", "previous", "target", "weight", IMAGE, "image_mask", "code_mask")
    rows = {name: batch[name] for name in names if name in batch}
    rows = rows if self.rdrop is None else twice(rows)
    targets = jnp.where(rows["weight"][:, None] > 0, rows["target"], PAD)
    inputs = {"tokens": rows["source"], "decoder_tokens": rows["previous"], **self.pictures(rows)}
    if "code_mask" in rows:
      inputs["code_mask"] = rows["code_mask"]
    if self.learnt_tokens is not None:
      inputs["places"], targets = learnt_places(
        targets, self.learnt_tokens, ignore_prefix=self.ignore_prefix
      )
    return Taught(inputs, targets)

  def cost(
    self, logits: jax.Array | InBlocks, targets: jax.Array, batch: Mapping[str, jax.Array]
  ) -> dict[str, losses.Mean]:
    """The loss of logits float[B, T, V] for targets int32[B, T], both as of `taught`."""
    conf, allowed = batch.get("conf"), self.allowed(batch, vocab_size=logits.shape[-1])
    return losses.label_smoothed(
      logits,
      targets,
      smoothing=self.smoothing,
      conf=conf if self.rdrop is None else twice(conf),
      mask=allowed if self.rdrop is None else twice(allowed),
      allowed_range=self.allowed_range,
      ignore_prefix=self.ignore_prefix if self.learnt_tokens is None else 0,
      ignore=EOS if self.ignore_eos else None,
      drop_worst=self.drop_worst,
      dropping=batch.get("dropping", False),
      drop_best=self.drop_best,
      dropping_best=batch.get("dropping_best", False),
      log_end=self.log_end,
      rdrop=self.rdrop,
      sentence_avg=self.sentence_avg,
    )

  def pictures(self, rows: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The model's image arguments for rows of a batch; none without an image."""
    if IMAGE not in rows:
      return {}
    pixels = normalized(rows[IMAGE], mean=self.pixel_mean, std=self.pixel_std)
    return {IMAGE: pixels} | {name: rows[name] for name in ("image_mask",) if name in rows}

  def decoder_prompts(self, batch: Mapping[str, jax.Array]) -> jax.Array:
    """int32[B, P], what the decoder is given of each row before it answers, then padding."""
    room = batch["target"].shape[1] - (self.learnt_tokens or 1) if self.prompts else 0
    given = jnp.cumprod(batch["target"] == PAD, axis=1)[:, :room] > 0
    return jnp.where(given, batch["previous"][:, 1 : room + 1], PAD)

  def streams(self, split: str) -> dict[str, Rows]:
    return {"examples": self.examples(split)}

  def predict(self, model, batch, *, rngs, frozen):
    """The best answer of each row, int32[B, N] with its end and padding, and its score.

    `frozen` is the trie that answers keep to, or None.
    """

    def best(model, rows, trie):
      return self.best(self.generate(model, rows["batch"], rngs=rows["rngs"], trie=trie))

    keys = answers.row_keys(rngs, batch["index"]) if self.search.sample else None
    return answers.on_each_device(best)(model, {"batch": batch, "rngs": keys}, frozen)

  def best(self, hypotheses: Hypotheses) -> dict[str, jax.Array]:
    """The "tokens" int32[B, N] of each row's answer, and its "score": those of the best one.

    With `temperatures` also what `probabilities` needs.
    """
    best = {"tokens": hypotheses.tokens[:, 0], "score": hypotheses.scores[:, 0]}
    if self.temperatures:
      best["log_probability"] = confidence.log_probabilities(hypotheses)[:, 0]
    return best

  def generate(
    self,
    model: Any,
    batch: Mapping[str, jax.Array],
    *,
    rngs: jax.Array | None = None,
    trie: Trie | None = None,
    search: Search | None = None,
  ) -> Hypotheses:
    """Searches for the answers of a batch behind their prompts, which are left out of them.

    Args:
      model: an OFA.
      batch: of `blank`'s fields, and "weight".
      rngs: PRNG keys [B], for a search that samples.
      trie: what may follow the prompts.
      search: None: that of evaluations.
    """
    return answers.generate(
      [model],
      [model.encode(batch["source"], **self.pictures(batch))],
      search=search or self.search,
      batch=len(batch["source"]),
      prompts=self.decoder_prompts(batch) if self.prompts else None,
      trie=trie,
      active=batch["weight"] > 0,
      rngs=rngs,
    )

  def log_line(self, values):
    return (
      "Global Steps: {step}/{steps} | Train Epoch: {epoch} [{seen}/{rows} ({percent:.0f}%)] | "
      "Loss: {loss:.6f} | NLL: {nll:.4f} | Accuracy: {accuracy:.2%} | Grad Norm: {grad_norm:.3f} | "
      "Data Time: {data_time:.3f}s | Batch Time: {batch_time:.3f}s | LR: {lr:.3e} | "
      "Global Batch Size: {batch_size}"
    ).format(**values)
