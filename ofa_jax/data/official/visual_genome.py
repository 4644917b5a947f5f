"""Visual Genome's questions (arXiv 1602.07332), which OFA learns beside those of VQA v2."""

import pathlib

from ofa_jax.data.official.vqa import answer_of, column
from ofa_jax.data.official.writing import (
  Files,
  Pictures,
  Skipped,
  Table,
  clean,
  joined,
  load_json,
  need,
  reading,
)

_FORM = "pictures with qas (qa_id, image_id, question, answer)"


def files(source: pathlib.Path, *, skipped: Skipped, listed: frozenset[str] | None = None) -> Files:
  """`vqa_data/vg_qa_train.tsv`, a row for each question, in VQA's columns.

  Args:
    source: with question_answers.json and the folders VG_100K and VG_100K_2.
    skipped: counts what is left out.
    listed: the answers that may be learnt; None: any.
  """
  path = need(source, "question_answers.json")
  yield Table("vqa_data/vg_qa_train.tsv", _rows(source, path, skipped, listed))


def _rows(source, path, skipped, listed):
  pictures = Pictures(source, "VG_100K", "VG_100K_2", "images")
  with reading(path, _FORM):
    for record in load_json(path):
      for asked in record["qas"]:
        number, image_id = str(asked["qa_id"]), str(asked["image_id"])
        answer = answer_of(asked["answer"]).rstrip(".").rstrip()
        question = clean(asked["question"])
        if not question or not answer:
          skipped.add("empty question or answer", number)
        elif listed is not None and answer not in listed:
          skipped.add("question whose answer is not in the list", number)
        else:
          image = pictures(f"{image_id}.jpg")
          yield number, image_id, question, joined([column(answer, 1.0)]), "", image
