"""What the tasks of OFA share: how examples become arrays, and that rows stay apart."""

import base64
import dataclasses
import io
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from ofa_jax.config import Config
from ofa_jax.data import prompts
from ofa_jax.data.tsv import BadRow
from ofa_jax.decode import answers
from ofa_jax.decode.beam import Search
from ofa_jax.tasks.answering import Answering
from ofa_jax.tasks.seq2seq import Seq2Seq
from ofa_jax.validation import validate
from tests.ofa_files import write_bpe
from tests.tiny import OFA

ANSWERING = Answering(
  prompt=lambda texts, chinese: prompts.entailment(texts["text"], texts.get("premise")),
  columns={"id": 0, "text": 3, "premise": 4},
  id="uniq_id",
  result="label",
  reads_prompt=True,
  choices={"yes": "entailment", "maybe": "neutral", "no": "contradiction"},
)
ANSWERS = {label: answer for answer, label in ANSWERING.choices.items()}


@dataclasses.dataclass(kw_only=True)
class Entailment(Seq2Seq):
  """The example of docs/tasks.md without its image."""

  fields = ("label", "text")
  answering = ANSWERING
  prompts = ANSWERING.reads_prompt
  columns: tuple[int, ...] = (1, 0)

  def example(self, row, rng):
    question = self.asked(row)
    return {
      "source": question,
      "prompt": question,
      "target": self.encode(" " + ANSWERS[row["label"]]),
    }


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  folder = tmp_path_factory.mktemp("entailment")
  path = folder / "train.tsv"
  path.write_text("a\tentailment\nthe dog\tneutral\n", encoding="utf-8")
  task = Entailment(
    train=(str(path),), tokenizer=str(write_bpe(folder / "bpe")), source_length=16, target_length=16
  )
  return task, task.examples("train")


def test_a_task_of_another_kind_in_a_few_lines(rows):
  task, rows = rows
  example = rows.example(1, None)
  assert len(rows) == 2 and example.keys() == rows.blank().keys() == {
    "source",
    "previous",
    "target",
  }
  question = [n for n in example["source"].tolist() if n > 2]
  assert example["source"].tolist()[: len(question) + 2] == [0, *question, 2]
  # The decoder reads the question again; only the answer and the end after it are learnt.
  answer = 2085  # " maybe"
  assert example["previous"].tolist()[: len(question) + 2] == [0, *question, answer]
  expected = [1] * len(question) + [answer, 2]
  assert example["target"].tolist() == expected + [1] * (16 - len(expected))
  assert task.batch_spec(4)["target"].shape == (4, 16)


def test_answers_are_generated_behind_their_prompts(rows):
  task, rows = rows
  task = dataclasses.replace(task, search=Search(num_beams=2, max_length=4))
  model = dataclasses.replace(OFA, vocab_size=6200).build(rngs=nnx.Rngs(0))
  examples = [rows.example(0, None), rows.example(1, None), rows.blank()]
  batch = {k: jnp.stack([e[k] for e in examples]) for k in examples[0]}
  batch |= {"weight": jnp.array([1.0, 1.0, 0.0]), "index": jnp.array([0, 1, -1])}
  asked = [[n for n in example["source"].tolist() if n > 2] for example in examples[:2]]
  assert len(asked[0]) != len(asked[1])

  @jax.jit
  def found(model, batch):
    whole = [
      answers.generate(
        [model],
        [model.encode(batch["source"][i : i + 1])],
        search=Search(num_beams=2, max_length=len(prompt) + 4),
        batch=1,
        prefix_tokens=jnp.array([prompt], jnp.int32),
      )
      for i, prompt in enumerate(asked)
    ]
    return whole, task.generate(model, batch), task.predict(model, batch, rngs=None, frozen=None)

  whole, behind, best = jax.device_get(found(model, batch))
  for i, prompt in enumerate(asked):
    begin = len(prompt)
    tokens, length = whole[i].tokens[0, 0], whole[i].lengths[0, 0]
    assert tokens[:begin].tolist() == prompt
    answer = tokens[begin:].tolist()
    assert behind.tokens[i, 0, : len(answer)].tolist() == answer
    assert set(behind.tokens[i, 0, len(answer) :].tolist()) <= {1}
    assert behind.lengths[i, 0] == length - begin
    np.testing.assert_allclose(
      behind.scores[i, 0], whole[i].positional_scores[0, 0, begin:].sum(), rtol=1e-6
    )
    assert best["tokens"][i].tolist() == behind.tokens[i, 0].tolist()
    assert 2 in best["tokens"][i].tolist()
  assert best["score"].tolist() == behind.scores[:, 0].tolist()
  assert not np.any(best["tokens"][2] != 1) and behind.scores[2, 0] == -np.inf


def test_answers_are_told_as_result_files_have_them(rows):
  task, rows = rows
  tokens = np.full((2, 4), 1, np.int32)
  tokens[0, :2] = *task.encode(" maybe"), 2
  predictions = {"examples": {"tokens": tokens, "valid": np.array([True, False])}}
  assert task.texts(predictions) == {0: "maybe"} and task.told(predictions) == {0: "neutral"}

  class Named(Entailment):
    fields = ("label", "uniq_id")  # the text tells the rows apart

  fields = {f.name: getattr(task, f.name) for f in dataclasses.fields(task)}
  named = Named(**{**fields, "valid": task.train})
  files = named.results(predictions, named.streams("valid"))
  assert json.loads(files["predict.json"]) == [{"uniq_id": "a", "label": "neutral"}]


def test_targets_without_an_end(rows):
  task, _ = rows

  class Label(Entailment):
    target_ends = False

  label = Label(**{f.name: getattr(task, f.name) for f in dataclasses.fields(task)})
  arrays = label.assemble({"source": [9], "prompt": [9], "target": [4420]})
  assert arrays["target"].tolist()[:3] == [1, 4420, 1]
  assert arrays["previous"].tolist()[:3] == [0, 9, 4420]


def test_what_is_too_long_is_cut_before_its_end(rows):
  task, _ = rows
  long = {"source": list(range(10, 40)), "target": list(range(40, 80)), "prompt": [7, 8]}
  with pytest.warns(UserWarning) as said:
    arrays = task.assemble(long, warn=True)
  assert [str(w.message) for w in said] == [
    "Cut a source of 30 tokens to 14; task.source_length would keep it",
    "Cut a target of 40 tokens to 13; task.target_length would keep it",
  ]
  assert arrays["source"].tolist() == [0, *range(10, 24), 2]
  assert arrays["target"].tolist() == [1, 1, *range(40, 53), 2]
  assert arrays["previous"].tolist() == [0, 7, 8, *range(40, 53)]
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    task.assemble(long)  # an evaluation's references do not matter here


def test_a_row_with_too_few_columns_is_bad(tmp_path, rows):
  path = tmp_path / "train.tsv"
  path.write_text("a man\tentailment\nthe dog\na cat\tneutral\n", encoding="utf-8")
  found = dataclasses.replace(rows[0], train=(str(path),)).examples("train")
  with pytest.raises(BadRow, match=r"train.tsv:2.*expected 2 columns"):
    found.example(1, None)


@dataclasses.dataclass(kw_only=True)
class Half(Seq2Seq):
  """The left half of a picture, and where it ends in the whole."""

  fields = ("image", "text")
  columns: tuple[int, ...] = (1, 0)

  def example(self, row, rng):
    width, height = row.size
    half = row.image().crop((0, 0, width // 2, height))
    image = np.asarray(half.resize((self.image_size, self.image_size)))
    return {"image": image, "source": self.encode(row["text"]), "target": [width // 2, height]}


def test_pictures_are_made_with_what_moves_with_them(tmp_path, rows):
  pixels = np.zeros((20, 40, 3), np.uint8)
  pixels[:, 20:] = 255
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "PNG")
  encoded = file.getvalue()
  lines = [f"a dog\t{base64.b64encode(x).decode()}\n" for x in (encoded, encoded[:-30])]
  (tmp_path / "train.tsv").write_text("".join(lines))
  settings = {"train": (str(tmp_path / "train.tsv"),), "tokenizer": rows[0].tokenizer}
  task = Half(image_size=8, **settings)
  halves = task.examples("train")
  example = halves.example(0, None)
  assert example["image"].shape == (8, 8, 3) and not example["image"].any()
  assert example["target"].tolist()[:3] == [20, 20, 2]
  with pytest.raises(BadRow, match=r"train.tsv:2 a dog: cannot be decoded"):
    halves.example(1, None)

  class Whole(Half):
    def example(self, row, rng):
      return {"image": self.image(row, rng), "source": [], "target": []}

  class Forgetful(Half):
    def example(self, row, rng):
      return {"source": [], "target": []}

  found = Whole(image_size=40, **settings).examples("train").example(0, None)["image"]
  assert not found[:, :18].any() and (found[:, 22:] == 255).all()
  with pytest.raises(ValueError, match=r"Expected image, .* from Forgetful\.example, found p"):
    Forgetful(**settings).examples("train").example(0, None)


def test_faults_are_told_before_the_data_is_read():
  task = Entailment(
    columns=(0,), tokenizer="tests", source_length=2, target_length=2000, drop_worst=1.0
  )
  task.search.num_beams = 0
  config = Config(model=OFA, task=task, batch_size=8, steps=1)
  with pytest.raises(ValueError) as e:
    validate(config, devices=1)
  for text in (
    "task.columns: expected one column for each of label, text, found (0,)",
    "task.source_length: expected 3 to 1024, found 2",
    "task.target_length: expected 2 to 1024, found 2000",
    "task.drop_worst: expected a share from 0 to below 1, found 1.0",
    "task.search: Expected num_beams >= 1, found 0",
    "task.tokenizer: Expected the tokenizer of OFA in tests: dict.txt",
  ):
    assert text in str(e.value)
  with pytest.raises(ValueError, match="Expected data for the split 'valid' in"):
    task.examples("valid")


def test_the_worst_tokens_are_left_out_later():
  task = Entailment(tokenizer="", drop_worst=0.2, drop_worst_after=3)
  for step, expected in ((0, False), (3, False), (4, True)):
    batch = task.prepare(None, {}, rngs=None, step=jnp.int32(step), frozen=None)
    assert bool(batch["dropping"]) is expected


@dataclasses.dataclass(kw_only=True)
class Pictures(Seq2Seq):
  """A task with everything in its batch."""

  fields = ("image",)
  columns: tuple[int, ...] = (0,)


def test_a_bad_row_changes_nothing_and_is_finite():
  model_config = dataclasses.replace(OFA, freeze_resnet=True)
  task = Pictures(
    tokenizer="",
    image_size=48,
    source_length=6,
    target_length=5,
    smoothing=0.1,
    drop_worst=0.3,
    rdrop=0.5,
  )
  rng = np.random.default_rng(0)
  batch = {
    "source": rng.integers(4, 60, (4, 6)),
    "previous": rng.integers(4, 60, (4, 5)),
    "target": rng.integers(4, 60, (4, 5)),
  }
  batch = {k: v.astype(np.int32) for k, v in batch.items()}
  batch["image"] = rng.integers(0, 256, (4, 48, 48, 3)).astype(np.uint8)
  batch["conf"] = np.array([1, 0.5, 2, 1], np.float32)
  batch["weight"] = np.array([1, 1, 1, 0], np.float32)
  batch["dropping"] = np.bool_(True)
  blank = {k: v.copy() for k, v in batch.items()}
  for name, value in task.blank().items():
    blank[name][3] = value
  graph, params, rest = nnx.split(model_config.build(rngs=nnx.Rngs(0)), nnx.Param, ...)

  @jax.jit
  def gradient(batch):
    def loss(params):
      metrics = task.loss(nnx.merge(graph, params, rest), batch, rngs=jax.random.key(1))
      return metrics["loss"].total, metrics["loss"].count

    return jax.value_and_grad(loss, has_aux=True)(params)

  (loss, count), grads = gradient(batch)
  (same, same_count), same_grads = gradient(blank)
  assert count == same_count == 2 * int(15 * 0.7)
  np.testing.assert_allclose(same, loss, rtol=1e-6)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(same_grads), strict=True):
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
