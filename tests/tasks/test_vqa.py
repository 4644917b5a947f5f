"""Questions about images: rows, masks and answers as the original has them."""

import collections
import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ofa_jax.data.tsv import BadRow
from ofa_jax.decode.beam import Search
from ofa_jax.tasks import choice
from ofa_jax.tasks.base import normalized
from ofa_jax.tasks.vqa import VQA
from ofa_jax.validation import validate
from tests import tiny, vqa_files
from tests.ofa_directory import save_micro
from tests.ofa_files import GOLDEN, write_bpe
from tests.ofa_golden import micro_model

FOLDER = GOLDEN / "vqa"
CASES = ("none", "src", "prev_output", "no_object")
PAD = 1


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
  return str(write_bpe(tmp_path_factory.mktemp("bpe")))


def write_answers(folder, answers):
  path = folder / "answers.json"
  path.write_text(json.dumps({text: i for i, text in enumerate(answers)}))
  return str(path)


def filled(ids, length):
  return ids + [PAD] * (length - len(ids))


@pytest.mark.parametrize("case", CASES)
def test_rows_are_the_originals(case, bpe, tmp_path):
  golden = json.loads((FOLDER / f"{case}.json").read_text())
  options, listed = golden["kwargs"], json.loads((FOLDER / "answers.json").read_text())
  constrained = options["constraint_trie"] is not None
  task = VQA(
    train=(str(shutil.copy(FOLDER / "vqa.tsv", tmp_path)),),
    tokenizer=bpe,
    answers=write_answers(tmp_path, listed["answers"]) if constrained else None,
    inference="allcand" if constrained else "beamsearch",
    image_size=options["patch_image_size"],
    prompt=options["prompt_type"],
    max_words=options["max_src_length"],
    max_objects=options.get("max_object_length", 30) if options["add_object"] else 0,
    answer_length=options["max_tgt_length"],
    source_length=16,
    target_length=48,
  )
  rows = task.examples("train")
  blank = rows.blank()
  rng = np.random.default_rng(0) if golden["split"] == "train" else None
  examples = [rows.example(i, rng) for i in range(len(rows))]
  assert len(examples) == len(golden["items"]) == 3
  for i, (example, item) in enumerate(zip(examples, golden["items"], strict=True)):
    assert {k: (v.shape, v.dtype) for k, v in example.items()} == {
      k: (v.shape, v.dtype) for k, v in blank.items()
    }
    assert rows.row(i)["id"] == item["id"]
    assert example["source"].tolist() == filled(item["source"]["ids"], 16)
    assert example["previous"].tolist() == filled(item["prev_output_tokens"]["ids"], 48)
    assert example["target"].tolist() == filled(item["target"]["ids"], 48)
    assert example["conf"] == np.float32(item["conf"][0])
    image = np.asarray(normalized(example["image"][None], mean=task.pixel_mean, std=task.pixel_std))
    stored = item["patch_image"]
    np.testing.assert_allclose(np.mean(image, dtype=np.float64), stored["mean"], atol=1e-7)
    np.testing.assert_allclose(np.std(image, dtype=np.float64, ddof=1), stored["std"], rtol=1e-6)
  batch = {k: jnp.stack([e[k] for e in examples]) for k in blank}
  allowed = task.allowed({**batch, "trie": task.choices and task.choices.trie}, vocab_size=59457)
  if not constrained:
    assert allowed is None
    return
  for ours, item in zip(np.asarray(allowed), golden["items"], strict=True):
    masks = item["constraint_mask_true_ids_per_position"]
    begin = next(i for i, token in enumerate(item["target"]["ids"]) if token != PAD)
    assert not any(masks[:begin])  # before the answer nothing is learnt: ours has no places there
    assert [np.flatnonzero(row).tolist() for row in ours[: len(masks) - begin]] == masks[begin:]


MICRO = json.loads((GOLDEN / "generation" / "vqa_allcand.json").read_text())


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
  """A task with the words and the answers of the micro model's goldens."""
  root = tmp_path_factory.mktemp("micro")
  save_micro(root)
  return VQA(
    tokenizer=str(root / "words"),
    answers=write_answers(root, MICRO["none"]["answers"]),
    image_size=64,
    source_length=16,
    target_length=24,
    answer_length=8,
    search=Search(num_beams=5, max_length=12, normalize_scores=False),
  )


def golden_batch(prompt):
  """The golden's three inputs behind prompts of different lengths, as an evaluation has them."""
  with np.load(GOLDEN / "generation" / "inputs.npz") as arrays:
    batch = {
      "source": arrays["mm.src_tokens"].astype(np.int32),
      "image": arrays["mm.patch_images"].transpose(0, 2, 3, 1),
      "image_mask": arrays["mm.patch_masks"],
    }
  given = [ids[1:] for ids in MICRO[prompt]["decoder_prompts"]]
  batch["previous"] = np.array([filled([0, *ids], 24) for ids in given], np.int32)
  batch["target"] = np.array([filled([PAD] * len(ids) + [2], 24) for ids in given], np.int32)
  batch["weight"], batch["index"] = np.ones(3, np.float32), np.arange(3, dtype=np.int32)
  return jax.tree.map(jnp.asarray, batch)


@pytest.mark.parametrize("prompt", choice.PROMPTS)
def test_answers_are_the_originals(micro, prompt, monkeypatch):
  """Rows of different prompt lengths in one batch: every answer's score, the best, the beams."""
  golden, batch, model = MICRO[prompt], golden_batch(prompt), micro_model()
  task = dataclasses.replace(micro, prompt=prompt)
  assert [list(task.words.encode(f" {text}")) for text in golden["answers"]] == golden["answer_ids"]
  plan, count = task.choices.plan, len(golden["answers"])

  @jax.jit
  def run(batch, plan, trie):
    chosen = task.predict(model, batch, rngs=None, frozen=plan)
    beams = task.generate(model, batch, trie=trie)
    return task.scores(model, batch, plan), chosen, beams

  with jax.default_matmul_precision("highest"):
    scores, chosen, beams = jax.device_get(run(batch, plan, task.choices.trie))
    alone = scores
    if prompt == "prev_output":
      monkeypatch.setattr(choice, "MAX_POSITIONS", 1)  # one input after the other
      alone = jax.device_get(jax.jit(functools.partial(task.scores, model))(batch, plan))
  np.testing.assert_allclose(scores[:, :count], golden["allcand_scores"], atol=1e-5)
  np.testing.assert_allclose(alone[:, :count], golden["allcand_scores"], atol=1e-5)
  assert np.all(scores[:, count:] == -np.inf)
  np.testing.assert_array_equal(chosen["score"], scores.max(axis=1))
  valid = np.ones(3, bool)
  assert list(task.texts({"examples": {**chosen, "valid": valid}}).values()) == golden["predicts"]
  for i, hypotheses in enumerate(golden["beam_hypos_prefix_tokens"]):
    begin = len(golden["decoder_prompts"][i]) - 1
    expected = [x["tokens"][begin:] for x in hypotheses]
    lengths = beams.lengths[i][: len(hypotheses)]
    assert [x[:n].tolist() for x, n in zip(beams.tokens[i], lengths, strict=False)] == expected
    for positional, x in zip(beams.positional_scores[i], hypotheses, strict=False):
      continued = x["positional_scores"][begin:]
      np.testing.assert_allclose(positional[: len(continued)], continued, atol=1e-5)


@pytest.fixture(scope="module")
def questions(tmp_path_factory, shapes):
  return vqa_files.write(tmp_path_factory.mktemp("vqa"), shapes)


def read(task, line, folder, *, rng):
  """The example of one line that stands behind good ones."""
  good = (FOLDER / "vqa.tsv").read_bytes()
  path = folder / "rows.tsv"
  path.write_bytes(good + line + b"\n")
  rows = dataclasses.replace(task, train=(str(path),)).examples("train")
  return rows.example(len(rows) - 1, rng)


IMAGE_COLUMN = (FOLDER / "vqa.tsv").read_text().split("\n")[0].split("\t")[5]


@pytest.mark.parametrize(
  ("columns", "message"),
  [
    (("7", "8", "why?", "1|!+no"), "expected 6 columns separated by tabs, found 5"),
    (("7", "8", "?!", "1|!+no", ""), "the question is empty"),
    (("7", "8", "", "1|!+no", ""), "the question is empty"),
    (("7", "8", "why?", "", ""), "there is no answer to learn"),
    (("7", "8", "why?", "1|!+perhaps", ""), "the answer 'perhaps' is not among those to choose"),
    (("7", "8", "why?", "1|!+red and", ""), "the answer 'red and' is not among"),
    (("7", "8", "why?", "much|!+no", ""), r"confidence\|!\+answer, && between them, found 'much"),
    (("7", "8", "why?", "nan|!+no", ""), "found 'nan"),
    (("7", "8", "why?", "-1|!+no", ""), "found '-1"),
    (("7", "8", "why?", "no", ""), "found 'no'"),
    (("7", "8", "why?", "1|!+no&&0.3|!+ ", ""), r"found '0.3\|!\+ '"),
    (("7", "8", "wh\udcff?", "1|!+no", ""), "text is not UTF-8"),
  ],
  ids=range(12),
)
def test_what_cannot_be_used_is_named(bpe, tmp_path, columns, message):
  answers = json.loads((FOLDER / "answers.json").read_text())["answers"]
  task = VQA(tokenizer=bpe, answers=write_answers(tmp_path, answers), image_size=16)
  line = "\t".join((*columns, IMAGE_COLUMN)).encode(errors="surrogateescape")
  with pytest.raises(BadRow, match=message) as raised:
    read(task, line, tmp_path, rng=np.random.default_rng(0))
  assert raised.value.name == f"{tmp_path}/rows.tsv:4 7"


def test_questions_may_have_no_answer_in_an_evaluation(bpe, tmp_path):
  answers = write_answers(tmp_path, ["yes", "no"])
  task = VQA(tokenizer=bpe, answers=answers, image_size=16)
  line = "\t".join(("7", "8", "why?", "", "", IMAGE_COLUMN)).encode()
  example = read(task, line, tmp_path, rng=None)
  length = int(np.sum(example["source"] != PAD)) - 2
  assert example["target"].tolist() == filled([PAD] * length + [2], task.target_length)
  other = "\t".join(("7", "8", "why?", "1|!+perhaps", "", IMAGE_COLUMN)).encode()
  assert read(task, other, tmp_path, rng=None)["conf"] == 1


def test_scores_and_the_file_for_evalai(bpe, tmp_path):
  names, valid = ("yes", "2", "red and white"), np.array([True, False, True])
  path = tmp_path / "valid.tsv"
  text = (FOLDER / "vqa.tsv").read_text().replace("79459\t", "q79459\t", 1)
  path.write_text(text)
  task = VQA(
    valid=(str(path),), tokenizer=bpe, answers=write_answers(tmp_path, names), image_size=16
  )
  streams = task.streams("valid")
  chosen = {"examples": {"answer": np.array([0, 1, 2]), "valid": valid}}
  assert task.score(chosen, streams) == {"vqa_score": (0.0 + 0.9) / 2}
  assert json.loads(task.results(chosen, streams)["predict.json"]) == [
    {"question_id": "q79459", "answer": "yes"},
    {"question_id": 2, "answer": "red and white"},
  ]
  tokens = np.full((3, 8), PAD, np.int32)
  for row, answer in zip(tokens, (" no", " x", " red and white"), strict=True):
    ids = [*task.encode(answer), 2]
    row[: len(ids)] = ids
  searched = {"examples": {"tokens": tokens, "valid": valid}}
  assert task.score(searched, streams) == {"vqa_score": (0.6 + 0.9) / 2}
  assert task.confidences(searched, streams) is None
  sure = dataclasses.replace(task, temperatures=(2.0,))
  searched["examples"]["log_probability"] = np.log([0.25, 0.5, 0.04])
  told = sure.confidences(searched, streams)
  assert told.right.tolist() == [0.6, 0.9]
  np.testing.assert_allclose(told.probabilities[:, 0], [0.5, 0.2])
  assert [line["answer"] for line in told.told] == ["no", "red and white"]


def test_faults_of_a_config_are_told_at_once(questions):
  config = tiny.vqa_config(questions)
  validate(config, devices=8)
  wrong = {
    "prompt": "source",
    "inference": "all",
    "answers": None,
    "target_length": 30,
    "max_objects": -1,
    "columns": (0, 5, 2, 3),
  }
  with pytest.raises(ValueError) as raised:
    validate(tiny.vqa_config(questions, task=wrong), devices=8)
  for text in (
    "task.prompt: expected one of none, src, prev_output, found 'source'",
    "task.inference: expected one of allcand, beamsearch, found 'all'",
    "task.target_length: expected at least 31, for a question",
    "max_objects at least 0, found 8, 80, 9, -1",
    "task.columns: expected one column for each of id, image, text, answer, objects",
  ):
    assert text in str(raised.value)
  with pytest.raises(ValueError, match="expected a file of answers, or 'train', to choose from"):
    validate(tiny.vqa_config(questions, task={"answers": None}), devices=8)
  with pytest.raises(ValueError, match="found src, whose end ends the search"):
    ends = {"prompt": "src", "inference": "beamsearch"}
    validate(tiny.vqa_config(questions, task=ends), devices=8)


def test_answers_are_counted_in_the_training_data(questions):
  task = tiny.vqa_config(questions, task={"answers": "train", "least": 3}).task
  lines = (questions / "train.tsv").read_text().splitlines()
  learnt = collections.Counter(line.split("\t")[3].split("|!+")[-1] for line in lines)
  kept = [text for text, count in learnt.items() if count >= 3]
  assert task.choices.texts == tuple(sorted(kept, key=lambda text: (-learnt[text], text)))
  assert 0 < len(kept) < len(learnt)
  with pytest.raises(ValueError, match="at least 1000 times in the training data, found none"):
    _ = dataclasses.replace(task, least=1000).choices


def test_the_loss_is_the_originals_with_confidences_and_what_the_trie_allows(micro):
  """Against its formula in float64, answer by answer: prompts and padding cost nothing."""
  task = dataclasses.replace(micro, smoothing=0.1)
  batch, model = golden_batch("prev_output"), micro_model()
  answers = [list(task.encode(f" {text}")) for text in ("not red", "the red dog", "no")]
  given = [ids[1:] for ids in MICRO["prev_output"]["decoder_prompts"]]
  nodes = np.zeros((3, task.learnt_tokens), np.int32)
  for row, answer in zip(nodes, answers, strict=True):
    path = task.choices.trie.path(answer)
    row[: len(path)] = path
  pairs = list(zip(given, answers, strict=True))
  batch["previous"] = jnp.array([filled([0, *p, *a], 24) for p, a in pairs])
  batch["target"] = jnp.array([filled([PAD] * len(p) + [*a, 2], 24) for p, a in pairs])
  batch |= {
    "node": jnp.asarray(nodes),
    "conf": jnp.array([0.3, 1.0, 0.6]),
    "trie": task.choices.trie,
  }

  def logits_of(batch):
    given = {name: batch[name] for name in ("image", "image_mask")}
    return model(batch["source"], batch["previous"], **given)

  with jax.default_matmul_precision("highest"):
    loss, logits = jax.jit(lambda b: (task.loss(model, b, rngs=None)["loss"], logits_of(b)))(batch)
  logits = np.asarray(logits, np.float64)
  total, count = 0.0, 0
  ended = [[*task.encode(f" {text}"), 2] for text in task.choices.texts]
  for i, (p, answer) in enumerate(zip(given, answers, strict=True)):
    for k, token in enumerate([*answer, 2]):
      allowed = sorted({x[k] for x in ended if x[:k] == answer[:k]})
      row = logits[i, len(p) + k, allowed]
      log_probs = batch["conf"][i] * (row - np.log(np.sum(np.exp(row - row.max()))) - row.max())
      nll = -log_probs[allowed.index(token)]
      share = 0.1 / (len(allowed) - 1 + 1e-6)
      total += (1 - 0.1 - share) * nll - share * log_probs.sum()
      count += 1
  np.testing.assert_allclose(loss.total, total, rtol=1e-5)
  assert loss.count == count


class Whole(VQA):
  """Logits at every place, as of tasks that say nothing of what is learnt."""

  learnt_tokens = None


@pytest.mark.parametrize("options", [{}, {"ignore_prefix": 5, "rdrop": 0.5, "drop_worst": 0.3}])
def test_logits_where_nothing_is_learnt_change_nothing(micro, options):
  task = dataclasses.replace(micro, answers=None, smoothing=0.1, **options)
  whole = Whole(**{f.name: getattr(task, f.name) for f in dataclasses.fields(task)})
  batch, model = golden_batch("prev_output"), micro_model()
  given = [ids[1:] for ids in MICRO["prev_output"]["decoder_prompts"]]
  pairs = list(zip(given, ([45, 62], [5, 62, 61], [60] * 16), strict=True))
  batch["previous"] = jnp.array([filled([0, *p, *a], 24)[:24] for p, a in pairs])
  batch["target"] = jnp.array([filled([PAD] * len(p) + [*a, 2], 24) for p, a in pairs])
  batch |= {"conf": jnp.array([0.3, 1.0, 0.6]), "dropping": True}
  task = dataclasses.replace(task, answer_length=16)

  def losses(task):
    return jax.jit(lambda b: task.loss(model, b, rngs=None))(batch)

  few, all_places = losses(task), losses(whole)
  for name, mean in few.items():
    np.testing.assert_allclose(mean.total, all_places[name].total, rtol=1e-6, err_msg=name)
    assert mean.count == all_places[name].count
