"""Chinese-CLIP's prompt templates for zero-shot classification, `{}` standing for the class name.

A class is represented by the mean over all its prompts, so that a template which stands twice
counts twice; the order means nothing. `templates_for` chooses as the original does, which defines
the sets after `COUNTRY211` without ever choosing them.
"""

import itertools


def templates_for(dataset: str) -> tuple[str, ...]:
  """Returns the templates of a data set, by its exact name; `OPENAI` for all without their own."""
  match dataset:
    case "fgvc-aircraft-2013b-variants102":
      return AIRCRAFT
    case "food-101":
      return FOOD
    case "oxford-flower-102":
      return FLOWER
    case "eurosat_clip" | "resisc45_clip":
      return EUROSAT
    case "country211":
      return COUNTRY211
    case _:
      return OPENAI


def _all(*parts: str) -> tuple[str, ...]:
  """Returns every string made of one alternative (they are divided by `|`) of each part in turn."""
  return tuple(map("".join, itertools.product(*(part.split("|") for part in parts))))


_COMMON = (
  *_all(
    "{}的",
    "照片|雕塑|低分辨率照片|渲染|糟糕照片|裁剪照片|裁剪照片|纹身|刺绣照片|明亮照片|深色照片|手绘画|"
    "特写照片|黑白照片|雕像|模糊照片|相片|渲染照|涂鸦|近距离照片|折纸|草图|涂鸦照|涂鸦照|折纸形状|"
    "副本|干净的照片|重现|艺术作品|素描|像素照|拍照|损坏的照片|艺术照|图形|摄影图|刺青",
  ),
  *_all("{}", "在视频游戏中|毛绒玩具"),
  *_all(
    "质量差的|许多|难以看到|很难看到|一张干净的|一张包含|我的|不自然的|一张酷的|人造的|一张关于|"
    "低分辨率的|一张大|一张漂亮的|一张奇怪的|模糊的|高质量的|漂亮的|小|大|黑白的|拍了|酷酷的",
    "{}的照片",
  ),
  "损坏的{}的jpeg照片",
  *_all("涂鸦|视频游戏中的|玩具|卡通|刺绣|毛绒玩具|照片是奇怪的|漫画|玩具形状的|照片里的小", "{}"),
  *_all("一幅{}的", "画|绘画"),
  *_all("一张{}的", "像素照片|明亮照片|好照片|照片|深色照片"),
)
_LIKED = (
  *_all("{}", "的可爱的照片|可爱图片|酷炫图片|的好看照片|的好看图片"),
  *_all("一张{}", "可爱的照片|的酷炫的照片|的酷炫图片|的好看的图片"),
  "这是{}",
)
OPENAI = (
  *(text + stop for text in _COMMON + _LIKED for stop in ("", "。")),
  "一种叫{}的花的照片",
  "一种叫{}的食物的照片",
  "{}的卫星照片",
)

_VIEWS = "照片|高清图|模糊图片|缩放图片|摄影图"
_CLOSE_VIEWS = f"{_VIEWS}|近距离照片|裁剪照片"
AIRCRAFT = _all(
  "{}，|一种叫{}的",
  "飞机|战斗机|老飞机|大飞机|小飞机|军用飞机|运输机|公务机|客机|喷气机",
  "的",
  _VIEWS,
)
FOOD = _all("一种叫{}的", "食物|美食|菜", "的", _CLOSE_VIEWS)
FLOWER = _all("一种叫{}的", "花|花卉|花朵|鲜花", "的", f"{_CLOSE_VIEWS}|好看的图片")
EUROSAT = _all("|一张", "{}的", "|高清|清晰的|高质量的", "卫星照片|卫星图|卫星图片")
COUNTRY211 = (
  "一张在{}拍的照片",
  "一张在{}旅行时拍的照片",
  "一张我家乡{}的照片",
  "一张展示{}风光的照片",
)

IMAGENET80 = tuple(text + "。" for text in _COMMON)
NORMAL = ("{}的图片",)
HATEFUL_MEMES = _all("|一个", "{}")
KITTI = _all("|照片里|图片里", "{}")
CARS = (*_all("一张", "|我的|我肮脏的|我干净的|我新买的|我旧的", "{}的照片"), "我爱我的{}")
DTD = _all("一张{}", "纹理|图案|物体", "的", "照片|图片")
PATCH = _all("一张{}的", "医疗照片|ct照片|化验照片")
PET = _all("一种叫{}的宠物的", "照片|图片|可爱图片|高清图片|模糊图片|特写照片")
CIFAR100 = (
  *_all("一张{}", "|的照片|的模糊照片|的好照片|的黑白照片"),
  *_all("一张{}的", "低|高", "对比度", "|的", "照片"),
  *_all("一张", "小|大", "{}的照片"),
)
CALTECH101 = (
  *_all("{}的", "照片|绘画|塑料|雕像|草图|刺青|玩具|演绎|装饰|卡通画|折纸|艺术画|涂鸦画|画"),
  "{}在游戏中",
  "一个豪华的{}.",
)
FER = (
  *_all("一张", "表情{}|表达{}情绪|看起来很{}", "的照片"),
  *_all("他的脸看起来|他们看起来很", "{}"),
)
