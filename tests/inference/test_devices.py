"""What PyTorch's users say about devices."""

import jax
import pytest

import ofa_jax
from ofa_jax import api
from ofa_jax.inference import devices
from tests.ofa_directory import save_micro


class Written:
  """Stands for a torch.device."""

  def __str__(self):
    return "cpu:1"


def test_devices_go_by_torchs_names():
  everything = jax.local_devices()
  assert devices.choose() == devices.choose("cpu") == everything and len(everything) == 8
  assert devices.choose(Written()) == [everything[1]]
  for absent in ("cuda", "cuda:0", "tpu", "cpu:8"):
    with pytest.warns(UserWarning, match=f"device='{absent}': JAX has 8 CPU devices here"):
      assert devices.choose(absent) == everything
  for wrong in ("gpus", "cpu:", 0):
    with pytest.raises(ValueError, match="cpu, cuda, gpu or tpu"):
      devices.choose(wrong)


def test_models_are_asked_as_torchs_are(tmp_path):
  model, preprocess = ofa_jax.load_from_name(save_micro(tmp_path), "cpu:2")
  assert model.eval().to("cuda").float() is model
  assert model._runner.mesh.devices.ravel().tolist() == [jax.local_devices()[2]]
  assert preprocess is model.preprocess
  assert api.CNCLIPModel.to is api.CNCLIPModel.eval is devices.itself
  assert ofa_jax.image_transform(64).keywords == {"size": 64}
