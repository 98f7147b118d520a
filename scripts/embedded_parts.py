"""The embedded model before training: closed vocabulary, tokenizer, processor, random weights.

What `pretrain_embedded_vlm.py` trains and exports; a change here asks for new weights.
"""

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from retention.embedded import LETTERS
from retention.tasks.scene import COLOURS, DECOY0, GROUND0, N_CLASSES

TOKENS = ["<pad>", "<bos>", "<image>", "<img>", "</img>", "<ask>", "<blank>", *map(str, range(10))]
TOKENS += [f"{colour}-{letter}" for colour in COLOURS for letter in LETTERS]
TOKENS += [f"<decoy{i}>" for i in range(GROUND0 - DECOY0)] + [f"<ground{i}>" for i in range(N_CLASSES - GROUND0)]
TOKENS += [f"<extra{i}>" for i in range(128 - len(TOKENS))]
PAD, BOS, IMAGE, START, END, ASK, CELL0 = range(7)  # a cell class c is token CELL0 + c
DIGIT0, KEY0 = CELL0 + 1, CELL0 + 11
PATCHES = 16
CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}{% for part in message['content'] %}"
    "{% if part is string or part['type'] == 'text' %} {{ part if part is string else part['text'] }}"
    "{% elif part['type'] == 'image' %} <img> <image> </img>{% endif %}"
    "{% endfor %}{% endfor %}"
)


def build_tokenizer() -> hf.PreTrainedTokenizerFast:
    """Word-level tokenizer over the closed vocabulary, with the chat template."""
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        padding_side="left",
        model_max_length=100_000,
        extra_special_tokens={
            "image_token": "<image>",
            "boi_token": "<img>",
            "eoi_token": "</img>",
            "ask_token": "<ask>",
        },
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_processor() -> hf.LlavaProcessor:
    """LLaVA's processor: PIL image processor without resizing, 16 image tokens per picture."""
    pictures = hf.SiglipImageProcessorPil(
        do_resize=False, size={"height": 32, "width": 32}, image_mean=[0.3] * 3, image_std=[0.35] * 3
    )
    return hf.LlavaProcessor(
        image_processor=pictures,
        tokenizer=build_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(seed: int) -> hf.LlavaForConditionalGeneration:
    """Random initial weights; norm weights of queries and keys at 1.7, without which logits are too flat to retrieve."""
    torch.manual_seed(seed)
    text = hf.Qwen3Config(
        vocab_size=len(TOKENS),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=None,
    )
    vision = hf.SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        vision_use_head=False,
    )
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_seq_length=PATCHES,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
    )
    model = hf.LlavaForConditionalGeneration(config)
    nn.init.normal_(model.get_input_embeddings().weight, std=128**-0.5)
    for layer in model.get_decoder().layers:
        nn.init.constant_(layer.self_attn.q_norm.weight, 1.7)
        nn.init.constant_(layer.self_attn.k_norm.weight, 1.7)
    return model
