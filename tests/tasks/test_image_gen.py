"""Text to image: rows, losses, rewards, rankings as the original has them; and what is refused."""

import base64
import dataclasses
import functools
import io
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from ofa_jax import hub
from ofa_jax.convert import families
from ofa_jax.convert.ofa import table
from ofa_jax.data import judged as judged_pictures
from ofa_jax.data.images import decode_cropped
from ofa_jax.data.tsv import BadRow
from ofa_jax.decode.beam import Search
from ofa_jax.inference.drawing import Drawing
from ofa_jax.losses_policy import policy_gradient, token_log_probs
from ofa_jax.tasks import drawn
from ofa_jax.tasks.image_gen import ImageGen
from ofa_jax.tasks.image_reward import ImageReward
from ofa_jax.tokenizers.special import EOS
from tests import frozen_golden, image_gen_golden, tiny
from tests.image_gen_golden import CONFIG, FIRST_CODE, FOLDER
from tests.ofa_files import write_bpe
from tests.ofa_golden import rule_state_dict

CONFIGS = Path(__file__).parent.parent.parent / "configs"
SEARCH = Search(num_beams=6, max_length=16, min_length=16, gen_code=True, sample=True, top_k=16)

# What is added to all keys alike changes no weight of attention: its gradient is 0, and what the
# original and we have of it is the rounding of sums of numbers up to 6 (found: 3e-8 and 4e-8).
NOTHING, ROUNDING = "decoder.cross_pos_k_linear.bias", 2e-7


@pytest.fixture(scope="module", autouse=True)
def _highest_precision():
  with jax.default_matmul_precision("highest"):
    yield


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  return str(write_bpe(tmp_path_factory.mktemp("words")))


def save(folder, tensors):
  """The model directory of tensors, by their own family."""
  (family,) = [family for family in families.FAMILIES if family.wrote(tensors)]
  config, settings = family.infer(tensors, {})
  hub.save_directory(folder, config, *family.from_torch(tensors, config), settings=settings)
  return str(folder)


@pytest.fixture(scope="module")
def helpers(tmp_path_factory):
  """Model directories of the micro VQGAN, for pictures of 32 pixels, and of the micro CLIP."""
  folder = tmp_path_factory.mktemp("helpers")
  shapes = {name: tuple(shape) for name, shape in CONFIG["vqgan_state_dict"].items()}
  codec = save(folder / "codec", rule_state_dict(shapes))
  return {"codec": codec, "judge": save(folder / "judge", frozen_golden.state_dict("clip"))}


def small(words, cls=ImageGen, **fields):
  """A task for pictures of 32 pixels."""
  given = {"search": SEARCH, "image_size": 32, "source_length": 32, "target_length": 17}
  return cls(**{**given, "tokenizer": words, **fields})


def written(folder, rows):
  file = folder / "rows.tsv"
  file.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
  return (str(file),)


def check(task, items):
  rows, blank = task.examples("train"), task.blank()
  for i, item in enumerate(items):
    example = rows.example(i, np.random.default_rng(0))
    assert {k: (v.shape, v.dtype) for k, v in example.items()} == {
      k: (np.shape(v), v.dtype) for k, v in blank.items()
    }
    source, target = item["source"], item["target"]
    assert example["source"].tolist() == source + [1] * (task.source_length - len(source))
    if isinstance(target, dict):  # of 1,024 zeros
      assert len(example["target"]) == target["length"]
      assert sorted(set(example["target"].tolist())) == target["distinct"]
      target = example["target"].tolist()
    assert example["target"].tolist() == target
    assert example["previous"].tolist() == [0, *target[:-1]]
    previous = item.get("previous", item.get("prev_output_tokens_first"))
    assert example["previous"].tolist()[: len(previous)] == previous
  return rows


def test_rows_are_the_originals(words, tmp_path):
  golden = image_gen_golden.told("rows")
  rows = [line.split("\t") for line in golden["rows"]]
  task = small(words, train=written(tmp_path, rows), columns=(0, 2, 1), max_words=20)
  check(task, golden["items"])
  for number, columns in ((2, (0, 1)), (3, (0, 1, 2)), (4, (0, 1, 2, 3))):
    told = golden["by_columns"][f"{number}_columns"]
    folder = tmp_path / str(number)
    folder.mkdir()
    pictures = [(FOLDER / f"ref_{i}.png").read_bytes() for i in range(3)]
    encoded = [base64.urlsafe_b64encode(picture).decode() for picture in pictures]
    rows = [[encoded[i] if x is None else x for x in row] for i, row in enumerate(told["rows"])]
    length = {"target_length": 1025} if number == 2 else {}
    task = small(words, train=written(folder, rows), columns=columns, **length)
    found = check(task, told["items"])
    if number == 4:
      assert np.array_equal(found.row(1).image(), Image.open(io.BytesIO(pictures[1])))


@pytest.mark.parametrize("variant", judged_pictures.FOR_FID)
def test_real_pictures_are_those_of_the_files(words, tmp_path, monkeypatch, variant):
  """An evaluation compares with what the folders of an FID would have of the same pictures."""
  monkeypatch.setattr(drawn, "inception_variant", lambda _: variant)
  picture = (FOLDER / "ref_1.png").read_bytes()
  rows = [["0", base64.urlsafe_b64encode(picture).decode(), "a dog", " ".join(["7"] * 16)]]
  given = {"columns": (0, 1, 2, 3), "compared": True, "inception": variant}
  task = small(words, valid=written(tmp_path, rows), **given)
  found, blank = task.examples("valid").example(0, None)["real"], task.blank()["real"]
  assert found.shape == blank.shape == (299, 299, 3) and found.dtype == blank.dtype
  with Image.open(io.BytesIO(picture)) as image:
    np.testing.assert_array_equal(found, judged_pictures.FOR_FID[variant](image))


def test_faulty_rows_are_named(words, helpers, tmp_path):
  right = " ".join(map(str, range(16)))
  rows = [
    ["0", "  ", right],
    ["1", "a dog", right.removesuffix(" 15")],
    ["2", "a dog", right.replace("15", "8192")],
    ["3", "a dog", right.replace("15", "-1")],
    ["4", "a dog", right.replace("15", "x")],
    ["5", "a dog", right.replace("15", "9" * 20)],
    ["6", "the " * 60 + "city " * 16, right],
    ["7", "a dog", right],
  ]
  task = small(words, train=written(tmp_path, rows), **helpers)
  reasons = (
    "caption is empty",
    "expected 16 codes, one for each cell of the picture, found 15",
    "expected codes from 0 to 8191, found 1 others, first 8192",
    "first -1",
    "expected codes from 0 to 8191, found x",
    "expected codes from 0 to 8191, found 99999999999999999999",
    "the caption is too long for .*judge",
  )
  rows = dataclasses.replace(task, max_words=80).examples("train")
  for i, reason in enumerate(reasons):
    with pytest.raises(BadRow, match=f"rows.tsv:{i + 1} {i}: .*{reason}"):
      rows.example(i, None)
  assert rows.example(7, None)["target"].tolist() == [*range(FIRST_CODE, FIRST_CODE + 16), EOS]


def test_the_recipes_are_the_originals():
  get_config = runpy.run_path(str(CONFIGS / "ofa_image_gen.py"))["get_config"]
  first, second = get_config("large"), get_config("large,clip")
  assert (first.batch_size, first.optim.lr, first.steps, first.optim.warmup) == (
    512, 1e-3, 40_000, 2000,
  )  # fmt: skip
  assert (second.batch_size, second.optim.lr, second.steps, second.optim.warmup) == (
    32, 1e-6, 5000, 0,
  )  # fmt: skip
  assert first.model.dropout == first.model.encoder_drop_path == 0.1
  assert second.model.dropout == second.model.encoder_drop_path == 0 and second.model.freeze_resnet
  assert first.model.code_image_size == 256 and first.task.smoothing == 0
  search, sampling = second.evals[0].task.search, second.task.sampling
  assert (search.num_beams, sampling.num_beams, search.top_k, sampling.top_k) == (24, 5, 256, 256)
  assert search.max_length == sampling.min_length == 1024 and search.temperature == 1
  assert get_config("base,chinese,clip").task.judge == "ViT-B-16"
  assert get_config("large,test").evals[0].task.statistics.endswith("gt_stat.npz")


def test_what_does_not_fit_is_told_together(words, helpers):
  config = runpy.run_path(str(CONFIGS / "ofa_image_gen.py"))["get_config"]("base")
  assert not [x for x in config.task.check(config) if "tokenizer" not in x]
  task = small(
    words, target_length=18, judged_by="pixels", compared=True, inception="x", drop_caption=1.0
  )
  faults = "\n".join(task.check(dataclasses.replace(config, task=task)))
  for part in ("task.target_length: expected 1025", "task.search: expected min_length and max_leng",
               "drop_caption", "judged_by", "four columns", "task.codec"):  # fmt: skip
    assert part in faults, part
  rewarded = small(words, ImageReward, smoothing=0.1, codec=helpers["codec"])
  faults = "\n".join(rewarded.check(dataclasses.replace(config, task=rewarded)))
  assert "task.smoothing" in faults and "the CLIP that judges" in faults
  swapped = small(words, codec=helpers["judge"], judge=helpers["codec"])
  with pytest.raises(ValueError, match=r"Expected a VQGAN as codec, found .*CLIP"):
    swapped.helper("codec")
  with pytest.raises(ValueError, match=r"Expected OpenAI's CLIP or a Chinese-CLIP as judge"):
    swapped.blank()
  with pytest.raises(ValueError, match=r"task\.image_size: expected 32"):
    small(words, image_size=64, **helpers).helper("codec")


def test_a_model_that_cannot_draw_is_told():
  model = Drawing()
  model.config = dataclasses.replace(tiny.OFA, num_codes=0)
  with pytest.raises(ValueError, match="Expected a model that writes image codes, found one with"):
    model.draw(["a dog"])


def test_the_loss_is_that_of_all_tokens_with_the_originals_range(words):
  """Of the codes alone, which are all that have a probability."""
  given = image_gen_golden.arrays("clip_scst")
  task = small(words)
  tokens = given["gen_target"].reshape(3, 5, 17)[:, 0].astype(np.int32)
  batch = {
    "source": given["src_tokens"].astype(np.int32),
    "previous": np.pad(tokens[:, :-1], ((0, 0), (1, 0))),
    "target": tokens,
    "weight": np.ones(3, np.float32),
  }
  model = image_gen_golden.model()
  few = jax.jit(lambda b: task.loss(model, b, rngs=None))(batch)
  taught = task.taught(batch)
  whole = model(**taught.inputs, code_mask=jnp.ones(3, bool))
  log_probs = token_log_probs(whole, tokens, allowed_range=(FIRST_CODE, FIRST_CODE + 8192))
  np.testing.assert_allclose(few["loss"].total, -jnp.sum(log_probs), rtol=1e-6)
  assert few["loss"].count == 3 * 17
  expected = given["target_logprob_constrained"].reshape(3, 5, 17)[:, 0]
  np.testing.assert_allclose(few["nll"].value, -np.mean(expected), rtol=1e-5)


def judged(helpers, images, texts):
  """Scores, as of training, of pictures uint8[N, S, S, 3] for as many texts or one."""
  judge = frozen_golden.model("clip")
  tokens = drawn.judge_tokens(helpers["judge"], texts)
  size = CONFIG["clip_n_px"]

  @jax.jit
  def compared(images, tokens):
    seen = drawn.image_features(judge, images, size=size)
    return jnp.sum(seen * drawn.text_features(judge, tokens), axis=-1)

  return np.asarray(compared(images, tokens))


def test_samples_rewards_and_loss_are_the_originals(words, helpers):
  """From the tokens that the original drew, to the gradient."""
  given, told = image_gen_golden.arrays("clip_scst"), image_gen_golden.told("clip_scst")
  task = small(words, ImageReward, columns=(0, 1), **helpers)
  assert task.scale == 2.5 and task.sampling.num_beams == 5
  tokens = given["gen_target"].reshape(3, 5, 17).astype(np.int32)
  batch = {
    "source": given["src_tokens"].astype(np.int32),
    "caption": drawn.judge_tokens(helpers["judge"], told["captions_as_recovered"]),
    "weight": np.ones(3, np.float32),
  }
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"))
  frozen = task.frozen(mesh, precision="fp32")
  codes = tokens[..., :-1] - FIRST_CODE
  np.testing.assert_array_equal(codes.reshape(15, 16), given["codes"])
  codec = task.helper("codec").merge(frozen["codec"])
  images = np.asarray(jax.jit(lambda c: drawn.decoded(codec, c, batch_size=4))(codes))
  images = images.reshape(15, 32, 32, 3)
  off = images.astype(int) - given["uint8"]
  assert np.abs(off).max() <= 1 and np.count_nonzero(off) < 100  # truncated at whole numbers
  texts = np.repeat(told["captions_as_recovered"], 5).tolist()
  from_bytes = 2.5 * judged(helpers, given["uint8"], texts)
  np.testing.assert_allclose(from_bytes, given["scores"], atol=2e-6)
  scores = np.asarray(
    jax.jit(lambda b, f: task.rewards(codes, b, f, num_codes=8192))(batch, frozen)
  )
  np.testing.assert_allclose(scores.ravel(), given["scores"], atol=3e-4)
  reward = drawn.leave_one_out(jnp.asarray(given["scores"]).reshape(3, 5))
  np.testing.assert_allclose(reward.ravel(), given["reward"], atol=1e-6)

  graph, params, rest = image_gen_golden.weights()
  batch |= {"samples": tokens, "score": given["scores"].reshape(3, 5)}
  batch |= {"advantage": given["reward"].reshape(3, 5)}

  def loss(params):
    metrics = task.loss(nnx.merge(graph, params, rest), batch, rngs=None)
    return metrics["loss"].total, metrics

  (total, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  np.testing.assert_allclose(total, told["loss"], rtol=1e-5)
  assert metrics["loss"].count == told["sample_size"] == 255
  np.testing.assert_allclose(metrics["reward"].total, told["score_logged"], rtol=1e-5)
  tensors = table.to_torch(jax.device_get(grads), rest, image_gen_golden.config())
  names = [name.removeprefix("grad:") for name in given if name.startswith("grad:")]
  assert len(names) == 13 and NOTHING in names
  for name in names:
    expected = given[f"grad:{name}"]
    if name == NOTHING:
      assert np.abs(tensors[name]).max() < ROUNDING and np.abs(expected).max() < ROUNDING
    else:
      assert frozen_golden.error(tensors[name], expected) < 1e-5, name
  rows = tensors["encoder.embed_tokens.weight"][given["grad_rows:ids"]]
  assert frozen_golden.error(rows, given["grad_rows:encoder.embed_tokens.weight"]) < 1e-5


def test_the_function_is_the_originals():
  given = image_gen_golden.arrays("function")
  targets = given["target"].astype(np.int32)
  for name, allowed in (("range", tuple(given["range"].tolist())), ("none", None)):

    @functools.partial(jax.jit, static_argnums=1)
    def loss(logits, allowed):
      log_probs = token_log_probs(logits, targets, allowed_range=allowed)
      mean = policy_gradient(log_probs, targets, given["reward"])["loss"]
      return mean.total, mean.count

    of_logits = jax.value_and_grad(loss, has_aux=True)
    (total, count), gradient = of_logits(jnp.asarray(given["logits"]), allowed)
    np.testing.assert_allclose(total, given[f"{name}:loss"], rtol=1e-5)
    assert count == given[f"{name}:ntokens"]
    assert frozen_golden.error(gradient, given[f"{name}:dlogits"]) < 1e-5
  reward = drawn.leave_one_out(jnp.asarray(given["baseline:scores"]))
  np.testing.assert_allclose(reward.ravel(), given["baseline:reward"], atol=1e-6)


def test_pictures_of_files_are_judged_as_the_original_does(helpers):
  told = image_gen_golden.told("validation")["reward_from_given"]
  size = CONFIG["clip_n_px"]
  cropped = [decode_cropped((FOLDER / name).read_bytes(), size=size) for name in told["images"]]
  texts = np.repeat(told["texts"], 2).tolist()
  found = 2.5 * judged(helpers, np.stack(cropped), texts)
  np.testing.assert_allclose(found, told["scores"], atol=3e-6)


# Another program of the same two models.
@pytest.mark.parametrize("judged_by", ["text", pytest.param("image", marks=pytest.mark.slow)])
def test_the_ranking_is_the_originals(words, helpers, tmp_path, judged_by):
  """Of a row's samples, those that the original drew, through the evaluation itself."""
  told, given = image_gen_golden.told("validation"), image_gen_golden.arrays("validation")
  rows = image_gen_golden.told("rows")["by_columns"]["4_columns"]["rows"]
  pictures = [(FOLDER / f"ref_{i}.png").read_bytes() for i in range(3)]
  rows = [
    [base64.urlsafe_b64encode(pictures[i]).decode() if x is None else x for x in row]
    for i, row in enumerate(rows)
  ]
  compared = judged_by == "image"
  task = small(
    words,
    valid=written(tmp_path, rows),
    columns=(0, 1, 2, 3),
    judged_by=judged_by,
    compared=compared,
    page=0,
    **helpers,
  )
  kind = "ii_sim" if compared else "ti_sim"
  cases = [x for x in told["cases"] if x["eval_clip_method"] == kind and x["sampling_times"] == 1]
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"))
  frozen = task.frozen(mesh, precision="fp32", training=False)
  read = task.examples("valid")
  examples = [read.example(case["row"], None) for case in cases]
  batch = {name: np.stack([x[name] for x in examples]) for name in examples[0]}
  own = np.stack([given[f"{case['row']}.{kind}:codes"] for case in cases])

  @jax.jit
  def ranked(codes, batch, frozen):
    drawings = task.drawings(codes, frozen["codec"], num_codes=8192)
    return task._judged(frozen["judge"], drawings, batch)[0]

  for case, scores in zip(cases, np.asarray(ranked(own, batch, frozen)), strict=True):
    order = np.argsort(-scores, kind="stable")
    assert order.tolist() == case["indices"]
    np.testing.assert_allclose(scores[order], case["similarity_sorted"], atol=3e-4)
    assert abs(scores.max() - case["score"]) < 3e-4
