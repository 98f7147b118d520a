"""Time one training step against its floor, and count what it holds; write docs/benchmarks/training.md.

    python scripts/bench_training.py                   # a small decoder on a CPU; a 4B one where there is a CUDA device
    python scripts/bench_training.py --quick           # the same in miniature, printed
    python scripts/bench_training.py --json out.json

The floor of a distillation step is a teacher forward, a plain student forward and a plain backward for activations only
(no weight has a gradient), with the same losses through the same head and the same recomputation of activations. Ratios
are of runs side by side in one process, in turns. Random weights: figures about time and memory, never quality.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import retention as rt
from retention.attach.hidden import Entrance, entrance, final_hidden
from retention.attach.recompute import recomputing
from retention.files import write_json, write_text
from retention.gates.dbtrim import DBTrim
from retention.losses import distillation_terms
from retention.models.family import head_of
from retention.objectives.base import Step
from retention.objectives.distillation import Distillation
from retention.ops.gated import gated_attention
from retention.provenance import hardware, package_versions
from retention.training.module import collect

Row = dict[str, Any]
SMALL = {
    "vocab_size": 4000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 40960,
}  # fmt: skip
LARGE = {
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}  # fmt: skip
ANSWER = 64
"""Labelled tokens at the end of the sequence."""


@dataclass
class Plan:
    """Sizes of the measurements."""

    decoder: Row = field(default_factory=lambda: dict(SMALL))
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    rounds: int = 5


def model_of(plan: Plan) -> Any:
    """A frozen decoder with random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    with torch.device(plan.device):
        model = Qwen3ForCausalLM(Qwen3Config(**plan.decoder))
    return model.to(plan.dtype).eval().requires_grad_(False)


def batch(plan: Plan, length: int) -> tuple[dict[str, Tensor], Tensor]:
    """Random tokens, the last of them labelled."""
    ids = torch.randint(0, plan.decoder["vocab_size"], (1, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :-ANSWER] = -100
    return {"input_ids": ids.to(plan.device)}, labels.to(plan.device)


def floor_step(model: Any, inputs: dict[str, Tensor], labels: Tensor, *, again: bool) -> Tensor:
    """Teacher, plain student and the loss of the two, whose backward reaches the embeddings' activations."""
    start = entrance(model, inputs)
    with torch.no_grad():
        teacher = final_hidden(model, start)
    embedded = model.get_input_embeddings()(inputs["input_ids"]).requires_grad_()
    given = {k: v for k, v in start.arguments.items() if k != "input_ids"} | {"inputs_embeds": embedded}
    with recomputing(model) if again else nullcontext():
        student = final_hidden(model, Entrance(given, start.caught))
    (kl, many), (ntp, count) = distillation_terms(student, teacher, labels, head_of(model))
    return kl / many + ntp / count


def real_step(model: Any, gates: Any, inputs: dict[str, Tensor], labels: Tensor, *, again: bool) -> Tensor:
    """The step that training makes, optimiser apart."""
    objective = Distillation(budget="128")
    step = Step(labels, torch.Generator().manual_seed(0))
    terms, _ = objective.loss(collect(model, gates, objective, inputs, step, recompute=again))
    return terms.loss()


def measured(plan: Plan, step: Callable[[], Tensor]) -> tuple[float, int]:
    """Seconds of a forward and backward, and bytes held for the backward (on CUDA: the peak above the weights)."""
    cuda, held = plan.device == "cuda", {}
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before, begin = (torch.cuda.memory_allocated() if cuda else 0), time.perf_counter()

    def pack(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with nullcontext() if cuda else torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = step()
    loss.backward()
    if cuda:
        torch.cuda.synchronize()
    spent = time.perf_counter() - begin
    return spent, (torch.cuda.max_memory_allocated() - before if cuda else sum(held.values()))


def steps(plan: Plan, model: Any) -> list[Row]:
    """Floor and real step at each length, with and without running layers again in the backward."""
    gates = rt.RetentionGates.for_model(DBTrim(init_half_life=1000.0), model)
    rows = []
    for length in plan.lengths:
        inputs, labels = batch(plan, length)
        for again in (False, True):
            kinds: dict[str, Callable[[], Tensor]] = {
                "floor": lambda i=inputs, y=labels, a=again: floor_step(model, i, y, again=a),
                "step": lambda i=inputs, y=labels, a=again: real_step(model, gates, i, y, again=a),
            }
            found: dict[str, list[tuple[float, int]]] = {kind: [] for kind in kinds}
            for number in range(plan.rounds + 1):
                for kind, step in kinds.items():
                    gates.zero_grad(set_to_none=True)
                    once = measured(plan, step)
                    found[kind] += [once] if number else []  # the first warms up
            pairs = zip(found["step"], found["floor"], strict=True)
            rows.append(
                {
                    "length": length,
                    "recompute": again,
                    **{f"{kind}_s": statistics.median(t for t, _ in values) for kind, values in found.items()},
                    **{f"{kind}_bytes": max(b for _, b in values) for kind, values in found.items()},
                    "step_over_floor": statistics.median(a[0] / b[0] for a, b in pairs),
                }
            )
            print(rows[-1], flush=True)
    return rows


def attention(plan: Plan) -> list[Row]:
    """Gated attention alone against plain fused attention, forward and backward."""
    rows, d = [], plan.decoder
    for length in plan.lengths:
        shape = (1, d["num_attention_heads"], length, d["head_dim"])
        q = torch.randn(shape, device=plan.device, dtype=plan.dtype, requires_grad=True)
        kv = (1, d["num_key_value_heads"], length, d["head_dim"])
        k, v = (torch.randn(kv, device=plan.device, dtype=plan.dtype, requires_grad=True) for _ in range(2))
        log_beta = (-torch.rand(kv[:3], device=plan.device) / 1000).requires_grad_()
        positions, groups = torch.arange(length, device=plan.device)[None], shape[1] // kv[1]

        def plain(q: Tensor = q, k: Tensor = k, v: Tensor = v, g: int = groups) -> Tensor:
            wide = (x.repeat_interleave(g, 1) for x in (k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, *wide, is_causal=True).float().square().mean()

        def gated(q: Tensor = q, k: Tensor = k, v: Tensor = v, b: Tensor = log_beta, p: Tensor = positions) -> Tensor:
            scale = q.shape[-1] ** -0.5
            return gated_attention(q, k, v, b, scaling=scale, positions=p).float().square().mean()

        found: dict[str, list[float]] = {"plain": [], "gated": []}
        for number in range(plan.rounds + 1):
            for kind, function in (("plain", plain), ("gated", gated)):
                spent, _ = measured(plan, function)
                found[kind] += [spent] if number else []
        ratio = statistics.median(a / b for a, b in zip(found["gated"], found["plain"], strict=True))
        times = {f"{kind}_s": statistics.median(values) for kind, values in found.items()}
        rows.append({"length": length, **times, "gated_over_plain_attention": ratio})
        print(rows[-1], flush=True)
    return rows


def packing(plan: Plan, model: Any) -> Row:
    """A step on four rows of unlike lengths, padded to the longest and as documents of one row."""
    gates, longest = rt.RetentionGates.for_model(DBTrim(init_half_life=1000.0), model), plan.lengths[0]
    lengths = [longest * (i + 1) // 4 for i in range(4)]
    valid = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    ids = torch.randint(1, plan.decoder["vocab_size"], valid.shape, generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": (ids * valid).to(plan.device), "attention_mask": valid.long().to(plan.device)}
    labels = inputs["input_ids"].clone()
    labels[:, :-ANSWER] = -100

    def step(apart: bool) -> Tensor:
        objective, known = Distillation(budget="128"), Step(labels, torch.Generator().manual_seed(0))
        return objective.loss(collect(model, gates, objective, inputs, known, packing=apart))[0].loss()

    found: dict[bool, list[float]] = {False: [], True: []}
    for number in range(plan.rounds + 1):
        for apart, times in found.items():
            gates.zero_grad(set_to_none=True)
            spent, _ = measured(plan, lambda a=apart: step(a))  # type: ignore[misc]
            times += [spent] if number else []
    ratio = statistics.median(a / b for a, b in zip(found[True], found[False], strict=True))
    padded = 1 - sum(lengths) / valid.numel()
    row = {"lengths": lengths, "padding": padded, "packed_over_padded": ratio}
    print(row, flush=True)
    return row


def page(plan: Plan, step_rows: list[Row], attention_rows: list[Row], packed: Row) -> str:
    """The page, with targets met and missed."""
    machine = {**package_versions(), **hardware()}
    lines = [
        "# The cost of a training step",
        "",
        "From `python scripts/bench_training.py`. Random weights; one row of tokens, the last 64 labelled; the floor is a "
        "teacher forward, a plain student forward and a plain backward for activations, with the same losses.",
        "",
        f"Decoder: {plan.decoder['num_hidden_layers']} layers, hidden {plan.decoder['hidden_size']}, "
        f"{plan.decoder['num_attention_heads']} query and {plan.decoder['num_key_value_heads']} KV heads of "
        f"{plan.decoder['head_dim']}, {str(plan.dtype).removeprefix('torch.')}, on {plan.device}; median of "
        f"{plan.rounds} rounds in turns.",
        "",
        "| tokens | layers run again | floor, s | step, s | step / floor | held by the step, MiB | held by the floor, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in step_rows:
        lines.append(
            f"| {row['length']:,} | {'yes' if row['recompute'] else 'no'} | {row['floor_s']:.2f} | {row['step_s']:.2f} | "
            f"{row['step_over_floor']:.2f} | {row['step_bytes'] / 2**20:,.0f} | {row['floor_bytes'] / 2**20:,.0f} |"
        )
    lines += ["", "| tokens | plain attention, s | gated, s | gated / plain |", "|---|---|---|---|"]
    for row in attention_rows:
        ratio = row["gated_over_plain_attention"]
        lines.append(f"| {row['length']:,} | {row['plain_s']:.3f} | {row['gated_s']:.3f} | {ratio:.2f} |")
    lines += [
        "",
        f"Four rows of {', '.join(f'{n:,}' for n in packed['lengths'])} tokens ({packed['padding']:.0%} of the padded batch is "
        f"padding): a step with `data.packing=true` takes {packed['packed_over_padded']:.2f} times the padded one.",
    ]
    lines += ["", *verdicts(step_rows, attention_rows), "", "Machine:", ""]
    return "\n".join([*lines, *(f"- {key}: {value}" for key, value in machine.items()), ""])


def verdicts(step_rows: list[Row], attention_rows: list[Row]) -> list[str]:
    """Each aim with what was measured."""
    worst = max(row["step_over_floor"] for row in step_rows)
    growth = []
    for again in (False, True):
        held = {row["length"]: row["step_bytes"] for row in step_rows if row["recompute"] == again}
        growth += [held[2 * n] / held[n] for n in held if 2 * n in held]
    gated = max(row["gated_over_plain_attention"] for row in attention_rows)
    aims = [
        ("a step at most 1.25 times the floor", worst, 1.25),
        ("gated attention at most 1.35 times plain", gated, 1.35),
    ]
    aims += [("memory at twice the length at most 2.2 times", max(growth), 2.2)] if growth else []
    return [f"- {what}: {value:.2f}, {'met' if value <= limit else 'missed'}" for what, value, limit in aims]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plan = Plan()
    if torch.cuda.is_available():
        plan = Plan(dict(LARGE), torch.bfloat16, "cuda", (8192, 16384, 32768), 3)
    if options.quick:
        plan = Plan(
            dict(SMALL) | {"num_hidden_layers": 2, "hidden_size": 64, "head_dim": 16}, lengths=(128, 256), rounds=2
        )
    model = model_of(plan)
    step_rows, attention_rows, packed = steps(plan, model), attention(plan), packing(plan, model)
    if options.json:
        write_json(options.json, {"steps": step_rows, "attention": attention_rows, "packing": packed})
    text = page(plan, step_rows, attention_rows, packed)
    if options.quick:
        print(text)
    else:
        folder = Path(__file__).parent.parent / "docs" / "benchmarks"
        write_text(folder / ("training_cuda.md" if plan.device == "cuda" else "training.md"), text)


if __name__ == "__main__":
    main()
