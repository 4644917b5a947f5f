from ofa_jax.data.text import normalize_caption


def test_lower_case_and_straight_double_quotes_and_nothing_else():
  assert normalize_caption("“ABC”的 Ｂ‘图’…—É\t") == '"abc"的 ｂ‘图’…—é\t'
  assert normalize_caption("") == ""
