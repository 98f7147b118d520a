"""Gated attention alone: its error against float64 over length, its time and memory against flash attention without gates.

    python scripts/bench_gated_attention.py            # docs/benchmarks/gated_attention.md, or gated_attention_cuda.md
    python scripts/bench_gated_attention.py --quick    # the same in miniature, printed
    python scripts/bench_gated_attention.py --json out.json

Random queries, keys and values, so figures are about numbers, time and memory, never quality.
"""

import argparse
import gc
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gated_page import page
from torch import Tensor
from torch.nn import functional as F

from retention.files import write_json, write_text
from retention.ops import attention, flex, split
from retention.ops.split import QUERIES, age_error, fused_causal

Row = dict[str, Any]
Dimensions = Callable[..., tuple[Tensor, Tensor]]
RELEVANT = 20.0
"""A key whose age term is further below 0, in logits, weighs nothing."""


@dataclass
class Plan:
    """Sizes of the measurements; those of a CPU."""

    device: str = "cpu"
    spans: tuple[int, ...] = (512, 4096, 16_384, 65_536, 131_072)
    half_lives: tuple[float, ...] = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
    lengths: tuple[int, ...] = (512, 2048, 4096)
    far: tuple[int, ...] = (16_384, 65_536, 131_072)
    error_half_lives: tuple[float, ...] = (1, 100, 10_000)
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    timed: tuple[int, ...] = (1024, 2048, 4096)
    rounds: int = 5


QUICK = Plan("cpu", (512, 4096), (1, 1000), (256,), (1024,), (100,), 4, 2, 32, (256, 512), 1)
CUDA = Plan("cuda", heads=32, kv_heads=8, timed=(8192, 16_384, 32_768), lengths=(512, 2048, 8192), rounds=10)


def unsplit_dimensions(
    slope: Tensor, positions: Tensor, valid: Tensor | None, *, pad: float, first: int = 0
) -> tuple[Tensor, Tensor]:
    """The fp32 form's dimensions rounded to bfloat16: why there is a split."""
    more_q, more_k = attention.age_dimensions(slope, positions, valid, pad=pad)
    return more_q[:, first:].bfloat16(), more_k.bfloat16()


def whole_dimensions(slope: Tensor, positions: Tensor, valid: Tensor | None, *, pad: float, first: int = 0) -> Any:
    """The fp32 form's dimensions, of queries from `first` on."""
    more_q, more_k = attention.age_dimensions(slope, positions, valid, pad=pad)
    return more_q[:, first:], more_k


def folded(dimensions: Dimensions, q: Tensor, k: Tensor, v: Tensor, log_beta: Tensor, **where: Any) -> Tensor:
    """Attention of the last queries by extra head dimensions of a kind, in the dtype that they have."""
    scaling, positions, tokens = where["scaling"], where["positions"], k.shape[2]
    more_q, more_k = dimensions(log_beta.float() / scaling, positions, None, first=tokens - q.shape[2], pad=0.0)
    kind, fill = more_k.dtype, -(q.shape[-1] + more_q.shape[-1]) % 8
    more_q = more_q[:, None].expand(-1, q.shape[1], -1, -1)
    wide = [F.pad(torch.cat([x.to(kind), more], -1), (0, fill)) for x, more in ((q, more_q), (k, more_k))]
    out, _ = fused_causal(*wide, F.pad(v.to(kind), (0, wide[0].shape[-1] - v.shape[-1])), scaling)
    return out[..., : v.shape[-1]]


def late_split(q: Tensor, k: Tensor, v: Tensor, log_beta: Tensor, **where: Any) -> Tensor:
    """The split form for the last queries: what the last of its calls computes."""
    tokens = k.shape[2]
    start = (tokens - 1) // QUERIES * QUERIES

    def centred(slope: Tensor, positions: Tensor, valid: Tensor | None, *, pad: float, first: int) -> Any:
        more_q, more_k = split.split_dimensions(slope, positions, valid, first=start, pad=pad)
        return more_q[:, first - start :], more_k

    return folded(centred, q, k, v, log_beta, **where)


def plain(q: Tensor, k: Tensor, v: Tensor, log_beta: Tensor | None = None, *, scaling: float, **_: Any) -> Tensor:
    """Flash attention without gates."""
    return fused_causal(q, k, v, scaling)[0]


def drawn(plan: Plan, tokens: int, half_life: float, *, heads: int, queries: int | None = None) -> tuple[Tensor, ...]:
    """Queries, keys, values in bfloat16 and gates that halve after `half_life` tokens, half as many to twice as many."""
    g = torch.Generator().manual_seed(tokens)
    shape = (1, heads, queries or tokens, plan.head_dim)
    q = torch.randn(shape, generator=g)
    k, v = (torch.randn(1, max(1, heads // 4), tokens, plan.head_dim, generator=g) for _ in range(2))
    rates = 2 ** (2 * torch.rand(1, k.shape[1], tokens, generator=g) - 1)
    log_beta = -math.log(2) / half_life * rates
    return (*(x.bfloat16().to(plan.device) for x in (q, k, v)), log_beta.to(plan.device))


def truth(q: Tensor, k: Tensor, v: Tensor, log_beta: Tensor, *, scaling: float, positions: Tensor) -> Tensor:
    """Float64, the queries being the last tokens; one head at a time."""
    tokens, groups = k.shape[2], q.shape[1] // k.shape[1]
    first = tokens - q.shape[2]
    ages = (positions[0, first:, None] - positions[0]).double()
    outs = []
    for head in range(q.shape[1]):
        logits = scaling * q[0, head].double() @ k[0, head // groups].double().T
        logits = logits + ages * log_beta[0, head // groups].double()
        outs.append(logits.masked_fill(ages < 0, float("-inf")).softmax(-1) @ v[0, head // groups].double())
    return torch.stack(outs)[None]


def age_terms(plan: Plan) -> list[Row]:
    """Largest error of the age term itself, in logits: attention to one key, whose log-sum-exp is its logit."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    if plan.device == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    scaling, rows = plan.head_dim**-0.5, []
    forms = {"fp32": whole_dimensions, "split": split.split_dimensions, "unsplit": unsplit_dimensions}
    if plan.device == "cuda":
        forms.pop("fp32")  # flash kernels are of half precision
    for span in plan.spans:
        for half_life in plan.half_lives:
            log_beta, worst = -math.log(2) / half_life, dict.fromkeys([*forms, "recentred"], 0.0)
            for at in (0, 1, span // 3, span // 2, span - 130, span - 2):
                ages = torch.cat([torch.arange(40), torch.logspace(1, math.log10(span), 100).long()]).unique()
                t = (at + ages)[at + ages < span]
                positions = torch.cat([torch.tensor([at, 0]), t, torch.tensor([span - 1])])[None].to(plan.device)
                near = (t >= (span - 1) // QUERIES * QUERIES).to(plan.device)
                for kind in worst:
                    if kind == "recentred":
                        positions[0, 1] = (span - 1) // QUERIES * QUERIES
                    slope = torch.full((1, 1, positions.shape[1]), log_beta / scaling, device=plan.device)
                    more_q, more_k = forms.get(kind, split.split_dimensions)(slope, positions, None, first=1, pad=0.0)
                    wide = (more_q[:, None, 1:-1], more_k[:, :, :1])
                    wide_q, wide_k = (F.pad(x, (plan.head_dim, -x.shape[-1] % 8)) for x in wide)
                    lse = flash(wide_q, wide_k, wide_k, 0.0, False, scale=scaling)[1][0, 0, : len(t)].double()
                    exact = (positions[0, 2:-1] - at) * log_beta
                    counts = (exact >= -RELEVANT) & (near if kind == "recentred" else near | True)
                    if counts.any():
                        worst[kind] = max(worst[kind], float((lse - exact)[counts].abs().max()))
            bounds = {"bound": age_error(span, -log_beta), "recentred_bound": age_error(min(span, QUERIES), -log_beta)}
            rows.append({"span": span, "half_life": half_life, **worst, **bounds})
            print(rows[-1], flush=True)
    return rows


def errors(plan: Plan) -> list[Row]:
    """Output and gradients of whole rows against float64."""
    forms = {
        "fp32": attention.augmented_gated_attention,
        "split": split.split_gated_attention,
        "bias": attention.blocked_gated_attention,
        "unsplit": partial(folded, unsplit_dimensions),
    }
    forms |= {"flex": flex.flex_gated_attention}
    rows = []
    for tokens in plan.lengths:
        for half_life in plan.error_half_lives:
            inputs = drawn(plan, tokens, half_life, heads=2)
            where = {"scaling": plan.head_dim**-0.5, "positions": torch.arange(tokens, device=plan.device)[None]}
            asked = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(plan.device)
            exact = found(truth, [x.double() for x in inputs], asked, where)
            still = (*inputs[:3], torch.zeros_like(inputs[3]))
            floor = found(plain, inputs[:3], asked, where)
            base = found(truth, [x.double() for x in still], asked, where)
            rows.append({"tokens": tokens, "half_life": half_life, "form": "noise", **against(floor, base[:4])})
            for name, form in forms.items():
                given = [x.float() for x in inputs] if name == "fp32" else list(inputs)
                if name == "flex" and plan.device == "cpu":
                    with torch.no_grad():
                        got = [form(*given, **where)]
                else:
                    got = found(form, given, asked, where)
                rows.append({"tokens": tokens, "half_life": half_life, "form": name, **against(got, exact)})
            print(*rows[-1 - len(forms) :], sep="\n", flush=True)
    return rows


def found(form: Callable[..., Tensor], inputs: Any, asked: Tensor, where: Row) -> list[Tensor]:
    """Output and gradients of a form."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = form(*leaves, **where)
    return [out.detach(), *torch.autograd.grad(out, leaves, asked.to(out.dtype))]


def against(got: list[Tensor], exact: list[Tensor]) -> Row:
    """The largest error of the output, and relative errors of gradients."""
    row: Row = {"out": float((got[0].double() - exact[0]).abs().max())}
    for name, a, b in zip(("q", "k", "v", "log_beta"), got[1:], exact[1:], strict=False):
        row[name] = float((a.double() - b).norm() / b.norm())
    return row


def far_errors(plan: Plan) -> list[Row]:
    """Largest output error of the last 64 queries of long rows."""
    forms: dict[str, Callable[..., Tensor]] = {"split": late_split, "unsplit": partial(folded, unsplit_dimensions)}
    if plan.device == "cpu":
        forms["fp32"] = partial(folded, whole_dimensions)
    rows = []
    for tokens in plan.far:
        for half_life in plan.error_half_lives:
            inputs = drawn(plan, tokens, half_life, heads=2, queries=64)
            where = {"scaling": plan.head_dim**-0.5, "positions": torch.arange(tokens, device=plan.device)[None]}
            exact, ungated = truth(*inputs, **where), truth(*inputs[:3], torch.zeros_like(inputs[3]), **where)
            row = {name: float((form(*inputs, **where).double() - exact).abs().max()) for name, form in forms.items()}
            row["noise"] = float((plain(*inputs, **where).double() - ungated).abs().max())
            rows.append({"tokens": tokens, "half_life": half_life, **row})
            print(rows[-1], flush=True)
    return rows


def speeds(plan: Plan) -> list[Row]:
    """Forward and backward of every form, in turns in one process: the least time, and the memory it holds."""
    forms: dict[str, Callable[..., Tensor]] = {
        "plain": plain,
        "split": split.split_gated_attention,
        "fp32": attention.augmented_gated_attention,
        "bias": attention.blocked_gated_attention,
    }
    if plan.device == "cuda":
        forms["flex"] = flex.flex_gated_attention
    scaling, rows = plan.head_dim**-0.5, []
    for tokens in plan.timed:
        g = torch.Generator().manual_seed(0)
        heads = (plan.heads, plan.kv_heads, plan.kv_heads)
        given = [torch.randn(1, count, tokens, plan.head_dim, generator=g).bfloat16() for count in heads]
        given.append(-torch.rand(1, plan.kv_heads, tokens, generator=g) / 1000)
        leaves = [x.to(plan.device).requires_grad_() for x in given]
        where = {"scaling": scaling, "positions": torch.arange(tokens, device=plan.device)[None]}
        seen: dict[str, list[tuple[float, float, int]]] = {name: [] for name in forms}
        for number in range(plan.rounds + 1):
            for name, form in forms.items():
                once = measured(plan.device, lambda f=form, x=leaves, w=where: f(*x, **w), leaves)
                seen[name] += [once] if number else []  # the first warms up and compiles
        base = min(t[1] for t in seen["plain"])
        for name, times in seen.items():
            row = {"tokens": tokens, "form": name, "forward_s": min(t[0] for t in times)}
            row |= {"both_s": min(t[1] for t in times), "bytes": max(t[2] for t in times)}
            rows.append({**row, "over_plain": row["both_s"] / base})
            print(rows[-1], flush=True)
    return rows


def measured(device: str, forward: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[float, float, int]:
    """Seconds of a forward, of it with its backward, and bytes: held for the backward, or on CUDA the peak."""
    cuda, held = device == "cuda", {}
    wait = torch.cuda.synchronize if cuda else lambda: None
    for leaf in leaves:
        leaf.grad = None
    gc.collect()

    def pack(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    wait()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before, begin = (torch.cuda.memory_allocated() if cuda else 0), time.perf_counter()
    with nullcontext() if cuda else torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = forward()
    wait()
    middle = time.perf_counter()
    out.backward(torch.ones_like(out))
    wait()
    end = time.perf_counter()
    return middle - begin, end - begin, torch.cuda.max_memory_allocated() - before if cuda else sum(held.values())


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, printed")
    parser.add_argument("--json", type=Path, help="where to write the figures as well")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plan = QUICK if options.quick else CUDA if torch.cuda.is_available() else Plan()
    measures = {"age_terms": age_terms(plan), "errors": errors(plan), "far": far_errors(plan), "speeds": speeds(plan)}
    if options.json:
        write_json(options.json, measures)
    text = page(plan, measures)
    if options.quick:
        print(text)
    else:
        name = "gated_attention_cuda.md" if plan.device == "cuda" else "gated_attention.md"
        write_text(Path(__file__).parent.parent / "docs" / "benchmarks" / name, text)


if __name__ == "__main__":
    main()
