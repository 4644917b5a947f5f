"""Gigaword (arXiv 1509.00685): articles and their headlines, a line each, in two text files."""

import itertools
import pathlib

from ofa_jax import text_files
from ofa_jax.data.official.writing import Files, Skipped, Table, clean, find, need

_ARTICLES = ("{}.src.txt", "{}.src", "{}.article.txt", "{}.article.filter.txt")
_HEADLINES = ("{}.tgt.txt", "{}.tgt", "{}.title.txt", "{}.title.filter.txt")
_SPLITS = {"train": ("train",), "dev": ("dev", "valid", "val"), "test": ("test",)}


def files(source: pathlib.Path, *, skipped: Skipped) -> Files:
  """`gigaword_data/gigaword_{train,dev,test}.tsv`; columns: article, headline."""
  pairs = {}
  for split, names in _SPLITS.items():
    articles = find(source, *(form.format(name) for name in names for form in _ARTICLES))
    if articles is not None:
      pairs[split] = (
        articles,
        need(source, *(form.format(name) for name in names for form in _HEADLINES)),
      )
  if not pairs:
    need(source, "train.src.txt", "train.src")
  for split, paths in pairs.items():
    yield Table(f"gigaword_data/gigaword_{split}.tsv", _rows(*paths, skipped))


def _rows(articles, headlines, skipped):
  for one, other in itertools.zip_longest(text_files.lines(articles), text_files.lines(headlines)):
    if one is None or other is None:
      short, longer = (articles, headlines) if one is None else (headlines, articles)
      line = (one or other)[0]
      raise ValueError(
        f"Expected as many lines in {articles} as in {headlines}, found that {short} ends before "
        f"line {line} of {longer}"
      )
    number, text = one
    article, headline = clean(text_files.decode(text, articles)), other[1]
    headline = clean(text_files.decode(headline, headlines))
    if article and headline:
      yield article, headline
    else:
      skipped.add("empty text", f"{articles}:{number}")
