r"""Converts PyTorch and Hugging Face weights to a model directory, and back.

  python -m ofa_jax.convert clip_cn_vit-b-16.pt models/ViT-B-16
  python -m ofa_jax.convert runs/muge muge.pt --to=torch
  python -m ofa_jax.convert models/ViT-B-16 hf/ViT-B-16 --to=hf --check
  python -m ofa_jax.convert ViT-B-16.pt start/ --bert=chinese-roberta-wwm-ext/
  python -m ofa_jax.convert vqa_base_best.pt models/vqa --ema
  python -m ofa_jax.convert vqgan/last.ckpt models/vqgan
  python -m ofa_jax.convert ViT-B-16.pt models/clip
  python -m ofa_jax.convert pt_inception-2015-12-05-6726825d.pth models/inception

IN is a released `.pt` or one that the originals' training wrote (fp32 or fp16, with or without
optimizer, in FlashAttention's naming or the usual one), a Hugging Face directory of a
ChineseCLIPModel or an OFAModel, a model directory, or a workdir of ofa_jax.train (W@STEP and W@best
are one checkpoint of it, W the newest). The sizes are read off the weights; where a Chinese-CLIP's
number of heads cannot be (heads are neither 64 wide nor ViT-H-14's 80), give the original's JSON
files with --model-config. An OFA's tokenizer is copied from the folder of its weights, or of
--tokenizer: dict.txt, encoder.json, vocab.bpe; or dict.txt, vocab.txt; or vocab.json, merges.txt.
Without one, what needs no text works.

What text to image and its metrics need is converted so, too, each known by its tensors' names: the
VQGAN (`last.ckpt`, with `model.yaml` beside it), OpenAI's CLIP (its TorchScript archive, a state
dict, a Hugging Face directory of a CLIPModel), Inception v3 of torchvision and of pytorch-fid.
"""

import argparse
import os
import pathlib

# A conversion computes nothing; on an accelerator it would only fill its memory.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from flax import nnx

from ofa_jax import calibrations, checksums, cli, hub, trees, weights
from ofa_jax.cli_parsers import expand
from ofa_jax.convert import torch_files
from ofa_jax.convert.cnclip import family as cnclip_family
from ofa_jax.convert.cnclip import model_config
from ofa_jax.convert.cnclip import table as cnclip
from ofa_jax.convert.openai_clip import family as openai_clip_family
from ofa_jax.files import written_whole
from ofa_jax.models.abstract import abstract
from ofa_jax.models.openai_clip import OpenAICLIPConfig

TARGETS = ("orbax", "torch", "hf")


def convert(
  path: str,
  out: str,
  *,
  to: str = "orbax",
  bert: str | None = None,
  model_config_files: tuple[str, ...] = (),
  check: bool = False,
  ema: bool = False,
  tokenizer: str | None = None,
) -> None:
  """Converts one model; the arguments are the command's.

  Raises:
    ValueError: everything that does not fit, nothing being written then.
  """
  with cli.sole_writer(out, flag="OUT", new=True):
    source = _open(
      path,
      bert=bert,
      model_config_files=model_config_files,
      ema=ema,
      tokenizer=tokenizer,
    )
    with written_whole(out) as made:
      params, rest = source.load()
      _write(made, source, params, rest, to=to)
      known = {} if to == "torch" else calibrations.load(source)
      if known:  # of these very weights
        calibrations.store(made, known)
  name = source.config.name or "unnamed sizes"
  print(f"{path} ({source.form}) -> {out} ({to}): {name}, {trees.count(params):,} parameters")
  del params, rest
  if to != "torch" and source.family.tokenizers:
    try:
      source.tokenizer  # noqa: B018 - whether there is one
    except ValueError as error:
      print(f"{out} reads ids, but no text yet. {error}")
  if check:
    for line in _check(path, out, source, to=to):
      print(line)


def _open(path, *, bert, model_config_files, ema, tokenizer) -> hub.Source:
  config = model_config.read(model_config_files) if model_config_files else None
  if bert:
    source = weights.open_towers(path, bert, config=config)
  else:
    source = hub.open_model(path, config=config, ema=ema)
  if config and source.form not in ("torch", "towers"):
    raise ValueError(f"Expected --model-config only for a .pt; {path} describes its own sizes")
  return source.with_tokenizer(tokenizer)


def _write(out: pathlib.Path, source: hub.Source, params, rest, *, to: str) -> None:
  if to == "orbax":
    stored = {"settings": source.settings, "files": source.files}
    hub.save_directory(out, source.config, params, rest, **stored)
    return
  arrays = jax.device_get((params, rest))
  if to == "torch":
    source.family.save_torch(out, source.config, arrays, settings=source.settings)
  else:
    if source.family.huggingface is None:
      raise ValueError(
        f"Expected a model that Hugging Face's libraries know for --to=hf, found "
        f"{source.family.title}; use --to=torch"
      )
    source.family.huggingface.save(
      out, source.config, arrays, settings=source.settings, files=source.files
    )
    checksums.write(out)  # transformers takes no notice of it


def _check(path: str, out: str, source: hub.Source, *, to: str) -> list[str]:
  """Lines on the largest differences between our features and PyTorch's, on random inputs."""
  forms = {path: source.form, out: {"orbax": "directory", "hf": "huggingface"}.get(to, to)}
  peers = {"torch": _cn_clip, "huggingface": _transformers}
  if source.family is openai_clip_family.FAMILY:
    del peers["torch"]  # the original is in no package
  elif source.family is not cnclip_family.FAMILY:
    return [f"not checked: this command runs no PyTorch model that is {source.family.title}"]
  theirs = [p for p, form in forms.items() if form in peers]
  if not theirs:
    return ["not checked: neither side is a whole PyTorch model that this command runs"]
  rng = np.random.default_rng(0)
  size, text = source.config.vision.image_size, source.config.text
  image = rng.standard_normal((2, size, size, 3), np.float32)
  shape = (2, source.settings.get("context_length", text.max_positions))
  tokens = rng.integers(1, text.vocab_size - 1, shape, np.int32)
  if source.family is openai_clip_family.FAMILY:
    tokens[:, -1] = text.vocab_size - 1  # where a text ends
  own = [p for p, form in forms.items() if form in ("directory", "run")] or [out]
  ours = _features(hub.open_model(own[0], config=source.config), image, tokens)
  lines = []
  for other in theirs:
    run = peers[forms[other]]
    for kind, mine, reference in zip(
      ("image", "text"), ours, run(other, source.config, image, tokens), strict=True
    ):
      worst, largest = np.abs(mine - reference).max(), np.abs(reference).max()
      lines.append(
        f"{kind} features against {run.__name__[1:]} on {other}: largest difference {worst:.2e} "
        f"of {largest:.2e}"
      )
  return lines


def _features(source: hub.Source, image: np.ndarray, tokens: np.ndarray) -> list[np.ndarray]:
  """Our features of normalised images and of tokens."""
  graph, _, _ = abstract(source.config)
  weights = source.load()

  def encode(weights, image, tokens):
    model = nnx.merge(graph, *weights)
    return model.encode_image(image), model.encode_text(tokens)

  with jax.default_matmul_precision("highest"):
    return [np.asarray(x) for x in jax.jit(encode)(weights, image, tokens)]


def _cn_clip(path: str, config, image: np.ndarray, tokens: np.ndarray):
  try:
    import torch
    from cn_clip.clip.model import CLIP
  except ImportError as error:
    raise ValueError(f"--check needs PyTorch, torchvision and cn_clip: {error}") from error
  tensors = cnclip.standard_names(torch_files.load_state_dict(path))
  tensors = {
    k: torch.from_numpy(v.astype(np.float32)) for k, v in tensors.items() if "bert.pooler" not in k
  }
  model = CLIP(**model_config.to_fields(config)).eval()
  model.load_state_dict(tensors)
  with torch.no_grad():
    features = (
      model.encode_image(torch.from_numpy(image.transpose(0, 3, 1, 2).copy())),
      model.encode_text(torch.from_numpy(tokens).long()),
    )
  return [x.numpy() for x in features]


def _transformers(path: str, config, image: np.ndarray, tokens: np.ndarray):
  try:
    import torch
    from transformers import ChineseCLIPModel, CLIPModel
  except ImportError as error:
    raise ValueError(f"--check needs PyTorch and transformers: {error}") from error
  image = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
  tokens = torch.from_numpy(tokens).long()
  english = isinstance(config, OpenAICLIPConfig)
  options = {}
  model = (
    (CLIPModel if english else ChineseCLIPModel).from_pretrained(path, dtype=torch.float32).eval()
  )
  if not english:
    options["attention_mask"] = (tokens != config.text.pad).long()
  with torch.no_grad():
    text = model.text_model(tokens, **options)
    text = text.pooler_output if english else text.last_hidden_state[:, 0]
    features = (
      model.visual_projection(model.vision_model(image).pooler_output),
      model.text_projection(text),
    )
  return [x.numpy() for x in features]


def main() -> None:
  """The command."""
  parser = argparse.ArgumentParser(
    prog="python -m ofa_jax.convert",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("input", metavar="IN", help="the weights, see above")
  parser.add_argument("output", metavar="OUT", help="a new folder, or with --to=torch a new file")
  parser.add_argument(
    "--to",
    choices=TARGETS,
    default="orbax",
    help="orbax: a model directory of ofa_jax; torch: a file that the original loads (cn_clip, "
    "OFA's fairseq, ...); hf: a directory that transformers.ChineseCLIPModel or CLIPModel loads, "
    "or OFA-Sys' OFAModel",
  )
  parser.add_argument(
    "--model-config",
    metavar="F.json",
    nargs="+",
    default=(),
    help="the sizes, in the fields of cn_clip/clip/model_configs: one file with those of both "
    "towers, or two",
  )
  parser.add_argument(
    "--bert",
    metavar="PATH",
    help="start a new model, as the original's training does: IN is an OpenAI CLIP, PATH a "
    "Hugging Face BERT (directory or .bin)",
  )
  parser.add_argument(
    "--ema",
    action="store_true",
    help="of a checkpoint of fairseq take the moving average of the weights, in fp32 if it has it",
  )
  parser.add_argument(
    "--tokenizer",
    metavar="DIR",
    help="folder of the tokenizer's files, which go into OUT instead of those beside IN",
  )
  parser.add_argument(
    "--check",
    action="store_true",
    help="run both models on random inputs and print the largest difference; needs cn_clip, or "
    "transformers for a Hugging Face directory",
  )
  args = parser.parse_args()
  with cli.readable():
    convert(
      expand(args.input),
      expand(args.output),
      to=args.to,
      bert=args.bert and expand(args.bert),
      model_config_files=tuple(map(expand, args.model_config)),
      check=args.check,
      ema=args.ema,
      tokenizer=args.tokenizer and expand(args.tokenizer),
    )


if __name__ == "__main__":
  main()
