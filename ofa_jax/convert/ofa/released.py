"""The OFA models that are public, by name, and where their files are.

The pretrained English ones are repositories of the Hugging Face Hub. The fine-tuned and the Chinese
ones are fairseq's checkpoints, which the original's pages link to on a server of its authors; the
tokenizer's files are in the original's repository, and are the same for all models of a language.
"""

from ofa_jax.convert.releases import Address, Release
from ofa_jax.models.ofa.model import SIZES
from ofa_jax.tokenizers.ofa import LAYOUTS

CHINESE_WORDS = 30325  # symbols of the Chinese models' dictionary
_SERVER = "https://ofa-beijing.oss-cn-beijing.aliyuncs.com/checkpoints"
_REPOSITORY = "OFA-Sys/OFA"
# One commit of it, whose files stay as they are.
_UTILS = (
  f"https://raw.githubusercontent.com/{_REPOSITORY}/a36b91ce86ff105ac8d9e513aa88f42b85e33479/utils"
)
_FOLDERS = {"gpt2": f"{_UTILS}/BPE", "bert-chinese": f"{_UTILS}/BERT_CN_dict"}
_SHA256 = {
  "gpt2": (
    "2c31c5b236661067fe8626775eb995ef5fe808ac87d2ad4a6ddbef68550f5cc6",
    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
  ),
  "bert-chinese": (
    "77254f85a4aac36919b2ebbaa27a4305ef4dd2a25bf1c428b595dea05e73df25",
    "45bbac6b341c319adc98a532532882e91a9cefc0329aa57bac9ae761c27b291c",
  ),
}

_FINETUNED = {
  "OFA-base-caption": "caption_base_best.pt",
  "OFA-base-refcoco": "refcoco_base_best.pt",
  "OFA-base-refcocoplus": "refcocoplus_base_best.pt",
  "OFA-base-refcocog": "refcocog_base_best.pt",
  "OFA-base-vqa": "vqa_base_best.pt",
  "OFA-base-snli_ve": "snli_ve_base_best.pt",
  "OFA-base-image_gen": "image_gen_base_best.pt",
  "OFA-large-caption": "caption_large_best_clean.pt",
  "OFA-large-caption-stage1": "caption_stage1_best.pt",
  "OFA-large-refcoco": "refcoco_large_best.pt",
  "OFA-large-refcocoplus": "refcocoplus_large_best.pt",
  "OFA-large-refcocog": "refcocog_large_best.pt",
  "OFA-large-vqa": "vqa_large_best.pt",
  "OFA-large-snli_ve": "snli_ve_large_best.pt",
  "OFA-large-image_gen": "image_gen_large_best.pt",
  "OFA-large-imagenet": "imagenet_1k_large_best.pt",
  "OFA-large-gigaword": "gigaword_large_best.pt",
  "OFA-huge-caption": "caption_huge_best.pt",
  "OFA-huge-vqa": "vqa_huge_best.pt",
}
_CHINESE = {"OFA-CN-base": "ofa_cn_base.pt", "OFA-CN-large": "ofa_cn_large.pt"}
_CHINESE_FINETUNED = {
  f"OFA-CN-{size}-{task}": file.format(size=size)
  for size in ("base", "large")
  for task, file in (
    ("muge", "caption_cn_{size}.pt"),
    ("refcoco", "refcoco_cn_{size}.pt"),
    ("refcocoplus", "refcocoplus_cn_{size}.pt"),
    ("refcocog", "refcocog_cn_{size}.pt"),
    ("ocr", "ofa_cn_ocr_{size}.pt"),
  )
}
# The archives that a file is in, beside others that image generation needs.
_ARCHIVES = {"image_gen_large_best.pt": "image_gen_large_best.zip"}


def _fairseq(file: str, kind: str, *, finetuned: bool) -> Release:
  """A checkpoint of fairseq, with the tokenizer of this kind."""
  addresses = (
    Address(_SERVER, archive=_ARCHIVES.get(file, "")),
    *(Address(_FOLDERS[kind], sha256=digest) for digest in _SHA256[kind]),
  )
  files = (file, *LAYOUTS[kind])
  return Release(_REPOSITORY, files, addresses=addresses, finetuned=finetuned)


RELEASES: dict[str, Release] = {
  **{
    f"OFA-{size}": Release(
      f"OFA-Sys/OFA-{size}", ("pytorch_model.bin", "config.json", *LAYOUTS["huggingface"])
    )
    for size in SIZES
  },
  **{name: _fairseq(file, "bert-chinese", finetuned=False) for name, file in _CHINESE.items()},
  **{name: _fairseq(file, "gpt2", finetuned=True) for name, file in _FINETUNED.items()},
  **{
    name: _fairseq(file, "bert-chinese", finetuned=True)
    for name, file in _CHINESE_FINETUNED.items()
  },
}
