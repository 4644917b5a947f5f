"""`evaluate --tokenizer`: the tokenizer of a config's tasks, from another folder."""

import types

import pytest

from ofa_jax import evaluate
from ofa_jax.tasks.caption import Caption


def config(*tasks):
  first, *others = tasks
  return types.SimpleNamespace(
    task=first, evals=[types.SimpleNamespace(task=task) for task in others]
  )


def test_every_task_reads_the_other_tokenizer():
  tasks = [Caption(tokenizer="a"), Caption(tokenizer="b"), object()]
  evaluate.set_tokenizer(config(*tasks), "words")
  assert [task.tokenizer for task in tasks[:2]] == ["words", "words"]


def test_a_task_without_one_is_told():
  with pytest.raises(ValueError, match=r"Expected a task with a tokenizer .*found object"):
    evaluate.set_tokenizer(config(object()), "words")
