"""Files of the micro models as the original leaves them, for tests of conversion and loading."""

import pathlib

import numpy as np

from tests.cnclip_golden import golden_json, micro_state_dict

_GOLDEN = pathlib.Path(__file__).parent / "golden" / "cnclip"
MODEL_CONFIGS = {
  "micro_vit": (
    _GOLDEN / "micro_vit" / "Micro-ViT.json",
    _GOLDEN / "micro_vit" / "Micro-RoBERTa.json",
  ),
  "micro_rn50": (
    _GOLDEN / "micro_rn50" / "Micro-RN50.json",
    _GOLDEN / "micro_rn50" / "Micro-RBT3.json",
  ),
}


def half_state_dict(model: str) -> dict[str, np.ndarray]:
  """The state dict after the original's `convert_weights`: some tensors in float16, no pooler."""
  dtypes = golden_json(model, "fp16_dtypes")
  tensors = {k.removeprefix("module."): x for k, x in micro_state_dict(model).items()}
  return {f"module.{k}": tensors[k].astype(dtype) for k, (_, dtype) in dtypes.items()}


def save(path: pathlib.Path, state_dict: dict[str, np.ndarray], **more) -> pathlib.Path:
  """Writes a checkpoint in the released layout; `more` stands beside the state dict."""
  import torch

  tensors = {k: torch.from_numpy(np.array(x)) for k, x in state_dict.items()}
  torch.save({"epoch": 15, "step": 1000, "name": "micro", "state_dict": tensors, **more}, path)
  return path


def flash_state_dict() -> dict[str, np.ndarray]:
  """The micro ViT's state dict in the naming of the original's FlashAttention variant."""
  released = micro_state_dict("micro_vit")
  flash = {}
  for name, x in released.items():
    if ".attention.self." in name:
      prefix, part, kind = name.rsplit(".", 2)
      if part == "query":
        parts = [released[f"{prefix}.{part}.{kind}"] for part in ("query", "key", "value")]
        flash[f"{prefix}.Wqkv.{kind}"] = np.concatenate(parts)
    else:
      name = name.replace("attention.output.dense", "attention.self.out_proj")
      flash[name.replace("in_proj_", "Wqkv.")] = x
  return flash
