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


def _without(*names: str) -> dict[str, Any]:
    return {k: v for k, v in TEXT.items() if k not in names}


def tiny_qwen2(seed: int = 0, **changes: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return _build(Qwen2ForCausalLM, Qwen2Config(**_without("head_dim") | changes), seed)


def tiny_mistral(seed: int = 0, **changes: Any) -> Any:
    """Full attention, as from version 0.2 on; `sliding_window=n` builds the older kind."""
    from transformers import MistralConfig, MistralForCausalLM

    return _build(MistralForCausalLM, MistralConfig(**TEXT | {"sliding_window": None} | changes), seed)


def tiny_phi3(seed: int = 0, **changes: Any) -> Any:
    from transformers import Phi3Config, Phi3ForCausalLM

    return _build(Phi3ForCausalLM, Phi3Config(**_without("head_dim") | changes), seed)


def tiny_gemma3(seed: int = 0, **changes: Any) -> Any:
    """4 layers: two sliding windows of 16 tokens, full attention, sliding; each type with its own rotary base."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    own = {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 16,
        "query_pre_attn_scalar": 16,
    }
    return _build(Gemma3ForCausalLM, Gemma3TextConfig(**TEXT | own | changes), seed)


def tiny_gemma2(seed: int = 0, **changes: Any) -> Any:
    """4 layers, every other one a sliding window of 16 tokens; logits of attention and of the head are capped."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    caps = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
    own = {"num_hidden_layers": 4, "sliding_window": 16, "query_pre_attn_scalar": 16}
    return _build(Gemma2ForCausalLM, Gemma2Config(**TEXT | own | caps | changes), seed)


def tiny_qwen3_moe(seed: int = 0, **changes: Any) -> Any:
    """4 experts, two of them for each token."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    own = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return _build(Qwen3MoeForCausalLM, Qwen3MoeConfig(**TEXT | own | changes), seed)


def tiny_qwen3_next(seed: int = 0, **changes: Any) -> Any:
    """4 layers: linear, full, linear, full attention; a quarter of each head rotates; 4 experts."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    own = {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts_per_tok": 2,
        "num_experts": 4,
    }
    return _build(Qwen3NextForCausalLM, Qwen3NextConfig(**TEXT | own | changes), seed)


VIDEO_TOKEN = 98
MERGE = 2
GRID_TOKENS = {
    "vision_start_token_id": 96,
    "vision_end_token_id": 97,
    "video_token_id": VIDEO_TOKEN,
    "image_token_id": IMAGE_TOKEN,
}


def tiny_qwen2_5_vl(seed: int = 0, **changes: Any) -> Any:
    """M-RoPE in chunks of 4, 2 and 2 frequencies; images of any grid, see `grid_inputs`."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": PATCH}
    vision |= {"out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 32, "initializer_range": 0.2}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}}
    text = _without("head_dim") | rope | changes
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **GRID_TOKENS)
    return _build(Qwen2_5_VLForConditionalGeneration, config, seed)


def tiny_qwen3_vl(seed: int = 0, **changes: Any) -> Any:
    """M-RoPE interleaved, 4, 2 and 2 frequencies; images of any grid, see `grid_inputs`; one deepstack layer."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": PATCH}
    vision |= {"out_hidden_size": 64, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = Qwen3VLConfig(text_config=TEXT | {"rope_parameters": rope} | changes, vision_config=vision, **GRID_TOKENS)
    return _build(Qwen3VLForConditionalGeneration, config, seed)


def grid_inputs(*parts: int | tuple[int, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """One prompt for the Qwen-VL builders: n text tokens for each n, an image of merged rows x columns for each pair."""
    generator = torch.Generator().manual_seed(seed)
    ids, kinds, grids = [], [], []
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(3, 96, (part,), generator=generator).tolist()
            kinds += [0] * part
        else:
            ids += [IMAGE_TOKEN] * (part[0] * part[1])
            kinds += [1] * (part[0] * part[1])
            grids.append([1, MERGE * part[0], MERGE * part[1]])
    batch = {"input_ids": torch.tensor([ids]), "mm_token_type_ids": torch.tensor([kinds])}
    if grids:
        patches = sum(rows * columns for _, rows, columns in grids)
        batch["image_grid_thw"] = torch.tensor(grids)
        batch["pixel_values"] = torch.randn(patches, 3 * 2 * PATCH**2, generator=generator)
    return batch
