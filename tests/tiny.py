"""Tiny random models of the real architectures: 3 layers, hidden 64, 4 query and 2 KV heads, vocabulary 100."""

from typing import Any

import torch

VOCAB = 100
IMAGE_TOKEN = 99
IMAGE_SIZE, PATCH = 16, 8
IMAGE_TOKENS = (IMAGE_SIZE // PATCH) ** 2
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def _build(factory: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factory(config)
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    return model.eval().requires_grad_(False)


def tiny_llama(seed: int = 0, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _build(LlamaForCausalLM, LlamaConfig(**TEXT | changes), seed)


def tiny_qwen3(seed: int = 0, **changes: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _build(Qwen3ForCausalLM, Qwen3Config(**TEXT | changes), seed)


def tiny_llava(seed: int = 0, **changes: Any) -> Any:
    """A CLIP tower without its class token in front of a Llama decoder: IMAGE_TOKENS tokens per 16 x 16 image."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=32,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT | changes),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return _build(LlavaForConditionalGeneration, config, seed)
