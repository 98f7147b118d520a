"""Random gates in the layouts they are published in, and what their formulas say, written from the formulas alone."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 3, 64, 4, 2, 16


def drawn(*shape: int, seed: int, scale: float = 0.3) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kvzap(width: int | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {}
    for i in range(LAYERS):
        if width is None:
            tensors |= {f"layers.{i}.weight": drawn(KV_HEADS, HIDDEN, seed=i), f"layers.{i}.bias": drawn(KV_HEADS, seed=50 + i)}  # fmt: skip
            continue
        tensors |= {
            f"layers.{i}.0.weight": drawn(width, HIDDEN, seed=i),
            f"layers.{i}.0.bias": drawn(width, seed=50 + i),
        }
        tensors |= {f"layers.{i}.2.weight": drawn(KV_HEADS, width, seed=90 + i), f"layers.{i}.2.bias": drawn(KV_HEADS, seed=70 + i)}  # fmt: skip
    config = {
        "model_type": "kvzap",
        "input_dim": HIDDEN,
        "output_dim": KV_HEADS,
        "hidden_dim": width,
        "n_modules": LAYERS,
    }
    return tensors, config


def kvzap_score(tensors: dict[str, Tensor], layer: int, x: Tensor) -> Tensor:
    if f"layers.{layer}.weight" in tensors:
        return x @ tensors[f"layers.{layer}.weight"].T + tensors[f"layers.{layer}.bias"]
    u = F.gelu(x @ tensors[f"layers.{layer}.0.weight"].T + tensors[f"layers.{layer}.0.bias"])
    return u @ tensors[f"layers.{layer}.2.weight"].T + tensors[f"layers.{layer}.2.bias"]


def fastkvzip(rank: int = 4, bases: int = 5) -> list[dict[str, Tensor]]:
    group = HEADS // KV_HEADS
    return [
        {
            "q_proj.weight": drawn(HEADS * rank, HIDDEN, seed=i),
            "q_proj.bias": drawn(HEADS * rank, seed=20 + i),
            "k_proj.weight": drawn(KV_HEADS * rank, HIDDEN, seed=30 + i),
            "q_norm.weight": 1 + drawn(rank, seed=40 + i),
            "k_norm.weight": 1 + drawn(rank, seed=60 + i),
            "k_base": drawn(KV_HEADS, 1, bases, rank, seed=80 + i, scale=1.0),
            "b": drawn(KV_HEADS, 1, group, seed=100 + i, scale=1.0),
        }
        for i in range(LAYERS)
    ]


def fastkvzip_probability(layer: dict[str, Tensor], x: Tensor) -> Tensor:
    """`p_g = mean over h in g of 1 / (1 + sum_m exp(q_h.b_m / sqrt(r) - q_h.k_g / sqrt(r) - c_h))`, head by head."""
    rank, group = len(layer["q_norm.weight"]), HEADS // KV_HEADS

    def norm(y: Tensor, weight: Tensor) -> Tensor:
        return weight * y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    q = (x @ layer["q_proj.weight"].T + layer["q_proj.bias"]).split(rank, -1)
    k = (x @ layer["k_proj.weight"].T).split(rank, -1)
    found = []
    for g in range(KV_HEADS):
        key, of_group = norm(k[g], layer["k_norm.weight"]), []
        for j in range(group):
            query = norm(q[g * group + j], layer["q_norm.weight"])
            own = (query * key).sum(-1) / rank**0.5 + layer["b"][g, 0, j]
            base = query @ layer["k_base"][g, 0].T / rank**0.5
            of_group.append(1 / (1 + (base - own[..., None]).exp().sum(-1)))
        found.append(torch.stack(of_group).mean(0))
    return torch.stack(found, -1)


def trim_kv(kind: str, prefix: str = "model.layers", tied: bool = True, width: int = 12) -> dict[str, Tensor]:
    tensors = {}
    for i in range(LAYERS):
        own, shared = f"{prefix}.{i}.self_attn.retention_gate", 0 if tied else i
        tensors |= {
            f"{own}.linear1.weight": drawn(width, HIDDEN, seed=i),
            f"{own}.linear1.bias": drawn(width, seed=20 + i),
        }
        if kind == "rg":
            tensors |= {f"{own}.linear2.weight": drawn(KV_HEADS, width, seed=40 + i), f"{own}.bias": 2 + drawn(KV_HEADS, seed=i)}  # fmt: skip
        else:
            tensors |= {f"{own}.linear2.weight": drawn(width, width, seed=40 + i), f"{own}.linear2.bias": drawn(width, seed=60 + i)}  # fmt: skip
            tensors |= {f"{own}.linear3.weight": drawn(KV_HEADS, width, seed=80 + shared), f"{own}.bias": 2 + drawn(KV_HEADS, seed=shared)}  # fmt: skip
    return tensors


def trim_kv_log_beta(tensors: dict[str, Tensor], own: str, x: Tensor) -> Tensor:
    u = F.silu(x @ tensors[f"{own}.linear1.weight"].T + tensors[f"{own}.linear1.bias"])
    last = "linear2"
    if f"{own}.linear3.weight" in tensors:
        u, last = F.silu(u @ tensors[f"{own}.linear2.weight"].T + tensors[f"{own}.linear2.bias"]), "linear3"
    s = (u @ tensors[f"{own}.{last}.weight"].T + tensors[f"{own}.bias"]).double()
    return torch.log(1 / (1 + torch.exp(-s)))


def locret(width: int = 10) -> dict[str, Tensor]:
    size = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    return {
        f"model.layers.{i}.self_attn.{name}.weight": drawn(*shape, seed=seed + i)
        for i in range(LAYERS)
        for name, shape, seed in (("fc1", (width, size), 0), ("fc2", (KV_HEADS, width), 20))
    }


def dms(bias: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {"model.embed_tokens.weight": drawn(100, HIDDEN, seed=1)}
    for i in range(LAYERS):
        own = f"model.layers.{i}.self_attn"
        tensors |= {f"{own}.q_proj.weight": drawn(HIDDEN, HIDDEN, seed=2)}
        tensors |= {f"{own}.dms_proj_alpha.weight": drawn(KV_HEADS, HIDDEN, seed=30 + i, scale=0.02)}
        tensors |= {f"{own}.dms_proj_alpha_norm.weight": 1 + drawn(HIDDEN, seed=50 + i)}
        if bias:
            tensors |= {f"{own}.dms_proj_alpha.bias": drawn(KV_HEADS, seed=60 + i, scale=0.02)}
    config = {"dms_separate_alpha": True, "dms_alpha_scale": 100.0, "dms_initial_alpha_offset": 5.0}
    return tensors, config | {"dms_alpha_per": "head", "dms_window_size": 512}


def dms_logit(tensors: dict[str, Tensor], config: dict[str, Any], layer: int, residual: Tensor, eps: float) -> Tensor:
    """`e` as it is read off each token of the residual stream: about the token before it."""
    own = f"model.layers.{layer}.self_attn"
    r = residual / (residual.square().mean(-1, keepdim=True) + eps).sqrt()
    e = (tensors[f"{own}.dms_proj_alpha_norm.weight"] * r) @ tensors[f"{own}.dms_proj_alpha.weight"].T
    e = e + tensors.get(f"{own}.dms_proj_alpha.bias", torch.zeros(KV_HEADS))
    e = config["dms_alpha_scale"] * e - config["dms_initial_alpha_offset"]
    return e[..., :1].expand(e.shape) if config["dms_alpha_per"] == "layer" else e
