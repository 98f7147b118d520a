"""The page of scripts/bench_gated_attention.py: tables of errors and of time, aims met and missed."""

from typing import Any

from retention.ops.split import QUERIES, STEEPEST, age_error
from retention.provenance import hardware, package_versions

Row = dict[str, Any]
AIM = 1.35
NAMES = {
    "noise": "bf16, no gates (noise floor)",
    "plain": "bf16 flash, no gates",
    "fp32": "fp32 augmented",
    "split": "bf16 split",
    "bias": "bf16 with a written-out bias, in blocks",
    "unsplit": "bf16 augmented without a split",
    "flex": "FlexAttention",
}


def page(plan: Any, measures: dict[str, list[Row]]) -> str:
    """The whole page."""
    command = "python scripts/bench_gated_attention.py"
    lines = [
        "# Gated attention alone",
        "",
        f"From `{command}`, on {plan.device}. Random queries, keys and values of {plan.head_dim} dimensions, in bfloat16; "
        "`log_beta` in fp32, half-lives of gates within a factor of two of the one named. Truth is float64 from the same "
        "rounded inputs.",
        "",
        *age_part(measures["age_terms"]),
        *error_part(measures["errors"]),
        *far_part(measures["far"]),
        *speed_part(plan, measures["speeds"]),
        "## Aims",
        "",
        *verdicts(plan, measures),
        "",
        "## Machine",
        "",
        *(f"- {key}: {value}" for key, value in {**package_versions(), **hardware()}.items()),
        "",
    ]
    return "\n".join(lines)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table and an empty line."""
    body = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *body, ""]


def figure(row: Row, name: str) -> str:
    """A figure in two digits; a dash where it was not measured."""
    return f"{row[name]:.1e}" if name in row else "-"


def age_part(rows: list[Row]) -> list[str]:
    """The age term itself."""
    kinds = ("unsplit", "fp32", "split", "bound", "recentred", "recentred_bound")
    body = [[f"{r['span']:,}", f"{r['half_life']:,.0f}", *(figure(r, kind) for kind in kinds)] for r in rows]
    return [
        "## The age term itself",
        "",
        "Largest error in logits among keys whose age term is above -20, read off the kernel's log-sum-exp of attention to a "
        "single key with q.k = 0. One call: positions are centred once for the row. Recentred: the last call of those that "
        f"`split_gated_attention` makes, one per {QUERIES:,} queries, each with its own centre.",
        "",
        *table(
            [
                "tokens",
                "half-life",
                "bf16, no split",
                "fp32, one call",
                "split, one call",
                "bound",
                "split, recentred",
                "bound",
            ],
            body,
        ),
        f"The bound, `-log_beta * (2^-9 + 2^-23 * span) + 2^-19`, is `age_error`. With {QUERIES:,} queries per call it is "
        f"{age_error(QUERIES, 1.0):.1e} of `log_beta` at any length, one bfloat16 rounding of it; gates "
        f"faster than e^-{STEEPEST:.0f} per token count as that fast. float16 has too few exponents for slopes times positions "
        "and is attended in fp32.",
        "",
    ]


def error_part(rows: list[Row]) -> list[str]:
    """Outputs and gradients."""
    kinds = ("out", "log_beta", "q", "k", "v")
    body = [
        [f"{r['tokens']:,}", f"{r['half_life']:,.0f}", NAMES[r["form"]], *(figure(r, kind) for kind in kinds)]
        for r in rows
    ]
    head = ["tokens", "half-life", "form", "output, largest error", "d log_beta", "d q", "d k", "d v"]
    return [
        "## Outputs and gradients",
        "",
        "Errors of gradients are relative (norm of the difference over norm). Without a split the gradient of `log_beta` is "
        "the kernel's own; a backward of FlexAttention needs a GPU.",
        "",
        *table(head, body),
    ]


def far_part(rows: list[Row]) -> list[str]:
    """Long rows."""
    kinds = ("noise", "unsplit", "fp32", "split")
    body = [[f"{r['tokens']:,}", f"{r['half_life']:,.0f}", *(figure(r, kind) for kind in kinds)] for r in rows]
    return [
        "## Long rows",
        "",
        "Largest output error of the last 64 queries.",
        "",
        *table(["tokens", "half-life", *(NAMES[kind] for kind in kinds)], body),
    ]


def speed_part(plan: Any, rows: list[Row]) -> list[str]:
    """Time and memory."""
    held = "peak, MiB" if plan.device == "cuda" else "held for the backward, MiB"
    body = [
        [
            f"{r['tokens']:,}",
            NAMES[r["form"]],
            f"{1000 * r['forward_s']:.1f}",
            f"{1000 * r['both_s']:.1f}",
            f"{r['over_plain']:.2f}",
            f"{r['bytes'] / 2**20:,.0f}",
        ]
        for r in rows
    ]
    return [
        "## Time and memory",
        "",
        f"{plan.heads} query heads, {plan.kv_heads} KV heads; the least of {plan.rounds} rounds in turns in one process, inputs "
        "in bfloat16 (the fp32 form converts them).",
        "",
        *table(["tokens", "form", "forward, ms", "with backward, ms", "over no gates", held], body),
    ]


def verdicts(plan: Any, measures: dict[str, list[Row]]) -> list[str]:
    """Each aim with what was measured."""
    ratio = max(r["over_plain"] for r in measures["speeds"] if r["form"] == "split")
    age = max(r["recentred"] / r["recentred_bound"] for r in measures["age_terms"])
    lines = [
        f"- the split at most {AIM} times flash attention without gates: {ratio:.2f}, {'met' if ratio <= AIM else 'missed'}",
        f"- the age term within its bound: {age:.2f} of it, {'met' if age <= 1 else 'missed'}",
    ]
    if plan.device == "cpu":
        lines.append("- on a GPU: not measured; the aim is for flash kernels there, and so is FlexAttention's time")
    return lines
