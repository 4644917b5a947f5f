"""VQA v2 (arXiv 1612.00837): its questions and annotations, and the pictures of COCO."""

import collections
import os
import pathlib
import pickle
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from ofa_jax.data import answers as answer_lists
from ofa_jax.data import held_out
from ofa_jax.data.official.writing import (
  Content,
  Files,
  Pictures,
  Skipped,
  Table,
  clean,
  find,
  joined,
  load_json,
  need,
  reading,
)

LEAST = 9  # questions that have an answer in the list, which gives the published 3,129
HELD_OUT = 10_000 / 214_354  # share of the validation pictures: about ten thousand questions

_PEOPLE = 3  # of whom an answer needs as many to count whole
_QUESTIONS = "questions with question_id, image_id and question"
_ANNOTATIONS = "annotations with question_id, image_id and answers"
_CONFIDENCE = "|!+"
_ANSWERS = "trainval_ans2label.pkl"


def confidence(people: int, among: int = 10) -> float:
  """What the official accuracy gives for an answer that so many of the people gave.

  min(n / 3, 1) over the others, averaged over leaving out each of the people: 0.3, 0.6, 0.9 and 1
  for one, two, three and more of ten.
  """
  own = people * min((people - 1) / _PEOPLE, 1)
  rest = (among - people) * min(people / _PEOPLE, 1)
  return round((own + rest) / among, 4)


def files(
  source: pathlib.Path, *, skipped: Skipped, least: int = LEAST, held: float = HELD_OUT
) -> Files:
  """`vqa_data/vqa_{train,val,test}.tsv` and `vqa_data/trainval_ans2label.pkl`.

  Columns: question-id, image-id, question, answers with confidences, objects (none), image. The
  validation is the questions about some of the pictures of val2014, and training all others of
  both sets, with a row for every answer in the list; validation rows have all answers.

  Args:
    source: with `v2_OpenEnded_mscoco_*_questions.json`, `v2_mscoco_*_annotations.json` and the
      folders train2014, val2014, test2015.
    skipped: counts what is left out.
    least: questions that an answer in the list is the most frequent answer of.
    held: share of val2014's pictures that are for validation.
  """
  asked = {
    split: find(source, f"*OpenEnded_mscoco_{split}_questions.json")
    for split in ("train2014", "val2014", "test2015")
  }
  if not any(asked.values()):
    need(source, "v2_OpenEnded_mscoco_train2014_questions.json")
  learnt = {
    split: need(source, f"*mscoco_{split}_annotations.json")
    for split in ("train2014", "val2014")
    if asked[split]
  }
  told = {split: _told(path) for split, path in learnt.items()}
  listed = _listed((people for given in told.values() for people in given.values()), least)
  if listed:
    table = {text: number for number, text in enumerate(listed)}
    yield Content(f"vqa_data/{_ANSWERS}", pickle.dumps(table, protocol=2))
  allowed = frozenset(listed)
  kept = _kept(asked["val2014"], share=held)

  def rows(splits, *, training):
    for split in splits:
      pictures = Pictures(source, split, f"images/{split}", f"coco/{split}")
      for question in _questions(asked[split]):
        if split == "val2014" and (question["image_id"] in kept) == training:
          continue
        number, image_id = str(question["question_id"]), question["image_id"]
        image = pictures(f"COCO_{split}_{int(image_id):012}.jpg")
        text = clean(question["question"])
        if not text:
          skipped.add("empty question", number)
          continue
        if split not in told:
          yield number, str(image_id), text, "", "", image
          continue
        given = told[split].get(question["question_id"])
        if given is None:
          skipped.add("question without annotations", number)
          continue
        confidences = _confidences(given)
        if not training:
          yield number, str(image_id), text, joined(confidences.values()), "", image
          continue
        known = [confidences[answer] for answer in confidences if answer in allowed]
        if not known:
          skipped.add("question whose answers are not in the list", number)
        yield from ((number, str(image_id), text, joined([said]), "", image) for said in known)

  trained = [split for split in told if asked[split]]
  if trained:
    yield Table("vqa_data/vqa_train.tsv", rows(trained, training=True))
  if asked["val2014"]:
    yield Table("vqa_data/vqa_val.tsv", rows(["val2014"], training=False))
  if asked["test2015"]:
    yield Table("vqa_data/vqa_test.tsv", rows(["test2015"], training=False))


def listed_beside(output: str | os.PathLike) -> frozenset[str] | None:
  """The answers that `files` wrote into an output folder; None where it did not."""
  path = pathlib.Path(output, "vqa_data", _ANSWERS)
  return frozenset(answer_lists.load(path)) if path.is_file() else None


def answer_of(text: object) -> str:
  """An answer as people's answers are compared: in lower case, spaces made single."""
  return clean(text).lower()


def column(answer: str, confidence: float) -> str:
  """A column with one answer."""
  return f"{confidence}{_CONFIDENCE}{answer}"


def _questions(path: pathlib.Path) -> list[dict]:
  with reading(path, _QUESTIONS):
    questions = load_json(path)["questions"]
    for question in questions:
      _ = question["question_id"], question["image_id"], question["question"]
    return questions


def _kept(path: pathlib.Path | None, *, share: float) -> frozenset[int]:
  """The pictures of val2014 that are for validation."""
  if path is None:
    return frozenset()
  ids = np.array(sorted({question["image_id"] for question in _questions(path)}))
  if len(ids) < 2:
    return frozenset(ids.tolist())
  return frozenset(ids[held_out.choose([str(i) for i in ids], share)].tolist())


def _told(path: pathlib.Path) -> Mapping[int, Sequence[str]]:
  """The most frequent answer of each question, then those of all people."""
  with reading(path, _ANNOTATIONS):
    return {
      record["question_id"]: (
        # One copy of each of the answers, of which there are millions.
        sys.intern(answer_of(record["multiple_choice_answer"])),
        *(sys.intern(answer_of(given["answer"])) for given in record["answers"]),
      )
      for record in load_json(path)["annotations"]
    }


def _listed(given, least: int) -> tuple[str, ...]:
  """The answers that are the most frequent one of enough questions."""
  given = [answers[0] for answers in given]
  return answer_lists.counted(given, least=least) if given else ()


def _confidences(given: Sequence[str]) -> dict[str, str]:
  """The column of each answer of a question, in the order in which they were first given."""
  people = [answer for answer in given[1:] if answer]
  counts = collections.Counter(people)
  return {
    answer: column(answer, confidence(count, len(people))) for answer, count in counts.items()
  }
