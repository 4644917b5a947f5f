"""What OFA is asked in each task, spelled as in its training: every space counts.

Each function makes one prompt, in Chinese for the models with the Chinese vocabulary. The user's
words are cleaned and cut as the original does; a cut is warned of. A prompt of no words is an error
at the caller's.
"""

import warnings
from collections.abc import Callable

from ofa_jax.data.text import REFERENCES, known_words, pre_caption, pre_question, pre_sentence

MAX_WORDS = 80  # of the user's part in a prompt: the original's --max-src-length

MAX_PICTURE_WORDS = 64  # of a caption that is drawn, in the original's scripts
MAX_ARTICLE_WORDS = MAX_SENTENCE_WORDS = 512  # of Gigaword's articles, of each of GLUE's texts

CAPTION = " what does the image describe?"
CAPTION_CHINESE = "图片描述了什么内容?"
MATCHING = ' does the image describe " {} "?'
ANSWER_MATCHING = ' what is the answer to question " {} ". is " {} "?'
REGION = ' which region does the text " {} " describe?'
REGION_CAPTION = "  what does the region describe? region:"  # before four bins; two spaces
MIDDLE = " what is the image in the middle part?"
OBJECTS = " what are the objects in the image?"
WHOLE_TEXT = ' what is the complete text of "', ' "?'  # around a text with hidden words
PICTURE = " what is the complete image? caption: "
PICTURE_CHINESE = "完整的图片是什么? 描述: "  # ours: the original draws in English alone
READING = " what are the texts on the image?"
READING_CHINESE = "图片上的文字是什么?"


def caption(*, chinese: bool = False) -> str:
  """Asks for a caption; the same question asks for an image's class."""
  return CAPTION_CHINESE if chinese else CAPTION


def reading(*, chinese: bool = False) -> str:
  """Asks for the words that stand in an image."""
  return READING_CHINESE if chinese else READING


def question(text: str, *, max_words: int = MAX_WORDS) -> str:
  """Asks a question about an image; it gets its question mark if it has none."""
  text = _cut(text, pre_question, max_words)
  return f" {text}" if text.endswith("?") else f" {text}?"


def objects(names: str, *, most: int) -> str:
  """What stands behind a question: the names, "&&" between them, of objects that were seen."""
  return f" object: {' '.join(names.strip().split(REFERENCES)[:most])}"


def picture(text: str, *, chinese: bool = False, max_words: int = MAX_PICTURE_WORDS) -> str:
  """Asks for a picture of what a caption says; "" asks for any, which is what guidance leaves."""
  text = _cut(text, _words, max_words)
  return f"{PICTURE_CHINESE if chinese else PICTURE}{text}" if text else _untold(chinese)


def _untold(chinese: bool) -> str:
  return (PICTURE_CHINESE if chinese else PICTURE).rstrip()


def region(text: str, *, chinese: bool = False, max_words: int = MAX_WORDS) -> str:
  """Asks for the box that a text describes."""
  text = _cut(text, pre_caption, max_words)
  if chinese:
    return f'这段文字" {text} "描述的是哪个区域？'
  return REGION.format(text)


def entailment(hypothesis: str, premise: str | None = None, *, max_words: int = MAX_WORDS) -> str:
  """Asks whether an image, and perhaps a text about it, imply another text."""
  hypothesis = _cut(hypothesis, pre_caption, max_words)
  if premise is None:
    return MATCHING.format(hypothesis)
  premise = _cut(premise, pre_caption, max_words)
  return f' can image and text1 " {premise} " imply text2 " {hypothesis} "?'


def summary(article: str, *, chinese: bool = False, max_words: int = MAX_ARTICLE_WORDS) -> str:
  """Asks for the summary of an article."""
  article = known_words(_cut(article, pre_caption, max_words))
  if chinese:
    return f"{article} 请用一个句子简单总结上文："
  return f' what is the summary of article " {article} "?'


def whole_text(text: str) -> str:
  """Asks for a text in which "<mask>" hides words."""
  before, after = WHOLE_TEXT
  return f"{before} {text}{after}"


def sentences(template: str, *texts: str, max_words: int = MAX_SENTENCE_WORDS) -> str:
  """Asks about sentences, each in its place `{}` of a template of GLUE's: lower case, cut."""
  return template.format(*(_cut(text, pre_sentence, max_words) for text in texts))


def _words(text: str, *, max_words: int) -> str:
  """The first words as they are, letters and signs kept."""
  return " ".join(text.split()[:max_words])


def _cut(text: str, clean: Callable[..., str], max_words: int) -> str:
  whole = clean(text, max_words=len(text) + 1)
  words = whole.count(" ") + 1
  if words > max_words:
    warnings.warn(f"Cut a text of {words} words to the first {max_words}: {whole[:40]!r} ...")
  return clean(text, max_words=max_words)
