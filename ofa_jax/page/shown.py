"""Results as pieces of HTML with their pictures in them, whatever letters are in their texts."""

import html
from collections.abc import Sequence

import numpy as np

from ofa_jax import pictures
from ofa_jax.page.asking import COLOURS, Answer, Found
from ofa_jax.page.comparing import Likeness
from ofa_jax.page.library import Hit
from ofa_jax.page.words import Words

STYLE = """
.answer {font-size: 1.35em; margin: .2em 0; overflow-wrap: anywhere}
.sure {opacity: .8; margin: .2em 0}
.fault {border-left: 4px solid #cf222e; padding: .4em .8em; margin: .2em 0}
.drawn {max-width: 100%; height: auto; border-radius: 4px}
.numbers {border-collapse: collapse; width: 100%}
.numbers th, .numbers td {text-align: left; padding: .25em .8em .25em 0; overflow-wrap: anywhere}
.numbers td.number {text-align: right; font-variant-numeric: tabular-nums}
.numbers meter {width: 100%; min-width: 4em}
.key {display: inline-block; width: .8em; height: .8em; margin-right: .4em}
.hits {display: grid; gap: .8em; grid-template-columns: repeat(auto-fill, minmax(8em, 1fr));
  list-style: none; margin: 0; padding: 0}
.hits li {margin: 0}
.hits figure {margin: 0}
.hits img {width: 100%; height: 8em; object-fit: contain}
.hits figcaption {font-size: .85em; overflow-wrap: anywhere; text-align: center}
footer {display: none !important}
"""


def fault(sentence: str) -> str:
  """What a person should know, read aloud by screen readers at once."""
  return f'<p class="said fault" role="alert">{_text(sentence)}</p>'


def answer(said: Answer, *, words: Words) -> str:
  """An answer and how likely it is."""
  line = ""
  if said.probability is not None:
    how = words.calibrated if said.calibrated else words.among_choices
    line = _note(how.format(100 * said.probability))
  return _status(f'<p class="answer">{_text(said.text) or "—"}</p>{line}')


def boxes(found: Found, *, least: float, words: Words) -> str:
  """The picture with the boxes and a table of them, or why there is none."""
  drawn = _drawn(found.drawn, words.boxes_drawn)
  if not len(found.boxes):
    none = words.no_box if found.probabilities is None else words.absent.format(100 * least)
    return _status(f'{drawn}<p class="answer">{_text(none)}</p>')
  titles = [words.box, words.pixels]
  titles += [] if found.probabilities is None else [words.probability]
  rows = []
  for number, box in enumerate(found.boxes):
    key = f'<span class="key" style="background: {COLOURS[number % len(COLOURS)]}"></span>'
    row = [f"<td>{key}{number + 1}</td>", _number(", ".join(f"{x:.0f}" for x in box))]
    if found.probabilities is not None:
      row.append(_number(f"{100 * found.probabilities[number]:.1f} %"))
    rows.append(row)
  return _status(drawn + _table(titles, rows))


def likenesses(found: Sequence[Likeness], *, words: Words) -> str:
  """A table of texts with their cosines and probabilities."""
  rows = []
  for like in found:
    share = f'<meter min="0" max="1" value="{like.probability:.4f}"></meter>'
    cosine, probability = f"{like.cosine:.4f}", f"{100 * like.probability:.1f} %"
    row = [f"<td>{_text(like.text)}</td>", _number(cosine), _number(probability)]
    rows.append([*row, f'<td aria-hidden="true">{share}</td>'])
  return _status(_table([words.text, words.cosine, words.probability, ""], rows))


def hits(found: Sequence[Hit], *, words: Words) -> str:
  """Pictures that were found, the best first, with their names and cosines."""
  if not found:
    return fault(words.none_left)
  items = []
  for hit in found:
    image = pictures.data_url(np.asarray(hit.thumbnail), kind="jpeg")
    name = _text(hit.name)
    items.append(
      f'<li><figure><img src="{image}" alt="{name}"><figcaption>{name}<br>{words.cosine} '
      f"{hit.cosine:.3f}</figcaption></figure></li>"
    )
  return _status(f'<ol class="hits">{"".join(items)}</ol>')


def drawings(found: Sequence[np.ndarray], text: str) -> str:
  """Pictures of a text, the best first."""
  items = []
  for number, image in enumerate(found, 1):
    what = f'alt="{_text(text)} ({number})"'
    items.append(f'<li><img src="{pictures.data_url(image, kind="jpeg")}" {what}></li>')
  return _status(f'<ol class="hits">{"".join(items)}</ol>')


def attention(drawn: np.ndarray, share: float, *, words: Words) -> str:
  """The picture with the attention on it, and how much of it is on the picture."""
  line = _note(words.attention_far.format(100 * share))
  return _status(_drawn(drawn, words.attention_drawn) + line)


def _status(content: str) -> str:
  """What screen readers read when it has changed."""
  return f'<div class="said" role="status">{content}</div>'


def _note(sentence: str) -> str:
  return f'<p class="sure">{_text(sentence)}</p>'


def _drawn(image: np.ndarray, what: str) -> str:
  return f'<img class="drawn" src="{pictures.data_url(image, kind="jpeg")}" alt="{_text(what)}">'


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  head = "".join(f'<th scope="col">{_text(title)}</th>' if title else "<td></td>"
                 for title in titles)  # fmt: skip
  body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
  return f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _number(value: str) -> str:
  return f'<td class="number">{value}</td>'


def _text(value: str) -> str:
  """A text without any letter that HTML, or a template that this is put into, could obey."""
  value = html.escape(value)
  return value.replace("$", "&#36;").replace("{", "&#123;").replace("}", "&#125;")
