"""Words of English captions as coco-caption counts them, without Java.

coco-caption cuts captions by the rules of the Penn Treebank, as Stanford's PTBTokenizer 3.4.1 has
them, and leaves out most punctuation. The rules that captions meet are below: contractions are two
words ("ca n't", "man 's"), hyphens and slashes join ("t-shirt", "and/or"), abbreviations keep their
point, brackets have names. What is left out are the signs of coco-caption's list, which names
brackets in capitals: "-lrb-" stays.
"""

import html
import re

# coco-caption's list.
LEFT_OUT = frozenset(
  ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-")
  + (".", "?", "!", ",", ":", "-", "--", "...", ";")
)

# What keeps its point, beside single letters and letters with points between them.
_ABBREVIATIONS = """
  adm al ala apr ariz assn assoc asst aug ave bldg blvd bros calif capt cf cmdr co col colo conn
  corp cos cpl ct dec dept det dr esq est etc ext feb fla fri ft ga gen gov hon inc ind insp intl
  jan jr jul jun kan kans ky lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont mr mrs ms
  mt natl neb nev nov oct okla ph.d plc pres prof pty pvt rd rep reps rev sen sep sept sgt sq sr
  st ste supt tel tenn thu thurs treas tue tues univ va vs vt wed wis wyo
"""
_SPLIT = {
  "cannot": ("can", "not"),
  "gonna": ("gon", "na"),
  "wanna": ("wan", "na"),
  "gotta": ("got", "ta"),
  "lemme": ("lem", "me"),
  "gimme": ("gim", "me"),
  "'tis": ("'t", "is"),
  "'twas": ("'t", "was"),
}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SPELLED = str.maketrans(
  {
    **dict.fromkeys("’‛", "'"),
    **dict.fromkeys("‘‹›", "`"),
    **dict.fromkeys("“”«»", '"'),
    **dict.fromkeys("–—―", "--"),
    **dict.fromkeys("‐‑", "-"),
    "…": "...",
    "¢": " cents ",
    "£": "#",
    "€": "$",
    "½": "1/2",
    "¼": "1/4",
    "¾": "3/4",
  }
)

_CLITIC = r"'(?:s|d|m|ll|re|ve)(?!\w)"
_RULES = (
  # Addresses, tags, names and faces.
  r"https?://\S*[\w/]",
  r"www\.\S*\w",
  r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+",
  r"</?[A-Za-z!][^<>]*>",
  r"[@#][A-Za-z_]\w*",
  r"[:;=]-?[()](?!\w)",
  r"[:;=]-?[DPp](?!\w)",
  # Points that belong to a word. No space behind one is not the end of a sentence.
  rf"\b(?:{'|'.join(map(re.escape, _ABBREVIATIONS.split()))})\.(?!\w)",
  r"\bno\.(?=\ ?\d)",
  r"\b[A-Za-z](?:\.[A-Za-z])+(?!\w)\.?",
  r"\b[A-Za-z]\.(?!\w)",
  r"[A-Za-z]+\.(?=[,;])",
  # Words with apostrophes.
  rf"\b(?:{'|'.join(x for x in _SPLIT if x.isalpha())})(?!\w)",
  r"'twas(?!\w)|'tis(?!\w)",
  r"'n'",
  r"'(?:n|em|til|till|cause|\d0s)(?!\w)",
  r"\b(?:ma'am|c'mon|ol')(?!\w)",
  r"\by'(?=all(?!\w))",
  r"(?:\w+-)*\w+?(?=n't(?!\w))",
  r"n't(?!\w)",
  _CLITIC,
  rf"\b(?:\w+-)*[dol](?!{_CLITIC})'\w+(?:-\w+)*",
  # Words with signs in them, and numbers.
  r"(?-i:[A-Z]+&[A-Z]+)",
  r"\b[A-Za-z]\w*(?:[.!?][A-Za-z]\w*)+(?:-\w+)*",
  r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}",
  r"\w+(?:\.\d+)?(?:-\w+)+",
  r"[-+]?(?:\d+(?:[.,:]\d+)+|\.\d+)",
  r"[-+]\d+(?!\w)",
  r"\w+",
  # Signs.
  r"\.\.\.",
  r"--+",
  r"[?!]+",
  r"\*+",
  r"''|``|<<|>>",
  r"\S",
)
_TOKEN = re.compile("|".join(_RULES), re.IGNORECASE)


def tokens(text: str) -> list[str]:
  """Returns all words and signs of a caption, in lower case.

  Args:
    text: of one line, in English.
  """
  text = html.unescape(text).translate(_SPELLED)
  words = []
  for match in _TOKEN.finditer(text):
    word = match[0].lower()
    words += _SPLIT.get(word) or (_bracketed(word),)
  return words


def words(text: str) -> str:
  """Returns the words that coco-caption compares, single spaces between them."""
  return " ".join(word for word in tokens(text.replace("\n", " ")) if word not in LEFT_OUT)


def _bracketed(word: str) -> str:
  """A token with its brackets named, a straight quote as the Treebank's."""
  if word == '"':
    return "''"
  if word in _BRACKETS or (len(word) < 4 and word[-1] in "()"):
    return "".join(_BRACKETS.get(sign, sign) for sign in word)
  return "--" if word.startswith("--") else word
