"""The caption clean-up that Chinese-CLIP applies in training and evaluation, before tokenising."""

_CURLY_QUOTES = str.maketrans({"“": '"', "”": '"'})


def normalize_caption(text: str) -> str:
  """Returns the text in lower case with curly double quotes made straight.

  The vocabulary has no curly quotes: without this they become [UNK]. The original's public
  `tokenize` does not do it.
  """
  return text.lower().translate(_CURLY_QUOTES)
