"""Commands are killed at random moments and started again: what comes out is the straight run.

  python -m tests.kills JOB COUNT [FOLDER [SIGNAL]]

of train, train_ofa, extract_features, generate, convert. The signal is SIGKILL; SIGTERM or SIGINT
are for trainings, which save and end in order. Prints how many ended equal, and is the config of
the trainings. Commands are forked from this process, so that the moments lie in their work and not
in their imports; in every second try the command is killed twice.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from tests import forked

JOBS = ("train", "train_ofa", "extract_features", "generate", "convert")
HERE = pathlib.Path(__file__)
TIMES = {"train/data_time", "train/batch_time", "train/rows_per_s"}


def get_config(family: str) -> Any:
  """A run of 12 steps with two evaluations; the data are in OFA_JAX_DATA."""
  from ofa_jax.data import quickstart, quickstart_ofa
  from tests import tiny

  folder = pathlib.Path(os.environ["OFA_JAX_DATA"])
  if family == "ofa":
    base = tiny.caption_config(quickstart_ofa.shapes(folder), evals=True)
  else:
    base = tiny.config(quickstart.digits(folder), evals=True)
  evals = tuple(dataclasses.replace(e, every=6) for e in base.evals)
  return dataclasses.replace(
    base, batch_size=16, steps=12, log_every=1, save_every=2, keep=3, evals=evals
  )


# How a training may end that is told to stop: in order, or, before it has begun, by the signal.
STATUSES = {signal.SIGKILL: (0, -9), signal.SIGTERM: (0, -15), signal.SIGINT: (0, 130)}


def killed(
  job: str, count: int, folder: pathlib.Path, number: signal.Signals = signal.SIGKILL
) -> tuple[int, list[str]]:
  """Kills a job `count` times; how often it ended as the straight run did, and how it did not."""
  os.environ |= {"JAX_PLATFORMS": "cpu", "OFA_JAX_DATA": str(folder / "data")}
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  forked.load()
  (folder / "data").mkdir(parents=True, exist_ok=True)
  fault = _in_child(lambda: prepare(job, folder))
  assert fault is None, fault
  straight = folder / "straight"
  for _ in range(2):  # the first compiles; the second is what is killed later
    shutil.rmtree(straight, ignore_errors=True)
    begin = time.monotonic()
    status, said = _finish(job, folder, straight)
    seconds = time.monotonic() - begin
    assert status == 0, said
  faults, moments = [], []
  saves_more = number != signal.SIGKILL  # at the step that it was at
  for i in range(count):
    out = folder / f"killed{i}"
    statuses = []
    for _ in range(1 + i % 2):
      if job == "convert" and (out / "out").exists():
        break  # finished, and what is there is not made again
      moments.append(round(random.uniform(0, seconds), 2))
      statuses.append(_kill(job, folder, out, moments[-1], number))
    if not {*statuses} <= {*STATUSES[number]}:
      faults.append(f"killed{i} after {moments[-len(statuses) :]} s: it ended with {statuses}")
      continue
    if job != "convert" or not (out / "out").exists():  # what is there is not made again
      status, said = _finish(job, folder, out)
      if status:
        faults.append(
          f"killed{i} after {moments[-len(statuses) :]} s: status {status}: {said[-2000:]}"
        )
        continue
    else:
      _finish(job, folder, out)  # says so, and clears the lock away
    difference = _in_child(lambda out=out: compare(job, out, straight, newest_only=saves_more))
    print(f"{job} {i + 1}/{count}: {difference or 'equal'}", file=sys.stderr, flush=True)
    if difference:
      faults.append(f"killed{i} after {moments[-len(statuses) :]} s: {difference}")
    else:
      shutil.rmtree(out)
  return count - len(faults), faults


def prepare(job: str, folder: pathlib.Path) -> None:
  """Makes what the job reads."""
  if job in ("extract_features", "convert"):
    from tests.evaluation_golden import RETRIEVAL, save_model

    save_model(folder, "vit")
    for name in ("test_imgs.tsv", "test_texts.jsonl"):
      shutil.copy(RETRIEVAL / "dataset" / name, folder / name)
  elif job == "generate":
    from tests.ofa_directory import save_micro

    save_micro(folder)
    write_pictures(folder / "in.tsv")
  else:
    get_config("ofa" if job == "train_ofa" else "digits")


def write_pictures(path: pathlib.Path) -> None:
  """40 rows of a captioning TSV, one of which cannot be read."""
  import base64
  import io

  import numpy as np
  from PIL import Image

  rng = np.random.default_rng(0)
  lines = []
  for i in range(40):
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(file, "PNG")
    image = base64.b64encode(file.getvalue()[: 30 if i == 9 else None]).decode()
    lines.append(f"{i}\timg{i}\tthe dog&&a dog\tdog\t{image}\n")
  path.write_text("".join(lines))


def command(job: str, folder: pathlib.Path, out: pathlib.Path) -> list[str]:
  """The command, whose files are in `out`."""
  if job == "extract_features":
    return [
      *("extract_features", f"--model={folder / 'Micro-ViT'}", "--batch-size=1"),
      *(f"--images={folder / 'test_imgs.tsv'}", f"--texts={folder / 'test_texts.jsonl'}"),
      f"--output={out / 'out'}",
    ]
  if job == "generate":
    return [
      *(
        "generate",
        f"--model={folder / 'model'}",
        "--task=caption",
        "--batch-size=2",
        "--max-bad-rate=0.1",
      ),
      *(f"--input={folder / 'in.tsv'}", f"--output={out / 'out' / 'captions.jsonl'}"),
    ]
  if job == "convert":
    return ["tools/convert_torch_weights.py", str(folder / "Micro-ViT"), str(out / "out")]
  family = "ofa" if job == "train_ofa" else "digits"
  return ["train", f"--config={HERE}:{family}", f"--workdir={out / 'out'}"]


def compare(
  job: str, out: pathlib.Path, straight: pathlib.Path, *, newest_only: bool = False
) -> str:
  """What differs from the straight run, or is there beside it; "" if nothing.

  Args:
    newest_only: of checkpoints look at the newest.
  """
  names = [sorted(str(p.relative_to(x)) for p in _listed(job, x)) for x in (out, straight)]
  if newest_only:
    newest = f"out/checkpoints/{max(int(p.name) for p in (straight / 'out/checkpoints').iterdir())}"
    names = [[n for n in x if not n.startswith("out/checkpoints/") or n.startswith(newest)]
             for x in names]  # fmt: skip
  if names[0] != names[1]:
    return f"{sorted(set(names[0]) ^ set(names[1]))} are in one of them only"
  if job in ("extract_features", "generate"):
    return "".join(
      f"{path} differs "
      for path in _listed(job, straight)
      if path.is_file() and path.read_bytes() != (out / path.relative_to(straight)).read_bytes()
    )
  from tests.test_train import assert_bit_equal, final_state

  if job == "convert":
    from ofa_jax import hub, trees

    found, expected = (hub.load_directory(x / "out") for x in (out, straight))
    if found[0] != expected[0]:
      return "config.json differs"
    _say_where(
      assert_bit_equal, *(trees.flatten(dict(enumerate(x[1:]))) for x in (found, expected))
    )
    return ""
  from ofa_jax.engine import log

  _say_where(assert_bit_equal, final_state(out / "out"), final_state(straight / "out"))
  rows = [
    [{k: v for k, v in row.items() if k not in TIMES} for row in log.read_metrics(x / "out")]
    for x in (out, straight)
  ]
  return "" if rows[0] == rows[1] else f"metrics.jsonl differs: {rows[0]} {rows[1]}"


def _say_where(function: Callable[..., None], *args: Any) -> None:
  try:
    function(*args)
  except AssertionError as error:
    raise ValueError(f"arrays differ: {error}") from error


def _listed(job: str, folder: pathlib.Path) -> list[pathlib.Path]:
  """Files and folders whose names say something; those within Orbax' own are made up anew."""
  depth = {"convert": 3, "train": 4, "train_ofa": 4}.get(job, 9)
  inside = [p for p in folder.rglob("*") if len(p.relative_to(folder).parts) <= depth]
  return [p for p in inside if "ocdbt" not in str(p) and p.parent.name not in ("params", "d")]


def _finish(job: str, folder: pathlib.Path, out: pathlib.Path) -> tuple[int, str]:
  with tempfile.TemporaryFile("w+") as output:
    status = forked.wait(forked.start(command(job, folder, out), output=output.fileno()))
    output.seek(0)
    return status, output.read()


def _kill(
  job: str, folder: pathlib.Path, out: pathlib.Path, seconds: float, number: signal.Signals
) -> int:
  with open(os.devnull, "w") as output:
    child = forked.start(command(job, folder, out), output=output.fileno())
    timer = threading.Timer(seconds, os.kill, (child, number))
    timer.start()
    status = forked.wait(child)
    timer.cancel()
  return status


def _in_child(function: Callable[[], Any]) -> Any:
  """What a function returns, as JSON, or its error. This process itself starts no devices."""
  reader, writer = os.pipe()
  child = os.fork()
  if not child:
    os.close(reader)
    try:
      text = json.dumps(function())
    except Exception as error:
      text = json.dumps(f"{type(error).__name__}: {error}")
    with contextlib.suppress(OSError), open(writer, "w") as file:
      file.write(text)
    os._exit(0)
  os.close(writer)
  with open(reader) as file:
    text = file.read()
  forked.wait(child)
  return json.loads(text or '"the child ended"')


def main() -> None:
  """See above."""
  job, count = sys.argv[1], int(sys.argv[2])
  with contextlib.ExitStack() as stack:
    given = sys.argv[3:]
    folder = given[0] if given else stack.enter_context(tempfile.TemporaryDirectory())
    number = signal.Signals[given[1]] if given[1:] else signal.SIGKILL
    equal, faults = killed(job, count, pathlib.Path(folder), number)
  print("\n".join(faults), file=sys.stderr)
  print(f"{job}: {equal} of {count} ended as the straight run", flush=True)
  raise SystemExit(equal < count)


if __name__ == "__main__":
  main()
