"""Ways to tune few of an OFA's parameters, each the original's script for RefCOCO but `lora`.

  prompt    100 learnt keys and values before those of each layer's self-attention; nothing else is
            trained
  adapter   two small matrices behind each layer's feed-forward part; as in the original the whole
            model is trained with them, but for the table of tokens
  bitfit    the biases of norms and of feed-forward parts, and nothing else (arXiv 2106.10199)
  lora      what is added to the matrices of attention, in factors of rank 16 (arXiv 2106.09685);
            nothing else is trained. The original has no such script

The original tries the rates 0.03, 5e-5 and 1e-4 for each and does not say which it took:
--config.optim.lr. Before the first step the log says what is trained ("trained") and, with prompts
and adapters, what the weights to start from lack and is drawn anew.
"""

import dataclasses

from ofa_jax.config import Config, Lora
from ofa_jax.models import ofa

KINDS = ("prompt", "adapter", "bitfit", "lora")
LENGTH = 100  # of prompts, and the width of adapters
RATES = {"prompt": 0.03, "adapter": 5e-5, "bitfit": 1e-4, "lora": 1e-4}
ATTENTION = (r"/(attn|cross)/(qkv|q|kv|out)/kernel$",)


def tuned(config: Config, kind: str) -> Config:
  """A recipe of the whole model as one of few parameters; ValueError for an unknown kind."""
  if kind not in KINDS:
    raise ValueError(f"Expected a way of tuning out of {', '.join(KINDS)}, found {kind!r}")
  parts = {
    "prompt": {"encoder_prompt": LENGTH, "decoder_prompt": LENGTH},
    "adapter": {"adapter": LENGTH},
  }
  frozen = {"freeze": ofa.FREEZE[kind]} if kind in ofa.FREEZE else {}
  if kind == "lora":
    frozen = {"freeze": (), "lora": Lora(matrices=ATTENTION, rank=16, alpha=32.0)}
  return dataclasses.replace(
    config,
    name=f"{config.name}, {kind}",
    model=dataclasses.replace(config.model, **parts.get(kind, {})),
    optim=dataclasses.replace(config.optim, lr=RATES[kind], **frozen),
  )
