import json
import string

import pytest

from ofa_jax.data import text
from ofa_jax.data.text import normalize_caption
from tests.ofa_files import GOLDEN

CASES = json.loads((GOLDEN / "tokenizer/tokenizer.json").read_text())


def test_lower_case_and_straight_double_quotes_and_nothing_else():
  assert normalize_caption("“ABC”的 Ｂ‘图’…—É\t") == '"abc"的 ｂ‘图’…—é\t'
  assert normalize_caption("") == ""


@pytest.mark.parametrize("name", ["pre_caption", "pre_question"])
def test_prompts_are_cleaned_as_in_the_original(name):
  for raw, expected in CASES[name].items():
    assert getattr(text, name)(raw, max_words=100) == expected


def test_prompts_are_cut_by_words():
  assert text.pre_caption("one two\tthree four", max_words=2) == "one two\tthree"
  assert text.pre_question("", max_words=2) == ""


def test_target_captions():
  assert (
    text.target_caption(" A man,  (riding) - a T-shirt!\n", max_words=5) == "A man riding a Tshirt"
  )
  assert text.target_caption("a b c", max_words=2) == "a b"
  assert text.target_caption("…", max_words=2) == "…"  # not ASCII: stays
  assert text.remove_punctuation(string.punctuation) == ""


def test_reference_captions():
  assert text.reference_captions("A  man.&& second, ref \n&&") == ["A man", "second ref", ""]
  assert text.reference_captions("a - b") == ["a  b"]  # spaces are joined before signs are removed
