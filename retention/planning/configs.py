"""A model's config off a file, and whether its cache is one that can be planned."""

from pathlib import Path
from typing import Any

from retention.checkpoint import parsed, shown

COUNTS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size")
OTHERWISE = {
    "kv_lora_rank": "multi-head latent attention, whose latent is one for all heads",
    "cross_attention_layers": "layers that read another sequence, whose keys and values grow otherwise",
    "num_kv_shared_layers": "layers that read the keys and values of other layers",
}
"""Settings of caches that are made otherwise, and what they mean."""


def config_of(file: Path) -> Any:
    """The config of a JSON file, or of the `config.json` in a folder; nothing is looked up elsewhere.

    Raises:
        ValueError: when it is none, or transformers does not take it.
    """
    from transformers import CONFIG_MAPPING

    file = file / "config.json" if file.is_dir() else file
    try:
        told = parsed(file.read_bytes(), file.name)
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a config.json or its folder, {file} is none ({error})") from error
    kind = told.get("model_type") if isinstance(told, dict) else None
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(f"expected a model_type that transformers knows in {file}, got {shown(kind)}")
    try:
        return CONFIG_MAPPING[kind].from_dict(told)
    except Exception as error:  # what a family checks, and how it says so, is its own
        raise ValueError(f"transformers refuses the config in {file} ({' '.join(str(error).split())[:200]})") from error


def check(config: Any) -> None:
    """Refuse caches that are something else than keys and values of equal heads, in every layer its own.

    Raises:
        ValueError: with the reason.
    """
    text = config.get_text_config()
    try:
        told: dict[str, Any] = {name: getattr(text, name, None) for name in (*COUNTS, *OTHERWISE, "head_dim")}
    except RuntimeError as error:  # transformers' own, for what differs between layers
        raise ValueError(
            "expected layers of equal heads, got a config whose layers differ (per_layer_config)"
        ) from error
    for name, meaning in OTHERWISE.items():
        if told[name]:
            raise ValueError(
                f"expected keys and values by head in every layer, got {meaning} ({name}); nothing here plans or evicts it"
            )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            "expected a decoder alone, got an encoder with one, which holds keys of its own for what it reads"
        )
    for name in COUNTS:
        if type(told[name]) is not int or told[name] < 1:
            raise ValueError(f"expected one number {name} above 0 in the config, got {shown(told[name])}")
    hidden, heads, kv_heads = (told[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if heads % kv_heads or (not told["head_dim"] and hidden % heads):
        raise ValueError(
            f"expected query heads that {kv_heads} KV heads divide, and head_dim or a hidden_size that heads divide, got "
            f"{heads} heads and hidden_size {hidden}"
        )
    if (told["head_dim"] or 1) < 1:
        raise ValueError(f"expected head_dim above 0 in the config, got {shown(told['head_dim'])}")
