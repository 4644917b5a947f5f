"""Chinese-CLIP's initialisation: the image tower of an OpenAI CLIP and a Chinese BERT.

As the original's `restore_model`, which training starts from: of CLIP the image tower and the
temperature, of BERT everything but its pooler; the projection of texts is new. Unlike there, the
weights are not rounded to fp16 on the way.
"""

import re
from collections.abc import Mapping

import numpy as np

from ofa_jax.convert import rules
from ofa_jax.convert.cnclip import table as cnclip
from ofa_jax.convert.cnclip.positions import resize_positions
from ofa_jax.models.cnclip import CNCLIPConfig
from ofa_jax.models.vit import ViTConfig

_POSITIONS = "visual.positional_embedding"


def merge(
  clip: Mapping[str, np.ndarray],
  bert: Mapping[str, np.ndarray],
  *,
  config: CNCLIPConfig | None = None,
  seed: int = 0,
) -> tuple[dict[str, np.ndarray], CNCLIPConfig]:
  """Makes a Chinese-CLIP state dict of two others.

  Args:
    clip: OpenAI CLIP's tensors by name; `visual.*` and `logit_scale` are taken.
    bert: a BERT's tensors by name, with or without `bert.` before them and with either name of
      LayerNorm's parameters; those of its heads, its pooler and its position numbers are left out.
    config: the sizes, where they cannot be inferred. A ViT's positions are interpolated to its
      image size.
    seed: draws the text projection, N(0, 1 / width).

  Returns:
    The tensors by name, for `cnclip.from_torch`, and the sizes.

  Raises:
    ValueError: a tower is missing.
  """
  clip, bert = rules.plain_names(clip), rules.plain_names(bert)
  image = {k: v for k, v in clip.items() if k.startswith("visual.") or k == "logit_scale"}
  prefix = "" if any(name.startswith("bert.") for name in bert) else "bert."
  renamed = {re.sub("gamma$", "weight", re.sub("beta$", "bias", k)): x for k, x in bert.items()}
  text = {
    f"{prefix}{name}": x
    for name, x in renamed.items()
    if f"{prefix}{name}".startswith("bert.")
    and not name.endswith((".position_ids", ".token_type_ids"))
  }
  out = image.get("visual.proj", image.get("visual.attnpool.c_proj.bias"))
  words = text.get("bert.embeddings.word_embeddings.weight")
  if out is None or words is None:
    wrong = [
      f"{kind} among {list(tensors)[:3]}, ..."
      for kind, tensors, x in (("visual.*", clip, out), ("BERT", bert, words))
      if x is None
    ]
    raise ValueError(f"Expected a CLIP's and a BERT's tensors, found no {' and no '.join(wrong)}")
  shape = words.shape[1], out.shape[-1]
  noise = np.random.default_rng(seed).standard_normal(shape, np.float32)
  tensors = {**image, **text, "text_projection": noise / np.float32(shape[0] ** 0.5)}
  config = config or cnclip.infer_config(tensors)
  if isinstance(config.vision, ViTConfig) and _POSITIONS in tensors:
    grid = config.vision.image_size // config.vision.patch_size
    if len(tensors[_POSITIONS]) != 1 + grid**2:
      tensors[_POSITIONS] = resize_positions(tensors[_POSITIONS], grid)
  return tensors, config
