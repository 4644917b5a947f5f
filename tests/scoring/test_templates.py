import collections
import hashlib
import json
import pathlib

import pytest

from ofa_jax.scoring import templates

GOLDEN = json.loads(
  (pathlib.Path(__file__).parents[1] / "golden/cnclip/zeroshot/templates.json").read_text()
)
NAMES = {name: name.removesuffix("_templates").upper() for name in GOLDEN["sets"]}
NAMES["hatefulmemes_templates"] = "HATEFUL_MEMES"


@pytest.mark.parametrize("name", GOLDEN["sets"])
def test_every_set_is_the_original_with_its_repetitions(name):
  ours = getattr(templates, NAMES[name])
  assert collections.Counter(ours) == collections.Counter(GOLDEN["sets"][name])


@pytest.mark.parametrize("dataset", GOLDEN["by_dataset"])
def test_the_choice_by_data_set(dataset):
  chosen = getattr(templates, NAMES[GOLDEN["by_dataset"][dataset]])
  assert templates.templates_for(dataset) is chosen


@pytest.mark.parametrize("dataset", ["imagenet", "cifar-10", "mnist", "Food-101"])
def test_all_others_have_the_general_set(dataset):
  assert templates.templates_for(dataset) is templates.OPENAI
  assert (len(templates.OPENAI), len(set(templates.OPENAI))) == (183, 179)


def test_imagenet_80():
  """The digest is that of the sorted templates in cn_clip 1.6.0's imagenet_zeroshot_templates."""
  digest = hashlib.sha256("\n".join(sorted(templates.IMAGENET80)).encode()).hexdigest()
  assert digest == "c74f3befd54ca039ca102a52fb217dbee5a534ec9f1fc9376523a4aa2d846dcd"
