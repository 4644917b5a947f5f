"""Answering questions about images (OFA, arXiv 2202.03052, section 3.3)."""

from ofa_jax.data import prompts
from ofa_jax.data.tsv import IMAGE
from ofa_jax.decode.beam import Search
from ofa_jax.tasks.answering import Answering

ANSWERING = Answering(
  prompt=lambda texts, chinese: prompts.question(texts["text"]),
  columns={"id": 0, IMAGE: 5, "text": 2},
  id="question_id",
  result="answer",
  number_ids=True,
  reads_prompt=True,
  # The length of an answer is ours, the original's is 200 with the question.
  search=Search(num_beams=5, max_length=30, normalize_scores=False),
)
