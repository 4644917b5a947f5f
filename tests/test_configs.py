"""Every config file builds, has the size that is written down, and lowers for eight devices."""

import dataclasses
import runpy
from pathlib import Path

import jax
import pytest

from ofa_jax import hub, trees, weights
from ofa_jax.config import MeshShape, mesh_sizes
from ofa_jax.data import quickstart_world
from ofa_jax.engine import sharding, step
from ofa_jax.models import cnclip
from ofa_jax.validation import validate

CONFIGS = Path(__file__).parent.parent / "configs"

# file and argument: parameters
SIZES = {
  ("quickstart.py", None): 3_946_497,
  ("cnclip_vith14.py", None): 957_598_209,
  ("cnclip_vith14.py", "pod"): 957_598_209,
  ("cnclip_muge.py", None): 188_262_913,
  ("cnclip_muge.py", "distill"): 188_262_913,
  ("cnclip_flickr30k.py", "ViT-L-14,flip"): 406_233_089,
  ("cnclip_coco.py", "RN50"): 76_989_537,
  ("cnclip_custom.py", None): 188_262_913,
  ("cnclip_custom.py", "RN50"): 76_989_537,
  ("cnclip_few_shot.py", None): 188_262_913,
  ("cnclip_few_shot.py", "RN50"): 76_989_537,
  ("quickstart.py", "ofa"): 3_468_680,
  ("quickstart.py", "world"): 3_550_032,
  ("quickstart.py", "world_scst"): 3_550_032,
  ("quickstart.py", "draw"): 3_800_220,
  ("quickstart.py", "judge"): 4_020_225,
  ("ofa_custom.py", None): 182_238_536,
  ("ofa_custom.py", "OFA-tiny"): 33_488_336,
  ("ofa_caption.py", "tiny"): 33_488_336,
  ("ofa_caption.py", "medium"): 92_892_000,
  ("ofa_caption.py", "base"): 182_238_536,
  ("ofa_caption.py", "large"): 472_977_152,
  ("ofa_caption.py", "huge"): 929_486_848,
  ("ofa_vqa.py", "base"): 182_238_536,
  ("ofa_vqa.py", "large"): 472_977_152,
  ("ofa_vqa.py", "huge,test"): 929_486_848,
  ("ofa_vqa.py", "base,zeroshot"): 182_238_536,
  ("ofa_caption.py", "large,el_db"): 472_977_152,
  ("ofa_caption.py", "huge,scst"): 929_486_848,
  ("ofa_refcoco.py", "large,prompt"): 477_892_352,
  ("ofa_refcoco.py", "base,adapter"): 184_092_152,
  ("ofa_refcoco.py", "refcoco+,base,bitfit"): 182_238_536,
  ("ofa_refcoco.py", "refcocog,large,el"): 472_977_152,
  ("ofa_refcoco.py", "tiny,lora"): 33_488_336,
  ("ofa_snli_ve.py", "tiny"): 33_488_336,
  ("ofa_snli_ve.py", "huge,test"): 929_486_848,
  ("ofa_snli_ve.py", "base,zeroshot"): 182_238_536,
  ("ofa_glue.py", None): 472_977_152,
  ("ofa_glue.py", "mnli,base,tfds,test"): 182_238_536,
  ("ofa_glue.py", "rte,tiny"): 33_488_336,
  ("ofa_gigaword.py", None): 472_977_152,
  ("ofa_gigaword.py", "medium,test"): 92_892_000,
  ("ofa_refcoco.py", None): 182_238_536,
  ("ofa_refcoco.py", "refcoco+,tiny,testB"): 33_488_336,
  ("ofa_refcoco.py", "refcocog,base,chinese"): 159_865_160,
  ("ofa_imagenet.py", "tiny,tfds,test"): 33_488_336,
  ("ofa_ocr.py", "base,document"): 159_865_160,
  ("ofa_muge.py", None): 159_865_160,
  ("ofa_pretrain.py", "tiny"): 33_488_336,
  ("ofa_pretrain.py", "base"): 182_238_536,
  ("ofa_pretrain.py", "large"): 472_977_152,
  ("ofa_image_gen.py", None): 182_238_536,
  ("ofa_image_gen.py", "large,test"): 472_977_152,
  ("ofa_image_gen.py", "base,chinese"): 159_865_160,
}

# One of every file, the smaller ones, and every option that changes the program. The others are of
# the same classes; tracing a ResNet of a hundred blocks takes seconds.
LOWERED = {
  ("quickstart.py", None),
  ("quickstart.py", "ofa"),
  ("quickstart.py", "world"),
  ("cnclip_vith14.py", "pod"),
  ("cnclip_muge.py", "distill"),
  ("cnclip_flickr30k.py", "ViT-L-14,flip"),
  ("cnclip_coco.py", "RN50"),
  ("cnclip_custom.py", None),
  ("cnclip_few_shot.py", None),
  ("ofa_custom.py", "OFA-tiny"),
  ("ofa_caption.py", "tiny"),
  ("ofa_vqa.py", "base"),
  ("ofa_refcoco.py", "base,adapter"),
  ("ofa_refcoco.py", "tiny,lora"),
  ("ofa_snli_ve.py", "tiny"),
  ("ofa_glue.py", "rte,tiny"),
  ("ofa_gigaword.py", "medium,test"),
  ("ofa_imagenet.py", "tiny,tfds,test"),
  ("ofa_ocr.py", "base,document"),
  ("ofa_muge.py", None),
  ("ofa_pretrain.py", "tiny"),
  ("ofa_image_gen.py", None),
}

# Whose updates have so few rows that no more devices divide them; others are checked for 16.
FEWER_DEVICES = {"quickstart.py": 4, "ofa_pretrain.py": 1}

# Parameters of the released models; of ViT-B-32, which was not released, by its config.
RELEASED = {
  "RN50": 76_989_537,
  "ViT-B-16": 188_262_913,
  "ViT-L-14": 406_233_089,
  "ViT-L-14-336": 406_560_769,
  "ViT-H-14": 957_598_209,
}


@pytest.fixture(autouse=True)
def data(digits, monkeypatch):
  monkeypatch.setenv("OFA_JAX_DATA", str(digits.parent))
  monkeypatch.setattr(quickstart_world, "PICTURES", dict.fromkeys(quickstart_world.PICTURES, 8))


OWN_DATA = ("cnclip_custom.py", "cnclip_few_shot.py", "ofa_custom.py")  # it is named by flags


def load(name, argument):
  get_config = runpy.run_path(str(CONFIGS / name))["get_config"]
  return get_config(argument) if argument else get_config()


def place(tree, shardings):
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
  )


def build(config, shape):
  """A config's program for a mesh of eight devices."""
  mesh = sharding.make_mesh(mesh_sizes(shape, 8))
  return step.build(dataclasses.replace(config, mesh=shape), mesh, steps=10)


def test_every_file_has_its_size_here():
  files = {p.name for p in CONFIGS.glob("*.py") if "def get_config" in p.read_text()}
  assert files == {name for name, _ in SIZES} == {name for name, _ in LOWERED}


@pytest.mark.parametrize(("name", "argument"), SIZES, ids=str)
def test_config(name, argument):
  config = load(name, argument)
  validate(config, devices=FEWER_DEVICES.get(name, 16))
  program = build(config, MeshShape(data=2, fsdp=2, tensor=2))
  assert trees.count(program.abstract.params) == SIZES[name, argument]
  paths = trees.flatten(program.abstract.params)
  unmatched = [p for p in paths if trees.first_match(config.model.sharding, p) is None]
  assert not unmatched
  towers = [p for p in paths if not any(trees.first_match(((t, True),), p)
                                        for t in config.model.towers.values())]  # fmt: skip
  assert not towers


@pytest.mark.parametrize(
  ("name", "argument"),
  [pytest.param(*x, marks=() if x in LOWERED else pytest.mark.slow) for x in SIZES],
  ids=str,
)
def test_the_train_step_is_lowered_for_eight_devices(name, argument):
  config = load(name, argument)
  program = build(config, MeshShape(data=2, fsdp=2, tensor=2))
  spec = config.task.batch_spec(64)
  rows = jax.tree.map(lambda _: sharding.batch_sharding(program.mesh), spec)
  state, batch = place(program.abstract, program.shardings), place(spec, rows)
  frozen = config.task.frozen(program.mesh, precision=config.precision, load=False)
  assert "sdy.sharding" in step.train_step(program).lower(state, batch, frozen).as_text()


@pytest.mark.parametrize("name", RELEASED)
def test_released_models(name, digits):
  model = cnclip.config(*cnclip.MODELS[name])
  base = load("cnclip_vith14.py", None)
  task = dataclasses.replace(base.task, image_size=model.vision.image_size)
  config = dataclasses.replace(base, model=model, task=task, evals=())
  program = build(config, MeshShape(data=1, fsdp=8))
  assert trees.count(program.abstract.params) == RELEASED[name]
  held = sharding.bytes_per_device(program.abstract, program.shardings)
  assert held < trees.num_bytes(program.abstract) / 8 * 1.05


@pytest.mark.parametrize("name", ["muge", "flickr30k", "coco"])
def test_every_size_has_its_teacher_or_says_that_it_has_none(name):
  for model in cnclip.MODELS:
    config = load(f"cnclip_{name}.py", f"{model},distill")
    assert config.model.name.startswith(model) and config.init == model
    if model == "ViT-L-14-336":
      with pytest.raises(ValueError, match="expected a model of 336 pixels, found one of 224"):
        validate(config, devices=8)
    else:
      validate(config, devices=8)
  with pytest.raises(ValueError, match="a variant out of flip, distill, found flipp"):
    load(f"cnclip_{name}.py", "ViT-B-16,flipp")


def test_an_unknown_variant_is_told():
  with pytest.raises(ValueError, match="variants"):
    load("cnclip_vith14.py", "huge")


def test_questions_are_of_a_size_and_perhaps_of_the_test_split():
  assert load("ofa_vqa.py", None).name == "OFA-base: VQA"
  assert [e.split for e in load("ofa_vqa.py", "large,test").evals] == ["test"]
  with pytest.raises(
    ValueError, match="base, large, huge and perhaps test or zeroshot, found tiny"
  ):
    load("ofa_vqa.py", "tiny,test")


def test_grounding_is_of_a_data_set_a_size_and_a_split():
  assert load("ofa_refcoco.py", "refcocog,base").epochs == 12
  large = load("ofa_refcoco.py", "refcocog,large,test,el")
  assert (large.epochs, large.optim.lr, large.task.log_end) == (10, 3e-5, 0.75)
  assert [e.split for e in large.evals] == ["test"]
  assert large.evals[0].task.search == large.task.search
  assert large.task.search.no_repeat_ngram_size == 3
  (valid,) = load("ofa_refcoco.py", None).evals
  assert valid.task.search == dataclasses.replace(large.task.search, no_repeat_ngram_size=0)
  assert large.task.test[0].endswith("refcocog_data/refcocog_test.tsv")
  plus = load("ofa_refcoco.py", "refcoco+,testB,zeroshot").task
  assert plus.test[0].endswith("refcocoplus_data/refcocoplus_testB.tsv") and plus.image_size == 480
  chinese = load("ofa_refcoco.py", "chinese").task
  assert chinese.columns == (0, 3, 1, 2) and "refcoco_cn_data" in chinese.train[0]
  with pytest.raises(ValueError, match=r"refcocog, test, zeroshot, .* or lora, found testA"):
    load("ofa_refcoco.py", "refcocog,testA")


@pytest.mark.parametrize(
  ("name", "argument", "message"),
  [
    (
      "ofa_snli_ve.py",
      "base,large",
      "out of tiny, .*, huge and perhaps test or zeroshot, found base",
    ),
    ("ofa_gigaword.py", "test,big", "and perhaps test, found big"),
    ("ofa_caption.py", "el,el_db", "Expected one loss out of el, el_db, scst, found el, el_db"),
    ("ofa_glue.py", "rte,cola", "Expected one part out of cola, .*, found cola, rte"),
    ("ofa_refcoco.py", "refcoco,refcoco+", "Expected one data set .*, found refcoco, refcoco"),
  ],
)
def test_what_is_asked_for_twice_or_unknown_is_told(name, argument, message):
  with pytest.raises(ValueError, match=message):
    load(name, argument)


@pytest.mark.parametrize("name", ["ofa_imagenet.py", "ofa_ocr.py", "ofa_muge.py"])
def test_the_test_split_is_evaluated_alone(name):
  config = load(name, "large,test")
  assert [(e.name, e.split) for e in config.evals] == [("test", "test")]
  assert config.best_metric is None and load(name, "large").best_metric.startswith("valid/")
  with pytest.raises(ValueError, match="found some"):
    load(name, "large,some")


@pytest.mark.parametrize("name", sorted({name for name, _ in SIZES} - {"quickstart.py", *OWN_DATA}))
def test_data_may_lie_in_a_bucket(name, monkeypatch):
  monkeypatch.setenv("OFA_JAX_DATA", "gs://bucket/datasets")
  assert "'gs://bucket/datasets/" in repr(load(name, None).task.train)


@pytest.mark.parametrize(("name", "argument"), SIZES)
def test_recipes_of_released_models_start_from_them(name, argument):
  config = load(name, argument)
  drawn = []
  weights.from_scratch(config.model, seed=0, warn=drawn.append)
  if name == "quickstart.py":  # no one else has its models
    assert not drawn and (config.init is None or config.init.startswith("runs/"))
    return
  assert bool(drawn) == (config.init is not None)
  if "scst" in (argument or ""):  # its first stage is a run of the user's
    assert config.init.endswith("@best")
    return
  assert config.init in (None, *hub.RELEASES)
  assert all(f"--config.init={config.init} " in line for line in drawn)
