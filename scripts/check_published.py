"""Check scores and kept entries against public code: kvpress, on the same random weights and tokens.

`python scripts/check_published.py` builds kvpress's environment once (as scripts/bench_kvpress.py does, about 1.5 GB) and
writes docs/published_scores.md; it ends with an error where something differs that no named deviation explains. On a CPU,
fp32. Nothing of kvpress is copied: it runs in its own process.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench_kvpress import SHAPE, Worker, environment, write_model
from kvpress_worker import load_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import retention as rt
from retention.budget import AllocationInput, pyramid
from retention.cache.inputs import states
from retention.files import write_text
from retention.policies import Policy
from retention.policies.adakv import AdaKV
from retention.policies.criticalkv import CriticalKV
from retention.policies.expected_attention import ExpectedAttention
from retention.policies.h2o import H2O
from retention.policies.kvzip import KVzip
from retention.policies.lagkv import LagKV
from retention.policies.pyramidkv import PyramidKV
from retention.policies.snapkv import SnapKV
from retention.policies.streaming_llm import StreamingLLM
from retention.policies.tova import TOVA
from retention.provenance import package_versions

LENGTH, BUDGET, WINDOW, LAG, SEEDS = 512, 128, 32, 64, (0, 1, 2)
TOLERANCE = 1e-5
"""Largest difference of scores, as a part of the largest score; the two environments run different transformers."""
NEAR = 1e-4
"""Kept sets may differ by entries whose scores are nearer to each other than this part of the largest."""
SMALL = SHAPE | {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "initializer_range": 0.15}  # fmt: skip


@dataclass
class Check:
    """One press beside one policy."""

    press: str
    policy: Policy
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the press."""
    around: list[str] = field(default_factory=list)
    cache: dict[str, Any] = field(default_factory=dict)
    """Settings of our cache beside the budget."""
    ours: str = ""
    """How a user writes the policy."""
    columns: slice = field(default_factory=lambda: slice(None))
    """Entries whose scores mean something on both sides."""
    same: Callable[[Tensor], Tensor] = lambda x: x
    """Brings our scores to the other side's scale."""
    scored: bool = True
    kept: bool = True
    budget: int = BUDGET
    eager: bool = False
    deviation: str = ""


BEFORE = slice(0, LENGTH - WINDOW)
EDGES = slice(2, LENGTH - WINDOW - 2)
PARTS = (LENGTH - 4) // LAG
COMPARED = slice(4, 4 + (PARTS - 1) * LAG)
PLAIN = SnapKV(window_size=WINDOW, kernel_size=1)
FLAT = {"window_size": WINDOW, "kernel_size": 1}
RULE = "SnapKV: a mean over neighbours counts zeros beyond both ends there, here the neighbours that exist; the two entries at each end were left out of the comparison of scores (`policy.snapkv.kernel_size=1` has no ends)"
WORDS = "KVzip: each side has an instruction of its own words; here neither has any, and the prompt is repeated right behind itself"
CHECKS = [
    Check("KnormPress", rt.POLICIES["knorm"](), ours="`knorm`"),
    Check("KeyDiffPress", rt.POLICIES["keydiff"](), ours="`keydiff`"),
    Check("SnapKVPress", PLAIN, FLAT, columns=BEFORE, ours="`snapkv`, `kernel_size=1`"),
    Check("SnapKVPress", SnapKV(), {"window_size": WINDOW}, columns=EDGES, kept=False, ours="`snapkv`", deviation=RULE),
    Check("TOVAPress", TOVA(), columns=slice(0, LENGTH - 1), ours="`tova`"),
    Check("ObservedAttentionPress", H2O(recent_share=0.0), eager=True, ours="`h2o`, `recent_share=0`",
          deviation="H2O: the press keeps no recent half; ours does unless `policy.h2o.recent_share=0`"),
    Check("ExpectedAttentionPress", ExpectedAttention(), cache={"sink_size": 4}, columns=slice(4, None), ours="`expected_attention`, `cache.sink_size=4`"),
    Check("ExpectedAttentionPress", ExpectedAttention(use_covariance=False, use_vnorm=False), {"use_covariance": False, "use_vnorm": False},
          cache={"sink_size": 4}, columns=slice(4, None), ours="`expected_attention`, `use_covariance=false`, `use_vnorm=false`, `cache.sink_size=4`"),
    Check("LagKVPress", LagKV(lag_size=LAG), {"lag_size": LAG}, columns=COMPARED, same=lambda x: x - 1 / LAG, ours=f"`lagkv`, `lag_size={LAG}`",
          budget=4 + LENGTH - COMPARED.stop + (PARTS - 1) * 8, deviation="LagKV: ranks count from 1 here and from 0 there, which orders alike"),
    Check("LagKVPress", LagKV(lag_size=LAG, cross_scoring=True), {"lag_size": LAG, "cross_scoring": True}, columns=COMPARED, budget=200,
          ours=f"`lagkv`, `lag_size={LAG}`, `cross_scoring=true`"),
    Check("StreamingLLMPress", StreamingLLM(), scored=False, ours="`streaming_llm`"),
    Check("SnapKVPress", AdaKV().over(PLAIN), FLAT, ["AdaKVPress"], scored=False, ours="`adakv` over `snapkv`, `kernel_size=1`"),
    Check("KnormPress", AdaKV(base="knorm"), around=["AdaKVPress"], scored=False, ours="`adakv`, `base=knorm`"),
    Check("KeyDiffPress", AdaKV(base="keydiff"), around=["AdaKVPress"], scored=False, ours="`adakv`, `base=keydiff`"),
    Check("SnapKVPress", CriticalKV().over(PLAIN), FLAT, ["CriticalKVPress"], scored=False, ours="`criticalkv` over `snapkv`, `kernel_size=1`"),
    Check("ExpectedAttentionPress", CriticalKV(base="expected_attention"), {"use_vnorm": False}, ["CriticalKVPress"], scored=False,
          cache={"sink_size": 4}, ours="`criticalkv`, `base=expected_attention`, `cache.sink_size=4`"),
    Check("SnapKVPress", CriticalKV().over(AdaKV().over(PLAIN)), FLAT, ["CriticalAdaKVPress"], scored=False,
          ours="`criticalkv` over `adakv` over `snapkv`, `kernel_size=1`"),
    Check("KVzipPress", KVzip(), columns=slice(4, None), ours="`kvzip` without a tokenizer", deviation=WORDS),
    Check("KVzipPress", KVzip(chunk_size=192), {"chunk_size": 192}, columns=slice(4, None), ours="`kvzip` without a tokenizer, `chunk_size=192`", deviation=WORDS),
    Check("KVzipPress", KVzip(plus=True), {"kvzip_plus_normalization": True}, columns=slice(4, None), ours="`kvzip` without a tokenizer, `plus=true`", deviation=WORDS),
    Check("KVzipPress", KVzip(), {"layerwise": True}, columns=slice(4, None), cache={"allocator": "head_adaptive", "head_floor": 0.0},
          ours="`kvzip` without a tokenizer, `cache.allocator=head_adaptive`, `cache.head_floor=0`", deviation=WORDS),
]  # fmt: skip
UNCHECKED = (
    "`random`: two draws of noise have nothing in common.",
    "`kvzap`, `fastkvzip`, `duo_attention`, `dms`: their presses load trained weights.",
    "`cake`, `mixkv`, `r_kv`, `look_m`, `meda`, `prefixkv`, `vl_cache`, `tgv_kv`, `mada`: no installable package of theirs with a licence; their formulas are tested against loops in `tests/policies`.",
)


@torch.no_grad()
def own(check: Check, model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Our scores and kept entries, [layers, kv_heads, tokens]."""
    config = rt.CacheConfig(budget=rt.Budget(check.budget), **check.cache)
    with rt.evicting(model, check.policy, config) as cache:
        with cache.hold():
            model(input_ids=ids, past_key_values=cache)
        scores = torch.stack([check.policy.score(state)[0] for state in states(cache)])
        cache.evict()
        return scores, cache.kept_table()[:, 0]


def compared(check: Check, worker: Worker, model: Any, ids: Tensor, folder: Path) -> dict[str, Any]:
    """Differences of one check on one model."""
    share = 1 - check.budget / LENGTH  # exact in binary, so that rounding down gives the budget
    reply = worker.ask(do="run", name=check.press, share=share, settings=check.settings, around=check.around, eager=check.eager, file="out.safetensors")  # fmt: skip
    if "error" in reply:
        raise ValueError(f"{check.press} failed: {reply['error']}; see {worker.log}")
    theirs = load_file(folder / "out.safetensors")
    scores, kept = own(check, model, ids)
    found: dict[str, Any] = {}
    if check.scored:
        a, b = theirs["scores"][..., check.columns], check.same(scores)[..., check.columns]
        found["absolute"], found["scale"] = float((a - b).abs().max()), float(a.abs().max())
    if check.kept:
        differ = theirs["kept"] != kept
        found["heads"], found["equal"] = kept[..., 0].numel(), int((~differ.any(-1)).sum())
        found["entries"] = int((theirs["kept"] & ~kept).sum())
        assert int(theirs["kept"].sum()) == int(kept.sum()), f"{check.ours}: other numbers of entries"
    return found


def pyramid_budgets(worker: Worker) -> dict[str, Any]:
    """Budgets per layer of PyramidKVPress beside ours, as the press spreads them: the window is part of the slope."""
    share, beta = 1 - BUDGET / LENGTH, 2
    settings = {"window_size": WINDOW, "beta": beta, "kernel_size": 1}
    reply = worker.ask(do="run", name="PyramidKVPress", share=share, settings=settings, file="out.safetensors")
    if "error" in reply:
        raise ValueError(f"PyramidKVPress failed: {reply['error']}; see {worker.log}")
    heads, layers = SMALL["num_key_value_heads"], SMALL["num_hidden_layers"]
    given = AllocationInput(torch.full((layers, 1, heads), LENGTH), pyramid_beta=float(beta))
    slope = pyramid(torch.tensor([BUDGET]), given)[:, 0, 0]
    given.window = torch.tensor([PyramidKV(window_size=WINDOW).recent(BUDGET)])
    return {
        "theirs": [n // heads for n in reply["kept"]], "slope": slope.tolist(),
        "ours": pyramid(torch.tensor([BUDGET]), given)[:, 0, 0].tolist(),
    }  # fmt: skip


def checked(python: Path, folder: Path, seeds: tuple[int, ...]) -> dict[str, Any]:
    """All checks on models of several seeds, the worst of each."""
    rows: list[dict[str, Any]] = [{} for _ in CHECKS]
    for seed in seeds:
        place = folder / str(seed)
        write_model(place, SMALL, seed)
        ids = 1 + torch.randperm(SMALL["vocab_size"] - 1, generator=torch.Generator().manual_seed(seed))[None, :LENGTH]
        save_file({"ids": ids.contiguous()}, place / "ids.safetensors")
        script = Path(__file__).resolve().with_name("published_worker.py")
        worker = Worker("kvpress", [str(python), str(script), str(place)], place / "kvpress.log")
        try:
            versions, model = worker.ask(do="versions"), load_model(place)
            for row, check in zip(rows, CHECKS, strict=True):
                for key, value in compared(check, worker, model, ids, place).items():
                    row[key] = row.get(key, 0) + value if key in ("heads", "equal", "entries") else max(row.get(key, 0.0), value)  # fmt: skip
            budgets = pyramid_budgets(worker)
        finally:
            worker.close()
    return {"rows": rows, "pyramid": budgets, "versions": versions}


def failures(result: dict[str, Any]) -> list[str]:
    """What differs beyond rounding."""
    found = []
    for check, row in zip(CHECKS, result["rows"], strict=True):
        if check.scored and row["absolute"] > TOLERANCE * max(row["scale"], 1e-30):
            found.append(
                f"{check.ours}: scores differ from {check.press} by {row['absolute']:.1e} of {row['scale']:.1e}"
            )
        if check.kept and row["entries"] > NEAR * row["heads"] * check.budget:
            found.append(f"{check.ours}: {row['entries']} kept entries differ from {check.press}")
    theirs, slope = result["pyramid"]["theirs"], result["pyramid"]["slope"]
    if max(abs(a - b) for a, b in zip(theirs, slope, strict=True)) > 1:
        found.append(f"pyramid budgets are {slope}, PyramidKVPress has {theirs}")
    return found


def page(result: dict[str, Any], seeds: int) -> str:
    """What was checked, against which versions, and with what result."""
    mine, theirs, shape = package_versions(), result["versions"], SMALL
    lines = [
        "# Scores beside public code", "",
        "`python scripts/check_published.py` writes this page. Policies are re-implemented from their formulas; here they run beside "
        f"[kvpress](https://github.com/NVIDIA/kvpress) {theirs['kvpress']} (Apache-2.0; torch {theirs['torch']}, transformers {theirs['transformers']}), "
        f"each side in its own environment (here: torch {mine['torch']}, transformers {mine['transformers']}, retention {mine['retention']}).", "",
        f"One prompt of {LENGTH} tokens on {seeds} Qwen3 models with random weights ({shape['num_hidden_layers']} layers, {shape['num_attention_heads']} "
        f"query and {shape['num_key_value_heads']} KV heads, fp32, CPU). Scores: the largest difference, and the largest score beside it. Kept: heads, of all layers and "
        f"models, whose kept entries are the same set at equal budgets ({BUDGET} of {LENGTH} unless noted).", "",
        "| kvpress | here | scores differ by at most | of | heads with equal sets | entries that differ |", "|---|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    notes = []
    for check, row in zip(CHECKS, result["rows"], strict=True):
        words = ", ".join(f"{k}={v}" for k, v in check.settings.items())
        name = f"{check.press}({words})"
        for outer in check.around:
            name = f"{outer}({name})"
        mark = ""
        if check.deviation:
            if check.deviation not in notes:
                notes.append(check.deviation)
            mark = f" ({1 + notes.index(check.deviation)})"
        budget = "" if check.budget == BUDGET else f", {check.budget} kept"
        scores = (f"{row['absolute']:.1e}", f"{row['scale']:.1e}") if check.scored else ("", "")
        sets = (f"{row['equal']} of {row['heads']}", str(row["entries"])) if check.kept else ("", "")
        lines.append(f"| `{name}` | {check.ours}{budget}{mark} | {' | '.join((*scores, *sets))} |")
    budgets = result["pyramid"]
    lines += ["", "Deviations, and what switches them off:", "", *(f"{number}. {text}." for number, text in enumerate((x[0].upper() + x[1:] for x in notes), 1)), "",
        f"PyramidKVPress (window {WINDOW}, beta 2) spreads {budgets['theirs']} entries over the layers. Ours without a window is {budgets['slope']}: the same slope, rounded to an exact "
        f"total. With its window `pyramidkv` is {budgets['ours']}: every layer holds the window and the slope is laid on what is left, as in the original code "
        "(the press takes the slope over the whole budget). `cache.integer_floor=true` rounds as that code does.", "",
        "Not checked:", "", *(f"- {text}" for text in UNCHECKED), ""]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Build, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one model, and the page is printed")
    parser.add_argument(
        "--env", type=Path, default=Path("outputs/kvpress_env"), help="kvpress's environment, built once"
    )
    parser.add_argument("--work", type=Path, default=Path("outputs/check_published"))
    parser.add_argument("--out", type=Path, default=Path("docs/published_scores.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    started, seeds = time.time(), SEEDS[:1] if args.quick else SEEDS
    try:
        result = checked(environment(args.env), args.work, seeds)
    except ValueError as error:
        sys.exit(f"error: {error}")
    text, wrong = page(result, len(seeds)), failures(result)
    if args.quick or wrong:
        print(text)
    else:
        write_text(args.out, text)
        print(f"{args.out}, {len(CHECKS)} checks in {time.time() - started:.0f} s")
    if wrong:
        sys.exit("error: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
