"""CLIP text and vision config tables, with transformers' field names and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .checks import At, Check, anything, integer, key, layers, one_of, optional, positive, read, size, strict

TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
ACT = one_of("quick_gelu", "gelu")
TOKEN = integer(0)

# keys of transformers' PreTrainedConfig, old and new, that allocate nothing in a CLIP forward
METADATA = """
    architectures attention_dropout bad_words_ids begin_suppress_tokens bos_token_id cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dropout dtype early_stopping encoder_no_repeat_ngram_size
    eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label
    initializer_factor initializer_range label2id length_penalty logit_scale_init_value max_length min_length
    model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores pad_token_id prefix
    problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
    use_return_dict
"""
EXTRA: dict[str, Check[Any]] = {
    **dict.fromkeys(METADATA.split(), anything),
    "output_hidden_states": one_of(False),
    "output_attentions": one_of(False),
    "chunk_size_feed_forward": one_of(0),
    "add_cross_attention": one_of(False),
    "is_decoder": one_of(False),
    "is_encoder_decoder": one_of(False),
    "pruned_heads": one_of(None, {}),
}


@dataclass(frozen=True, slots=True)
class CLIPTextConfig:
    """The config of ``CLIPTextModel`` or ``CLIPTextModelWithProjection``, as ``class_name`` says."""

    class_name: str
    vocab_size: int = key(size, 49408)
    hidden_size: int = key(size, 512)
    intermediate_size: int = key(size, 2048)
    projection_dim: int = key(size, 512)
    num_hidden_layers: int = key(layers, 12)
    num_attention_heads: int = key(size, 8)
    max_position_embeddings: int = key(size, 77)
    hidden_act: str = key(ACT, "quick_gelu")
    layer_norm_eps: float = key(positive, 1e-5)
    pad_token_id: int | None = key(optional(TOKEN), 1)
    bos_token_id: int | None = key(optional(TOKEN), 49406)
    eos_token_id: int = key(TOKEN, 49407)


@dataclass(frozen=True, slots=True)
class CLIPVisionConfig:
    """The vision tower of ``StableDiffusionSafetyChecker`` or of ``CLIPVisionModelWithProjection``.

    ``projection_dim`` is the width of its projection.
    """

    hidden_size: int = key(size, 768)
    intermediate_size: int = key(size, 3072)
    projection_dim: int = key(size, 512)
    num_hidden_layers: int = key(layers, 12)
    num_attention_heads: int = key(size, 12)
    num_channels: int = key(size, 3)
    image_size: int = key(size, 224)
    patch_size: int = key(size, 32)
    hidden_act: str = key(ACT, "quick_gelu")
    layer_norm_eps: float = key(positive, 1e-5)

    @property
    def tokens(self) -> int:
        """One of the class and one a patch."""
        return 1 + (self.image_size // self.patch_size) ** 2


def _check_heads(config: CLIPTextConfig | CLIPVisionConfig, file: str, prefix: str = "") -> None:
    if config.hidden_size % config.num_attention_heads:
        at = At(file, prefix + "hidden_size")
        raise at.unsupported(config.hidden_size, f"multiples of num_attention_heads = {config.num_attention_heads}")


def _text_class(mapping: object) -> object:
    """Return the class that ``architectures`` names, as transformers writes it."""
    named = mapping.get("architectures") if isinstance(mapping, Mapping) else None
    return named[0] if isinstance(named, list | tuple) and len(named) == 1 else TEXT_CLASSES[0]


def clip_text_config(
    mapping: object, file: str = "text_encoder/config.json", class_name: str | None = None
) -> CLIPTextConfig:
    """Return the checked config of a CLIP text encoder; raises ``DerivationError``."""
    named = one_of(*TEXT_CLASSES)(class_name or _text_class(mapping), At(file, "architectures"))
    config = CLIPTextConfig(class_name=named, **read(CLIPTextConfig, mapping, file, extra=EXTRA))
    _check_heads(config, file)
    return config


def _tower(mapping: object, file: str) -> tuple[object, str, dict[str, object]]:
    """Split a nested CLIPConfig into its vision tower, the tower's key, and the outer projection_dim."""
    if not isinstance(mapping, Mapping) or not {"vision_config", "vision_config_dict"} & mapping.keys():
        return mapping, "", {}
    nested = ["vision_config", "vision_config_dict", "text_config", "text_config_dict", "projection_dim"]
    outer = strict(mapping, file, known=[*nested, *EXTRA], owner="CLIPConfig")
    # transformers: CLIPConfig.__post_init__ lets vision_config_dict win over vision_config
    name = "vision_config" if outer.get("vision_config_dict") is None else "vision_config_dict"
    return outer.get(name), name + ".", {"projection_dim": outer.get("projection_dim", 512)}


def clip_vision_config(mapping: object, file: str = "safety_checker/config.json") -> CLIPVisionConfig:
    """Return the checked vision tower of a model, from a nested or a flat dict; raises ``DerivationError``."""
    tower, prefix, outer = _tower(mapping, file)
    values = read(CLIPVisionConfig, tower, file, extra=EXTRA, prefix=prefix)
    for name, value in outer.items():
        values[name] = size(value, At(file, name))
    config = CLIPVisionConfig(**values)
    _check_heads(config, file, prefix)
    if config.patch_size > config.image_size:
        at = At(file, prefix + "patch_size")
        raise at.unsupported(config.patch_size, f"up to image_size = {config.image_size}")
    return config
