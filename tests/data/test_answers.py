"""Lists of answers: every form they come in, and what is refused."""

import json
import pickle

import pytest

from ofa_jax.data import answers

NAMES = ("no", "red and white", "2")


class Hostile:
  def __reduce__(self):
    return print, ("executed",)


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("trainval_ans2label.pkl", pickle.dumps({"no": 0, "red and white": 1, "2": 2}, protocol=2)),
    ("list.json", json.dumps(NAMES).encode()),
    ("labels.json", json.dumps({text: i for i, text in enumerate(NAMES)}).encode()),
    ("answers.txt", b"no\r\nred and white\n\n2\n"),
  ],
)
def test_the_order_is_that_of_the_file(tmp_path, name, content):
  (tmp_path / name).write_bytes(content)
  assert answers.load(tmp_path / name) == NAMES


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.pkl", pickle.dumps({"no": Hostile()}), "refused: it asks for builtins.print"),
    ("a.pkl", b"\x80\x02}q", "found not a plain pickle"),
    ("a.pkl", pickle.dumps(["no", 2]), "found list of other things"),
    ("a.json", b'{"no": 0', "found Expecting"),
    ("a.txt", b"\xff\xfe", "found UTF-16"),
    ("a.json", b'["no", "no", " "]', "found 1 empty: numbers 2"),
    ("a.txt", b"\n", "found none"),
    ("missing.pkl", None, "No such file"),
  ],
)
def test_what_is_no_list_is_told(tmp_path, capsys, name, content, message):
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message) as raised:
    answers.load(tmp_path / name)
  assert str(tmp_path / name) in str(raised.value)
  assert capsys.readouterr().out == ""


def test_counted_answers_are_in_an_order_of_their_own():
  texts = ["b", "a", "b", "a", "c", "d", "d", "d", " "]
  assert answers.counted(texts, least=2) == ("d", "a", "b")
  with pytest.raises(ValueError, match=r"at least 4 times .* found none among 4 different ones"):
    answers.counted(texts, least=4)
