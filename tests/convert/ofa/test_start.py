"""What a model starts from when the stored one is not the same."""

import functools
import re

import numpy as np
import pytest

from ofa_jax import trees
from ofa_jax.convert.ofa import start as ofa_start
from ofa_jax.convert.ofa import table as convert
from ofa_jax.models.ofa import ClassifierConfig
from tests.ofa_golden import micro_config, micro_state_dict, rule_state_dict


def start(tensors, config, **options):
  completed = ofa_start.complete(tensors, config, seed=0, **options)
  params, rest = convert.from_torch(completed, config)
  return {**trees.flatten(params), **trees.flatten(rest)}


@functools.cache
def stored():
  params, rest = convert.from_torch(micro_state_dict(), micro_config())
  return {**trees.flatten(params), **trees.flatten(rest)}


def assert_kept(found, *, but):
  """Whatever the stored model has is as it is there, all but `but`."""
  for path, x in stored().items():
    if path not in but:
      np.testing.assert_array_equal(found[path], x, err_msg=path)


def test_nothing_is_changed_where_nothing_is_missing():
  assert_kept(start(micro_state_dict(), micro_config()), but=())


def test_new_parts_are_drawn_as_in_a_new_model():
  config = micro_config(
    adapter=8,
    scale_resids=True,
    decoder_prompt=3,
    classifier=ClassifierConfig(classes=3, hidden=4),
  )
  found = start(micro_state_dict(), config)
  assert_kept(found, but=())
  new = {path: x for path, x in found.items() if path not in stored()}
  assert {path.split("/")[-2] for path in new} >= {"up", "down", "table", "dense", "out"}
  adapters = np.concatenate(
    [x.ravel() for path, x in new.items() if "adapter" in path and path.endswith("kernel")]
  )
  assert abs(adapters.std() - 0.02) < 0.002
  assert set(new["encoder/blocks/mlp/residual_scale"].ravel()) == {1.0}
  assert len(np.unique(new["decoder/prompt/table/embedding"])) > 100


def test_tables_that_are_too_short_get_new_rows():
  config = micro_config()
  config.vocab_size, config.image_bucket_size = 120, 9
  tensors = dict(micro_state_dict())
  for side in ("encoder", "decoder"):  # whose shape the original does not change
    for layer in range(2):
      tensors.pop(f"{side}.image_rel_pos_table_list.{layer}.weight")
  found = start(tensors, config)
  tables = {"tokens/embedding": 112}
  tables |= {f"{side}/positions/image/embedding": 65 for side in ("encoder", "decoder")}
  changed = [path for path in found if path in tables or "relative/image" in path]
  assert_kept(found, but=changed)
  for path, rows in tables.items():
    np.testing.assert_array_equal(found[path][:rows], stored()[path])
    assert abs(found[path][rows:].std() / 32**-0.5 - 1) < 0.15, path
  first, second = (found[path][65:] for path in list(tables)[1:])
  assert not np.array_equal(first, second)


def test_new_tokens_may_start_as_the_mean_of_others():
  config = micro_config()
  config.vocab_size = 114
  words = start(micro_state_dict(), config, answers=[[4, 5, 6], [7]])["tokens/embedding"]
  np.testing.assert_allclose(words[112], words[4:7].mean(0), rtol=1e-6)
  np.testing.assert_array_equal(words[113], words[7])
  with pytest.raises(ValueError, match="each of the 2 new tokens, found 1"):
    start(micro_state_dict(), config, answers=[[4]])


def test_a_mask_too_many_is_dropped():
  config = micro_config()
  config.vocab_size = 111
  words = start(micro_state_dict(), config)["tokens/embedding"]
  np.testing.assert_array_equal(words, stored()["tokens/embedding"][:111])


def test_another_models_head_is_left_out():
  head = rule_state_dict({"classification_heads.x.out_proj.weight": (3, 32)})
  assert_kept(start({**micro_state_dict(), **head}, micro_config()), but=())


# The tensors that BART and OFA have in common, and where they are here.
BART = r"\.(embed_tokens|embed_positions|layernorm_embedding|\w+_attn|fc\d|final_layer_norm)\b"
OURS = r"(attn|cross)/(norm|qkv|q|kv|out)/|mlp/(norm|up|down)/|coder/text_norm|positions/text/"


def test_bart_starts_encoder_and_decoder():
  bart = {
    name: x[:60] if "embed_tokens" in name else x
    for name, x in micro_state_dict().items()
    if re.search(BART, name.replace("_attn_layer_norm", "_attn")) and "c_attn" not in name
  }
  found = start(bart, micro_config())
  paths = [path for path in stored() if re.search(OURS, path)]
  assert len(paths) > 30
  for path in paths:
    np.testing.assert_array_equal(found[path], stored()[path], err_msg=path)
  np.testing.assert_array_equal(found["tokens/embedding"][:60], stored()["tokens/embedding"][:60])
  assert set(found["encoder/blocks/attn/head_scale"].ravel()) == {1.0}


def test_other_sizes_and_other_models_are_refused():
  config = micro_config()
  config.mlp = 48
  with pytest.raises(ValueError, match=r"shape of encoder\.layers\.0\.fc1\.weight"):
    start(micro_state_dict(), config)
  with pytest.raises(ValueError, match="to start from"):
    start({"x": np.zeros(3)}, micro_config())
  with pytest.raises(ValueError, match=r"unexpected: encoder\.y"):
    start({**micro_state_dict(), "encoder.y": np.zeros(3)}, micro_config())


def test_what_is_not_stored_is_told():
  config = micro_config(adapter=8)
  config.vocab_size, config.decoder_layers = 120, 3
  lines = []
  tensors = dict(micro_state_dict())
  del tensors["encoder.layernorm_embedding.weight"]
  start(tensors, config, say=lines.append)
  assert "tokens: 8 rows behind the 112 stored ones, drawn anew" in lines
  assert "encoder/text_norm drawn anew" in lines
  assert "decoder/blocks/mlp/up[2] drawn anew" in lines
  assert any(re.fullmatch(r"encoder/blocks/.*adapter.*/down drawn anew", line) for line in lines)
  lines = []
  start(micro_state_dict(), micro_config(), say=lines.append)
  assert lines == []
