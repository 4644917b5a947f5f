"""The rows of pretraining: with the original's draws they are its rows; faults are told."""

import dataclasses
import json
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ofa_jax import losses_vocabulary as vocabulary
from ofa_jax import trees
from ofa_jax.config import Config
from ofa_jax.data.negatives import Negatives
from ofa_jax.data.original_draws import Replayed, Seeded, augmenting
from ofa_jax.data.tsv import BadRow
from ofa_jax.models import ofa
from ofa_jax.tasks import pretrain, pretrain_parts
from ofa_jax.tasks.pretrain import Pretrain
from ofa_jax.tokenizers.special import BOS, EOS, PAD
from tests.ofa_files import GOLDEN, write_bpe
from tests.ofa_golden import golden, golden_json, inputs, micro_model

FILES = {"train": "vl", "text": "text", "image": "image", "detection": "detection"}


def write_negatives(folder, kwargs):
  """The folder `negative_sample` of the arguments that the original was called with."""
  folder.mkdir()
  (folder / "type2ans.json").write_text(json.dumps(kwargs["type2ans_dict"]))
  (folder / "object.txt").write_text("\n".join(kwargs["all_object_list"]) + "\n\n")
  (folder / "all_captions.txt").write_text("\n".join([*kwargs["all_caption_list"], " "]))
  return str(folder)


@pytest.fixture(scope="module")
def stored():
  return golden_json("pretrain/pretrain_unify")


@pytest.fixture(scope="module")
def task(tmp_path_factory, stored):
  folder = tmp_path_factory.mktemp("pretrain")
  kwargs = stored["kwargs"]
  copied = {
    field: (str(shutil.copy(GOLDEN / "pretrain" / f"{name}.tsv", folder)),)
    for field, name in FILES.items()
  }
  return Pretrain(
    **copied,
    negatives=write_negatives(folder / "negative_sample", kwargs),
    tokenizer=str(write_bpe(folder / "bpe")),
    image_size=kwargs["patch_image_size"],
    code_image_size=kwargs["code_image_size"],
    box_size=kwargs["max_image_size"],
    max_words=kwargs["max_src_length"],
    max_target_words=kwargs["max_tgt_length"],
  )


def filled(ids, length):
  assert len(ids) <= length
  return ids + [PAD] * (length - len(ids))


def check(example, expected, *, picture):
  """One of our examples is one of the original's."""
  for ours, theirs in (
    ("source", "source"), ("target", "target"), ("previous", "prev_output_tokens")
  ):  # fmt: skip
    ids = expected[theirs]["ids"]
    assert example[ours].tolist() == filled(ids, len(example[ours])), (ours, expected[theirs])
  assert [float(example["conf"])] == expected["conf"]
  assert bool(example.get("code_mask", False)) == expected.get("code_mask", [False])[0]
  if picture is None:
    assert expected["patch_mask"] == [False]
    return
  assert expected["patch_mask"] == [True]
  np.testing.assert_allclose(picture, expected["pixels"], atol=2e-7)


def made(task, stream, source, *, number=0):
  """The arrays of a row that these draws make."""
  rows, part = task.examples("train")[stream], task.parts[stream]
  arrays = part.assemble(part.made(rows.row(number), source))
  blank = rows.blank()
  assert {k: (v.shape, v.dtype) for k, v in arrays.items()} == {
    k: (v.shape, v.dtype) for k, v in blank.items()
  }
  return arrays


def seen(task, stream, image):
  """The picture as the model sees it, [3, S, S]."""
  part = task.parts[stream]
  return np.asarray(part.pictures({"image": image[None]})["image"])[0].transpose(2, 0, 1)


@pytest.mark.parametrize("replayed", [True, False], ids=["replayed", "seeded"])
@pytest.mark.parametrize("run", range(4))
def test_every_row_is_the_originals(task, stored, run, replayed):
  """With its draws, but those of augmentation, and from the number that its process was seeded."""
  expected, pixels = stored["runs"][run], golden("pretrain", "images")
  seeded = Seeded(expected["seed"])

  def source(row):
    return Replayed(row["random_draws"], augment=seeded.augment) if replayed else seeded

  for number, row in enumerate(expected["pair"]):
    drawn = source(row)
    arrays = made(task, "pairs", drawn, number=number)
    assert not replayed or drawn.left == []
    assert len(row["examples"]) == 2
    for i, example in enumerate(row["examples"]):
      own = {"pixels": pixels[f"s{run}.pair{number}"], **example}
      mine = {k: v if k == "image" else v[i] for k, v in arrays.items()}
      check(mine, own, picture=seen(task, "pairs", arrays["image"]))
  drawn = source(expected["text"])
  for example in expected["text"]["examples"]:  # the file's one text, twice
    check(made(task, "text", drawn), example, picture=None)
  assert not replayed or drawn.left == []
  for stream, name in (("image", "image"), ("detection", "det")):
    arrays = made(task, stream, source(expected[stream]))
    (example,) = expected[stream]["examples"]
    own = {"pixels": pixels[f"s{run}.{name}"], **example}
    check(arrays, own, picture=seen(task, stream, arrays["image"]))


def asked_of(number, kwargs, draws):
  """What the second example of a row asks, and its answer, by the paper and Python's `random`."""
  draws.choice(range(kwargs["patch_image_size"], 481))  # the size of the picture
  if number == 1:
    share = draws.random()
    if share < 0.6 - 0.1:
      kind = kwargs["type2ans_dict"]["how many"]
      wrong = draws.choice(kind[:-1])
      wrong = kind[-1] if wrong == "2" else wrong
      if share > 0.5:
        wrong = str(2 + draws.choice([-1, 1]))
    else:
      wrong = draws.choice(kwargs["type2ans_dict"]["other"][:-1])
    right = draws.random() >= 0.5
    question = ' what is the answer to question " how many much dogs ". is " {} "?'
    return question.format("2" if right else wrong), right
  caption, things = {
    0: ("a man-made, cart on street.", ["man", "cart"]),
    3: ("web alt text caption here", []),
  }[number]
  if draws.random() > 0.6 and things:
    there = draws.choice(things)
    wrong = caption.replace(there, draws.choice(kwargs["all_object_list"][:-1]))
  else:
    wrong = draws.choice(kwargs["all_caption_list"]).lower()
  right = draws.random() >= 0.5
  return f' does the image describe " {caption if right else wrong} "?'.replace("-", " "), right


def test_other_seeds_are_drawn_alike(task, stored):
  """Wrong captions and answers of numbers that nothing was recorded of."""
  words, seen = task.parts["pairs"].words, {number: set() for number in (0, 1, 3)}
  for seed in range(4, 40):
    for number, found in seen.items():
      asked, right = asked_of(number, stored["kwargs"], random.Random(seed))
      arrays = made(task, "pairs", Seeded(seed), number=number)
      expected = [BOS, *words.encode(asked), EOS]
      assert arrays["source"][1].tolist() == filled(expected, arrays["source"].shape[1])
      answer = words.encode(" yes" if right else " no")
      assert arrays["target"][1].tolist()[:2] == [*answer, EOS]
      found.add(asked)
  assert {number: len(found) for number, found in seen.items()} == {0: 6, 1: 6, 3: 3}


def test_a_picture_may_be_augmented_as_all_of_its_epoch(task):
  """The original's fault, by numpy's seed of its rows; else every picture for itself."""
  part = dataclasses.replace(task, augment_by="epoch").parts["pairs"]
  row = part.examples("train").row(0)
  rngs = {key: np.random.default_rng(key) for key in ((0, 0, 5), (0, 0, 6), (0, 2, 5))}

  def operations(part, key):
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(
        pretrain_parts,
        "random_augment",
        lambda image, rng, **_: (
          drawn.append((rng.integers(10, size=2).tolist(), rng.random())) or image
        ),
      )
      part.example(row, rngs[key])
    return drawn[0]

  first, second, later = (operations(part, key) for key in rngs)
  assert first == second != later
  expected = np.random.RandomState(200960)  # what Python 3.8 and later make of (7, 1)
  assert first == (expected.randint(0, 10, 2).tolist(), expected.random_sample())
  repaired = task.parts["pairs"]
  assert len({str(operations(repaired, key)) for key in rngs}) == 3


def test_the_seeds_of_epochs_are_those_of_the_original():
  for epoch, new, old in ((1, 200960, 978432), (3, 686464, 143680)):
    for before_3_8, seed in ((False, new), (True, old)):
      found = augmenting(epoch, before_3_8=before_3_8).integers(1000, size=9)
      np.testing.assert_array_equal(found, np.random.RandomState(seed).randint(0, 1000, 9))


@pytest.mark.parametrize(
  ("stream", "columns", "reason"),
  [
    ("pairs", {7: "captions"}, "expected a type out of caption, qa, visual_grounding, found"),
    ("pairs", {2: " "}, "the caption is empty"),
    ("pairs", {7: "qa", 3: "..."}, "the question is empty"),
    ("pairs", {7: "qa", 4: "dog"}, "expected answers as confidence"),
    ("pairs", {7: "qa", 4: "0.0|!+dog"}, "there is no answer to learn"),
    ("pairs", {7: "visual_grounding", 4: "1,2,3"}, "expected a box x0,y0,x1,y1 of four numbers"),
    ("pairs", {7: "visual_grounding", 4: "9,9,5,5"}, "which has no area"),
    ("pairs", {7: "visual_grounding", 4: "0,0,900,9"}, "reaches outside of the picture"),
    ("pairs", {7: "visual_grounding", 4: "0,0,9,9", 2: ""}, "the caption is empty"),
    ("pairs", {1: "AAAA"}, "not a JPEG, PNG"),
    ("text", {1: " "}, "the text is empty"),
    ("image", {2: "1 2 3"}, "expected 16 image codes, found 3"),
    ("image", {2: " ".join(["8192"] * 16)}, "expected image codes from 0 to 8191, found '8192'"),
    ("detection", {2: "1,2,30,40,dog"}, "expected an object x0,y0,x1,y1,id,name"),
    ("detection", {2: "1,2,30,40,/m/1,dog&&5,5,4,4,/m/1,cat"}, "which has no area"),
  ],
)
def test_a_bad_row_is_named(task, tmp_path, stream, columns, reason):
  field = {"pairs": "train"}.get(stream, stream)
  (path,) = getattr(task, field)
  lines = [line.split("\t") for line in pathlib.Path(path).read_text().splitlines() if line]
  for number, text in columns.items():
    lines[0][number] = text
  broken = tmp_path / "broken.tsv"
  broken.write_text("".join("\t".join(line) + "\n" for line in lines))
  rows = dataclasses.replace(task, **{field: (str(broken),)}).examples("train")[stream]
  with pytest.raises(BadRow) as fault:
    rows.example(0, np.random.default_rng(0))
  assert reason in str(fault.value) and f"broken.tsv:1 {lines[0][0]}" in str(fault.value)


def test_a_picture_that_cannot_be_filled_in_is_a_bad_row(task):
  part = dataclasses.replace(task.parts["image"], image_size=80)
  with pytest.raises(BadRow, match="expected a picture of 80 x 80 pixels, found 64 x 64"):
    part.examples("train").example(0, np.random.default_rng(0))


def test_missing_wrong_captions_and_answers_are_one_error(task, tmp_path):
  folder = shutil.copytree(task.negatives, tmp_path / "negative_sample")

  def fault():
    with pytest.raises(ValueError) as error:
      dataclasses.replace(task, negatives=str(folder)).examples("train")
    return str(error.value)

  (folder / "object.txt").write_text("car\n")
  (folder / "all_captions.txt").write_text("\n \n")
  (folder / "type2ans.json").write_text('{"how many": ["1"]}')
  text = fault()
  assert "object.txt has 1 names of things" in text and "all_captions.txt has no caption" in text
  assert "fewer for how many" in text and text.count("Expected") == 1
  (folder / "type2ans.json").write_text("{")
  assert "type2ans.json cannot be read" in fault()
  (folder / "object.txt").unlink()
  (folder / "type2ans.json").unlink()
  text = fault()
  assert "found: type2ans.json is missing; object.txt is missing." in text
  assert "--config.task.negatives" in text


def test_wrong_answers_are_of_the_kind_of_sure_ones():
  wrong = Negatives(
    ["dot", "bar", "box"], ["a car"], {"how many": ["1", "2", "3"], "other": ["cat", "dog"]}
  )

  def answer(*drawn, right="2", confidence=0.9):
    source = Replayed([[f"random.{kind}", x] for kind, x in drawn], augment=None)
    return wrong.answer(right, confidence, source)

  assert answer(("random", 0.7), ("choice", "-1")) == "1"
  assert answer(("random", 0.3), ("choice", "2")) == "3"  # the last one in its place
  assert answer(("random", 0.3), ("choice", "1")) == "1"
  assert answer(("random", 0.85), ("choice", "cat")) == "cat"  # not so sure
  assert answer(("random", 0.1), ("choice", "cat"), right="cat") == "dog"
  caption = Replayed(
    [["random.random", 0.61], ["random.choice", "dot"], ["random.choice", "dot"]], augment=None
  )
  assert wrong.caption("a dot on a dot", "dot&&bar", caption) == "a box on a box"
  with pytest.raises(ValueError, match=r"Expected a draw of random.choice, found nothing"):
    wrong.caption("a dot", "", Replayed([["random.random", 0.9]], augment=None))


def test_every_eight_pairs_come_with_two_texts_and_two_pictures(task):
  assert task.batch_sizes(8) == {"pairs": 8, "text": 2, "image": 1, "detection": 1}
  assert task.batch_sizes(64) == {"pairs": 64, "text": 16, "image": 8, "detection": 8}
  rounded = dataclasses.replace(task, multiple=4, image=())
  assert rounded.batch_sizes(24) == {"pairs": 24, "text": 8, "detection": 4}
  assert rounded.groups() == [["pairs"], ["text"], ["detection"]]
  blank = dataclasses.replace(task, blank_pictures=True)
  assert blank.groups() == [["pairs"], ["text", "image", "detection"]]
  with pytest.raises(ValueError, match="pretraining has no other"):
    task.examples("valid")


def test_faults_are_told(task):
  config = Config(model=ofa.config("tiny", code_image_size=32), task=task, batch_size=8, steps=1)

  def faults(model=config.model, **changes):
    changed = dataclasses.replace(task, **changes)
    return "\n".join(changed.check(dataclasses.replace(config, model=model, task=changed)))

  assert faults() == ""
  assert "task.every: expected at least 1, found 0" in faults(every=0)
  assert "task.augment_by: expected one of row, epoch, found 'rows'" in faults(augment_by="rows")
  assert "task.ratio: expected more than 0" in faults(ratio=0.0)
  assert "of the stream 'pairs': task.image_size: expected 1 to 672" in faults(image_size=1000)
  assert "task.box_size: expected at least the 64 pixels" in faults(box_size=32)
  assert faults(smoothing=2.0) == "task.smoothing: expected a share from 0 to below 1, found 2.0"
  assert "task.code_image_size: expected the model's 128, found 32" in faults(
    model=ofa.config("tiny")
  )


def test_every_objective_is_told_by_its_name_where_there_is_one():
  logits = jnp.zeros((4, 2, 5)).at[0, 0, 3].set(9.0)
  targets = jnp.array([[3, 2], [4, PAD], [4, 2], [PAD, PAD]])
  cost, kinds = vocabulary.costs(logits, targets), jnp.array([0, 0, 5, 1])
  told = pretrain.by_objective(cost, targets != PAD, pretrain.OBJECTIVES, kinds=kinds)
  values = {name: float(mean.value) for name, mean in told.items()}
  assert values["matching_answer/loss"] == pytest.approx(np.log(5))
  whole = np.log(5) * 2 + np.log(np.exp(9) + 4) - 9
  assert values["caption/loss"] == pytest.approx(whole / 3)
  assert values["caption/accuracy"] == pytest.approx(1 / 3)
  assert all(np.isnan(values[f"{name}/loss"]) for name in ("vqa", "grounding"))
  given = {"loss": 1.0, "grad_norm": 0.1, "lr": 1e-3, "data_time": 0.0, "batch_time": 1.0}
  place = {"step": 1, "steps": 2, "epoch": 1, "seen": 8, "rows": 8, "percent": 50, "batch_size": 8}
  line = Pretrain(negatives="", tokenizer="").log_line({**values, **given, **place})
  assert "| caption 1.0" in line and "matching_answer 1.6094 (0.0%)" in line and "vqa" not in line


def test_the_list_sample_is_the_originals():
  """Its two batches with their own means: loss, and gradient of the sum of both."""
  stored = json.loads((GOLDEN / "losses" / "pretrain_list_sample.json").read_text())
  (first, second), model = (golden("micro", n) for n in ("mm_batch", "code_mixed")), micro_model()
  batch = {}
  for name, arrays in (("pairs", first), ("detection", second)):
    given, previous = inputs(arrays), arrays["prev_output_tokens"].astype(np.int32)
    rows = len(previous)
    tokens = np.concatenate([previous[:, 1:], np.full((rows, 1), PAD)], axis=1)
    ends = np.sum(previous != PAD, axis=1) - 1
    tokens[np.arange(rows), ends] = EOS
    batch[name] = {
      "image": given["image"],
      "image_mask": given["image_mask"],
      "source": given["tokens"],
      "previous": previous,
      "target": tokens.astype(np.int32),
      "weight": np.ones(rows, np.float32),
      "conf": np.full(rows, {"pairs": 1, "detection": 2}[name], np.float32),
      "kind": np.zeros(rows, np.int32),
    }
  batch["detection"] |= {"code_mask": second["code_masks"]}
  plain = {name: dict(rows) for name, rows in batch.items()}
  for name in ("source", "previous", "target", "conf", "kind", "image_mask"):  # two of a picture
    x = np.asarray(batch["pairs"][name])
    other = np.full_like(x, PAD) if name == "target" else x
    batch["pairs"][name] = np.stack([x, other], axis=1)
  task = Pretrain(train=("a",), detection=("b",), negatives="", tokenizer="", num_patches=None)

  def expected(model):
    terms = []
    for rows in plain.values():
      logits = model(
        rows["source"], rows["previous"], image=rows["image"], image_mask=rows["image_mask"],
        code_mask=rows.get("code_mask"),
      )  # fmt: skip
      log_probs = jax.nn.log_softmax(logits) * rows["conf"][:, None, None]
      own = jnp.take_along_axis(log_probs, rows["target"][..., None], axis=-1).squeeze(-1)
      keep = rows["target"] != PAD
      terms.append(-jnp.sum(jnp.where(keep, own, 0)) / jnp.sum(keep))
    return sum(terms)

  def ours(model):
    metrics = task.loss(model, batch, rngs=None)
    blocks = dataclasses.replace(task, vocab_blocks=3).loss(model, batch, rngs=None)
    return metrics["loss"].value, (metrics, blocks)

  graph, params, rest = trees.split(model)
  with jax.default_matmul_precision("highest"):
    (loss, (metrics, blocks)), mine = jax.jit(
      jax.value_and_grad(lambda p: ours(nnx.merge(graph, p, rest)), has_aux=True)
    )(params)
    theirs = jax.jit(jax.grad(lambda p: expected(nnx.merge(graph, p, rest))))(params)
  assert float(loss) == pytest.approx(stored["loss"], rel=1e-5)
  assert float(blocks["loss"].value) == pytest.approx(float(loss), rel=1e-6)
  for name, number in (("pairs_loss", "v1"), ("others_loss", "v2")):
    total, count = metrics[name]
    assert float(total) == pytest.approx(stored[f"loss_{number}"], rel=1e-5)
    assert int(count) == stored[f"sample_size_{number}"]
  theirs, mine = trees.flatten(theirs), trees.flatten(mine)
  largest = max(float(jnp.abs(x).max()) for x in theirs.values())
  for path, gradient in theirs.items():  # some of them are nothing but rounding
    scale = max(float(jnp.abs(gradient).max()), 1e-3 * largest)
    np.testing.assert_allclose(mine[path], gradient, rtol=0, atol=1e-5 * scale, err_msg=path)
