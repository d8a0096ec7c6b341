"""Stand-ins for tokenizers and processors whose files are not there: the shapes they give are the real ones'.

A tokenizer splits as the real ones do on plain English: a word with its space, a mark and a line break are a token
each, so that a prompt of n words has n tokens and a chat template as many as the pipelines count on.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from functools import cache
from importlib import import_module
from itertools import count
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import torch
import transformers
from diffusers.models.controlnets import controlnet_cosmos
from diffusers.models.transformers import transformer_cosmos
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from transformers.processing_utils import ProcessorMixin

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


class PositionTokenizer(WordTokenizer):
    """What Kolors' ChatGLMTokenizer gives beside tokens and mask: their positions (kolors/tokenizer.py: _pad)."""

    def __call__(self, *args: Any, **given: Any) -> Any:
        """Return the tokens, their mask and positions [B, L]."""
        found = super().__call__(*args, **given)
        if isinstance(mask := found.get("attention_mask"), torch.Tensor):
            found["position_ids"] = (mask.cumsum(-1) - 1).clamp(0)
        return found


# Tokenizers of a pipeline's own module.
_OWN: Mapping[str, type[WordTokenizer]] = {"ChatGLMTokenizer": PositionTokenizer}


def word_tokenizer(
    class_name: str = "", model_max_length: int = 512, token_ids: Mapping[str, int] = MappingProxyType({})
) -> Any:
    """Return a stand-in that is an instance of the tokenizer class ``class_name``, where transformers has it.

    ``token_ids`` are the ids of some MARKS, as a model's config has them.
    """
    known = {MARKS[name]: i for name, i in token_ids.items()}
    free = (i for i in count() if i not in known.values())
    vocabulary = {token: known[token] if token in known else next(free) for token in SPECIAL}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    family = next((ends for name, ends in _ENDS.items() if class_name.startswith(name)), "$A")
    tokens = [(token, vocabulary[token]) for token in ("<s>", "</s>") if token in family]
    pair = f"{family} {family.replace('$A', '$B')}"
    backend.post_processor = processors.TemplateProcessing(single=family, pair=pair, special_tokens=tokens)
    names = {"pad": "<pad>", "unk": "<unk>", "bos": "<s>", "eos": "</s>", "cls": "<s>", "mask": "[MASK]"}
    marks = {f"{name}_token": token for name, token in names.items()}
    given = {"tokenizer_object": backend, "model_max_length": model_max_length, **marks}
    try:
        tokenizer = _class(class_name)(**given)
    except AttributeError:  # a tokenizer of bytes, which has no fast form (ByT5)
        tokenizer = WordTokenizer(**given)
    tokenizer.chat_template = CHAT
    for name, token in MARKS.items():
        for attribute, value in ((name, token), (f"{name}_id", vocabulary[token])):
            if getattr(tokenizer, attribute, None) is None:
                setattr(tokenizer, attribute, value)
    return tokenizer


@cache
def _class(name: str) -> type:
    """Return WordTokenizer, made a subclass of the tokenizer class called ``name`` where that can be."""
    if name in _OWN:
        return _OWN[name]
    wanted = getattr(transformers, name, None)
    if not isinstance(wanted, type) or issubclass(WordTokenizer, wanted):
        return WordTokenizer
    try:
        return type(name, (WordTokenizer, wanted), {"__init__": WordTokenizer.__init__})
    except TypeError:
        return WordTokenizer


def processor(class_name: str, token_ids: Mapping[str, int] = MappingProxyType({})) -> Any:
    """Return a processor of vision and text with default parts; raises KeyError for a class that has no stand-in."""
    image_processor, given = _PROCESSORS[class_name]
    made = {"image_processor": getattr(transformers, image_processor)(**given)}
    if image_processor.startswith("Qwen"):
        made["video_processor"] = _NoVideos()
    tokenizer = word_tokenizer("Qwen2Tokenizer", token_ids=token_ids)
    with patch.object(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None):
        return getattr(transformers, class_name)(**made, tokenizer=tokenizer, chat_template=CHAT)


class _NoVideos:
    """A video processor that is given no video: the real ones want torchvision."""

    temporal_patch_size, merge_size = 2, 2


class _Guard:
    """A safety checker that passes everything and holds nothing, where its library is not installed."""

    def to(self, *_: object) -> None:
        """Stay."""

    def check_text_safety(self, _prompt: str) -> bool:
        """Return that a prompt is safe."""
        return True

    def check_video_safety(self, frames: Any) -> Any:
        """Return the frames as they are."""
        return frames


class _Ftfy:
    """``ftfy`` for prompts that need no mending."""

    @staticmethod
    def fix_text(text: str) -> str:
        """Return the text as it is."""
        return text


class _Transforms:
    """``torchvision.transforms`` as Cosmos uses it (_functional_tensor.py: resize): half types are cast to float32."""

    class InterpolationMode(Enum):
        """The mode's name is what ``interpolate`` takes."""

        NEAREST = "nearest"

    class functional:  # noqa: N801
        """Functions of tensors."""

        @staticmethod
        def resize(image: torch.Tensor, size: list[int], interpolation: Any) -> torch.Tensor:
            """Return an image [B, C, H, W] of another size."""
            if list(image.shape[-2:]) == size:
                return image
            wide = image if image.dtype in (torch.float32, torch.float64) else image.to(torch.float32)
            found = torch.nn.functional.interpolate(wide, size=size, mode=interpolation.value)
            return found.to(image.dtype)


GUARD = "CosmosSafetyChecker"
_COSMOS = (transformer_cosmos, controlnet_cosmos)


def stand_in(pipeline: type) -> None:
    """Give a pipeline's modules what they want of ftfy, torchvision and cosmos_guardrail, where they are not there."""
    own: Any = import_module(pipeline.__module__)
    for module, name, value in ((own, "ftfy", _Ftfy), *((each, "transforms", _Transforms) for each in _COSMOS)):
        if not hasattr(module, name):
            setattr(module, name, value)
    if getattr(getattr(own, GUARD, None), "__module__", None) == own.__name__:
        setattr(own, GUARD, _Guard)  # which raises ImportError there


# class -> the class of its image processor, and what its published preprocessor_config.json says otherwise
_PROCESSORS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Qwen2VLProcessor": ("Qwen2VLImageProcessor", {}),
    "Qwen2_5_VLProcessor": ("Qwen2VLImageProcessor", {}),
    "Qwen3VLProcessor": ("Qwen2VLImageProcessor", {"patch_size": 16}),
    "Gemma3Processor": ("Gemma3ImageProcessor", {}),
}
