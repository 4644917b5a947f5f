"""A disk that is full amid the writing: one message, what was there stays, and then it goes on.

The disk is a limit of a file's size, as of a user's share: writing beyond it is an OSError.
"""

import json

import numpy as np
import pytest

from tests import forked
from tests.evaluation_golden import save_model
from tests.ofa_directory import save_micro

LIMIT = 80_000  # bytes; more than the places of outputs are tried with beforehand
TEXTS = 2000
OLD = "what was there"
# What is written, the file or folder that it becomes, and whether an old one is replaced.
COMMANDS = {
  "features": (["extract_features", "--model={m}", "--texts={d}/t.jsonl", "--output={o}"],
               "t.txt_feat.jsonl", True),
  "arrays": (["extract_features", "--model={m}", "--texts={d}/t.jsonl", "--output={o}",
              "--format=npy"], "t.txt_feat.npy", True),
  "topk": (["retrieve", "topk", "--image-feats={d}/images.jsonl", "--text-feats={d}/texts.jsonl",
            "--top-k=20", "--output={o}/p.jsonl"], "p.jsonl", True),
  "to-tr": (["retrieve", "to-tr", "--input={d}/t.jsonl", "--output={o}/r.jsonl"], "r.jsonl", True),
  "model directory": (["tools/convert_torch_weights.py", "{m}", "{o}/made"], "made", False),
  ".pt": (["tools/convert_torch_weights.py", "{m}", "{o}/made.pt", "--to=torch"], "made.pt", False),
  "transformers": (["tools/convert_torch_weights.py", "{m}", "{o}/hf", "--to=hf"], "hf", False),
  "an OFA's": (["tools/convert_torch_weights.py", "{d}/model", "{o}/o", "--to=hf"], "o", False),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
  """Of every command its folders and how it ended: without the limit, with it, and again."""
  data = tmp_path_factory.mktemp("data")
  model = save_model(data, "vit")
  save_micro(data)
  ids = range(TEXTS)
  rows = [{"text_id": i, "text": f"一只猫 {i}", "image_ids": [i]} for i in ids]
  (data / "t.jsonl").write_text("".join(map("{}\n".format, map(json.dumps, rows))))
  rng = np.random.default_rng(0)
  for kind in ("image", "text"):
    vectors = rng.normal(size=(TEXTS, 4))
    lines = [json.dumps({f"{kind}_id": i, "feature": [*vectors[i]]}) + "\n" for i in ids]
    (data / f"{kind}s.jsonl").write_text("".join(lines))
  folders = {name: [tmp_path_factory.mktemp("out") for _ in range(2)] for name in COMMANDS}
  for name, (_, made, replaces) in COMMANDS.items():
    if replaces:
      (folders[name][1] / made).write_text(OLD)

  def case(name, folder, **more):
    command = [part.format(m=model, d=data, o=folder) for part in COMMANDS[name][0]]
    return {"command": command, "environment": {"JAX_COMPILATION_CACHE_DIR": None}, **more}

  straight = forked.run([case(name, folders[name][0]) for name in COMMANDS])
  full = forked.run([case(name, folders[name][1], largest_file=LIMIT) for name in COMMANDS])
  left = [contents(folders[name][1]) for name in COMMANDS]
  again = forked.run([case(name, folders[name][1]) for name in COMMANDS])
  rows = zip(straight, full, left, again, strict=True)
  return {name: (*folders[name], *row) for name, row in zip(COMMANDS, rows, strict=True)}


def contents(folder):
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", COMMANDS)
def test_one_message_and_what_was_there_stays(outcomes, name):
  straight, full, worked, (status, output), left, (again, _) = outcomes[name]
  _, made, replaces = COMMANDS[name]
  assert worked[0] == 0, worked[1]
  told = f"error: Expected room for {full / made}, found: File too large. Make room"
  assert status == 1 and output.startswith(told), output
  assert "Traceback" not in output and len(output.splitlines()) <= 3, output
  partials = {f"{made}.partial", f"{made}.partial.json"}  # with which it goes on
  assert {*left} - partials == ({made} if replaces else set())
  assert not replaces or left[made] == OLD.encode()
  assert again == 0
  names = [{n for n in contents(x) if "/d/" not in n} for x in (straight, full)]  # Orbax' own
  assert names[0] == names[1]
  if made != "made":
    assert contents(straight) == contents(full)
