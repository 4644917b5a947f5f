"""Rows of the original's data sets, `golden/ofa/{snli_ve,glue,gigaword}/cases.json`, and ours."""

import json
import shutil

import jax.numpy as jnp
import numpy as np

from ofa_jax.tokenizers.special import PAD
from tests.ofa_files import GOLDEN


def cases(task):
  """The settings of a task by name, each with its rows."""
  return json.loads((GOLDEN / task / "cases.json").read_text(encoding="utf-8"))


def copied(task, case, folder):
  """The file of a setting, where its index may be written beside it."""
  return str(shutil.copy(GOLDEN / task / case["tsv"], folder))


def columns(case):
  """Its --selected-cols."""
  return tuple(map(int, case["selected_cols"].split(",")))


def filled(ids, length):
  """The ids and padding."""
  assert len(ids) <= length
  return ids + [PAD] * (length - len(ids))


def check(task, case, *, field=None):
  """Compares all rows with the original's: ids, targets, what the decoder sees, what may follow.

  Args:
    task: reads the file of the case as its training data.
    case: one of `cases`.
    field: a column whose text the rows give beside these.
  """
  rows = task.examples("train")
  blank = rows.blank()
  rng = np.random.default_rng(0) if case["split"] == "train" else None
  examples = [rows.example(i, rng) for i in range(len(rows))]
  assert len(examples) == len(case["items"]) > 1
  for i, (example, item) in enumerate(zip(examples, case["items"], strict=True)):
    assert {k: (v.shape, v.dtype) for k, v in example.items()} == {
      k: (v.shape, v.dtype) for k, v in blank.items()
    }
    assert example["source"].tolist() == filled(item["source"], task.source_length)
    assert example["previous"].tolist() == filled(item["prev_output_tokens"], task.target_length)
    assert example["target"].tolist() == filled(item["target"], task.target_length)
    if field is not None:
      assert rows.row(i)[field] == item[field]
  if "allowed" not in case["items"][0]:
    return examples
  batch = {k: jnp.stack([e[k] for e in examples]) for k in blank}
  masks = np.asarray(task.allowed({**batch, "trie": task.choices.trie}, vocab_size=59457))
  for ours, item in zip(masks, case["items"], strict=True):
    allowed = item["allowed"]
    begin = next(i for i, token in enumerate(item["target"]) if token != PAD)
    assert not any(allowed[:begin])  # before the answer nothing is learnt: no places there
    assert [np.flatnonzero(row).tolist() for row in ours[: len(allowed) - begin]] == allowed[begin:]
  return examples
