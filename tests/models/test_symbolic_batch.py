"""Every model is one program for any number of rows: it lowers with a symbolic batch."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import export

from ofa_jax.decode import beam, candidates
from ofa_jax.models.abstract import abstract
from ofa_jax.models.ofa import ClassifierConfig
from ofa_jax.models.vit import ViTConfig
from tests import cnclip_golden, ofa_golden

PLAN = candidates.plan([[10, 11], [10, 12, 13], [14]])


def lowered(config, function, **inputs):
  """The shapes that `function(model, **inputs)` gives; of an input's shape "b" is the batch."""
  (b,) = export.symbolic_shape("b")
  graph, params, rest = abstract(config)
  specs = {
    name: jax.ShapeDtypeStruct((b, *shape), dtype) for name, (shape, dtype) in inputs.items()
  }

  @jax.jit
  def run(params, rest, inputs):
    return function(nnx.merge(graph, params, rest), **inputs)

  exported = export.export(run)(params, rest, specs)
  shapes = [x.shape for x in exported.out_avals]
  assert all(str(shape[0]) == "b" for shape in shapes), shapes
  return [shape[1:] for shape in shapes]


@pytest.mark.parametrize("model", cnclip_golden.MICRO)
def test_chinese_clip(model):
  config = cnclip_golden.micro_config(model)
  size, width = config.vision.image_size, config.embed_dim
  image, tokens = ((size, size, 3), jnp.float32), ((8,), jnp.int32)
  found = lowered(
    config,
    lambda model, image, tokens: (model.encode_image(image), model.encode_text(tokens)),
    image=image,
    tokens=tokens,
  )
  assert found == [(width,), (width,)]
  found = lowered(config, lambda model, **inputs: model(**inputs)[:2], image=image, tokens=tokens)
  assert found == [(width,), (width,)]


IMAGE = {"image": ((64, 48, 3), jnp.float32), "image_mask": ((), jnp.bool_)}
TEXT = {"tokens": ((5,), jnp.int32)}
ANSWER = {"decoder_tokens": ((4,), jnp.int32)}


TRUNKS = {
  "vit": {"stages": (), "vit": ViTConfig(image_size=64, patch_size=16, width=64, layers=1)},
  "two_images": {"max_images": 2},
}


@pytest.mark.parametrize("options", ["plain", *ofa_golden.VARIANTS, *TRUNKS])
def test_ofa(options):
  config = ofa_golden.micro_config(**(ofa_golden.VARIANTS | TRUNKS).get(options, {}))
  second = {"second_image": ((32, 48, 3), jnp.float32)} if options == "two_images" else {}
  inputs = TEXT | IMAGE | ANSWER | second
  found = lowered(config, lambda model, **inputs: model(**inputs), **inputs)
  assert found == [(4, 112)]


def test_ofas_parts():
  config = ofa_golden.micro_config(classifier=ClassifierConfig(classes=3, hidden=4))

  def parts(model, tokens, decoder_tokens, code_mask, patch_ids, **image):
    encoded = model.encode(tokens)
    return (
      encoded.hidden,
      model.decode(encoded, decoder_tokens),
      model.decode(encoded, decoder_tokens, code_mask=code_mask),
      model.classify(encoded, decoder_tokens),
      model.encode(tokens, patch_ids=patch_ids, **image).hidden,
    )

  found = lowered(
    config,
    parts,
    code_mask=((), jnp.bool_),
    patch_ids=((6,), jnp.int32),
    **TEXT,
    **IMAGE,
    **ANSWER,
  )
  assert found == [(5, 32), (4, 112), (4, 112), (3,), (11, 32)]


@pytest.mark.parametrize("code", [False, True])
def test_ofas_search(code):
  search = beam.Search(num_beams=2, max_length=3, gen_code=code)

  def generate(model, tokens, **image):
    encoded = model.encode(tokens, **image)
    cache = model.start(encoded, max_length=4, hypotheses=2, code=code)
    return beam.generate(
      model.step, cache, reorder=model.reorder, search=search, batch=tokens.shape[0]
    )

  found = lowered(ofa_golden.micro_config(), generate, **TEXT, **IMAGE)
  assert found == [(2, 4), (2,), (2,), (2, 4)]


@pytest.mark.parametrize("options", ["plain", "prefix_plain"])
def test_ofas_scores_of_answers(options):
  config = ofa_golden.micro_config(**ofa_golden.VARIANTS.get(options, {}))

  def score(model, tokens, decoder_tokens, **image):
    encoded = model.encode(tokens, **image)
    return candidates.score_answers(model, encoded, prompts=decoder_tokens, plan=PLAN)

  assert lowered(config, score, **TEXT, **IMAGE, **ANSWER) == [(len(PLAN.paths),)]
