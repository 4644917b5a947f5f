"""Tiny data sets in the layouts of their makers become OFA's files, which the tasks read."""

import base64
import json
import pickle

import numpy as np
import pytest

from ofa_jax.data.official import vqa
from ofa_jax.prepare_data import LAYOUTS, prepare_data
from tests.tools.layouts import picture, read, shown, write_json


def test_coco(tmp_path, check, capsys):
  source, out = tmp_path / "coco", tmp_path / "out"
  records = []
  for number, split in enumerate(("train", "restval", "val", "test", "train", "train")):
    name = f"COCO_val2014_{number:012}.jpg"
    sentences = [
      {"raw": f"A red cat, {number}.\n", "sentid": 10 * number, "tokens": ["a"]},
      {"raw": "the\tbox && cat", "sentid": 10 * number + 1, "tokens": []},
    ]
    record = {"filepath": "val2014", "filename": name, "split": split, "cocoid": 100 + number}
    records.append(record | {"imgid": number, "sentences": sentences, "sentids": [0]})
    if number < 4:
      picture(source / "val2014" / name, colour=number)
  (source / "val2014" / records[5]["filename"]).write_bytes(b"no picture")  # 4 is missing
  write_json(source / "dataset_coco.json", {"images": records, "dataset": "coco"})

  rows = prepare_data("coco", source, out, workers=2)

  assert rows == {
    "caption_data/caption_stage1_train.tsv": 4,
    "caption_data/caption_stage2_train.tsv": 2,
    "caption_data/caption_val.tsv": 1,
    "caption_data/caption_test.tsv": 1,
  }
  assert shown(out / "caption_data/caption_stage1_train.tsv", 4) == [
    ["0", "100", "A red cat, 0.", "", "IMAGE"],
    ["1", "100", "the box & cat", "", "IMAGE"],
    ["10", "101", "A red cat, 1.", "", "IMAGE"],
    ["11", "101", "the box & cat", "", "IMAGE"],
  ]
  assert shown(out / "caption_data/caption_val.tsv", 4) == [
    ["102", "102", "A red cat, 2.&&the box & cat", "", "IMAGE"]
  ]
  told = capsys.readouterr()
  assert "3 x missing picture" in told.out and "3 x unreadable picture" in told.out
  assert "COCO_val2014_000000000004.jpg" in told.err
  assert base64.b64decode(read(out / "caption_data/caption_test.tsv")[0][4]) == picture(colour=3)
  assert check("ofa_caption", "base", frequencies=None, image_size=32) == 0


def test_vqa(tmp_path, check):
  source, out = tmp_path / "vqa", tmp_path / "out"
  given = {  # answers of ten people
    "train2014": [(1, ["yes"] * 7 + ["No "] * 2 + ["rare"]), (2, ["no"] * 10)],
    "val2014": [(3, ["yes"] * 10), (4, ["yes"] * 10), (5, ["rare"] * 9 + ["no"])],
  }
  for split, questions in given.items():
    asked = [
      {"question_id": 10 * image, "image_id": image, "question": f"is it\t{image}?"}
      for image, _ in questions
    ]
    annotated = [
      {
        "question_id": 10 * image,
        "image_id": image,
        "multiple_choice_answer": max(answers, key=answers.count),
        "answers": [{"answer": a, "answer_id": i} for i, a in enumerate(answers)],
      }
      for image, answers in questions
    ]
    write_json(source / f"v2_OpenEnded_mscoco_{split}_questions.json", {"questions": asked})
    write_json(source / f"v2_mscoco_{split}_annotations.json", {"annotations": annotated})
    for image, _ in questions:
      picture(source / split / f"COCO_{split}_{image:012}.jpg")
  asked = [{"question_id": 60, "image_id": 6, "question": "what"}]
  write_json(source / "v2_OpenEnded_mscoco_test2015_questions.json", {"questions": asked})
  picture(source / "test2015/COCO_test2015_000000000006.jpg")

  prepare_data("vqa", source, out, least=1)
  listed = pickle.loads((out / "vqa_data/trainval_ans2label.pkl").read_bytes())
  assert listed == {"yes": 0, "no": 1, "rare": 2}
  rows = shown(out / "vqa_data/vqa_train.tsv", 5)
  assert rows[:4] == [
    ["10", "1", "is it 1?", "1.0|!+yes", "", "IMAGE"],
    ["10", "1", "is it 1?", "0.6|!+no", "", "IMAGE"],
    ["10", "1", "is it 1?", "0.3|!+rare", "", "IMAGE"],
    ["20", "2", "is it 2?", "1.0|!+no", "", "IMAGE"],
  ]
  kept = shown(out / "vqa_data/vqa_val.tsv", 5)
  images = {row[1] for row in rows[4:]}, {row[1] for row in kept}
  assert images[0] | images[1] == {"3", "4", "5"} and not images[0] & images[1] and images[1]
  assert read(out / "vqa_data/vqa_test.tsv")[0][:5] == ["60", "6", "what", "", ""]
  assert check("ofa_vqa", "base", image_size=32) == 0
  assert check("ofa_vqa", "base,test", image_size=32) == 0

  prepare_data("vqa", source, out, least=2)  # "rare" leaves the list, and so its rows
  assert {row[3] for row in read(out / "vqa_data/vqa_train.tsv")} <= {
    "1.0|!+yes", "0.6|!+no", "1.0|!+no", "0.3|!+no",
  }  # fmt: skip
  assert check("ofa_vqa", "base", image_size=32) == 0


@pytest.mark.parametrize("people, confidence", [(1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_confidence_is_the_official_accuracy(people, confidence):
  answers = [i < people for i in range(10)]
  others = [answers[:i] + answers[i + 1 :] for i in range(10)]
  assert np.isclose(np.mean([min(sum(rest) / 3, 1) for rest in others]), confidence)
  assert vqa.confidence(people) == confidence


def test_visual_genome(tmp_path, check, capsys):
  source, out = tmp_path / "vg", tmp_path / "out"
  asked = [
    {"qa_id": 1, "image_id": 7, "question": "What is it?", "answer": "Yes."},
    {"qa_id": 2, "image_id": 8, "question": "What?", "answer": "A blue dog."},
  ]
  records = [{"id": q["image_id"], "qas": [q]} for q in asked]
  write_json(source / "question_answers.json", records)
  picture(source / "VG_100K/7.jpg")
  picture(source / "VG_100K_2/8.jpg")
  (out / "vqa_data").mkdir(parents=True)
  listed = out / "vqa_data/trainval_ans2label.pkl"

  assert prepare_data("visual_genome", source, out) == {"vqa_data/vg_qa_train.tsv": 2}
  listed.write_bytes(pickle.dumps({"yes": 0}))
  assert prepare_data("visual_genome", source, out) == {"vqa_data/vg_qa_train.tsv": 1}
  path = out / "vqa_data/vg_qa_train.tsv"
  assert shown(path, 5) == [["1", "7", "What is it?", "1.0|!+yes", "", "IMAGE"]]
  assert "1 x question whose answer is not in the list" in capsys.readouterr().out
  files = {"train": (str(path),), "valid": (str(path),), "test": ()}
  assert check("ofa_vqa", "base", image_size=32, **files) == 0


@pytest.mark.parametrize(
  "folder, name, argument",
  [("refcoco", "refcoco", "base"), ("refcoco+", "refcocoplus", "refcoco+,base"),
   ("refcocog", "refcocog", "refcocog,base")],
)  # fmt: skip
def test_refcoco(folder, name, argument, tmp_path, check):
  source, out = tmp_path / "refer", tmp_path / "out"
  splits = ("train", "val", "test") if folder == "refcocog" else ("train", "val", "testA", "testB")
  refs = [
    {
      "ref_id": number,
      "ann_id": 50 + number,
      "image_id": 7,
      "split": split,
      "sentences": [{"sent": "the red cat", "raw": "The red cat", "sent_id": 3}, {"sent": "é box"}],
    }
    for number, split in enumerate((*splits, "train"))
  ]
  boxes = [{"id": 50 + n, "image_id": 7, "bbox": [1.5, 2, 10.125, 8]} for n in range(len(splits))]
  write_json(
    source / folder / "instances.json",
    {"images": [{"id": 7, "file_name": "COCO_train2014_7.jpg"}], "annotations": boxes},
  )
  pickled = source / folder / ("refs(umd).p" if folder == "refcocog" else "refs(unc).p")
  pickled.write_bytes(pickle.dumps(refs, protocol=2))
  picture(source / "images/mscoco/images/train2014/COCO_train2014_7.jpg")

  rows = prepare_data("refcoco", source, out)

  assert rows == {f"{name}_data/{name}_{split}.tsv": 2 for split in splits}
  assert shown(out / f"{name}_data/{name}_train.tsv", 4) == [
    ["0_0", "7", "the red cat", "1.50,2.00,11.62,10.00", "IMAGE"],
    ["0_1", "7", "é box", "1.50,2.00,11.62,10.00", "IMAGE"],
  ]
  assert check("ofa_refcoco", argument, image_size=32) == 0


def test_a_pickle_runs_nothing(tmp_path):
  class Evil:
    def __reduce__(self):
      return (print, ("run",))

  write_json(tmp_path / "refcoco/instances.json", {"images": [], "annotations": []})
  (tmp_path / "refcoco/refs(unc).p").write_bytes(pickle.dumps(Evil()))
  with pytest.raises(ValueError, match=r"refs\(unc\)\.p, found .*refused"):
    prepare_data("refcoco", tmp_path, tmp_path / "out")


def test_snli_ve(tmp_path, check, capsys):
  source, out = tmp_path / "snli", tmp_path / "out"
  labels = ("entailment", "neutral", "contradiction", "-")
  for split in ("train", "dev", "test"):
    lines = [
      {"Flickr30K_ID": "12", "pairID": f"12.jpg#{i}", "gold_label": label, "sentence1": "a cat .",
       "sentence2": "an\tanimal"}
      for i, label in enumerate(labels)
    ]  # fmt: skip
    path = source / f"snli_ve_{split}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  picture(source / "flickr30k-images/12.jpg")

  prepare_data("snli_ve", source, out)

  assert shown(out / "snli_ve_data/snli_ve_dev.tsv", 2) == [
    [f"12.jpg#{i}", "12", "IMAGE", "an animal", "a cat .", label]
    for i, label in enumerate(labels[:3])
  ]
  assert "3 x row without a label" in capsys.readouterr().out
  assert check("ofa_snli_ve", "base", image_size=32) == 0


@pytest.mark.parametrize("solved", [False, True])
def test_imagenet(solved, tmp_path, check):
  source, out = tmp_path / "imagenet", tmp_path / "out"
  source.mkdir()
  words = "n002 crane\nn001 tench, Tinca tinca\nn003 crane\n"
  (source / "LOC_synset_mapping.txt").write_text(words)
  root = source / "ILSVRC/Data/CLS-LOC" if solved else source
  for number, synset in enumerate(("n001", "n002", "n003")):
    picture(root / "train" / synset / f"{synset}_1.JPEG", colour=number)
    val = root / "val" if solved else root / "val" / synset
    picture(val / f"ILSVRC2012_val_{number}.JPEG", colour=number)
  if solved:
    rows = "".join(f"ILSVRC2012_val_{i},n00{i + 1} 1 2 3 4\n" for i in range(3))
    (source / "LOC_val_solution.csv").write_text(f"ImageId,PredictionString\n{rows}")

  rows = prepare_data("imagenet", source, out)

  data = out / "imagenet_1k_data"
  expected = [
    ["IMAGE", "1", "tench, Tinca tinca"], ["IMAGE", "2", "crane"], ["IMAGE", "3", "crane 2"]
  ]  # fmt: skip
  assert shown(data / "imagenet_1k_train.tsv", 0) == expected
  assert shown(data / "imagenet_1k_val.tsv", 0) == expected
  assert shown(data / "imagenet_1k_val_subset.tsv", 0) == expected[:1]
  assert rows["imagenet_1k_data/class2label_new.pkl"] == 0
  assert pickle.loads((data / "class2label_new.pkl").read_bytes()) == {
    "tench, Tinca tinca": 1, "crane": 2, "crane 2": 3
  }  # fmt: skip
  assert check("ofa_imagenet", "base", image_size=32, augment="none", answer_length=30) == 0


def test_muge(tmp_path, check):
  source, out = tmp_path / "muge", tmp_path / "out"
  source.mkdir()
  encoded = base64.urlsafe_b64encode(picture()).decode()
  for split in ("train", "valid", "test"):
    (source / f"IC_{split}.tsv").write_text(f"a1\t{encoded}\nb2\t{encoded}\n")
    told = [{"image_id": name, "text": ["红色 的猫", "盒子"]} for name in ("a1", "b2")]
    if split != "test":
      text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in told)
      (source / f"IC_{split}.jsonl").write_text(text, encoding="utf-8")
  (source / "MR_valid_imgs.tsv").write_text(f"7\t{encoded}\n")
  query = {"query_id": 3, "query_text": "红色", "item_ids": [7]}
  (source / "MR_valid_queries.jsonl").write_text(json.dumps(query) + "\n")

  rows = prepare_data("muge", source, out)

  assert rows["muge_caption_data/caption_train.tsv"] == 4
  assert shown(out / "muge_caption_data/caption_train.tsv", 4)[1] == [
    "a1_1",
    "a1",
    "盒子",
    "",
    "IMAGE",
  ]
  assert shown(out / "muge_caption_data/caption_valid.tsv", 4)[1] == [
    "b2", "b2", "红色 的猫&&盒子", "", "IMAGE"
  ]  # fmt: skip
  assert shown(out / "muge_caption_data/caption_test.tsv", 4)[0] == ["a1", "a1", "", "", "IMAGE"]
  assert shown(out / "muge_data/valid_imgs.tsv", 1) == [["7", "IMAGE"]]
  assert json.loads((out / "muge_data/valid_texts.jsonl").read_text("utf-8")) == {
    "text_id": 3, "text": "红色", "image_ids": [7]
  }  # fmt: skip
  assert check("ofa_muge", "base", image_size=32) == 0


@pytest.mark.parametrize(
  "text, image, rows, recipe",
  [
    ("image,caption\na.jpg,a cat\na.jpg,\"a box, red\"\n", 4,
     [["0", "a", "a cat", "", "IMAGE"], ["1", "a", "a box, red", "", "IMAGE"]], "ofa_caption"),
    ("filepath,question,answer\na.jpg,what?,Yes\n", 5,
     [["0", "a", "what?", "1.0|!+yes", "", "IMAGE"]], "ofa_vqa"),
    ("image\ttext\tbox\na.jpg\tcat\t1, 2,3,4\n", 4,
     [["0", "a", "cat", "1,2,3,4", "IMAGE"]], "ofa_refcoco"),
  ],
)  # fmt: skip
def test_csv(text, image, rows, recipe, tmp_path, check, capsys):
  source, out = tmp_path / "mine", tmp_path / "out"
  picture(source / "a.jpg")
  more = text.splitlines()[-1].replace("a.jpg", "missing.jpg")
  table = source / f"train.{'tsv' if recipe == 'ofa_refcoco' else 'csv'}"
  table.write_text(f"{text}{more}\n")

  prepare_data("csv", source, out)

  assert "Skipped: 1 x row whose image is missing" in capsys.readouterr().out
  path = out / "csv_data/train.tsv"
  assert shown(path, image) == rows
  fields = {"train": (str(path),), "valid": (str(path),), "test": (), "image_size": 32}
  if recipe == "ofa_caption":
    fields["frequencies"] = None
  if recipe == "ofa_vqa":
    fields |= {"answers": None, "inference": "beamsearch"}
  assert check(recipe, "base", **fields) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_folder_is_said_to_be_one(layout, tmp_path):
  with pytest.raises(ValueError, match=r"Expected .* found nothing"):
    prepare_data(layout, tmp_path, tmp_path / "out")


def test_records_of_another_form_are_told(tmp_path):
  write_json(tmp_path / "dataset_coco.json", {"images": [{"split": "train", "filename": "a"}]})
  with pytest.raises(ValueError, match=r"sentences.* in .*dataset_coco\.json, found .*KeyError"):
    prepare_data("coco", tmp_path, tmp_path / "out")


def test_where_every_picture_is_missing_nothing_is_written(tmp_path):
  sentences = [{"raw": "a cat", "sentid": 1}]
  record = {"filename": "a.jpg", "split": "val", "cocoid": 1, "imgid": 1, "sentences": sentences}
  write_json(tmp_path / "dataset_coco.json", {"images": [record]})
  with pytest.raises(ValueError, match=r"found none that can be written \(1 missing picture\)"):
    prepare_data("coco", tmp_path, tmp_path / "out")
  assert not list((tmp_path / "out").rglob("*.tsv"))
