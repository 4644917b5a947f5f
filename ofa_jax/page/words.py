"""What the page says, in English and in Chinese."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words:
  """All texts of the page in one language; `{}` are filled in.

  Attributes:
    code: of the language, for browsers.
  """

  code: str
  title: str
  model: str
  run: str
  picture: str
  result: str
  caption: str
  caption_help: str
  question: str
  question_help: str
  question_text: str
  question_example: str
  answers: str
  answers_help: str
  grounding: str
  grounding_help: str
  phrase: str
  phrase_example: str
  most_boxes: str
  least: str
  least_help: str
  boxes_drawn: str
  box: str
  pixels: str
  absent: str
  no_box: str
  entailment: str
  entailment_help: str
  hypothesis: str
  hypothesis_example: str
  premise: str
  premise_help: str
  classes: str
  classes_help: str
  class_names: str
  class_example: str
  drawing: str
  drawing_help: str
  drawing_text: str
  drawing_example: str
  samples: str
  drawn: str
  seed: str
  search: str
  search_help: str
  by_text: str
  by_picture: str
  search_text: str
  search_example: str
  number: str
  similarity: str
  similarity_help: str
  texts: str
  scale: str
  scale_help: str
  text: str
  cosine: str
  probability: str
  calibrated: str
  among_choices: str
  attention: str
  attention_help: str
  attention_drawn: str
  attention_far: str
  no_picture: str
  no_text: str
  no_lines: str
  too_large: str
  bad_picture: str
  too_long: str
  none_left: str
  failed: str
  refused: str

  @property
  def entailments(self) -> dict[str, str]:
    """What the three labels are called."""
    return _ENTAILMENTS[self.code]


_ENTAILMENTS = {
  "en": {x: x for x in ("entailment", "neutral", "contradiction")},
  "zh": {"entailment": "蕴含", "neutral": "中立", "contradiction": "矛盾"},
}

ENGLISH = Words(
  code="en",
  title="OFA and Chinese-CLIP",
  model="Model: {}",
  run="Run",
  picture="Picture",
  result="Result",
  caption="Caption",
  caption_help="Describes the picture in a sentence.",
  question="Question",
  question_help="Answers a question about the picture.",
  question_text="Question",
  question_example="what is on the table?",
  answers="Answers to choose from",
  answers_help="One a line. Empty: any answer.",
  grounding="Grounding",
  grounding_help="Finds what a phrase describes, and draws boxes around it.",
  phrase="Phrase",
  phrase_example="the dog on the left",
  most_boxes="Boxes at most",
  least="Least probability of a box",
  least_help="Where no box reaches it, what the phrase describes is absent.",
  boxes_drawn="The picture with the boxes that were found",
  box="Box",
  pixels="Left, top, right, bottom, in pixels",
  absent="Absent: no box reaches {:.0f} %.",
  no_box="The model says no box for this phrase.",
  entailment="Entailment",
  entailment_help="Says whether the picture, and perhaps a text about it, implies another text.",
  hypothesis="Hypothesis",
  hypothesis_example="two people are outside",
  premise="Premise",
  premise_help="A text that is known to describe the picture. May be empty.",
  classes="Classification",
  classes_help="Chooses one of your classes for the picture.",
  class_names="Classes",
  class_example="One a line.",
  drawing="Text to image",
  drawing_help="Draws pictures of a text and shows the best of them. On CPUs this takes long.",
  drawing_text="Text to draw",
  drawing_example="a red boat on a lake",
  samples="Pictures that are drawn",
  drawn="Pictures that are shown, the best first",
  seed="Seed: another one gives other pictures",
  search="Search",
  search_help="Searches the {:,} pictures of the folder, by words or by another picture.",
  by_text="Search by text",
  by_picture="Search by picture",
  search_text="Text",
  search_example="a dog on the beach",
  number="Pictures at most",
  similarity="Similarity",
  similarity_help="How well each of several texts fits a picture.",
  texts="Texts, one a line",
  scale="Scale of the logits",
  scale_help="What cosines are multiplied by before the softmax; the model has learnt {:.4g}. "
  "Smaller: probabilities that are more alike.",
  text="Text",
  cosine="Cosine",
  probability="Probability",
  calibrated="{:.1f} % likely to be right (calibrated)",
  among_choices="{:.1f} % of the probability of all choices (the model's own, not calibrated)",
  attention="Attention",
  attention_help="What the class token, of which the features are made, attends to in the last "
  "layer of the image tower: the mean of its heads over the patches, relative to the highest. It "
  "shows where the model takes its last look, not why it finds a text fitting.",
  attention_drawn="The picture with the attention of the class token over it",
  attention_far="Of the attention {:.0f} % is on the patches, the rest on the class token itself.",
  no_picture="Please give a picture first.",
  no_text="Please fill in “{}”.",
  no_lines="Please fill in “{}”, one a line.",
  too_large="This picture has {:,} pixels; at most {:,} are read.",
  bad_picture="This file is no picture that can be read.",
  too_long="“{}” may have {:,} letters at most, and has {:,}.",
  none_left="None of these pictures is in the folder any more.",
  failed="This did not work; the terminal of the page says why.",
  refused="The model cannot do this: {}",
)

CHINESE = Words(
  code="zh",
  title="OFA 与 Chinese-CLIP",
  model="模型：{}",
  run="运行",
  picture="图片",
  result="结果",
  caption="图像描述",
  caption_help="用一句话描述图片。",
  question="视觉问答",
  question_help="回答关于图片的问题。",
  question_text="问题",
  question_example="what is on the table?",
  answers="候选答案",
  answers_help="每行一个；留空则自由作答。",
  grounding="视觉定位",
  grounding_help="找出短语所描述的内容，并用方框标出。",
  phrase="短语",
  phrase_example="the dog on the left",
  most_boxes="方框数量上限",
  least="方框的最低概率",
  least_help="若没有方框达到该概率，则视为图中不存在。",
  boxes_drawn="标出方框的图片",
  box="方框",
  pixels="左、上、右、下（像素）",
  absent="图中不存在：没有方框达到 {:.0f} %。",
  no_box="模型没有为该短语给出方框。",
  entailment="视觉蕴含",
  entailment_help="判断图片（以及可选的前提文本）是否蕴含另一段文本。",
  hypothesis="假设",
  hypothesis_example="two people are outside",
  premise="前提",
  premise_help="已知描述该图片的文本，可留空。",
  classes="图像分类",
  classes_help="从您给出的类别中为图片选出一个。",
  class_names="类别",
  class_example="每行一个。",
  drawing="文生图",
  drawing_help="按文字绘制多张图片，并展示其中最好的几张。在 CPU 上耗时较长。",
  drawing_text="要绘制的文字",
  drawing_example="a red boat on a lake",
  samples="绘制的图片数量",
  drawn="展示的图片数量（最好的在前）",
  seed="随机种子：换一个得到另一组图片",
  search="图片搜索",
  search_help="用文字或另一张图片搜索文件夹中的 {:,} 张图片。",
  by_text="以文搜图",
  by_picture="以图搜图",
  search_text="文字",
  search_example="海滩上的狗",
  number="图片数量上限",
  similarity="图文相似度",
  similarity_help="多段文本分别与图片有多匹配。",
  texts="文本，每行一个",
  scale="logit 缩放系数",
  scale_help="softmax 之前余弦值所乘的系数；模型学到的是 {:.4g}。系数越小，各概率越接近。",
  text="文本",
  cosine="余弦",
  probability="概率",
  calibrated="正确的可能性为 {:.1f} %（已校准）",
  among_choices="占全部候选概率的 {:.1f} %（模型自身的概率，未校准）",
  attention="注意力",
  attention_help="图像塔最后一层中，类别标记（特征由它得到）对各图像块的注意力：取各注意力头的"
  "平均，并以最高值为基准。它显示模型最后看向哪里，并不解释某段文本为何匹配。",
  attention_drawn="叠加了类别标记注意力的图片",
  attention_far="其中 {:.0f} % 的注意力落在图像块上，其余落在类别标记自身。",
  no_picture="请先给出一张图片。",
  no_text="请填写“{}”。",
  no_lines="请填写“{}”，每行一个。",
  too_large="这张图片有 {:,} 个像素，最多可读取 {:,} 个。",
  bad_picture="这个文件不是可以读取的图片。",
  too_long="“{}”最多 {:,} 个字符，现有 {:,} 个。",
  none_left="这些图片已不在文件夹中。",
  failed="运行失败，原因见页面所在的终端。",
  refused="模型无法完成：{}",
)

LANGUAGES: dict[str, Words] = {words.code: words for words in (ENGLISH, CHINESE)}
