"""Fonts of this machine for texts in any language, for pages of pictures.

OFA_JAX_FONT=FILE names one; else the usual ones with Chinese characters are looked for among
matplotlib's and the system's fonts.
"""

import functools
import logging
import os
import pathlib
import unicodedata
from collections.abc import Iterable, Iterator

VARIABLE = "OFA_JAX_FONT"
PACKAGE = "fonts-noto-cjk"  # of Debian and Ubuntu
# Families, with the beginnings of their files' names; those of emoji cannot be drawn.
FAMILIES = {
  "Noto Sans CJK SC": "notosanscjk",
  "Noto Sans CJK JP": "notosanscjksc",
  "Noto Sans SC": "notosanssc",
  "Noto Serif CJK SC": "notoserifcjk",
  "Source Han Sans SC": "sourcehansans",
  "WenQuanYi Micro Hei": "wqy-microhei",
  "WenQuanYi Zen Hei": "wqy-zenhei",
  "Droid Sans Fallback": "droidsansfallback",
  "PingFang SC": "pingfang",
  "Heiti SC": "stheiti",
  "Microsoft YaHei": "msyh",
  "SimHei": "simhei",
  "AR PL UMing CN": "uming",
  "Arial Unicode MS": "arial unicode",
  "Unifont": "unifont",
}
_DEFAULT = "DejaVu Sans"  # comes with matplotlib
_log = logging.getLogger(__name__)


def of_texts(texts: Iterable[str]) -> tuple[list[str], str]:
  """Families that draw these texts, the first that has a character draws it.

  Returns:
    Their names for matplotlib, and the characters, sorted, that none of this machine has.
  """
  import matplotlib.font_manager as manager  # slow, and needed once an evaluation

  left = {c for text in texts for c in text if _is_drawn(c)}
  left -= _characters(manager.findfont(_DEFAULT))
  families = [_DEFAULT]
  for path in _candidates() if left else ():
    drawn = left & _characters(path)
    if drawn:
      manager.fontManager.addfont(path)
      families.append(manager.FontProperties(fname=path).get_name())
      left -= drawn
    if not left:
      break
  return families, "".join(sorted(left))


def _is_drawn(char: str) -> bool:
  return not char.isspace() and unicodedata.category(char)[0] != "C"


def _candidates() -> Iterator[str]:
  """Files of fonts, the best first."""
  if os.environ.get(VARIABLE):
    yield os.path.expanduser(os.environ[VARIABLE])
  yield from _installed()


@functools.cache
def _installed() -> tuple[str, ...]:
  import matplotlib.font_manager as manager

  by_family = {font.name: font.fname for font in manager.fontManager.ttflist}
  paths = [by_family[name] for name in FAMILIES if name in by_family]
  # matplotlib remembers the fonts of its first start.
  system = {pathlib.Path(path).name.lower(): path for path in sorted(manager.findSystemFonts())}
  for begin in FAMILIES.values():
    paths += [path for name, path in system.items() if name.startswith(begin)]
  return tuple(dict.fromkeys(paths))


@functools.cache
def _characters(path: str) -> frozenset[str]:
  """All that a font file has; nothing, with a warning, where it cannot be read."""
  from matplotlib.ft2font import FT2Font

  try:
    return frozenset(map(chr, FT2Font(path).get_charmap()))
  except (OSError, RuntimeError) as e:
    _log.warning("Expected a font in %s, found: %s", path, e)
    return frozenset()
