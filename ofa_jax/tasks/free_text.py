"""Prompts in the user's own words, with or without an image."""

from ofa_jax.tasks import caption
from ofa_jax.tasks.answering import Answering

ANSWERING = Answering(
  name="text",
  prompt=lambda texts, chinese: _begun(texts["text"], chinese),
  columns={"id": 0, "text": 1},
  id="id",
  result="text",
  searched_as=caption.ANSWERING.searched_as,
  search=caption.ANSWERING.search,
)


def _begun(text: str, chinese: bool) -> str:
  """The text behind a space, as every prompt that the model learnt from."""
  return text if text[0].isspace() or chinese else f" {text}"
