"""Models beside the one that is trained: what is promised of them is what is loaded."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from ofa_jax import hub, numerics
from ofa_jax.convert.cnclip import table as cnclip
from ofa_jax.engine import sharding
from ofa_jax.models import cnclip as model
from ofa_jax.models.abstract import abstract
from ofa_jax.tasks.contrastive import Contrastive
from ofa_jax.tasks.frozen import Frozen
from tests import ofa_golden
from tests.cnclip_golden import micro_config, micro_state_dict


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
  path = tmp_path_factory.mktemp("frozen") / "model"
  config = micro_config("micro_rn50")
  hub.save_directory(path, config, *cnclip.from_torch(micro_state_dict("micro_rn50"), config))
  return str(path)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_promise_is_what_is_loaded(stored, precision):
  mesh = sharding.make_mesh((2, 2, 2))
  frozen = Frozen.of(stored)
  spec = frozen.spec(mesh, precision=precision)
  loaded = frozen.load(mesh, precision=precision)
  describe = lambda x: (x.shape, x.dtype, x.sharding)  # noqa: E731
  assert jax.tree.map(describe, spec) == jax.tree.map(describe, loaded)
  assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(loaded))
  dtype = numerics.cast(jnp.zeros(1), precision).dtype
  assert loaded["params"]["text_projection"].dtype == dtype
  assert {x.dtype for x in jax.tree.leaves(loaded["rest"])} == {jnp.dtype("float32")}
  image = jax.ShapeDtypeStruct((3, 64, 64, 3), dtype)
  features = jax.eval_shape(lambda w, x: frozen.merge(w).encode_image(x), spec, image)
  assert features.shape == (3, frozen.config.embed_dim)


def test_a_model_may_have_a_precision_of_its_own(stored):
  mesh = sharding.make_mesh((1, 1, 1), devices=jax.devices()[:1])
  frozen = Frozen.of(stored, precision="fp32")
  for tree in (
    frozen.spec(mesh, precision="bf16"),
    frozen.load(mesh, precision="bf16"),
  ):
    assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype("float32")}


def test_a_public_models_sizes_need_no_download(monkeypatch):
  monkeypatch.setattr(hub, "open_model", lambda name: pytest.fail("opened"))
  assert Frozen.of("ViT-B-16").config == model.config(*model.MODELS["ViT-B-16"])


def test_a_model_that_was_replaced_is_told(stored):
  config = dataclasses.replace(micro_config("micro_rn50"), embed_dim=24)
  with pytest.raises(ValueError, match="expected the sizes that it had before, found"):
    Frozen(name=stored, config=config).load(sharding.make_mesh((1, 1, 1)), precision="fp32")


def test_only_a_chinese_clip_teaches_one(tmp_path):
  config = ofa_golden.micro_config()
  shapes = abstract(config)[1:]
  hub.save_directory(tmp_path / "ofa", config, *jax.tree.map(lambda x: jnp.zeros(1), shapes))
  task = Contrastive(teacher=str(tmp_path / "ofa"))
  student = dataclasses.make_dataclass("Config", ["model", "optim"])(
    micro_config("micro_vit"), None
  )
  assert "task.teacher: expected a Chinese-CLIP, found an OFA" in task.check(student)
