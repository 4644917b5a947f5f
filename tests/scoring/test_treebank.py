"""Captions in the words of coco-caption: what its tokenizer, Stanford's, gave for them."""

import pytest

from ofa_jax.scoring import treebank

# What PTBTokenizer 3.4.1 (-preserveLines -lowerCase) gave, without the signs that are left out.
CASES = {
  "A man can't ride; he's (very) tired, isn't he?": (
    "a man ca n't ride he 's -lrb- very -rrb- tired is n't he"
  ),
  "The dog's ball and dogs' balls.": "the dog 's ball and dogs balls",
  "I cannot gonna wanna gotta lemme gimme 'tis 'twas": (
    "i can not gon na wan na got ta lem me gim me 't is 't was"
  ),
  "a black/white cat and/or dog w/ a hat": "a black/white cat and/or dog w / a hat",
  "wood/metal/glass/plastic/iron 1/2 3/4th 12/25 w/o men's/women's": (
    "wood/metal/glass / plastic/iron 1/2 3/4th 12/25 w/o men 's / women 's"
  ),
  "Mr. Smith and Mrs. Jones at 5 p.m. on St. Mark's St.": (
    "mr. smith and mrs. jones at 5 p.m. on st. mark 's st."
  ),
  "U.S. flag. The U.S.A. flag, u.s. flag, plan b.": "u.s. flag the u.s.a. flag u.s. flag plan b.",
  "costs $5.00 or 50% or #1 or & or A&W AT&T cat&dog at&t": (
    "costs $ 5.00 or 50 % or # 1 or & or a&w at&t cat & dog at & t"
  ),
  "He said \"hello\" to 'her' and “him” or ‘it’.": "he said hello to her and him or it",
  "a well-known T-shirt, mid-air -- flying - high –dash— em…": (
    "a well-known t-shirt mid-air flying high dash em"
  ),
  "wait... what.. ok . wow!!! what?! no!": "wait what ok wow !!! what ?! no",
  "o'clock ma'am y'all ya'll O'Brien hors d'oeuvre nothin' 'em 'til": (
    "o'clock ma'am y' all ya 'll o'brien hors d'oeuvre nothin 'em 'til"
  ),
  "rock'n'roll rock 'n' roll rock'n roll": "rock 'n' roll rock 'n' roll rock 'n roll",
  "man on a street.The dog.runs": "man on a street.the dog.runs",
  "5:30 pm 10,000 people 3.5 .5 1st 20s 1980's '80s 2x4 10am 7-Eleven 5'6\" 8\" 3:00pm": (
    "5:30 pm 10,000 people 3.5 .5 1st 20s 1980 's '80s 2x4 10am 7-eleven 5 6 8 3:00 pm"
  ),
  "7.5-inch 2-year-old mother-in-law's two-thirds 21st-century +1 -1 5-6": (
    "7.5-inch 2-year-old mother-in-law 's two-thirds 21st-century +1 -1 5-6"
  ),
  "[bracket] {curly} <person> <3": "-lsb- bracket -rsb- -lcb- curly -rcb- <person> < 3",
  "he'll she'd we've I'm they're I'd've shouldn't've who's": (
    "he 'll she 'd we 've i 'm they 're i 'd 've should n't 've who 's"
  ),
  "café naïve ½ ¢ £5 €10": "café naïve 1/2 cents # 5 $ 10",
  "a,b ,c d, a;b a:b @user #tag #1 no. 5 no. vs. approx. ft. in. lb.": (
    "a b c d a b a b @user #tag # 1 no. 5 no vs. approx ft. in lb"
  ),
  "&amp; a &lt; b": "& a < b",
  "a_b self- -self *** ~~": "a_b self self *** ~ ~",
  "a clock tower., a dog's; it": "a clock tower. a dog 's it",
  "one\ntwo": "one two",
  "": "",
}


@pytest.mark.parametrize("text", CASES)
def test_words_are_coco_captions(text):
  assert treebank.words(text) == CASES[text]


def test_words_stay_the_same_when_they_are_counted_again():
  """What the model writes has no punctuation; a caption in words has nothing more to be cut."""
  for text in ("a man riding a wave on top of a surfboard", "two dogs and a cat 's ball"):
    assert treebank.words(text) == text


def test_tokens_keep_the_signs():
  assert treebank.tokens('A "dog", (big)!') == [
    *("a", "''", "dog", "''", ",", "-lrb-", "big", "-rrb-", "!"),
  ]
