"""Visual entailment (OFA, arXiv 2202.03052, section 3.3): do an image and a text imply another?"""

from ofa_jax.data import prompts
from ofa_jax.data.tsv import IMAGE
from ofa_jax.tasks.answering import Answering

ANSWERING = Answering(
  prompt=lambda texts, chinese: prompts.entailment(texts["text"], texts.get("premise")),
  columns={"id": 0, IMAGE: 2, "text": 3, "premise": 4},
  id="uniq_id",
  result="label",
  reads_prompt=True,
  choices={"yes": "entailment", "maybe": "neutral", "no": "contradiction"},
)
