"""GLUE: rows, masks, answers and the files for its server; from TSVs and TensorFlow Datasets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ofa_jax.data.tsv import BadRow
from ofa_jax.decode import candidates, trie
from ofa_jax.models.abstract import abstract
from ofa_jax.tasks.glue import PARTS, Glue, answering
from ofa_jax.tokenizers.ofa import OFATokenizer
from ofa_jax.validation import validate
from tests import ofa_task_files, tiny
from tests.ofa_directory import write_words
from tests.ofa_files import write_bpe
from tests.ofa_golden import micro_model
from tests.tasks import golden_rows

CASES = golden_rows.cases("glue")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
  return str(write_bpe(tmp_path_factory.mktemp("bpe")))


@pytest.mark.parametrize("name", CASES)
def test_rows_are_the_originals(name, bpe, tmp_path):
  case = CASES[name]
  part = name.removeprefix("glue_").split(".")[0]
  task = Glue(
    part=part,
    train=(golden_rows.copied("glue", case, tmp_path),),
    columns=golden_rows.columns(case),
    tokenizer=bpe,
    prompt=case["kwargs"]["prompt_type"],
    max_words=case["kwargs"]["max_src_length"],
    source_length=40,
    target_length=48,
  )
  golden_rows.check(task, case)
  rows = task.examples("train")
  for i, item in enumerate(case["items"]):
    assert item["ref_dict"] == {PARTS[part].labels[rows.row(i)["label"]]: 1.0}
  # The same is asked where nobody trains: by `generate` and from Python.
  texts = dict(zip(PARTS[part].called, (rows.row(0)[x] for x in PARTS[part].texts), strict=True))
  prompt = answering(part).prompt(texts, False)
  assert [0, *task.encode(prompt), 2] == case["items"][0]["source"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("fault", ["label", "empty", "column", "encoding"])
def test_what_cannot_be_used_is_named(part, fault, tmp_path):
  files = ofa_task_files.glue(part, tmp_path)
  path, known = tmp_path / f"{part}_train.tsv", PARTS[part]
  columns = path.read_text().splitlines()[0].split("\t")
  change, message = {
    "label": (("label", "7"), "expected a label out of .*, found '7'"),
    "empty": ((known.texts[-1], "  "), f"the {known.texts[-1]} is empty"),
    "encoding": ((known.texts[0], "m\udcff"), f"{known.texts[0]} is not UTF-8"),
    "column": (None, f"expected {len(columns)} columns separated by tabs, found 1"),
  }[fault]
  if change is None:
    columns = columns[:1]
  else:
    columns[known.columns[change[0]]] = change[1]
  path.write_bytes(path.read_bytes() + "\t".join(columns).encode(errors="surrogateescape") + b"\n")
  rows = Glue(**files).examples("train")
  with pytest.raises(BadRow, match=message) as raised:
    rows.example(len(rows) - 1, np.random.default_rng(0))
  assert raised.value.name.startswith(f"{path}:{ofa_task_files.ROWS['train'] + 1}")


def chosen(task, answers, valid=None):
  """Predictions of an evaluation by the names of the answers."""
  numbers = np.array([task.choices.texts.index(answer) for answer in answers])
  return {"examples": {"answer": numbers, "valid": np.array(valid or [True] * len(answers))}}


def test_metrics_of_the_parts(bpe, tmp_path):
  path = tmp_path / "valid.tsv"
  path.write_text("x\tA b.\t1\nx\tB\t0\nx\tC\t1\nx\tD\t\n")
  cola = Glue(part="cola", valid=(str(path),), tokenizer=bpe)
  streams = cola.streams("valid")
  scores = cola.score(chosen(cola, ["yes", "no", "no", "no"]), streams)
  assert scores == {"acc": 2 / 3, "mcc": pytest.approx(0.5)}
  left_out = cola.score(chosen(cola, ["yes", "no", "no", "no"], [True, True, False, True]), streams)
  assert left_out == {"acc": 1.0, "mcc": 1.0}
  with pytest.warns(
    UserWarning, match="mcc is undefined with 0 predictions and 2 labels of 3 being"
  ):
    assert cola.score(chosen(cola, ["no"] * 4), streams) == {"acc": 1 / 3, "mcc": 0.0}
  path = tmp_path / "pairs.tsv"
  path.write_text("a\tb\t1\nc\td\t0\ne\tf\t1\n")
  mrpc = Glue(part="mrpc", valid=(str(path),), tokenizer=bpe)
  streams = mrpc.streams("valid")
  assert mrpc.score(chosen(mrpc, ["yes", "yes", "no"]), streams) == {"acc": 1 / 3, "f1": 0.5}
  path = tmp_path / "three.tsv"
  path.write_text("a\tb\t1\nc\td\t0\ne\tf\t2\n")
  mnli = Glue(part="mnli", valid=(str(path),), tokenizer=bpe)
  assert mnli.score(chosen(mnli, ["yes", "maybe", "maybe"]), mnli.streams("valid")) == {
    "acc": 2 / 3
  }


@pytest.mark.parametrize(
  ("part", "answers", "expected"),
  [
    ("cola", ("yes", "no"), ("CoLA.tsv", "1", "0")),
    ("mnli", ("maybe", "no"), ("MNLI-m.tsv", "neutral", "contradiction")),
    ("mrpc", ("yes", "no"), ("MRPC.tsv", "1", "0")),
    ("qnli", ("yes", "no"), ("QNLI.tsv", "entailment", "not_entailment")),
    ("qqp", ("yes", "no"), ("QQP.tsv", "1", "0")),
    ("rte", ("yes", "no"), ("RTE.tsv", "entailment", "not_entailment")),
    ("sst2", ("positive", "negative"), ("SST-2.tsv", "1", "0")),
  ],
)
def test_the_file_for_the_server(part, answers, expected, tmp_path):
  files = ofa_task_files.glue(part, tmp_path)
  task = Glue(**files)
  streams = task.streams("test")
  assert len(streams["examples"]) == 8
  predictions = chosen(task, answers * 4)
  assert task.score(predictions, streams) == {}  # nobody but the server knows the labels
  ((name, content),) = task.results(predictions, streams).items()
  lines = content.decode().splitlines()
  assert (name, *(line.split("\t")[1] for line in lines[1:3])) == expected
  assert lines[0] == "index\tprediction" and [x.split("\t")[0] for x in lines[1:]] == list(
    "01234567"
  )
  other = dataclasses.replace(task, submission="MNLI-mm.tsv")
  assert list(other.results(predictions, streams)) == ["MNLI-mm.tsv"]


def test_a_file_without_labels_needs_no_column_for_them(bpe, tmp_path):
  path = tmp_path / "test.tsv"
  path.write_text("0\ta b\n1\tc\n")
  task = Glue(part="sst2", test=(str(path),), columns=(1,), tokenizer=bpe)
  streams = task.streams("test")
  assert not np.any(streams["examples"].example(0, None)["node"])
  predictions = chosen(task, ["positive", "negative"])
  assert task.score(predictions, streams) == {}
  assert task.results(predictions, streams)["SST-2.tsv"] == b"index\tprediction\n0\t1\n1\t0\n"


def test_labels_of_several_tokens_need_room(tmp_path):
  files = ofa_task_files.glue("mnli", tmp_path)
  words = tmp_path / "words"
  OFATokenizer.train([" a dog"], vocab_size=280).save(words)  # which has not met the labels
  task = Glue(**files | {"tokenizer": str(words)})
  with pytest.raises(
    ValueError, match=r"to be one token each, found \d+ in .*words; set task.answer"
  ):
    task.examples("train")


def test_the_answer_is_the_likeliest_of_the_allowed_at_the_last_place(tmp_path):
  """As the original's validation: logits behind the question, masked, the highest counts."""
  files = ofa_task_files.glue("mnli", tmp_path)
  task = Glue(
    **files | {"tokenizer": str(write_words(tmp_path / "words")), "answer_length": 8},
    smoothing=0.1,
  )
  model = micro_model()
  ids = [[5, 9, 30], [6, 7, 8, 20, 33], [45, 46]]
  labels = [[5, 60], [45], [62, 9]]
  plan, tree = candidates.plan(labels), trie.build(labels)  # the micro model lacks the words
  examples = []
  for i, source in enumerate(ids):
    nodes = np.zeros(task.learnt_tokens, np.int32)
    path = tree.path(labels[i])
    nodes[: len(path)] = path
    example = {"source": source, "prompt": [*source, 2], "target": labels[i], "node": nodes}
    examples.append(task.assemble(example))
  batch = {k: jnp.stack([e[k] for e in examples]) for k in examples[0]}
  batch |= {"weight": jnp.ones(3), "index": jnp.arange(3), "trie": tree}
  with jax.default_matmul_precision("highest"):
    scores = jax.jit(lambda b: task.scores(model, b, plan))(batch)
    logits = jax.jit(lambda b: model(b["source"], b["previous"]))(batch)
  first = sorted({label[0] for label in labels})
  for i, source in enumerate(ids):
    at = len(source) + 1  # behind the question and its end
    row = np.asarray(logits[i, at])[first]
    expected = row - np.log(np.sum(np.exp(row)))
    ours = [scores[i, [label[0] for label in labels].index(token)] for token in first]
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_no_picture_is_computed(tmp_path):
  """Neither in training nor in evaluations: the programs have no convolution."""
  files = ofa_task_files.glue("cola", tmp_path)
  task = Glue(**files)
  model = tiny.OFA
  model = dataclasses.replace(model, vocab_size=task.words.vocab_size)
  split = abstract(model)
  batch = task.batch_spec(2) | {"trie": task.choices.trie}
  batch["index"] = jax.ShapeDtypeStruct((2,), jnp.int32)

  def train(params, rest, batch):
    return task.loss(nnx.merge(split[0], params, rest), batch, rngs=None)["loss"].total

  def predict(params, rest, batch):
    model = nnx.merge(split[0], params, rest)
    return task.predict(model, batch, rngs=None, frozen=task.choices.plan)

  for function in (train, predict):
    text = str(jax.make_jaxpr(function)(split[1], split[2], batch))
    assert "conv_general_dilated" not in text and "dot_general" in text


def test_faults_of_a_config_are_told_at_once(tmp_path, shapes):
  files = ofa_task_files.glue("cola", tmp_path)
  config = tiny.caption_config(shapes)

  def faults(**changes):
    with pytest.raises(ValueError) as raised:
      validate(dataclasses.replace(config, task=Glue(**files | changes)), devices=8)
    return str(raised.value)

  assert "task.part: expected one of cola, mnli" in faults(part="wnli", columns=(0, 1))
  text = faults(inference="beamsearch", prompt="prev_output", target_length=39)
  assert "task.inference: expected allcand, found beamsearch" in text
  assert "task.target_length: expected at least 40" in text
  assert "task.columns: expected one column for each of sentence" in faults(columns=(1,) * 5)


class Told(Glue):
  """A task whose model is the table of its answers' scores, float32[rows, answers]."""

  def scores(self, model, batch, plan):
    return model[batch["index"]]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_from_its_files_to_its_metrics_and_the_file_for_the_server(part, tmp_path):
  """What is learnt, predicted, scored and written; the model alone is left out."""
  task, known = Told(**ofa_task_files.glue(part, tmp_path)), PARTS[part]
  lines = {
    split: [
      line.split("\t") for line in (tmp_path / f"{part}_{split}.tsv").read_text().splitlines()
    ]
    for split in ("train", "valid", "test")
  }
  labels = {k: [row[known.columns["label"]] for row in rows] for k, rows in lines.items()}
  train = task.examples("train")
  for i, label in enumerate(labels["train"][:4]):
    example = train.example(i, np.random.default_rng(0))
    (learnt,) = (x for x in example["target"] if x != 1)
    assert task.words.decode(np.array([learnt])).strip() == known.labels[label]
    end = list(example["previous"]).index(1) - 1
    assert example["target"][end] == learnt and example["previous"][end] == 2  # behind the question

  def evaluated(split, answers):
    streams = task.streams(split)
    scores = np.eye(len(task.choices.texts))[[task.choices.texts.index(x) for x in answers]]
    rows = [streams["examples"].example(i, None) for i in range(len(answers))]
    batch = {k: jnp.stack([row[k] for row in rows]) for k in rows[0]}
    batch |= {"weight": jnp.ones(len(rows)), "index": jnp.arange(len(rows))}
    frozen = task.choices.plan
    told = task.predict(jnp.float32(scores), batch, rngs=None, frozen=frozen)
    predictions = {"examples": jax.device_get(told) | {"valid": np.ones(len(rows), bool)}}
    return task.score(predictions, streams), task.results(predictions, streams)

  right = [known.labels[label] for label in labels["valid"]]
  assert set(right) == set(known.answers)
  scores, _ = evaluated("valid", right)
  assert scores == {"acc": 1.0, **dict.fromkeys(known.metrics, 1.0)}
  wrong = next(x for x in known.answers if x != right[0])
  scores, _ = evaluated("valid", [wrong, *right[1:]])
  assert scores["acc"] == 15 / 16 and all(0.5 < scores[name] < 1 for name in known.metrics)
  answers = [known.answers[i % len(known.answers)] for i in range(len(lines["test"]))]
  scores, files = evaluated("test", answers)
  assert scores == {} and set(files) == {known.submission}
  expected = [f"{i}\t{known.told[answer]}" for i, answer in enumerate(answers)]
  assert files[known.submission].decode().splitlines() == ["index\tprediction", *expected]
