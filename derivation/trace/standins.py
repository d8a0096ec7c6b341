"""Stand-ins for tokenizers and processors whose files are not there: the shapes they give are the real ones'.

A tokenizer splits as the real ones do on plain English: a word with its space, a mark and a line break are a token
each, so that a prompt of n words has n tokens and a chat template as many as the pipelines count on.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors

WORDS = r"<\|?[\w/]+\|?>| ?[\w']+| ?[^\s\w<]+|<|\n| +"
# The names that pipelines and processors look up.
MARKS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
SPECIAL = (
    *("<pad>", "<unk>", "<s>", "</s>", "[MASK]", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|think_start|>"),
    *("<image>", "<image_soft_token>", "<start_of_turn>", "<end_of_turn>", *MARKS.values()),
)
# Encoders end a sequence with </s> or between <s> and </s>; decoder-only models add nothing.
_ENDS: Mapping[str, str] = {
    "T5": "$A </s>",
    "UMT5": "$A </s>",
    "CLIP": "<s> $A </s>",
    "Bert": "<s> $A </s>",
    "Llama": "<s> $A",
    "Gemma": "<s> $A",
}
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class WordTokenizer(transformers.PreTrainedTokenizerFast):
    """A fast tokenizer with one id for all words."""


def word_tokenizer(class_name: str = "", model_max_length: int = 512) -> Any:
    """Return a stand-in that is an instance of the tokenizer class ``class_name``, where transformers has it."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL)}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    family = next((ends for name, ends in _ENDS.items() if class_name.startswith(name)), "$A")
    tokens = [(token, vocabulary[token]) for token in ("<s>", "</s>") if token in family]
    pair = f"{family} {family.replace('$A', '$B')}"
    backend.post_processor = processors.TemplateProcessing(single=family, pair=pair, special_tokens=tokens)
    names = {"pad": "<pad>", "unk": "<unk>", "bos": "<s>", "eos": "</s>", "cls": "<s>", "mask": "[MASK]"}
    marks = {f"{name}_token": token for name, token in names.items()}
    tokenizer = _class(class_name)(tokenizer_object=backend, model_max_length=model_max_length, **marks)
    tokenizer.chat_template = CHAT
    for name, token in MARKS.items():
        for attribute, value in ((name, token), (f"{name}_id", vocabulary[token])):
            if getattr(tokenizer, attribute, None) is None:
                setattr(tokenizer, attribute, value)
    return tokenizer


@cache
def _class(name: str) -> type:
    """Return WordTokenizer, made a subclass of the tokenizer class called ``name`` where that can be."""
    wanted = getattr(transformers, name, None)
    if not isinstance(wanted, type) or issubclass(WordTokenizer, wanted):
        return WordTokenizer
    try:
        return type(name, (WordTokenizer, wanted), {"__init__": WordTokenizer.__init__})
    except TypeError:
        return WordTokenizer


def processor(class_name: str) -> Any:
    """Return a processor of vision and text with default parts; raises KeyError for a class that has no stand-in."""
    parts = _PROCESSORS[class_name]
    made = {name: getattr(transformers, part)() for name, part in parts.items()}
    return getattr(transformers, class_name)(**made, tokenizer=word_tokenizer("Qwen2Tokenizer"), chat_template=CHAT)


_QWEN_IMAGES = {"image_processor": "Qwen2VLImageProcessor", "video_processor": "Qwen2VLVideoProcessor"}
_PROCESSORS: Mapping[str, Mapping[str, str]] = {
    "Qwen2VLProcessor": _QWEN_IMAGES,
    "Qwen2_5_VLProcessor": _QWEN_IMAGES,
    "Qwen3VLProcessor": {**_QWEN_IMAGES, "video_processor": "Qwen3VLVideoProcessor"},
    "Gemma3Processor": {"image_processor": "Gemma3ImageProcessor"},
}
