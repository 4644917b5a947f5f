"""The scores of captions as coco-caption gives them, by the Treebank's words."""

from collections.abc import Sequence

import numpy as np

from ofa_jax.scoring import java, treebank
from ofa_jax.scoring.bleu import ORDERS, bleu
from ofa_jax.scoring.cider import cider, cider_d
from ofa_jax.scoring.rouge import rouge_l

# In coco-caption's order. "CIDEr" is what it prints, which is CIDEr-D; "CIDEr-plain" is without the
# D: neither clipping nor a look at lengths (Vedantam et al. 2015, equation 1).
METRICS = (
  *(f"coco_bleu{n}" for n in range(1, ORDERS + 1)),
  *("coco_meteor", "coco_rouge_l", "coco_cider", "coco_cider_plain", "coco_spice"),
)


def left_out() -> str | None:
  """A line on what cannot be scored here; None: all can."""
  why = java.missing()
  if not why:
    return None
  parts = [f"{name.upper()} ({reason})" for name, reason in why.items()]
  return f"not scored: {', '.join(parts)}; see docs/evaluation.md"


def scores(
  hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[str, float], list[str]]:
  """Returns the scores by `METRICS`, and a line on each program that failed, whose is left out.

  Those of programs that are not there, see `left_out`, are left out, too. Document frequencies are
  counted over these references, as coco-caption does.

  Args:
    hypotheses: captions as they stand in `predict.json`, at least one.
    references: for each hypothesis the captions of its image as people wrote them.
  """
  told = [treebank.words(caption) for caption in hypotheses]
  groups = [[treebank.words(caption) for caption in group] for group in references]
  values = dict(zip(METRICS, bleu(told, groups).tolist(), strict=False))
  values["coco_rouge_l"] = float(np.mean(rouge_l(told, groups)))
  values["coco_cider"] = float(np.mean(cider_d(told, groups)))
  values["coco_cider_plain"] = float(np.mean(cider(told, groups)))
  lines, absent = [], java.missing()
  for name, score in (("meteor", java.meteor), ("spice", java.spice)):
    if name in absent:
      continue
    try:
      values[f"coco_{name}"], _ = score(told, groups)
    except (java.JavaError, OSError) as error:
      lines.append(f"{name.upper()} is left out: {error}")
  return {name: values[name] for name in METRICS if name in values}, lines
