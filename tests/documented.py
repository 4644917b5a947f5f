"""The commands of README and docs: for each the test that runs it, or why none does.

`TABLE` is read from above: a documented command is told by the first pattern that it fits, in which
`*` is any part of a word and `**` anything. `tests/test_documented.py` holds that every command has
a pattern, that every pattern has a command, and that what is said of it is there.
"""

import dataclasses
import enum
import re
from collections.abc import Iterator


class Needs(enum.Enum):
  """Why no test runs a command as it stands."""

  CHECKPOINT = "a released checkpoint, and its data set where it trains or evaluates"
  DATA = "a data set that is downloaded"
  ACCELERATOR = "an accelerator"
  CLOUD = "a cloud account"
  CLUSTER = "the scheduler of a cluster"
  HUB = "an account of the Hugging Face Hub"
  PROGRAM = "a program that is no part of the project"
  INDEX = "a package index; .ci/run makes the environment of the tests"
  TESTS = "nothing else: it is the tests, or the linter"
  FIGURES = "minutes, and what it makes is kept: figures in benchmarks/results, pictures in docs"
  FORM = "words in place of its capitals: it is the form of others"


@dataclasses.dataclass(frozen=True)
class Told:
  """What is known of a row's commands.

  Attributes:
    tests: that run them, in other folders, perhaps with other numbers or a smaller model.
    needs: why none does.
    like: where none does, tests of the same on small models or with a stand-in.
    stage: of `tests/test_documented.py`, where the first command of each pattern is run as it is.
    adds: what it is given there beside.
  """

  tests: tuple[str, ...] = ()
  needs: Needs | None = None
  like: tuple[str, ...] = ()
  stage: str = ""
  adds: tuple[str, ...] = ()


def ran(*tests: str) -> Told:
  return Told(tests=tests)


def needs(reason: Needs, *like: str) -> Told:
  return Told(needs=reason, like=like)


def here(stage: str, *adds: str) -> Told:
  return Told(stage=stage, adds=adds)


FEW = ("--config.steps=2", "--config.log_every=1")
OWN = ("--config.batch_size=6", "--config.epochs=1", "--config.precision=fp32")
VM = "launch/test_tpu_vm.py::"
CONVERT = "tools/test_convert_torch_weights.py::"
FAIRSEQ = "test_hub_ofa.py::"
TASKS = "test_ofa_tasks.py::"

TABLE: tuple[tuple[Told, str], ...] = (
  (
    needs(Needs.INDEX),
    """
    pip install **
    python3 -m venv env
    source env/bin/activate
    """,
  ),
  (needs(Needs.ACCELERATOR), "OFA_JAX_TEST_PLATFORM=cuda python -m pytest **"),
  (
    needs(Needs.TESTS),
    """
    python -m pytest **
    python -m tests.fuzz_weights
    ruff **
    """,
  ),
  (
    ran("test_site.py::test_every_page_is_in_the_site"),
    "python -m mkdocs build --strict",
  ),
  (ran("test_kills.py::test_killed_at_random_moments"), "python -m tests.kills JOB COUNT"),
  (
    needs(Needs.FIGURES),
    """
    python benchmarks/**
    python -m tests.page.screenshots runs/world runs/digits docs/images
    """,
  ),
  (
    needs(Needs.PROGRAM),
    """
    apt install *
    apt-get install *
    iconv **
    jupyter lab notebooks
    jupytext --sync notebooks/*.py
    ovc **
    trtexec **
    uv tool install
    """,
  ),
  # The embedded defaults.
  (
    here("digits", *FEW),
    """
    python -m ofa_jax.train --config=configs/quickstart.py --workdir=*
    python -m ofa_jax.train --config=configs/quickstart.py --workdir=* --config.steps=100
    python -m ofa_jax.train --config=configs/quickstart.py --workdir=runs/wide **
    """,
  ),
  (
    here("digits"),
    """
    python -m ofa_jax.evaluate --config=configs/quickstart.py --checkpoint=runs/digits
    python -m ofa_jax.extract_features --model=M --images=D/valid_imgs.tsv **
    python -m ofa_jax.retrieve topk --image-feats=F/valid_imgs.img_feat.jsonl **
    python -m ofa_jax.retrieve recall --annotations=D/valid_texts.jsonl **
    python -m ofa_jax.zeroshot --model=M --data=datasets/cifar-100 --output=*
    python -m ofa_jax.extract_features --model=$N **
    python -m ofa_jax.retrieve topk --image-feats=$D/$N/${S}_imgs.img_feat.jsonl **
    python -m ofa_jax.retrieve recall --annotations=$D/${S}_texts.jsonl **
    python -m ofa_jax.retrieve to-tr --input=$D/${S}_texts.jsonl
    python -m ofa_jax.retrieve topk --direction=i2t **
    python -m ofa_jax.retrieve recall --direction=i2t **
    """,
  ),
  (
    here("drawn", *FEW),
    """
    python -m ofa_jax.train --config=configs/quickstart.py:ofa --workdir=*
    python -m ofa_jax.train --config=configs/quickstart.py:ofa --workdir=* --config.steps=200 **
    python -m ofa_jax.train --config=configs/quickstart.py:draw --workdir=runs/draw
    python -m ofa_jax.train --config=configs/quickstart.py:judge --workdir=runs/judge
    """,
  ),
  (
    here("drawn"),
    """
    python -m ofa_jax.evaluate --config=configs/quickstart.py:draw --checkpoint=runs/draw **
    python -m ofa_jax.generate --model=runs/draw --task=image **
    """,
  ),
  (
    ran("test_world.py::test_the_world_is_learnt_and_every_way_to_ask_gives_the_same"),
    """
    python -m ofa_jax.train --config=configs/quickstart.py:world --workdir=*
    python -m ofa_jax.evaluate --config=configs/quickstart.py:world **
    """,
  ),
  # One's own pictures, with stand-ins for the released models.
  (
    here("own", *OWN),
    """
    python -m ofa_jax.train --config=configs/cnclip_custom.py:ViT-B-16 **
    python -m ofa_jax.train --config=configs/ofa_custom.py:OFA-base **
    """,
  ),
  (
    here("own"),
    """
    python -m ofa_jax.extract_features --model=runs/mine@best **
    python -m ofa_jax.convert runs/mine@best mine.pt --to=torch
    python -m ofa_jax.convert W@best models/mine
    python -m ofa_jax.generate --model=runs/captions@best **
    """,
  ),
  (here("onnx"), "python -m ofa_jax.export --model=M --output=D --format=onnx"),
  (
    here("stablehlo"),
    "python -m ofa_jax.export --model=M --output=D --format=stablehlo --dtype=fp16",
  ),
  # What an OFA says.
  (
    here("asked"),
    """
    python -m ofa_jax.generate --model=M --task=caption --image=F
    python -m ofa_jax.generate --model=M --task=vqa --image=F **
    python -m ofa_jax.generate --model=M --task=refcoco --input=refcoco_val.tsv --output=boxes.jsonl
    python -m ofa_jax.generate --model=M --task=refcoco --input=F.tsv **
    python -m ofa_jax.generate --model=M --task=refcoco --image=F **
    python -m ofa_jax.generate --model=M --task=infilling **
    python -m ofa_jax.generate --model=runs/world --task=vqa **
    python -m ofa_jax.generate --model=runs/world --task=refcoco **
    """,
  ),
  (
    ran("test_demo.py::test_the_command_serves_until_it_is_told_to_end"),
    "python -m ofa_jax.demo --model=runs/digits --images=photos --language=zh",
  ),
  # The released models.
  (
    needs(Needs.CHECKPOINT, "test_demo.py::test_every_tab_says_what_the_api_says"),
    "python -m ofa_jax.demo --model=OFA-base --model=ViT-B-16 --images=photos",
  ),
  (
    needs(
      Needs.CHECKPOINT,
      "test_serve.py::test_sigterm_finishes_what_is_running_and_takes_no_more",
      "serving/test_models.py::test_the_nearest_rows_of_a_file",
    ),
    """
    python -m ofa_jax.serve --model=ViT-B-16 **
    curl **
    """,
  ),
  (
    needs(Needs.CHECKPOINT, "test_zeroshot.py::test_command", "test_zeroshot.py::test_tfds"),
    "python -m ofa_jax.zeroshot **",
  ),
  (
    needs(Needs.FORM),
    """
    python -m ofa_jax.convert D mine.pt --to=torch
    python -m ofa_jax.convert F **
    """,
  ),
  (
    needs(
      Needs.CHECKPOINT,
      CONVERT + "test_there_and_back_is_bit_equal",
      CONVERT + "test_check_runs_transformers",
      CONVERT + "test_two_towers_start_a_model",
      FAIRSEQ + "test_fairseqs_checkpoints_there_and_back",
      FAIRSEQ + "test_the_moving_average_is_read_in_the_precision_there_is",
      "tools/test_convert_frozen.py::test_a_vqgan_draws_as_the_original",
      "tools/test_convert_frozen.py::test_both_inceptions_are_told_apart",
    ),
    """
    python -m ofa_jax.convert **
    python tools/convert_torch_weights.py **
    """,
  ),
  (
    needs(Needs.CHECKPOINT, "test_configs.py::test_config"),
    "python -m ofa_jax.train --config=configs/cnclip_*.py --workdir=D",
  ),
  (
    needs(
      Needs.CHECKPOINT,
      TASKS + "test_trained_validated_and_gone_on_with",
      TASKS + "test_evaluated_again_on_another_mesh",
      "test_reward_training.py::test_trained_validated_and_gone_on_with",
      "test_image_gen_training.py::test_the_first_stage_is_learnt_and_drawn_from",
      "test_ofa_pretraining.py::test_a_run_names_every_objective_and_goes_on_bit_for_bit",
    ),
    """
    python -m ofa_jax.train --config=configs/ofa_*.py:* --workdir=*
    python -m ofa_jax.train --config=configs/ofa_*.py:* --workdir=* --config.init=*
    python -m ofa_jax.evaluate --config=configs/ofa_*.py:* --checkpoint=*
    python -m ofa_jax.evaluate --config=configs/ofa_*.py:* --checkpoint=* --results=R
    python -m ofa_jax.evaluate --config=configs/ofa_caption.py:large --config.evals[0].split=test **
    """,
  ),
  (
    needs(Needs.CHECKPOINT, "test_calibrate.py::test_probabilities_are_the_same_everywhere"),
    """
    python -m ofa_jax.calibrate **
    python -m ofa_jax.generate --model=D@best **
    """,
  ),
  (
    needs(
      Needs.CHECKPOINT,
      "test_image_gen_training.py::test_one_caption_is_drawn_by_the_command",
      "tools/test_tokenize_images.py::test_what_is_written_is_what_training_reads",
    ),
    """
    python -m ofa_jax.generate --model=OFA-large-image_gen **
    python -m ofa_jax.tokenize_images **
    """,
  ),
  (
    needs(Needs.CHECKPOINT, "test_score_images.py::test_clips_scores_are_those_of_its_features"),
    "python -m ofa_jax.score_images **",
  ),
  (
    needs(Needs.HUB, "tools/test_push_to_hub.py::test_a_model_directory_is_uploaded_with_a_card"),
    "python tools/push_to_hub.py **",
  ),
  (
    needs(
      Needs.DATA,
      "tools/test_prepare_data.py::test_vqa",
      "tools/test_prepare_texts.py::test_commands",
    ),
    """
    python -m ofa_jax.prepare_data **
    OFA_JAX_DATA=datasets python -m ofa_jax.validate_data **
    python -m ofa_jax.validate_data **
    """,
  ),
  # Many devices.
  (
    needs(Needs.INDEX, "test_compile_ahead.py::test_the_command_for_a_tpu"),
    "python -m ofa_jax.compile_ahead **",
  ),
  (
    needs(
      Needs.CLOUD,
      "test_buckets.py::test_a_run_is_the_same_in_a_bucket",
      "test_buckets.py::test_evaluate",
    ),
    """
    python -m ofa_jax.train --config=C --workdir=gs://** --stage=/mnt/ssd **
    python -m ofa_jax.evaluate --config=configs/cnclip_vith14.py:pod --checkpoint=gs://**
    """,
  ),
  (
    needs(
      Needs.CLOUD,
      VM + "test_create_asks_for_what_was_said_and_waits",
      VM + "test_run_logs_status_stop_delete",
      VM + "test_keep_goes_on_after_a_preemption",
      "launch/test_manifests.py::test_gcloud_lines_of_the_documentation",
    ),
    """
    gcloud **
    python launch/tpu_vm.py **
    """,
  ),
  (
    needs(Needs.PROGRAM, VM + "test_the_record_is_what_gcloud_says"),
    "python tests/launch/gcloud_flags.py",
  ),
  (
    needs(
      Needs.CLOUD,
      "launch/test_manifests.py::test_fields_exist",
      "launch/test_manifests.py::test_trainings",
      "launch/test_manifests.py::test_the_image_copies_what_is_there",
      "launch/test_manifests.py::test_sky_joins_the_processes",
    ),
    """
    docker **
    envsubst <launch/gke/*.yaml
    kubectl **
    sky **
    """,
  ),
  (
    needs(
      Needs.CLUSTER,
      "launch/test_slurm.py::test_told_to_stop_it_is_queued_again_and_ends_as_the_straight_run",
      "launch/test_slurm.py::test_an_array_extracts_the_bytes_of_one_job",
      "launch/test_launch.py::test_slurm_runs_two_tasks",
    ),
    """
    sbatch **
    srun **
    """,
  ),
  (
    ran("launch/test_smoke.py::test_the_whole_job_as_two_processes"),
    "launch/local.sh 2 launch/smoke.sh runs/smoke",
  ),
  (ran("launch/test_launch.py::test_local_runs_two_processes"), "launch/local.sh 2 COMMAND"),
  (ran("launch/test_smoke.py::test_the_whole_job_in_a_bucket"), "launch/smoke.sh *"),
  (ran("launch/test_supervise.py::test_what_is_started_again"), "launch/supervise.sh **"),
  # Forms of what stands above.
  (
    needs(Needs.FORM),
    """
    python -m ofa_jax.train --config=configs/quickstart.py --workdir=D [--config.FIELD=VALUE ...]
    python -m ofa_jax.train --config=C --workdir=W **
    python -m ofa_jax.train --config=configs/F.py **
    python -m ofa_jax.train C:* --workdir=D
    python -m ofa_jax.train … --config.init=START
    python -m ofa_jax.evaluate --config=C **
    python -m ofa_jax.evaluate C:* **
    python -m ofa_jax.extract_features --model=F **
    python -m ofa_jax.retrieve topk --image-feats=I **
    python -m ofa_jax.retrieve recall --annotations=A **
    python -m ofa_jax.retrieve to-tr --input=A
    python -m ofa_jax.retrieve topk\\|recall\\|to-tr
    python -m ofa_jax.generate --model=M,N
    python -m ofa_jax.generate --task=image
    """,
  ),
)


def patterns() -> Iterator[tuple[str, Told]]:
  """The rows of the table, one a pattern."""
  for told, text in TABLE:
    yield from ((" ".join(line.split()), told) for line in text.splitlines() if line.strip())


def fits(command: str, pattern: str) -> bool:
  parts = {"**": ".*", "*": r"\S*"}
  split = re.split(r"(\*\*|\*)", pattern)
  return bool(re.fullmatch("".join(parts.get(x, re.escape(x)) for x in split), command))
