"""Prompts as the original spells them."""

import pytest

from ofa_jax.data import prompts


def test_prompts_are_spelled_as_in_training():
  assert prompts.caption() == " what does the image describe?"
  assert prompts.caption(chinese=True) == "图片描述了什么内容?"
  assert prompts.question("What is  on the table") == " what is on the table?"
  assert prompts.question("Is it red?") == " is it red?"
  assert prompts.region("A lady in blue-white.") == (
    ' which region does the text " a lady in blue white. " describe?'
  )
  assert prompts.region("穿蓝色衣服的女士", chinese=True) == (
    '这段文字" 穿蓝色衣服的女士 "描述的是哪个区域？'
  )
  assert prompts.entailment("A dog") == ' does the image describe " a dog "?'
  assert prompts.entailment("A man is sleeping outside.", "a man sits, reading") == (
    ' can image and text1 " a man sits, reading " imply text2 " a man is sleeping outside. "?'
  )


def test_words_beyond_the_limit_are_cut_with_a_warning():
  with pytest.warns(UserWarning, match="Cut a text of 5 words to the first 3: 'one two three"):
    assert prompts.question("One two three four five", max_words=3) == " one two three?"


def test_summaries_and_sentences():
  article = "The <unk> of Man-City , ~~ 10/2"
  cleaned = "the unk of man city , ~~ 10 2"
  assert prompts.summary(article) == f' what is the summary of article " {cleaned} "?'
  assert prompts.summary(article, chinese=True) == f"{cleaned} 请用一个句子简单总结上文："
  with pytest.warns(UserWarning, match="Cut a text of 9 words to the first 2"):
    assert prompts.summary(article, max_words=2) == ' what is the summary of article " the unk "?'
  asked = prompts.sentences(' can text1 " {} " imply text2 " {} "?', " A-b\tC  d\n", "E/f ?")
  assert asked == ' can text1 " a-b c d " imply text2 " e/f ? "?'
