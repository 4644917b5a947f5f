"""What the originals do to texts before they are tokenised."""

import re
import string

REFERENCES = "&&"  # between the captions of one image, in OFA's files

_CURLY_QUOTES = str.maketrans({"“": '"', "”": '"'})
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_caption(text: str) -> str:
  """Returns the text in lower case with curly double quotes made straight: Chinese-CLIP's clean-up.

  The vocabulary has no curly quotes: without this they become [UNK]. The original's public
  `tokenize` does not do it.
  """
  return text.lower().translate(_CURLY_QUOTES)


def pre_caption(text: str, *, max_words: int) -> str:
  """Returns a text as OFA puts it into prompts: lower case, few signs, at most `max_words`."""
  return pre_question(text.lower().replace("<person>", "person"), max_words=max_words)


def pre_question(text: str, *, max_words: int) -> str:
  """Returns a question as OFA puts it into prompts: a caption, but that "<person>" stays."""
  text = text.lower().lstrip(",.!?*#:;~").replace("-", " ").replace("/", " ")
  text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
  return " ".join(text.split(" ")[:max_words])


def pre_sentence(text: str, *, max_words: int) -> str:
  """Returns a sentence as OFA puts it into GLUE's prompts: lower case, at most `max_words`."""
  return " ".join(text.lower().split()[:max_words])


def known_words(text: str) -> str:
  """Returns a text of Gigaword's with "unk" where it has "<unk>" for a rare word."""
  return text.replace("<unk>", "unk")


def remove_punctuation(text: str) -> str:
  """Returns the text without ASCII punctuation, as OFA compares captions."""
  return text.translate(_PUNCTUATION)


def target_caption(text: str, *, max_words: int) -> str:
  """Returns a caption as OFA learns it: its case kept, no punctuation, at most `max_words`."""
  return " ".join(remove_punctuation(text).split()[:max_words])


def written_captions(text: str) -> list[str]:
  """Returns the captions of one image, which "&&" separates, as they were written."""
  return [caption.strip() for caption in " ".join(text.split()).split(REFERENCES)]


def reference_captions(text: str) -> list[str]:
  """Returns the captions of one image, which "&&" separates, without punctuation."""
  return [remove_punctuation(caption).strip() for caption in written_captions(text)]
