"""The tasks of OFA as runs of seconds: each recipe with tiny files in its true format.

A model of a few thousand parameters learns for three steps. Tuned and encouraged recipes are here
beside the plain ones; what nobody has a recipe of (hidden words) has one like the others.
"""

import dataclasses
import functools
import pathlib
import runpy
from collections.abc import Callable

from ofa_jax.config import Config, Eval, MeshShape
from ofa_jax.configs.ofa_finetune import finetune
from ofa_jax.data.ocr import STRIP_WIDTH
from ofa_jax.data.tsv import IMAGE
from ofa_jax.tasks.gigaword import Gigaword
from ofa_jax.tasks.glue import PARTS
from ofa_jax.tasks.infilling import Infilling
from ofa_jax.tokenizers.ofa import OFATokenizer
from tests import ofa_picture_files as pictures
from tests import ofa_task_files as texts
from tests import tiny

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
STEPS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A task.

  Attributes:
    config: the config's file and argument; None: it has no file of its own.
    files: `(folder, shapes) -> fields of the task`, writes its data.
    metrics: of the validation.
    result: keys of a line in the result file, the answer's behind the others.
    generates: the command's name of the task.
    columns: of the command's input beside the defaults.
    quick: whether it is among the quick tests. The others are of the same classes: whole runs of
      answers that are chosen are those of test_vqa_training.py, of captions those of test_train.py.
  """

  config: tuple[str, str] | None
  files: Callable[[pathlib.Path, pathlib.Path], dict[str, object]]
  metrics: tuple[str, ...]
  result: tuple[str, ...]
  generates: str
  columns: dict[str, int] = dataclasses.field(default_factory=dict)
  quick: bool = False


CASES: dict[str, Case] = {
  "caption": Case(
    config=("ofa_caption.py", "base"),
    files=pictures.caption,
    metrics=("cider", "bleu4", "rouge_l", "exact"),
    result=("image_id", "caption"),
    generates="caption",
  ),
  "vqa": Case(
    config=("ofa_vqa.py", "base"),
    files=pictures.vqa,
    metrics=("vqa_score",),
    result=("question_id", "answer"),
    generates="vqa",
  ),
  "refcoco": Case(
    config=("ofa_refcoco.py", "refcoco+,base"),
    files=pictures.refcoco,
    metrics=("score",),
    result=("uniq_id", "box"),
    generates="refcoco",
    quick=True,
  ),
  "refcoco_chinese": Case(
    config=("ofa_refcoco.py", "refcocog,base,chinese"),
    files=pictures.refcoco_chinese,
    metrics=("score",),
    result=("uniq_id", "box"),
    generates="refcoco",
    columns={"id": 0, IMAGE: 3, "text": 1},
  ),
  "imagenet": Case(
    config=("ofa_imagenet.py", "base"),
    files=pictures.image_classify,
    metrics=("score",),
    result=("uniq_id", "answer"),
    generates="classify",
    columns={IMAGE: 0},
  ),
  "ocr": Case(
    config=("ofa_ocr.py", "base"),
    files=pictures.ocr,
    metrics=("acc", "ned"),
    result=("image_id", "ocr"),
    generates="ocr",
  ),
  "muge": Case(
    config=("ofa_muge.py", "base"),
    files=pictures.muge,
    metrics=("cider", "bleu4", "rouge_l", "exact"),
    result=("image_id", "caption"),
    generates="caption",
  ),
}

CASES |= {
  "snli_ve_alone": Case(
    config=("ofa_snli_ve.py", "base"),
    files=lambda *places: {**texts.snli_ve(*places), "premise": False},
    metrics=("snli_score",),
    result=("uniq_id", "answer", "label"),
    generates="snli_ve",
    columns={"id": 0, IMAGE: 2, "text": 3},
  ),
  "snli_ve": Case(
    config=("ofa_snli_ve.py", "base"),
    files=texts.snli_ve,
    metrics=("snli_score",),
    result=("uniq_id", "answer", "label"),
    generates="snli_ve",
  ),
  "gigaword": Case(
    config=("ofa_gigaword.py", "base"),
    files=lambda folder, shapes: {**texts.gigaword(folder), "bootstrap": True},
    metrics=Gigaword.metrics,
    result=("id", "hyp"),
    generates="gigaword",
    quick=True,
  ),
  "infilling": Case(
    config=None,
    files=lambda folder, shapes: texts.infilling(folder),
    metrics=("exact", "bleu4"),
    result=("id", "asked", "text"),
    generates="infilling",
  ),
  **{
    part: Case(
      config=("ofa_glue.py", f"{part},base"),
      files=functools.partial(lambda part, folder, shapes: texts.glue(part, folder), part),
      metrics=("acc", *known.metrics),
      result=("index", "prediction"),
      generates=part,
    )
    for part, known in PARTS.items()
  },
  # The same tasks asked otherwise.
  "ocr_document": dataclasses.replace(
    CASES["ocr"],
    config=("ofa_ocr.py", "base,document"),
    files=lambda *places: {**pictures.ocr(*places), "image_size": STRIP_WIDTH},
    generates="ocr_document",
  ),
  "custom": dataclasses.replace(CASES["caption"], config=("ofa_custom.py", "OFA-base")),
  "vqa_any": dataclasses.replace(
    CASES["vqa"],
    files=lambda *places: {**pictures.vqa(*places), "answers": None, "inference": "beamsearch"},
  ),
  # Other losses, and few parameters.
  **{
    f"caption_{loss}": dataclasses.replace(
      CASES["caption"], config=("ofa_caption.py", f"large,{loss}")
    )
    for loss in ("el", "el_db")
  },
  **{
    f"refcoco_{kind}": dataclasses.replace(
      CASES["refcoco"], config=("ofa_refcoco.py", f"base,{kind}"), quick=False
    )
    for kind in ("el", "prompt", "adapter", "bitfit", "lora")
  },
}

# The sizes of what few parameters are added as.
FEW = ("encoder_prompt", "decoder_prompt", "adapter")


def recipe(case: Case) -> Config:
  """The config of a case as it stands."""
  if case.config is None:
    task = Infilling(tokenizer="OFA-base", smoothing=0.1)
    config = finetune("base", task, name="hidden words", batch_size=128, lr=1e-4)
    return dataclasses.replace(config, evals=(Eval(name="valid", task=task),))
  name, argument = case.config
  return runpy.run_path(str(CONFIGS / name))["get_config"](argument)


def small(case: Case, fields: dict[str, object], mesh: MeshShape) -> Config:
  """The config of a case with its files and a model as small as they are."""
  return made_small(recipe(case), fields, mesh)


def made_small(config: Config, fields: dict[str, object], mesh: MeshShape) -> Config:
  """A recipe with these fields of its task, and a model as small as its files."""
  words = OFATokenizer.from_directory(fields["tokenizer"])
  search = dataclasses.replace(config.task.search, num_beams=2)
  search = dataclasses.replace(search, max_length=min(search.max_length, 8))
  fields = {**fields, "search": search}
  return dataclasses.replace(
    config,
    init=None,
    model=dataclasses.replace(
      tiny.OFA,
      vocab_size=words.vocab_size,
      num_codes=words.num_codes,
      num_bins=words.num_bins,
      freeze_resnet=True,
      image_bucket_size=max(tiny.OFA.image_bucket_size, -(-fields.get("image_size", 0) // 16)),
      **{x: min(getattr(config.model, x), 4) for x in FEW},
    ),
    task=dataclasses.replace(config.task, **fields),
    batch_size=16,
    steps=STEPS,
    epochs=None,
    log_every=1,
    save_every=2,
    save_every_epochs=0,
    keep=2,
    optim=dataclasses.replace(config.optim, lr=1e-3, eps=1e-4, warmup=1, warmup_ratio=0.0),
    precision="fp32",
    remat="none",
    mesh=mesh,
    evals=tuple(
      dataclasses.replace(e, task=dataclasses.replace(e.task, **fields), every=2, every_epochs=0)
      for e in config.evals
    ),
  )
