"""Summaries in the Treebank's words and their ROUGE, as the original has them."""

import json

import numpy as np
import pytest

from ofa_jax.scoring import gigaword, rouge
from tests.scoring.test_rouge import CASES


@pytest.mark.parametrize("text", CASES["gigaword_fix_tokenization"])
def test_words_are_the_originals(text):
  assert gigaword.fix_tokenization(text) == CASES["gigaword_fix_tokenization"][text]


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ('say " a " and " b', "say `` a '' and `` b"),
    ("( a ) [ b ] { c } & < d >", "-lrb- a -rrb- -lsb- b -rsb- -lcb- c -rcb- &amp; &lt; d &gt;"),
    ("do n ' t ' quote '", "do  n't ` quote '"),  # the n goes over, and an empty word is left
    ("can ' t", "ca n't"),
    ("it ' s he ' d we ' ll", "it 's he 'd we 'll"),
    ("wait . . . there", "wait ... there"),
    ("wait . .", "wait . ."),
    ("1 , 000 , 000 people", "1,000,000 people"),
    ("3 . 5 percent", "3.5 percent"),
    ("U . N . report", "U.N. . report"),
    ("- a - b - ( c - -", "- a-b - -lrb- c --"),
    ("a -", "a -"),
    ("[UNK] x", "UNK x"),
    ("", ""),
  ],
)
def test_words_by_rule(text, expected):
  assert gigaword.fix_tokenization(text) == expected


def test_validation_and_the_last_evaluation_differ_in_rare_words():
  text = " The <unk> Of 1990 "
  # In the last evaluation the sign of the vocabulary stays, as a word of its own.
  assert gigaword.hypothesis(text) == "the <unk> of #990"
  assert gigaword.hypothesis(text, validation=True) == "the  unk of #990"


def test_scores_with_and_without_resampling():
  answers, references = CASES["preds"], [text.upper() for text in CASES["refs"]]
  told = [gigaword.hypothesis(text) for text in answers]
  rows = rouge.summary_scores(told, CASES["refs"], stem=True)
  scores = gigaword.scores(answers, references)
  assert scores.keys() == {f"{k}_{x}" for k in gigaword.KINDS for x in ("f1", "recall")}
  both = gigaword.scores(answers, references, bootstrap=True)
  medians = rouge.bootstrap(rows)
  for kind in gigaword.KINDS:
    assert scores[f"{kind}_f1"] == both[f"{kind}_f1"]
    assert scores[f"{kind}_f1"] == pytest.approx(100 * np.mean(rows[kind][:, 2]), rel=1e-12)
    assert scores[f"{kind}_recall"] == pytest.approx(100 * np.mean(rows[kind][:, 1]), rel=1e-12)
    assert both[kind] == 100 * medians[kind][2]
  # Of texts that are in that form already the means are those of the original's own run.
  plain = [i for i, text in enumerate(answers) if gigaword.hypothesis(text) == text]
  assert len(plain) > 20
  expected = np.array(CASES["per_sample_stemmer"]["rougeL"])[plain]
  scores = gigaword.scores([answers[i] for i in plain], [CASES["refs"][i] for i in plain])
  assert scores["rougeL_f1"] == pytest.approx(100 * expected[:, 2].mean(), rel=1e-12)


def test_scores_are_plain_numbers():
  assert json.dumps(gigaword.scores(["a b"], ["a c"], bootstrap=True))
