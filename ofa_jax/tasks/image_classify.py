"""Image classification (OFA, arXiv 2202.03052, section 3.3): the class whose name fits best.

The question is that for captions; the answer is chosen among the names of all classes.
"""

from ofa_jax.data import prompts
from ofa_jax.data.tsv import IMAGE
from ofa_jax.tasks.answering import Answering

ANSWERING = Answering(
  prompt=lambda texts, chinese: prompts.caption(chinese=chinese),
  columns={"id": 1, IMAGE: 0},
  id="id",
  result="class",
)
