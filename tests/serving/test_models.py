"""The service beside the API, on the micro models: the same answers, computed together."""

import base64
import concurrent.futures
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the extra serve is not installed")
httpx = pytest.importorskip("httpx", reason="the extra test is not installed")

import ofa_jax  # noqa: E402 (what is skipped for comes first)
from ofa_jax import hub, retrieve  # noqa: E402
from ofa_jax.convert.cnclip import table as convert  # noqa: E402
from ofa_jax.data.features import FeatureWriter  # noqa: E402
from ofa_jax.inference.drawing import Drawing  # noqa: E402
from ofa_jax.serving.limits import Limits  # noqa: E402
from ofa_jax.serving.models import LENGTHS, Answers, served  # noqa: E402
from ofa_jax.serving.service import Service  # noqa: E402
from tests.cnclip_golden import micro_config, micro_state_dict  # noqa: E402
from tests.ofa_directory import save_micro  # noqa: E402
from tests.serving import stand_in  # noqa: E402

CLIENTS, REQUESTS = 16, 200
CLOSE = 1e-6  # of features of length 1: batches of other sizes are other programs


def files(number: int, *, size=(40, 80)) -> list[bytes]:
  """Pictures as people have them: of several kinds and modes, all different."""
  rng, made = np.random.default_rng(0), []
  for i in range(number):
    form, mode = (("png", "RGB"), ("jpeg", "L"), ("png", "RGBA"), ("gif", "P"))[i % 4]
    file = io.BytesIO()
    pixels = rng.integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, format=form)
    made.append(file.getvalue())
  return made


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  directory = tmp_path_factory.mktemp("models") / "small-clip"
  config = micro_config("micro_vit")
  weights = convert.from_torch(micro_state_dict("micro_vit"), config)
  hub.save_directory(directory, config, *weights)
  return ofa_jax.load_from_name(directory, device="cpu:0")


@pytest.fixture(scope="module")
def ofa(tmp_path_factory):
  return ofa_jax.load_from_name(save_micro(tmp_path_factory.mktemp("ofa")), device="cpu:0")[0]


@pytest.fixture(scope="module")
def index(clip, tmp_path_factory):
  """A feature file of 30 images with the ids 100 to 129, and its vectors."""
  model, _ = clip
  rows = np.random.default_rng(1).standard_normal((30, model.config.embed_dim), np.float32)
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  path = tmp_path_factory.mktemp("feats") / "x.img_feat.jsonl"
  with FeatureWriter(path, kind="image", width=rows.shape[1]) as writer:
    writer.write(writer.encode(range(100, 130), rows))
    writer.finish()
  return path, rows


@pytest.fixture(scope="module")
def client(clip, ofa, index):
  models = [
    served("clip", clip[0], files={"image": str(index[0])}, top_k=10),
    served("ofa", ofa, files={}, top_k=10),
  ]
  made = Service(models, limits=Limits(), most=16, wait=0.05)
  made.compile(now=False)
  with (
    stand_in.listening(made) as port,
    httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=100) as client,
  ):
    yield client


def uploads(pictures):
  return [("images", ("x", picture)) for picture in pictures]


def test_many_clients_get_what_the_api_gives(client, clip):
  """200 requests of 16 clients, as files and as JSON, JSON and arrays back, all of them right."""
  model, preprocess = clip
  pictures = files(60)
  images = np.stack([preprocess(Image.open(io.BytesIO(x))) for x in pictures])
  texts = [f"第{i}张图 number {i}" for i in range(50)]
  expected = {
    "images": [model.encode_image(x[None]) for x in images],
    "texts": [model.encode_text(ofa_jax.tokenize(text)) for text in texts],
  }

  def ask(number):
    if number % 2:
      i = number // 2 % len(texts)
      answer = client.post("/v1/features/texts", json={"texts": [texts[i]]})
      return answer, expected["texts"][i]
    i = number // 2 % len(pictures)
    npy = {"accept": "application/x-npy"} if number % 4 else {}
    answer = client.post("/v1/features/images", files=uploads([pictures[i]]), headers=npy)
    return answer, expected["images"][i]

  def counted():
    text = client.get("/metrics").text
    return np.array([
      sum(map(float, re.findall(rf"^ofa_jax_batch_rows_{x}{{.*}} (\S+)$", text, re.MULTILINE)))
      for x in ("count", "sum")
    ])  # fmt: skip

  before = counted()
  with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
    answers = list(pool.map(ask, range(REQUESTS)))
  for answer, features in answers:
    assert answer.status_code == 200, answer.text
    if answer.headers["content-type"] == "application/json":
      found = np.array(answer.json()["features"], np.float32)
    else:
      found = np.load(io.BytesIO(answer.content), allow_pickle=False)
    length = np.linalg.norm(features)
    np.testing.assert_allclose(found / length, features / length, rtol=0, atol=CLOSE)
  batches, rows = counted() - before
  assert rows == REQUESTS and batches < REQUESTS / 2  # the clients are computed for together


def test_one_request_is_the_api_to_the_last_bit(client, clip):
  model, preprocess = clip
  pictures, texts = files(3, size=(30, 30)), ["杰尼龟", "妙蛙种子", "小火龙", "皮卡丘"]
  images = np.stack([preprocess(Image.open(io.BytesIO(x))) for x in pictures])
  expected, _ = model.get_similarity(images, ofa_jax.tokenize(texts))
  answer = client.post("/v1/similarity", files=uploads(pictures), data={"texts": texts})
  found = answer.json()["logits_per_image"]
  np.testing.assert_array_equal(np.array(found, np.float32), expected)


def test_the_nearest_rows_of_a_file(client, clip, index, tmp_path):
  """Those that the command finds, by texts and by pictures."""
  model, preprocess = clip
  path, rows = index
  texts = ["杰尼龟", "妙蛙种子", "小火龙"]
  features = model.encode_text(ofa_jax.tokenize(texts))
  features /= np.linalg.norm(features, axis=1, keepdims=True)
  queries = tmp_path / "q.txt_feat.jsonl"
  with FeatureWriter(queries, kind="text", width=features.shape[1]) as writer:
    writer.write(writer.encode(range(3), features))
    writer.finish()
  retrieve.topk(path, queries, output=tmp_path / "found.jsonl", k=5)
  expected = [json.loads(x)["image_ids"] for x in (tmp_path / "found.jsonl").open()]
  told = client.post("/v1/topk", json={"texts": texts, "k": 5}).json()
  assert [x["ids"] for x in told["results"]] == expected and told["among"] == "image"
  for query, found in zip(features, told["results"], strict=True):
    places = np.array(found["ids"]) - 100
    np.testing.assert_allclose(found["scores"], rows[places] @ query, rtol=1e-5, atol=1e-6)
  (picture,) = files(1)
  answer = client.post("/v1/topk", files=uploads([picture]), data={"k": "2"})
  query = model.encode_image(preprocess(Image.open(io.BytesIO(picture)))[None])[0]
  assert answer.json()["results"][0]["ids"] == (100 + np.argsort(-rows @ query)[:2]).tolist()
  for body, text in (
    ({"texts": ["a"], "k": 11}, "k from 1 to 10"),
    ({"texts": ["a"], "k": 0}, "k: Input should be greater"),
    ({"texts": ["a"], "among": "text"}, "among: image"),
    ({}, "images or texts"),
  ):
    answer = client.post("/v1/topk", json=body)
    assert answer.status_code == 422 and text in answer.json()["detail"]


def asked_of(ofa, pictures):
  """For each path its fields, what the API gives for the same, and the answer's name."""
  images = [Image.open(io.BytesIO(x)) for x in pictures]
  phrases = ["the dog", "what"]
  candidates = ["the dog", "a", "the image"]
  scored = {"return_scores": True}
  yield "caption", {}, ofa.caption(images, **scored), "caption"
  yield "answer", {"texts": phrases}, ofa.answer(images, phrases, **scored), "answer"
  chosen = ofa.answer(images, phrases, candidates, prompt_decoder=False, **scored)
  fields = {"texts": phrases, "candidates": candidates, "prompt_decoder": "false"}
  yield "answer", fields, chosen, "answer"
  yield "ground", {"texts": phrases}, ofa.ground(images, phrases, **scored), "box"
  fields = {"texts": phrases, "premises": ["a", "a"]}
  yield "entail", fields, ofa.entail(images, phrases, ["a", "a"], **scored), "label"
  yield "classify", {"classes": candidates}, ofa.classify(images, candidates, **scored), "class"


def test_an_ofa_answers_as_the_api(client, ofa):
  pictures = files(2)
  for path, fields, (answers, scores), name in asked_of(ofa, pictures):
    answer = client.post(f"/v1/{path}", files=uploads(pictures), data=fields)
    assert answer.status_code == 200, answer.text
    told = answer.json()["results"]
    if name == "box":
      found = [[np.nan] * 4 if x["box"] is None else x["box"] for x in told]
      np.testing.assert_array_equal(np.array(found, np.float32), answers)
    else:
      assert [x[name] for x in told] == answers
    for x, score in zip(told, scores.tolist(), strict=True):
      assert x["score"] == (score if np.isfinite(score) else None), path


def test_boxes_are_of_the_picture_that_was_sent(ofa, monkeypatch):
  """The micro model finds none; here its search says the bins of a box."""
  (picture,) = files(1)  # 80 x 40
  tokens = np.array([ofa.tokenizer.bin_id(i) for i in (1, 2, 8, 12)] + [2], np.int32)
  hypothesis = {"tokens": tokens, "score": -1.0, "positional_scores": np.zeros(5, np.float32)}
  monkeypatch.setattr(ofa, "_search", lambda rows, *_, **__: [[hypothesis]] * len(rows["source"]))
  (expected,) = ofa.ground([Image.open(io.BytesIO(picture))], ["the dog"])
  model = Answers("ofa", ofa)
  ready = model.picture(picture, 0, limits=Limits(), what="refcoco")
  kind, _ = next(x for x in model.first_rows(1) if x[0].what == "refcoco")
  ((box, score, probability),) = model.run(kind, [(ready, ("the dog",))])
  assert box.tolist() == expected.tolist() and not np.isnan(box).any()
  assert (score, probability) == (-1.0, None)


def test_a_picture_with_several_questions_is_looked_at_once(client, ofa, monkeypatch):
  """Its part of the encoder, that is; the answers are those to each question alone."""
  (picture,) = files(1)
  questions = ["the dog", "what"]
  ofa.looks_once = False
  expected, scores = ofa.answer(
    [Image.open(io.BytesIO(picture))] * 2, questions, return_scores=True
  )
  ofa.looks_once = True
  look, looked = ofa._runner._look, []

  def counted(weights, batch, *args, **options):
    looked.append(len(batch["image"]))
    return look(weights, batch, *args, **options)

  monkeypatch.setattr(ofa._runner, "_look", counted)
  fields = {"texts": questions}
  told = client.post("/v1/answer", files=uploads([picture]), data=fields).json()["results"]
  assert [x["answer"] for x in told] == expected and looked == [1]
  np.testing.assert_allclose([x["score"] for x in told], scores, rtol=1e-5)
  answer = client.post("/v1/answer", files=uploads([picture] * 3), data=fields)
  assert answer.status_code == 422 and "images for 2 rows, or one for all" in answer.text
  empty = client.post("/v1/answer", files=uploads([picture]), data={"texts": [" "]})
  assert empty.status_code == 422 and "with words in them" in empty.json()["detail"]


def test_models_are_called_by_their_names(client):
  told = {x["name"]: x["can"] for x in client.get("/v1/models").json()["models"]}
  assert "/v1/topk" in told["clip"] and "/v1/caption" not in told["clip"]
  assert "/v1/caption" in told["ofa"] and "/v1/draw" not in told["ofa"]
  answer = client.post("/v1/features/texts", json={"texts": ["a"], "model": "ofa"})
  assert answer.status_code == 422 and "Expected model: clip" in answer.json()["detail"]
  assert client.post("/v1/draw", json={"texts": ["a"]}).status_code == 404
  with pytest.raises(ValueError, match="different names, found a, a"):
    Service([Answers("a", _NoModel())] * 2, limits=Limits(), most=1, wait=0)


def test_a_model_that_draws_is_asked_for_pictures():
  class Model(Drawing):
    def __init__(self, gone=False):
      self.gone = gone

    def painter(self, codec=None, judge=None):
      if codec is None and self.gone:
        raise FileNotFoundError("what the run names")
      if codec != "vqgan":
        raise ValueError(f"Expected codec, found {codec}")

    def draw(self, texts, *, samples, top, codec):
      assert codec == "vqgan"
      return [[np.full((4, 4, 3), samples * 10 + i, np.uint8) for i in range(top)] for _ in texts]

  assert not Answers("ofa", Model()).draws and not Answers("ofa", Model(gone=True)).draws
  with pytest.raises(ValueError, match="Expected codec, found other"):
    Answers("ofa", Model(), codec="other")
  with pytest.raises(ValueError, match="Expected codec, found None"):
    Answers("ofa", Model(), judge="clip")
  model = Answers("ofa", Model(), codec="vqgan")
  made = Service([model], limits=Limits(samples=4), most=2, wait=0)
  made.compile(now=False)
  with stand_in.listening(made) as port:
    url = f"http://127.0.0.1:{port}/v1/draw"
    body = {"texts": ["a", "b"], "samples": 4, "top": 2}
    results = httpx.post(url, json=body).json()["results"]
    faults = [httpx.post(url, json=body | x) for x in ({"samples": 8}, {"samples": 3}, {"top": 5})]
  assert [fault.status_code for fault in faults] == [422] * 3
  (first, second), _ = (x["images"] for x in results)
  values = [np.asarray(Image.open(io.BytesIO(base64.b64decode(x)))) for x in (first, second)]
  assert [x.shape for x in values] == [(4, 4, 3)] * 2
  assert [int(x[0, 0, 0]) for x in values] == [40, 41]


def test_all_kinds_are_compiled_at_the_start(clip, index):
  """And nothing after it, whatever the number of rows; an OFA's texts in all lengths."""
  model = served("clip", clip[0], files={"image": str(index[0])}, top_k=10)
  sizes = {(kind.what, len(rows)) for kind, rows in model.first_rows(6)}
  each = {(what, number) for what in ("images", "texts") for number in (1, 2, 4, 6)}
  assert sizes == each | {("image", 6)}
  made = Service([model], limits=Limits(), most=4, wait=0)
  made.compile(told=lambda line: None)
  assert made.ready
  compiled = clip[0]._encode_image._cache_size(), clip[0]._encode_text._cache_size()
  for kind, rows in model.first_rows(3):
    model.run(kind, rows)
  assert (clip[0]._encode_image._cache_size(), clip[0]._encode_text._cache_size()) == compiled
  kinds = {(k.what, len(r)) for k, r in Answers("ofa", _NoModel()).first_rows(2)}
  assert kinds == {(w, n) for w in ("caption", "vqa", "refcoco", "snli_ve") for n in (1, 2)}
  assert len(list(Answers("ofa", _NoModel()).first_rows(1))) == 1 + 3 * len(LENGTHS)


class _NoModel:
  image_size = 8

  def can_draw(self):
    return False


def test_files_of_another_width_are_refused(clip, tmp_path):
  np.save(tmp_path / "x.npy", np.ones((3, 7), np.float32))
  with pytest.raises(ValueError, match=r"numbers, found 7 in .*x\.npy"):
    served("clip", clip[0], files={"text": str(tmp_path / "x.npy")}, top_k=10)
