r"""Uploads a model directory, or a Hugging Face directory, with a model card.

  python -m ofa_jax.convert runs/muge models/my-clip
  hf auth login
  python tools/push_to_hub.py models/my-clip me/my-clip --run=runs/muge --license=apache-2.0

The card holds sizes, the metrics of the run's last evaluation, the licence and how to use the
model; a README.md that lies in the directory is taken in its place.
"""

import argparse
import os
import pathlib

# Nothing is computed; on an accelerator this would only fill its memory.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import huggingface_hub

from ofa_jax import cli, hub, trees
from ofa_jax.cli_parsers import expand
from ofa_jax.config import to_dict
from ofa_jax.engine import log
from ofa_jax.models.abstract import abstract

SIZES = (
  "width",
  "encoder_layers",
  "decoder_layers",
  "heads",
  "vocab_size",
)  # of models in one piece
FORMS = ("directory", "huggingface")
OURS = """import huggingface_hub, ofa_jax

model, preprocess = ofa_jax.load_from_name(huggingface_hub.snapshot_download("{repo}"))"""
TRANSFORMERS = """from transformers import ChineseCLIPModel, ChineseCLIPProcessor

model = ChineseCLIPModel.from_pretrained("{repo}")
processor = ChineseCLIPProcessor.from_pretrained("{repo}")"""


def push(
  path: str, repo: str, *, run: str | None = None, license: str, private: bool = False
) -> str:
  """Uploads a model and returns the address of its page.

  Args:
    path: a model directory or a Hugging Face directory.
    repo: `user/name`; made if it is not there.
    run: the workdir whose metrics the card shows; None: no metrics.
    license: its identifier on the hub, such as "apache-2.0".
    private: whether a new repository is.

  Raises:
    ValueError: another kind of model, a run without evaluations, or what the hub says.
  """
  try:
    huggingface_hub.utils.validate_repo_id(repo)
  except ValueError as error:
    raise ValueError(f"Expected REPO as user/name, found {repo!r}: {error}") from error
  source = hub.open_model(path)
  if source.form not in FORMS:
    raise ValueError(
      f"Expected a model directory or a Hugging Face directory, found a {source.form} in {path}; "
      "convert it first: python -m ofa_jax.convert IN OUT [--to=hf]"
    )
  folder = pathlib.Path(path)
  text = None if (folder / "README.md").exists() else card(source, repo, run=run, license=license)
  api = huggingface_hub.HfApi()
  try:
    page = api.create_repo(repo, private=private, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload model")
    if text is not None:
      api.upload_file(repo_id=repo, path_or_fileobj=text.encode(), path_in_repo="README.md")
  except Exception as error:  # of the service or of whichever HTTP library is under it
    raise ValueError(
      f"Expected to upload {path} to {repo}, found: {error}. Log in with `hf auth login` "
      "and a token that may write; started again, only what is missing is sent."
    ) from error
  return str(page)


def card(source: hub.Source, repo: str, *, run: str | None, license: str) -> str:
  """The README.md of a model's page."""
  _, params, _ = abstract(source.config)
  sizes = {"parameters": f"{trees.count(params):,}"}
  for name, value in to_dict(source.config).items():
    if isinstance(value, dict):
      fields = ((k, v) for k, v in value.items() if k != "_class")
      sizes[f"{name} tower"] = ", ".join(f"{k} {v}" for k, v in fields)
    elif name in SIZES:
      sizes[name] = str(value)
  family = source.family
  theirs = source.form == "huggingface" and family.huggingface.in_transformers
  data = huggingface_hub.ModelCardData(
    license=license, library_name="transformers" if theirs else "ofa-jax", **family.card
  )
  parts = [
    f"---\n{data.to_yaml()}\n---\n\n# {repo.rpartition('/')[2]}",
    f"This is {family.title} ({family.paper}), trained and converted with ofa_jax.",
    _table("", "", sizes),
  ]
  if run is not None:
    parts.append(_table("metric", "value", metrics(run)))
  parts += [
    f"```python\n{(TRANSFORMERS if theirs else OURS).format(repo=repo)}\n```",
    f"Licence: {license}.",
  ]
  return "\n\n".join(parts) + "\n"


def metrics(run: str) -> dict[str, str]:
  """What the last evaluations of a run found.

  Raises:
    ValueError: its `metrics.jsonl` has no evaluations.
  """
  rows = log.read_metrics(run)
  found = {
    name: (value, row["step"])
    for row in rows
    for name, value in row.items()
    if name != "step" and not name.startswith("train/")
  }
  if not found:
    raise ValueError(f"Expected evaluations in {run}/{log.METRICS}, found {len(rows)} rows, none.")
  return {name: f"{value:.4f} (step {step})" for name, (value, step) in found.items()}


def _table(left: str, right: str, rows: dict[str, str]) -> str:
  lines = [f"| {left} | {right} |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())]
  return "\n".join(lines)


def main() -> None:
  """The command."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("model", metavar="MODEL", help="a model directory or Hugging Face directory")
  parser.add_argument("repo", metavar="REPO", help="user/name on the hub")
  parser.add_argument("--run", metavar="WORKDIR", help="the run whose metrics the card shows")
  parser.add_argument("--license", required=True, help="identifier, such as apache-2.0 or mit")
  parser.add_argument("--private", action="store_true", help="a new repository is private")
  args = parser.parse_args()
  with cli.readable():
    model, run = expand(args.model), args.run and expand(args.run)
    print(push(model, args.repo, run=run, license=args.license, private=args.private))


if __name__ == "__main__":
  main()
