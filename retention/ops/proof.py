"""Whether the split form of gated attention is right on a device, found out by trying it there once.

It calls flash kernels in a way that fused attention itself does not offer, and kernels differ between devices and
versions; where it is wrong or fails, the fp32 form is taken, with a warning.
"""

import logging
from functools import lru_cache

import torch
from torch import Tensor

from retention.ops import split
from retention.ops.attention import naive_gated_attention

log = logging.getLogger(__name__)
TOKENS = 96
CLOSE = 0.02
"""Relative error that bfloat16 itself may have; a wrong mask or offset errs by the whole."""


@lru_cache
def proven(device: torch.device, head_dim: int, value_dim: int) -> bool:
    """Whether output and gradients, also of fewer queries than keys, are those of the naive form."""
    try:
        worst = max(*_apart(device, head_dim, value_dim), _shifted(device, head_dim))
    except (RuntimeError, NotImplementedError) as error:
        told = str(error).partition("\n")[0]
        log.warning("gated attention in bfloat16 fails on %s (%s); it runs in fp32 instead, slower", device, told)
        return False
    if not worst < CLOSE:
        log.warning("gated attention in bfloat16 errs by %.2g on %s; it runs in fp32 instead, slower", worst, device)
    return worst < CLOSE


def _random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, torch.bfloat16)


def _gap(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


@torch.enable_grad()
def _apart(device: torch.device, head_dim: int, value_dim: int) -> list[float]:
    """Errors of the output and of the gradients of everything that has one."""
    given = [
        _random(device, 1, heads, TOKENS, width) for heads, width in ((4, head_dim), (2, head_dim), (2, value_dim))
    ]
    log_beta = -_random(device, 1, 2, TOKENS).float().abs() / 10
    where = {"scaling": head_dim**-0.5, "positions": torch.arange(TOKENS, device=device)[None]}
    aim = _random(device, 1, 4, TOKENS, value_dim)
    found = []
    for form, dtype in ((split.split_gated_attention, torch.bfloat16), (naive_gated_attention, torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in given] + [log_beta.clone().requires_grad_()]
        with torch.autocast(device.type, enabled=False):
            out = form(*leaves, **where)
            found.append([out.detach(), *torch.autograd.grad((out.float() * aim).sum(), leaves)])
    return [_gap(own, truth) for own, truth in zip(*found, strict=True)]


@torch.no_grad()
def _shifted(device: torch.device, head_dim: int) -> float:
    """Error of the fused call for the last third of the queries."""
    q, k, v = (_random(device, 1, heads, TOKENS, head_dim) for heads in (4, 2, 2))
    last = slice(TOKENS - TOKENS // 3, None)
    own, _ = split.fused_causal(q[:, :, last], k, v, head_dim**-0.5)
    nothing = torch.zeros(k.shape[:3], device=device)
    where = {"scaling": head_dim**-0.5, "positions": torch.arange(TOKENS, device=device)[None]}
    return _gap(own, naive_gated_attention(q.float(), k.float(), v.float(), nothing, **where)[:, :, last])
