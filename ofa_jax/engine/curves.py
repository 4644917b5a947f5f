"""Curves of a run's metrics, as a picture."""

import io
import os
import pathlib
from collections.abc import Mapping, Sequence

from ofa_jax import storage

_COLUMNS = 2  # panels beside each other
_WIDTH, _HEIGHT = 6.0, 3.4  # inches of a panel


def panels(rows: Sequence[Mapping[str, float]]) -> dict[str, list[str]]:
  """The metrics that are drawn, by panel, so that a panel has one scale.

  Losses, shares (what stays between 0 and 1) and ranks have a panel each; any other metric of an
  evaluation, such as CIDEr, has one of its own. Times and rates are not drawn.

  Args:
    rows: of `metrics.jsonl`.
  """
  names = sorted({k for r in rows for k in r if k != "step"})
  losses = [n for n in names if n.endswith("loss")]
  # The scale of the logits says how the loss is made, not how good the model is.
  scores = [
    n
    for n in names
    if n not in losses and not n.startswith("train/") and not n.endswith("logit_scale")
  ]
  groups = {"loss": losses}
  for name in scores:
    if name.endswith("_rank"):
      groups.setdefault("rank", []).append(name)
    elif all(0 <= r[name] <= 1 for r in rows if name in r):
      groups.setdefault("share", []).append(name)
    else:
      groups.setdefault(name, []).append(name)
  order = ["loss", "share", *(g for g in groups if g not in ("loss", "share", "rank")), "rank"]
  return {title: groups[title] for title in order if groups.get(title)}


def plot(rows: Sequence[Mapping[str, float]], path: str | os.PathLike) -> None:
  """Draws the panels of these metrics over the steps, as PNG; nothing where there are none."""
  import matplotlib  # slow to import, and needed once a run
  import matplotlib.figure

  groups = panels(rows)
  if not groups:
    return
  columns = min(len(groups), _COLUMNS)
  lines = -(-len(groups) // columns)
  figure = matplotlib.figure.Figure(
    figsize=(_WIDTH * columns, _HEIGHT * lines), layout="constrained"
  )
  places = figure.subplots(lines, columns, squeeze=False).ravel()
  for axes in places[len(groups) :]:
    axes.remove()
  for axes, (title, group) in zip(places, groups.items(), strict=False):
    if len(group) > 10:  # the usual colours
      axes.set_prop_cycle(color=matplotlib.colormaps["tab20"].colors)
    for name in group:
      points = [(r["step"], r[name]) for r in rows if name in r]
      marker = "o" if len(points) < 30 else None
      axes.plot(*zip(*points, strict=True), label=name, marker=marker, markersize=3, linewidth=1.2)
    axes.set(title=title, xlabel="step", xlim=(0, None))
    axes.grid(alpha=0.3)
    if group != [title]:  # beside the curves, never on them
      axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
  drawn = io.BytesIO()
  figure.savefig(drawn, format="png", dpi=120)
  if storage.in_bucket(path):
    storage.write_bytes(path, drawn.getvalue())
  else:
    pathlib.Path(path).write_bytes(drawn.getvalue())
