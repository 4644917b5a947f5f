"""Which family a checkpoint is of, by the names of its tensors, and what others are told to be."""

import json
import pathlib

import pytest

from ofa_jax import hub
from ofa_jax.convert import family
from tests import frozen_golden
from tests.cnclip_golden import MICRO
from tests.cnclip_golden import micro_state_dict as cnclip_tensors
from tests.ofa_golden import micro_state_dict as ofa_tensors

torch = pytest.importorskip("torch")

# All names of the tensors of small models of other families, as their authors' code has them.
NAMES = json.loads(
  (pathlib.Path(__file__).parents[1] / "golden" / "foreign" / "names.json").read_text()
)


def bert():
  names = [name.removeprefix("module.") for name in cnclip_tensors("micro_vit")]
  return [*(name for name in names if name.startswith("bert.")), "cls.predictions.bias"]


def bart():
  ofa_only = ("embed_image", "rel_pos", "rp_bucket", "pos_", "image", "type_", "code_", "c_attn")
  return [name for name in ofa_tensors() if not any(part in name for part in ofa_only)]


OTHERS = {
  # Its codes are the nearest entries, not drawn ones.
  "vqgan": [
    name.replace("quantize.embed.", "quantize.embedding.")
    for name in NAMES["vqgan"]
    if not name.startswith("quantize.proj.")
  ],
  "bert": bert(),
  "bert without a prefix": [name.removeprefix("bert.") for name in bert()],
  "bart": bart(),
  "image tower": [n for n in NAMES["openai_clip"] if n.startswith("visual.")],
}
TITLES = {
  "vqgan": "a VQGAN of another kind; its codes come without Gumbel-softmax",
  "bert": "a BERT; a Chinese-CLIP starts from it",
  "bert without a prefix": "a BERT",
  "bart": "a BART or another Transformer of fairseq; an OFA starts training from it",
  "image tower": "an image tower alone",
}


def families(names):
  return [each.name for each in hub.FAMILIES if each.wrote(names)]


def test_ours_are_known_by_their_names():
  for name in MICRO:
    tensors = cnclip_tensors(name)
    assert families(tensors) == ["cnclip"]
    assert families([f"module.{n.removeprefix('module.')}" for n in tensors]) == ["cnclip"]
  assert families(ofa_tensors()) == ["ofa"]
  for name in ("openai_clip", "vqgan"):
    assert families(NAMES[name]) == [name]
  for name, (folder, _) in frozen_golden.LISTS.items():
    kind = "inception" if folder == "fid_is" else folder
    assert families(frozen_golden.golden_json(*frozen_golden.LISTS[name])["state_dict"]) == [kind]


@pytest.mark.parametrize("kind", OTHERS)
def test_others_are_not_taken_for_ours(kind, tmp_path):
  assert families(OTHERS[kind]) == []
  torch.save({name: torch.zeros(1) for name in OTHERS[kind]}, tmp_path / "x.pt")
  with pytest.raises(ValueError) as raised:
    hub.open_model(tmp_path / "x.pt")
  ours = " or ".join(each.title for each in hub.FAMILIES)
  expected = f"expected the tensors of {ours}, found {TITLES[kind]}"
  assert expected in str(raised.value)


def test_what_nobody_knows_is_shown():
  assert family.guess(["x.weight"]) == ""


def test_every_family_is_whole():
  names = [each.name for each in hub.FAMILIES]
  assert len({*names}) == len({each.config for each in hub.FAMILIES}) == len(names)
  for each in hub.FAMILIES:
    for release in each.releases:
      if each.released is not None:
        assert isinstance(each.released(release), each.config)
