"""What a .pt says of a Chinese-CLIP besides its tensors."""

import dataclasses
import json

import pytest

from ofa_jax.convert import torch_files
from ofa_jax.convert.cnclip import family
from tests.cnclip_golden import micro_config

CONFIG = micro_config("micro_vit")
OTHER_HEADS = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, heads=1))


@pytest.mark.parametrize(
  ("inferred", "settings", "told"),
  [
    (CONFIG, {"context_length": 52}, False),
    (dataclasses.replace(CONFIG, name="another"), {"context_length": 52}, False),
    (OTHER_HEADS, {"context_length": 52}, True),  # and would be read as that, without a word
    (None, {"context_length": 52}, True),
    (CONFIG, {"context_length": 24}, True),
  ],
)
def test_a_file_says_what_its_tensors_do_not(monkeypatch, tmp_path, inferred, settings, told):
  def infer_config(tensors):
    if inferred is None:
      raise ValueError
    return inferred

  saved = {}
  monkeypatch.setattr(family.cnclip, "infer_config", infer_config)
  monkeypatch.setattr(family.cnclip, "to_torch", lambda *_: {})
  monkeypatch.setattr(torch_files, "save_checkpoint", lambda *_, **more: saved.update(more))
  family.save_torch(tmp_path / "x.pt", CONFIG, ({}, {}), settings=settings)
  assert (saved["described"] is not None) == told
  if told:
    options = {torch_files.DESCRIBED: json.dumps(saved["described"])}
    assert family.infer({}, options) == (CONFIG, settings)


@pytest.mark.parametrize(
  "said", [3, None, "", "[]", "{}", '{"vision": {}}', "[" * 100_000, "\ud800", '{"a": NaN}']
)
def test_what_is_no_description_is_refused(said):
  with pytest.raises(ValueError):
    family.infer({}, {torch_files.DESCRIBED: said})
