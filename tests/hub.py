"""Tiny checkpoints of every vision-language family, saved in the hub's layout: real config, model and processor classes.

Three decoder layers, hidden 64, 4 query and 2 KV heads, a byte-level tokenizer; images of 16 to 32 pixels in patches of
4, so that one image is 4 to 40 tokens.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SPECIAL = [
    *("<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>"),
    *("<|vision_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
    *("[IMG]", "[IMG_BREAK]", "[IMG_END]", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
]
ID = {token: number for number, token in enumerate(SPECIAL)}
VOCAB = len(SPECIAL) + 256
SIDE, PATCH = 16, 4
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOWER: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUARE = TOWER | {"image_size": SIDE, "patch_size": PATCH, "initializer_range": 0.2}
GRID = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "patch_size": PATCH}
GRID |= {"initializer_range": 0.2}
SIZE = {"height": SIDE, "width": SIDE}


@dataclass
class Hub:
    """One family's tiny checkpoint."""

    config: Callable[[], Any]
    model: str
    """Name of the model class."""
    processor: str
    """Name of the processor class."""
    images: tuple[str, dict[str, Any]]
    """Name of the image processor class without its backend, and its arguments."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of the processor."""
    image: str = "<image>"
    """What stands for an image in a prompt."""
    named: dict[str, str] = field(default_factory=dict)
    """Special tokens that the tokenizer knows by name."""
    video: str = "<video>"
    """What stands for a video in a prompt, of processors that take any."""


def tokenizer(named: dict[str, str]) -> Any:
    """Bytes and special tokens; pads on the left."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, padding_side="left", model_max_length=4096, extra_special_tokens=named, **names
    )


def _vision(kind: str, **changes: Any) -> Any:
    import transformers

    return getattr(transformers, f"{kind}VisionConfig")(**SQUARE | changes)


def _text(kind: str, **changes: Any) -> Any:
    import transformers

    return getattr(transformers, f"{kind}Config")(**TEXT | changes)


def _llava() -> Any:
    from transformers import LlavaConfig

    tower = _vision("CLIP", projection_dim=64)
    own = {"image_seq_length": 16, "vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    return LlavaConfig(vision_config=tower, text_config=_text("Llama"), image_token_id=ID["<image>"], **own)


def _pixtral() -> Any:
    """Llava with Pixtral's tower, which takes images of any size."""
    from transformers import LlavaConfig

    tower = _vision("Pixtral", image_size=64)
    own = {"image_seq_length": 1, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    return LlavaConfig(
        vision_config=tower, text_config=_text("Mistral", sliding_window=None), image_token_id=ID["[IMG]"], **own
    )


PINPOINTS = [[16, 32], [32, 16], [32, 32]]


def _llava_next() -> Any:
    from transformers import LlavaNextConfig

    tower, ids = _vision("CLIP", projection_dim=64), {"image_token_id": ID["<image>"]}
    own = {"image_seq_length": 16, "image_grid_pinpoints": PINPOINTS, "vision_feature_layer": -2}
    return LlavaNextConfig(vision_config=tower, text_config=_text("Mistral", sliding_window=None), **own, **ids)


def _llava_onevision() -> Any:
    from transformers import LlavaOnevisionConfig

    ids = {"image_token_id": ID["<image>"], "video_token_id": ID["<video>"]}
    tower, own = _vision("Siglip", vision_use_head=False), {"image_grid_pinpoints": PINPOINTS}
    return LlavaOnevisionConfig(vision_config=tower, text_config=_text("Qwen2"), **own, **ids)


QWEN_IDS = {
    "image_token_id": ID["<|image_pad|>"],
    "video_token_id": ID["<|video_pad|>"],
    "vision_start_token_id": ID["<|vision_start|>"],
    "vision_end_token_id": ID["<|vision_end|>"],
}


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2], **more}}


def _qwen2_vl() -> Any:
    from transformers import Qwen2VLConfig

    tower = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": PATCH, "mlp_ratio": 2}
    return Qwen2VLConfig(text_config=TEXT | _rope(), vision_config=tower, **QWEN_IDS)


def _qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig

    tower = GRID | {"out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 16}
    return Qwen2_5_VLConfig(text_config=TEXT | _rope(), vision_config=tower, **QWEN_IDS)


DEEP = GRID | {"out_hidden_size": 64, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}


def _qwen3_vl() -> Any:
    from transformers import Qwen3VLConfig

    text = TEXT | {"head_dim": 16} | _rope(mrope_interleaved=True)
    return Qwen3VLConfig(text_config=text, vision_config=DEEP, **QWEN_IDS)


def _qwen3_vl_moe() -> Any:
    from transformers import Qwen3VLMoeConfig

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    text = TEXT | {"head_dim": 16} | _rope(mrope_interleaved=True) | experts
    return Qwen3VLMoeConfig(text_config=text, vision_config=DEEP, **QWEN_IDS)


def _internvl() -> Any:
    from transformers import InternVLConfig

    tower, ids = _vision("InternVL"), {"image_token_id": ID["<IMG_CONTEXT>"]}
    return InternVLConfig(vision_config=tower, text_config=_text("Qwen2"), image_seq_length=4, **ids)


def _idefics3(kind: str = "Idefics3") -> Any:
    import transformers

    ids = {"image_token_id": ID["<image>"], "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")
    return config(vision_config=_vision(kind), text_config=_text("Llama"), scale_factor=2, **ids)


def _gemma3() -> Any:
    from transformers import Gemma3Config, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention", "full_attention"]
    own = {"head_dim": 16, "query_pre_attn_scalar": 16, "layer_types": kinds, "sliding_window": 16}
    ids = {"image_token_id": ID["<image_soft_token>"], "boi_token_index": ID["<start_of_image>"]}
    ids |= {"eoi_token_index": ID["<end_of_image>"]}
    text, tower = Gemma3TextConfig(**TEXT | own), _vision("Siglip", vision_use_head=False)
    return Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4, **ids)


def _mistral3() -> Any:
    from transformers import Mistral3Config

    tower, ids = _vision("Pixtral", image_size=64), {"image_token_id": ID["[IMG]"]}
    return Mistral3Config(
        vision_config=tower, text_config=_text("Mistral", head_dim=16, sliding_window=None), spatial_merge_size=2, **ids
    )


CROP = "CLIPImageProcessor", {"size": {"shortest_edge": SIDE}, "crop_size": SIZE}
PIXTRAL = "PixtralImageProcessor", {"patch_size": PATCH, "size": {"longest_edge": 32}}
NEXT = {"size": {"shortest_edge": SIDE}, "crop_size": SIZE, "image_grid_pinpoints": PINPOINTS}
ONEVISION = {"size": SIZE, "image_grid_pinpoints": PINPOINTS}
GRIDS = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2}
GRIDS |= {"size": {"shortest_edge": 64, "longest_edge": 1024}}
TILES = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": SIDE}}
TILED = {"size": SIZE, "crop_to_patches": True, "max_patches": 4}
PATCHED = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
SCORES = "<|vision_start|><|image_pad|><|vision_end|>"
FOUR = {"image_seq_len": 4}
FILM = "<|vision_start|><|video_pad|><|vision_end|>"
QWEN = ("Qwen2VLImageProcessor", GRIDS), {}, SCORES, {}, FILM
GEMMA = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
INTERN = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
HUB: dict[str, Hub] = {
    "llava": Hub(_llava, "LlavaForConditionalGeneration", "LlavaProcessor", CROP, PATCHED),
    "pixtral": Hub(
        _pixtral, "LlavaForConditionalGeneration", "PixtralProcessor", PIXTRAL, {"patch_size": PATCH}, "[IMG]"
    ),
    "llava_next": Hub(
        _llava_next,
        "LlavaNextForConditionalGeneration",
        "LlavaNextProcessor",
        ("LlavaNextImageProcessor", NEXT),
        PATCHED,
    ),
    "llava_onevision": Hub(
        _llava_onevision,
        "LlavaOnevisionForConditionalGeneration",
        "LlavaOnevisionProcessor",
        ("LlavaOnevisionImageProcessor", ONEVISION),
        {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    ),
    "qwen2_vl": Hub(_qwen2_vl, "Qwen2VLForConditionalGeneration", "Qwen2VLProcessor", *QWEN),
    "qwen2_5_vl": Hub(_qwen2_5_vl, "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor", *QWEN),
    "qwen3_vl": Hub(_qwen3_vl, "Qwen3VLForConditionalGeneration", "Qwen3VLProcessor", *QWEN),
    "qwen3_vl_moe": Hub(_qwen3_vl_moe, "Qwen3VLMoeForConditionalGeneration", "Qwen3VLProcessor", *QWEN),
    "internvl": Hub(
        _internvl,
        "InternVLForConditionalGeneration",
        "InternVLProcessor",
        ("GotOcr2ImageProcessor", TILED),
        {"image_seq_length": 4},
        "<IMG_CONTEXT>",
        INTERN | {"video_token": "<video>"},
    ),
    "idefics3": Hub(
        _idefics3, "Idefics3ForConditionalGeneration", "Idefics3Processor", ("Idefics3ImageProcessor", TILES), FOUR
    ),
    "smolvlm": Hub(
        lambda: _idefics3("SmolVLM"),
        "SmolVLMForConditionalGeneration",
        "SmolVLMProcessor",
        ("SmolVLMImageProcessor", TILES),
        FOUR,
    ),
    "gemma3": Hub(
        _gemma3,
        "Gemma3ForConditionalGeneration",
        "Gemma3Processor",
        ("Gemma3ImageProcessor", {"size": SIZE}),
        {"image_seq_length": 4},
        "<start_of_image>",
        GEMMA,
    ),
    "mistral3": Hub(
        _mistral3,
        "Mistral3ForConditionalGeneration",
        "PixtralProcessor",
        PIXTRAL,
        {"patch_size": PATCH, "spatial_merge_size": 2},
        "[IMG]",
    ),
}
TEMPLATE = (
    "{%- for message in messages -%}{{ message['role'] + ': ' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ 'IMAGE' }}{%- elif part['type'] == 'video' -%}{{ 'VIDEO' }}"
    "{%- else -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{ '\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}"
)


def build(family: str, seed: int = 0) -> Any:
    """A tiny random model of a family, frozen."""
    import transformers

    hub = HUB[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, hub.model)(hub.config())
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
            if not parameter.any():  # Gemma's projector of images starts at zero
                torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def save(family: str, folder: Path, seed: int = 0) -> None:
    """The family's checkpoint as the hub has it: weights, configs, tokenizer, image processor, chat template."""
    import transformers

    hub = HUB[family]
    build(family, seed).save_pretrained(folder)
    tokenizer(hub.named).save_pretrained(folder)
    kind, arguments = hub.images
    getattr(transformers, f"{kind}Pil")(**arguments).save_pretrained(folder)
    preprocessor = folder / "preprocessor_config.json"
    told = json.loads(preprocessor.read_text()) | {"image_processor_type": kind, "processor_class": hub.processor}
    preprocessor.write_text(json.dumps(told))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": hub.processor, **hub.arguments}))
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("IMAGE", hub.image).replace("VIDEO", hub.video))
