r"""What drawn pictures are worth: FID, inception score, CLIPSIM, CMMD.

  python -m ofa_jax.score_images --fake=out/ --real=photos/ --inception=models/inception \
    --clip=models/clip --metrics=fid,is,cmmd,clipsim --captions=captions.tsv --output=scores.json

Pictures may be in any form that training reads: a folder, a table, .tar shards, a TSV. Models are
model directories that `ofa_jax.convert` makes of the released files.

fid: Frechet distance of Inception's features. With torchvision's model it is `fid_ofa`, the number
of OFA's own script; with pytorch-fid's it is `fid_pytorch_fid`, the one of papers. The two are not
to be compared; --inception takes both models at once. --real is pictures, or an .npz with mu and
sigma of the same model's features (--save-statistics writes one).
is: the inception score, with torchvision's model, as OFA's script.
cmmd: CLIP maximum mean discrepancy, unbiased, for sets of pictures from a handful on; papers take
ViT-L/14@336px.
clipsim: the mean cosine of a picture and its caption. --captions is a table (.csv, .tsv: filepath,
title), or the pictures are PNG files that carry their captions, as `ofa_jax.generate` writes them.
With a Chinese-CLIP the captions are Chinese.

Several processes may share the work, as in training: --distributed.
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Mapping

import jax
import numpy as np
from absl import flags

from ofa_jax import cli, files, hub, storage
from ofa_jax.data import judged, pipeline, sources
from ofa_jax.data.protocols import Images
from ofa_jax.data.table import CAPTION, IMAGE, read_columns
from ofa_jax.engine import log
from ofa_jax.inference import judges
from ofa_jax.models.inception import DIMS, WIDTH, InceptionConfig
from ofa_jax.scoring import clip_scores, fid
from ofa_jax.scoring.fid import Moments

METRICS = ("fid", "is", "cmmd", "clipsim")
NAMES = {"torchvision": "fid_ofa", "pytorch_fid": "fid_pytorch_fid"}  # of FIDs, by the variant


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What is to be scored, and by which models; see the command's flags.

  Attributes:
    metrics: of `METRICS`.
    inceptions: names of Inception v3 models, of different variants.
    clip: name of a CLIP, or None.
    dims: width of the features that fid compares.
    splits: parts of which the inception score is a mean.
    drop_rest: fid leaves out the pictures behind the last whole batch of so many, as OFA's script
      does of 128; None: it takes all.
    batch_size: pictures that are computed together, over all processes.
    max_bad_rate: the largest share of unreadable pictures.
  """

  metrics: tuple[str, ...]
  inceptions: tuple[str, ...] = ()
  clip: str | None = None
  dims: int = WIDTH
  splits: int = 1
  drop_rest: int | None = None
  batch_size: int = 64
  max_bad_rate: float = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
  """What the models say of a set of pictures.

  Attributes:
    moments: of Inception's features, by the variant.
    probabilities: float32[N, 1000] of torchvision's classes, or None.
    features: float32[N, E] of a CLIP, or None.
    rows: int[N], the numbers of the pictures that could be read.
  """

  moments: Mapping[str, Moments]
  probabilities: np.ndarray | None
  features: np.ndarray | None
  rows: np.ndarray


def score(
  plan: Plan,
  *,
  fake: str,
  real: str | None = None,
  captions: str | None = None,
  statistics: str | None = None,
) -> dict[str, float]:
  """Scores pictures; every process gives the same numbers.

  Args:
    plan: which metrics, and by which models.
    fake: the pictures, as `sources.open_images` takes them.
    real: pictures to compare with, or an .npz of statistics.
    captions: a table of the fake pictures' captions; None: they are in the pictures.
    statistics: a new .npz for those of the real pictures.

  Raises:
    ValueError: what is expected is not there, before anything is compiled.
  """
  opened = _open_models(plan)
  pictures = sources.open_images(fake)
  stored = fid.load(real) if real is not None and real.endswith(".npz") else None
  references = None
  if real is not None and stored is None:
    references = sources.open_images(real)
  _check(plan, opened, pictures=pictures, references=references, stored=stored, save=statistics)
  texts = _captions(pictures, captions, fake) if "clipsim" in plan.metrics else None
  loaded = {name: judges.Judge(source) for name, source in opened.items()}
  drawn = _look(plan, loaded, pictures, text="fake", score="is" in plan.metrics)
  seen = None
  if references is not None:
    seen = _look(plan, loaded, references, text="real", score=False)
  scores = {}
  for name, moments in drawn.moments.items():
    reference = stored or seen.moments[name].statistics
    if statistics is not None and jax.process_index() == 0:
      fid.save(statistics, reference)
    suffix = "" if plan.dims == WIDTH else f"_{plan.dims}"
    scores[f"{NAMES[name]}{suffix}"] = fid.frechet_distance(reference, moments.statistics)
  if drawn.probabilities is not None:
    mean, std = fid.inception_score(drawn.probabilities, splits=plan.splits)
    scores |= {"inception_score": mean, "inception_score_std": std}
  if "cmmd" in plan.metrics:
    scores["cmmd"] = clip_scores.cmmd(seen.features, drawn.features)
  if texts is not None:
    said = loaded["clip"].texts([texts[i] for i in drawn.rows])
    scores["clipsim"] = clip_scores.clipsim(drawn.features, said)
  return scores


def _open_models(plan: Plan) -> dict[str, hub.Source]:
  """The models by the names that their pictures have in a batch; ValueError for wrong ones."""
  unknown = [name for name in plan.metrics if name not in METRICS]
  if unknown or not plan.metrics:
    raise ValueError(f"Expected metrics out of {', '.join(METRICS)}, found {unknown or 'none'}")
  if plan.dims not in DIMS:
    raise ValueError(f"Expected features of {', '.join(map(str, DIMS))} dims, found {plan.dims}")
  opened = {}
  wanted = {"fid", "is"} & set(plan.metrics)
  if wanted and not plan.inceptions:
    raise ValueError(f"Expected --inception for {' and '.join(sorted(wanted))}, found none")
  for name in plan.inceptions if wanted else ():
    source = hub.open_model(name)
    if not isinstance(source.config, InceptionConfig):
      raise ValueError(f"{name}: expected an Inception v3, found {source.family.title}")
    if source.config.variant in opened:
      raise ValueError(
        f"Expected one Inception v3 of a variant, found {source.config.variant} twice"
      )
    opened[source.config.variant] = source
  if "is" in wanted and "torchvision" not in opened:
    raise ValueError(
      "Expected torchvision's Inception v3 for the inception score, as OFA's script, found "
      f"{', '.join(opened)}"
    )
  wanted = {"cmmd", "clipsim"} & set(plan.metrics)
  if wanted and plan.clip is None:
    raise ValueError(f"Expected --clip for {' and '.join(sorted(wanted))}, found none")
  if wanted:
    source = hub.open_model(plan.clip)
    if source.family.name not in ("openai_clip", "cnclip"):
      raise ValueError(f"{plan.clip}: expected a CLIP, found {source.family.title}")
    opened["clip"] = source
  return opened


def _check(plan, opened, *, pictures, references, stored, save):
  """Sees that what is compared is there, and of one width."""
  inceptions = [name for name in opened if name != "clip"]
  number = len(pictures)
  if number < 2 and {"fid", "cmmd"} & set(plan.metrics):
    raise ValueError(f"Expected at least two pictures to compare with others, found {number}")
  if references is not None and len(references) < 2:
    raise ValueError(f"Expected at least two real pictures, found {len(references)}")
  if "fid" in plan.metrics and stored is None and references is None:
    raise ValueError(
      "Expected --real for fid: pictures, or an .npz of their statistics; found none"
    )
  if "cmmd" in plan.metrics and references is None:
    raise ValueError("Expected --real with pictures for cmmd, which statistics do not replace")
  if stored is not None and len(stored.mean) != plan.dims:
    raise ValueError(
      f"Expected reference statistics of {plan.dims} dims, the features that are compared, found "
      f"{len(stored.mean)}; give those of the same model and --dims"
    )
  if stored is not None and len(inceptions) > 1:
    raise ValueError(
      f"Expected one Inception v3 for statistics out of a file, which are of one, found "
      f"{' and '.join(inceptions)}"
    )
  if save is not None and (references is None or len(inceptions) != 1 or "fid" not in plan.metrics):
    raise ValueError(
      "Expected real pictures, one Inception v3 and the metric fid for --save-statistics"
    )
  if "is" in plan.metrics and number < plan.splits:
    raise ValueError(f"Expected at least {plan.splits} pictures for as many splits, found {number}")


def _captions(pictures: Images, table: str | None, fake: str) -> list[str | None]:
  """The caption of every picture; ValueError where they are missing."""
  if table is None:
    captions = judged.captions_in(pictures)
    cure = "give them by --captions: a table with the columns filepath and title"
  else:
    root = fake if storage.is_dir(fake) else None
    rows = read_columns([table], [IMAGE, CAPTION], root=root)
    named = {os.path.normpath(path): text for path, text in rows}
    captions = [named.get(os.path.normpath(name)) for name in pictures.ids]
    cure = f"{table} has to name all pictures, by paths relative to {root or 'its folder'}"
  without = [name for name, text in zip(pictures.ids, captions, strict=True) if text is None]
  if without:
    raise ValueError(
      f"Expected a caption for each of {len(captions)} pictures, found none for {len(without)}: "
      f"{', '.join(without[:3])}; {cure}"
    )
  return captions


def _look(
  plan: Plan, loaded: Mapping[str, judges.Judge], pictures: Images, *, text: str, score: bool
) -> Side:
  """Shows pictures to the models; every process looks at its own."""
  prepared = {name: judges.preparation(judge.config) for name, judge in loaded.items()}
  rows = judged.JudgedRows(
    pictures,
    prepare={name: prepare for name, (prepare, _) in prepared.items()},
    blanks={name: blank for name, (_, blank) in prepared.items()},
  )
  compared = _compared(plan, len(rows))
  empty = Moments(0, np.zeros(plan.dims), np.zeros((plan.dims, plan.dims)))
  moments = {name: empty for name in loaded if name != "clip" and "fid" in plan.metrics}
  kept: dict[str, list[np.ndarray]] = {"index": [], "probabilities": [], "clip": []}
  bad = pipeline.BadRows(plan.max_bad_rate, _to_stderr)
  hosts = jax.process_count()
  with (
    pipeline.eval_batches(
      rows, batch_size=plan.batch_size, host=jax.process_index(), hosts=hosts, bad=bad
    ) as batches,
    cli.progress(text, total=len(rows), unit="images") as advance,
  ):
    for batch in batches:
      real = batch["weight"] > 0
      index = batch["index"][real]
      kept["index"].append(index)
      for name in moments:
        features = loaded[name](_FEATURES[plan.dims], batch[name])[real]
        moments[name] += Moments.of(features[index < compared])
      if score:
        found = loaded["torchvision"](judges.probabilities, batch["torchvision"])
        kept["probabilities"].append(found[real])
      if "clip" in loaded:
        kept["clip"].append(loaded["clip"](judges.encode_image, batch["clip"])[real])
      advance(hosts * int((batch["index"] >= 0).sum()))
  mine = np.concatenate(kept.pop("index"))
  rows_of_all = {
    name: judges.rows_of_hosts(mine, np.concatenate(found)) for name, found in kept.items() if found
  }
  return Side(
    moments={name: judges.sum_over_hosts(x) for name, x in moments.items()},
    probabilities=rows_of_all.get("probabilities"),
    features=rows_of_all.get("clip"),
    rows=judges.rows_of_hosts(mine, mine.astype(np.float32)).astype(int),
  )


def _compared(plan: Plan, number: int) -> int:
  """How many of the pictures fid compares."""
  size = plan.drop_rest
  return number if size is None or number < size else number // size * size


def _features(dims: int):
  return lambda model, pictures: model.features(pictures, dims=dims)


_FEATURES = {dims: _features(dims) for dims in DIMS}  # each one function, so that it compiles once


def _to_stderr(line: str) -> None:
  print(line, file=sys.stderr)


def main() -> None:
  """The command."""
  fake = cli.define_path("fake", "Drawn pictures: a folder, table, .tar, TSV.", required=True)
  real = cli.define_path("real", "Pictures to compare with, or an .npz with mu and sigma.")
  metrics = flags.DEFINE_list("metrics", ["fid"], f"Out of {', '.join(METRICS)}.")
  inceptions = cli.define_paths("inception", "Inception v3, of one variant or of both.")
  clip = cli.define_path("clip", "An OpenAI CLIP or a Chinese-CLIP.")
  captions = cli.define_path("captions", "Table (.csv, .tsv) of the pictures: filepath, title.")
  output = cli.define_path("output", "JSON file for the numbers.")
  statistics = cli.define_path("save-statistics", "New .npz for those of the real pictures.")
  dims = flags.DEFINE_integer("dims", WIDTH, "Width of the features that fid compares.")
  splits = flags.DEFINE_integer("splits", 1, "Parts of the inception score.", lower_bound=1)
  drop_rest = flags.DEFINE_integer(
    "drop-rest",
    None,
    "Leave out of fid what is behind the last whole batch of so many pictures: OFA's script does, "
    "128.",
    lower_bound=2,
  )
  batch_size = flags.DEFINE_integer("batch-size", 64, "Pictures computed together.", lower_bound=1)
  max_bad_rate = cli.define_max_bad_rate("pictures")
  cli.define_distributed()
  cli.define_stage()

  def work():
    plan = Plan(
      metrics=tuple(metrics.value),
      inceptions=tuple(inceptions.value or ()),
      clip=clip.value,
      dims=dims.value,
      splits=splits.value,
      drop_rest=drop_rest.value,
      batch_size=batch_size.value,
      max_bad_rate=max_bad_rate.value,
    )
    scores = score(
      plan,
      fake=fake.value,
      real=real.value,
      captions=captions.value,
      statistics=statistics.value,
    )
    if jax.process_index() == 0:
      for name, value in scores.items():
        print(f"{name}: {value}")
      if output.value:
        files.write_text(output.value, json.dumps(scores, indent=2) + "\n")
        print(f"Scores are in {output.value}")

  def command():
    log.quiet_libraries()
    inputs = (fake.value, real.value, captions.value)
    with contextlib.ExitStack() as held:
      for path, flag in ((output.value, "--output"), (statistics.value, "--save-statistics")):
        if path is not None and jax.process_index() == 0:
          held.enter_context(cli.sole_writer(path, flag=flag, inputs=inputs))
      work()

  cli.run(command)


if __name__ == "__main__":
  main()
