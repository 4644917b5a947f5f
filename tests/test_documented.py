"""Every command of README and docs is run by a test, or it is said why none does."""

import ast
import base64
import functools
import re
import shlex
import shutil
import string

import numpy as np
import pytest
from PIL import Image

from ofa_jax import calibrations, hub
from ofa_jax.calibrations import Calibration
from ofa_jax.convert.cnclip import table as convert
from tests import documented, documents, forked
from tests.cnclip_golden import micro_config, micro_state_dict
from tests.compiling import QUICK
from tests.data.samples import encode, photograph
from tests.documented import Needs
from tests.documents import ROOT
from tests.ofa_directory import save_micro

ROWS = tuple(documented.patterns())
# Model directories in place of released models.
STAND_INS = {
  "cnclip_custom.py:ViT-B-16": "cnclip_custom.py:models/clip",
  "ofa_custom.py:OFA-base": "ofa_custom.py:models/ofa",
}
# The variables of the page for those who come from the originals.
VARIABLES = {"D": "datasets/MUGE", "S": "valid", "N": "M"}


def row_of(command):
  return next((row for row in ROWS if documented.fits(command, row[0])), None)


@functools.cache
def names_in(path):
  """What a test file defines."""
  tree = ast.parse(documents.text_of(ROOT / "tests" / path))
  return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_command_is_run_or_it_is_said_why_not():
  strange = [f"{page.name}: {c}" for c, page in documents.commands().items() if not row_of(c)]
  assert not strange, "\n".join(["give these a pattern in tests/documented.py:", *strange])


def test_every_line_for_a_shell_is_a_command():
  """Else a command of a program that is not known would need no row."""
  for page in documents.PAGES:
    for line in documents.lines_of_shells(page):
      said = re.sub(r"(^|\s)#.*", "", line)
      assigned = re.fullmatch(r"\s*(export( [A-Z_]+=\S+)+)?\s*", said)
      assert assigned or list(documents.commands_in(line)), f"{page.name}: {line}"


def test_no_row_is_left_over():
  used = {row_of(command)[0] for command in documents.commands()}
  assert [pattern for pattern, _ in ROWS if pattern not in used] == []


def test_the_tests_that_are_named_exist():
  for pattern, told in ROWS:
    assert [bool(told.tests), told.needs is not None, bool(told.stage)].count(True) == 1, pattern
    for test in (*told.tests, *told.like):
      path, _, name = test.partition("::")
      assert name.startswith("test_") and name in names_in(path), f"{pattern}: {test}"
    assert told.stage in {"", *STAGES}, pattern


def test_the_tests_that_run_a_command_give_it_its_flags():
  for command in documents.commands():
    told = row_of(command)[1]
    files = "".join(documents.text_of(ROOT / "tests" / t.partition("::")[0]) for t in told.tests)
    if not told.tests:
      continue
    program = re.search(r"ofa_jax\.(\w+)|(\w+)\.sh|-m ([\w.]+)", command)
    assert program[1] or program[2] or program[3] in command
    for flag in re.findall(r"(?<!\S)--([\w-]+)", command):
      assert f"--{flag}" in files or f'"{flag}"' in files, f"{command}: {told.tests}"


def test_what_was_measured_is_there():
  kept = {path.name.partition(".")[0] for path in (ROOT / "benchmarks" / "results").iterdir()}
  for command in documents.commands():
    name = re.match(r"python benchmarks/(\w+)\.py", command)
    if row_of(command)[1].needs is Needs.FIGURES and name:
      assert any(k.startswith(name[1]) for k in kept), command


# The stages: folders in which what a command names is there.


def micro_clip(folder):
  config = micro_config("micro_vit")
  weights = convert.from_torch(micro_state_dict("micro_vit"), config)
  hub.save_directory(folder, config, *weights, settings={"context_length": 24})


def digits_stage(folder, data):
  shutil.copytree(data, folder / "datasets" / "MUGE")
  for name, target in {
    "D": "datasets/MUGE",
    "M": "runs/digits",
    "datasets/cifar-100": "MUGE/zeroshot",
  }.items():
    (folder / name).symlink_to(target)


def own_stage(folder, data):
  (folder / "photos").mkdir()
  lines, picture = ["filepath,title"], np.asarray(photograph(50, 50))
  for i in range(20):
    image = Image.fromarray(picture // (1 + i % 5))
    (folder / "photos" / f"{i:03}.png").write_bytes(encode(image, format="PNG"))
    lines.append(f'photos/{i:03}.png,"第{i % 5}种商品, 红色"')
  (folder / "my.csv").write_text("\n".join(lines), encoding="utf-8")
  (folder / "models").mkdir()
  micro_clip(folder / "models" / "clip")
  save_micro(folder / "ofa").rename(folder / "models" / "ofa")
  (folder / "W").symlink_to("runs/mine")


def export_stage(folder, data):
  micro_clip(folder / "M")


def asked_stage(folder, data):
  save_micro(folder).rename(folder / "M")
  fit = Calibration(temperature=1.0, rows=9, right=0.5, ece_before=0.2, ece_after=0.1)
  calibrations.store(folder / "M", {"refcoco/generated": fit})
  (folder / "runs").mkdir()
  (folder / "runs" / "world").symlink_to("../M")
  picture = encode(photograph(60, 40), format="PNG")
  (folder / "F").write_bytes(picture)
  (folder / "A").write_text("the dog\na cat\n")
  image = base64.b64encode(picture).decode()
  rows = "".join(f"{i}\t{i}\tthe dog\t1,2,30,40\t{image}\n" for i in range(3))
  for name in ("F.tsv", "refcoco_val.tsv"):
    (folder / name).write_text(rows)


STAGES = {
  "digits": digits_stage,
  "drawn": lambda folder, data: None,
  "own": own_stage,
  "onnx": export_stage,
  "stablehlo": export_stage,
  "asked": asked_stage,
}


@pytest.mark.slow  # some thirty commands, most of which compile: minutes
@pytest.mark.parametrize("stage", STAGES)
def test_commands_run(stage, digits, request, tmp_path):
  """The first command of each pattern of the stage, word by word, in the order of the table."""
  STAGES[stage](tmp_path, digits)
  data = request.getfixturevalue("shapes") if stage == "drawn" else digits
  environment = QUICK | {
    "OFA_JAX_DATA": str(data.parent),
    "HOME": str(tmp_path / "home"),
  }
  cases = []
  for pattern, told in ROWS:
    if told.stage != stage:
      continue
    command = next(c for c in documents.commands() if row_of(c)[0] == pattern)
    for name, other in STAND_INS.items():
      command = command.replace(name, other)
    command = string.Template(command).safe_substitute(VARIABLES)
    words = shlex.split(command.removeprefix("python -m ofa_jax."))
    cases.append(
      {"command": [*words, *told.adds], "environment": environment, "folder": str(tmp_path)}
    )
  assert cases
  for case, (status, said) in zip(cases, forked.run(cases, timeout=1200), strict=True):
    assert status == 0 and "Traceback" not in said, f"{' '.join(case['command'])}\n{said}"
