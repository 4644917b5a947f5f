r"""The VQGAN of taming-transformers and of OFA for `hub`: its table and the files it comes in.

`last.ckpt` is of PyTorch Lightning and holds what judged the pictures in training, too, which is
left out. Its tensors tell all sizes but the side of the pictures, which is in `model.yaml` beside
it, with the rest of the sizes; where that file is not there, the released model's is meant.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml

from ofa_jax.convert import limits, rules, tables, torch_files
from ofa_jax.convert.family import Family
from ofa_jax.convert.params import Weights
from ofa_jax.convert.rules import SAME, Rule, conv_rules, norm_rules, pointwise_rules
from ofa_jax.models.vqgan import VQGANConfig

TITLE = "a VQGAN"
YAML = "model.yaml"
RELEASED = VQGANConfig(name="vqgan_gumbel_f8")
_MAX_YAML = 1 << 16  # bytes; the released one has 2,000


def _block_rules(torch: str, ours: str) -> tuple[Rule, ...]:
  return (
    *norm_rules(f"{torch}.norm1", f"{ours}/norm1"),
    *conv_rules(f"{torch}.conv1", f"{ours}/conv1"),
    *norm_rules(f"{torch}.norm2", f"{ours}/norm2"),
    *conv_rules(f"{torch}.conv2", f"{ours}/conv2"),
    *pointwise_rules(f"{torch}.nin_shortcut", f"{ours}/shortcut"),
  )


def _attention_rules(torch: str, ours: str) -> tuple[Rule, ...]:
  return (
    *norm_rules(f"{torch}.norm", f"{ours}/norm"),
    *pointwise_rules(f"{torch}.q", f"{ours}/attn/qkv", part=0),
    *pointwise_rules(f"{torch}.k", f"{ours}/attn/qkv", part=1),
    *pointwise_rules(f"{torch}.v", f"{ours}/attn/qkv", part=2),
    *pointwise_rules(f"{torch}.proj_out", f"{ours}/attn/out", inputs=2),
  )


def _half_rules(half: str, level: str, resample: str) -> tuple[Rule, ...]:
  return (
    *conv_rules(f"{half}.conv_in", f"{half}/conv_in"),
    *_block_rules(rf"{half}.{level}.(\d+).block.(\d+)", rf"{half}/{level}\1/block\2"),
    *_attention_rules(rf"{half}.{level}.(\d+).attn.(\d+)", rf"{half}/{level}\1/attn\2"),
    *conv_rules(rf"{half}.{level}.(\d+).{resample}.conv", rf"{half}/{level}\1/resample"),
    *_block_rules(rf"{half}.mid.block_(\d+)", rf"{half}/mid/block\1"),
    *_attention_rules(rf"{half}.mid.attn_(\d+)", rf"{half}/mid/attn\1"),
    *norm_rules(f"{half}.norm_out", f"{half}/norm_out"),
    *conv_rules(f"{half}.conv_out", f"{half}/conv_out"),
  )


RULES: tuple[Rule, ...] = (
  *_half_rules("encoder", "down", "downsample"),
  *_half_rules("decoder", "up", "upsample"),
  *pointwise_rules("quant_conv", "quant_conv"),
  *pointwise_rules("quantize.proj", "proj"),
  ("quantize.embed.weight", "embed/embedding", SAME),
  *pointwise_rules("post_quant_conv", "post_quant_conv"),
)
IGNORED: tuple[tuple[str, str], ...] = (
  (r"^loss\.", "what judged the pictures in training: LPIPS and a discriminator"),
  (r"\.num_batches_tracked$", "a counter of the discriminator's norms"),
)


def from_torch(tensors: Mapping[str, np.ndarray], config: VQGANConfig) -> Weights:
  """Makes weights of the original's tensors by name; ValueError as `tables.from_torch`."""
  return tables.from_torch(rules.plain_names(tensors), config, table=RULES, ignored=IGNORED)


def to_torch(weights: Weights) -> dict[str, np.ndarray]:
  """Tensors as the original names them."""
  return tables.to_torch(weights, table=RULES)


def infer(
  tensors: Mapping[str, np.ndarray], options: Mapping[str, Any]
) -> tuple[VQGANConfig, dict[str, Any]]:
  """Reads the sizes off the tensors, and the side of the pictures out of what is beside them.

  Args:
    tensors: by name.
    options: of the file, and "model.yaml" as `beside` reads it.

  Raises:
    ValueError: tensors are missing, or `model.yaml` is of a VQGAN of other sizes; all of them.
  """
  config = infer_config(rules.plain_names(tensors))
  config.image_size = torch_files.described(options).get("image_size", config.image_size)
  if options.get(YAML) is not None:
    config.image_size = _checked(config, options[YAML])
  if dataclasses.replace(config, name=RELEASED.name) == RELEASED:
    config.name = RELEASED.name
  return limits.check(config), {}


def infer_config(tensors: Mapping[str, np.ndarray]) -> VQGANConfig:
  """Sizes of a state dict, the side of the pictures being the released model's.

  Raises:
    ValueError: tensors that this model has are missing, or have another number of axes.
  """
  levels = rules.count_layers(tensors, r"encoder\.down\.(\d+)\.")
  try:
    width = len(tensors["encoder.conv_in.weight"])
    outputs = [len(tensors[f"encoder.down.{i}.block.0.conv2.weight"]) for i in range(levels)]
    num_codes, embed_dim = tensors["quantize.embed.weight"].shape
    z_channels = len(tensors["encoder.conv_out.weight"])
  except (KeyError, ValueError, TypeError) as error:
    raise ValueError(
      f"Expected the tensors of a VQGAN, found none of its {error}; the first names are "
      f"{list(tensors)[:3]}"
    ) from error
  uneven = [x for x in outputs if not width or x % width]
  if uneven or not levels:
    raise ValueError(
      f"Expected a VQGAN whose levels have multiples of its first {width} channels, found {outputs}"
    )
  return VQGANConfig(
    image_size=RELEASED.image_size,
    num_codes=num_codes,
    embed_dim=embed_dim,
    z_channels=z_channels,
    width=width,
    multipliers=tuple(x // width for x in outputs),
    blocks=rules.count_layers(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
    attention=tuple(i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in tensors),
  )


def beside(folder: pathlib.Path) -> dict[str, Any]:
  """The sizes in `model.yaml` of a checkpoint's folder: {"model.yaml": fields, None without one}.

  Nothing that the file names is made or imported.

  Raises:
    ValueError: it is no YAML of a model.
  """
  path = folder / YAML
  if not path.is_file():
    return {YAML: None}
  try:
    if path.stat().st_size > _MAX_YAML:
      raise ValueError(f"{path.stat().st_size:,} bytes, more than any description")
    text = path.read_text(encoding="utf-8")
    # By references a few lines can be a value that no memory holds.
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
      raise ValueError("references (*name)")
    fields = yaml.safe_load(text)["model"]["params"]
    if not isinstance(fields, dict) or not isinstance(fields["ddconfig"], dict):
      raise ValueError("no params with a ddconfig")
  except (ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError) as error:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    raise ValueError(
      f"{path}: expected the sizes of a VQGAN under model.params, found {reason:.200}; take the "
      "file that belongs to the checkpoint, or move it away"
    ) from error
  return {YAML: fields}


def _checked(config: VQGANConfig, fields: Mapping[str, Any]) -> int:
  """The side of the pictures; ValueError where the fields are of another model."""
  sizes = fields["ddconfig"]
  side = sizes.get("resolution")
  if type(side) is not int or side < 1:
    raise ValueError(f"{YAML}: expected the resolution as a number of pixels, found {side!r:.40}")
  resolutions = sizes.get("attn_resolutions")
  resolutions = resolutions if isinstance(resolutions, list) else []
  levels = range(len(config.multipliers))
  expected = {
    "ddconfig.double_z": (sizes.get("double_z", True), False),
    "ddconfig.in_channels": (sizes.get("in_channels"), 3),
    "ddconfig.out_ch": (sizes.get("out_ch"), 3),
    "ddconfig.ch": (sizes.get("ch"), config.width),
    "ddconfig.ch_mult": (sizes.get("ch_mult"), list(config.multipliers)),
    "ddconfig.num_res_blocks": (sizes.get("num_res_blocks"), config.blocks),
    "ddconfig.z_channels": (sizes.get("z_channels"), config.z_channels),
    "attention at the levels": (
      [i for i in levels if side >> i in resolutions],
      list(config.attention),
    ),
    "embed_dim": (fields.get("embed_dim"), config.embed_dim),
    "n_embed": (fields.get("n_embed"), config.num_codes),
  }
  problems = [
    f"{name}: {told!r:.60}, the tensors {found!r:.60}"
    for name, (told, found) in expected.items()
    if told != found
  ]
  if problems:
    raise ValueError(
      f"Expected {YAML} beside the file to be of its model, found a VQGAN of other sizes: "
      + "; ".join(problems)
      + ". Take the file that belongs to the checkpoint"
    )
  return side


def save_torch(
  path: pathlib.Path, config: VQGANConfig, weights: Weights, *, settings: Mapping[str, Any]
) -> None:
  """Writes a checkpoint that the original loads, with the side of the pictures beside."""
  del settings
  described = {"image_size": config.image_size}
  torch_files.save_state_dict(path, to_torch(weights), under="state_dict", described=described)


FAMILY = Family(
  name="vqgan",
  title=TITLE,
  paper="arXiv 2012.09841",
  config=VQGANConfig,
  marks=(r"quantize\.embed\.weight$", r"quantize\.proj\.", r"encoder\.down\.\d+\."),
  settings={},
  read_settings=lambda described: {},
  to_json=dataclasses.asdict,
  from_json=functools.partial(limits.from_json, VQGANConfig, title=TITLE),
  infer=infer,
  from_torch=from_torch,
  save_torch=save_torch,
  image_size=lambda config, settings: config.image_size,
  card={"pipeline_tag": "image-to-image", "tags": ["vqgan", "image-tokenizer"]},
  beside=beside,
)
