"""Time decoding over full and evicted caches, evictions, prefills that evict, and count bytes; write the page.

`python scripts/bench_decode.py` writes docs/benchmarks/decode.md and decode.png, on a CPU and, where there is one, on a
CUDA device. `--quick` runs the same in miniature and prints the page; `--json PATH` also writes rows, ratios and machine;
`--device cpu` leaves the GPU out, `--device cuda` the CPU. Random weights: figures about time and bytes, never quality.
"""

import argparse
import gc
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from decode_caches import Bench, Contents, Running, bandwidth, cell, elapsed, kept, noted
from decode_page import FULLS, figure, page, ratios, summary

import retention as rt
from retention.files import write_json, write_text
from retention.provenance import hardware, package_versions

Row = dict[str, Any]
DECODER = {
    "vocab_size": 1000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 40960,
}  # fmt: skip
DECODER_4B = {
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}  # fmt: skip
EVICTED = {"global": {}, "uniform": {"allocator": "uniform"}}
WHILE_DECODING = ("db_trim_kv", "trim_kv", "keydiff", "knorm", "h2o")
IN_PREFILL = ("full", "db_trim_kv", "knorm", "keydiff", "snapkv", "h2o")
POOLED = {"db_trim_kv": {}, "knorm": {"allocator": "global"}}
EVERY = 64
"""Tokens between evictions while decoding."""


@dataclass
class Plan:
    """Sizes of the measurements."""

    decoder: Row = field(default_factory=lambda: dict(DECODER))
    context: int = 16384
    batch: int = 8
    budget: str = "5%"
    threads: tuple[int, ...] = (1, 2)
    rounds: int = 6
    tokens: int = 8
    curve_contexts: tuple[int, ...] = (1024, 4096, 16384, 32768)
    curve_budgets: tuple[str, ...] = ("1%", "2.5%", "5%", "10%", "25%", "50%", "100%")
    curve_rounds: int = 3
    curve_tokens: int = 4
    cycles: int = 3
    prefill: int = 16384
    prefill_threads: int = 2
    prefill_repeats: int = 2
    kept: tuple[int, ...] = (32, 128, 819)
    bytes_batch: int = 2
    megabytes: int = 512


QUICK = Plan(
    decoder=DECODER | {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}, context=4096, rounds=5,
    tokens=4, curve_contexts=(512, 2048), curve_budgets=("5%", "25%", "100%"), curve_rounds=3, prefill=2048,
    prefill_repeats=3, megabytes=256,
)  # fmt: skip


@dataclass
class GPUPlan:
    """Sizes of the measurements on CUDA."""

    decoder: Row = field(default_factory=lambda: dict(DECODER_4B))
    contexts: tuple[int, ...] = (8192, 32768)
    batches: tuple[int, ...] = (1, 4, 16)
    budget: str = "1024"
    rounds: int = 5
    tokens: int = 52
    megabytes: int = 4096


GPU_QUICK = GPUPlan(contexts=(8192,), batches=(1, 4), rounds=3, tokens=16, megabytes=1024)


def say(text: str) -> None:
    """Progress, apart from the page."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def decoding(bench: Bench, contents: Contents, budget: str, rounds: int, tokens: int) -> list[Row]:
    """Full caches and evicted ones of one context by turns, those that fit in memory."""
    room, spare, held = rounds * tokens + 16, contents.full_bytes // bench.config.num_hidden_layers, 0
    rows: dict[str, Row] = {}
    running: dict[str, Running] = {}
    for name in (*EVICTED, *FULLS):
        need = contents.full_bytes + contents.full_bytes // 16 + 2 * spare if name in FULLS else spare
        rows[name] = {"variant": name, "context": contents.context, "batch": contents.batch, "budget": budget}
        if held + need > bench.memory:
            rows[name]["note"] = "does not fit in memory"
            continue
        held += need
        evicted = name in EVICTED
        running[name] = contents.ours("db_trim_kv", budget, **EVICTED[name]) if evicted else contents.full(name, room)
        rows[name] |= kept(running[name]) if evicted else {}
    for name, found in bench.side_by_side(running, rounds, tokens).items():
        rows[name] |= found
    return [rows[name] for name in (*FULLS, *EVICTED)]


def setting(bench: Bench, plan: Plan) -> list[Row]:
    """The default setting, once for each number of threads."""
    rows = []
    contents = Contents(bench, plan.context, plan.batch)
    for threads in plan.threads:
        torch.set_num_threads(threads)
        say(f"context {plan.context}, batch {plan.batch}, {plan.budget} kept, {threads} threads")
        speed = {"part": "bandwidth", "threads": threads, "bytes_per_s": bandwidth(bench.device, plan.megabytes)}
        found = decoding(bench, contents, plan.budget, plan.rounds, plan.tokens)
        rows += [speed, *({"part": "setting", "threads": threads, **row} for row in found)]
    return rows


def curve(bench: Bench, plan: Plan) -> list[Row]:
    """Ours by context and budget, each by turns with the fastest full cache of that context."""
    rows = []
    rounds, tokens = plan.curve_rounds, plan.curve_tokens
    torch.set_num_threads(plan.threads[0])
    for context in plan.curve_contexts:
        say(f"curve: context {context}")
        contents = Contents(bench, context, plan.batch)
        room = (len(plan.curve_budgets) + 1) * (rounds * tokens + 16)
        together = len(FULLS) * 1.2 * contents.full_bytes <= bench.memory
        fulls: dict[str, Row] = {}
        for names in (FULLS,) if together else [(name,) for name in FULLS]:
            running = {name: contents.full(name, room) for name in names}
            fulls |= bench.side_by_side(running, rounds, tokens)
        del running
        fastest = min(fulls, key=lambda name: fulls[name]["ms"])
        where = {"part": "curve", "threads": plan.threads[0], "context": context, "batch": plan.batch}
        rows += [{**where, "variant": name, "by_turns": together, **row} for name, row in fulls.items()]
        full = contents.full(fastest, room)
        for budget in plan.curve_budgets:
            ours = contents.ours("db_trim_kv", budget)
            row = {**where, "variant": "global", "budget": budget, "fastest": fastest, **kept(ours)}
            found = bench.side_by_side({"full": full, "global": ours}, rounds, tokens)
            noisy = found["full"]["noisy"] or found["global"]["noisy"]
            rows.append(row | found["global"] | {"full_ms": found["full"]["ms"], "noisy": noisy})
        del full, ours, contents
        gc.collect()
    return rows


def evictions(bench: Bench, plan: Plan) -> list[Row]:
    """The share of `evict()` in decoding that evicts every 64 tokens, after one such cycle untimed."""
    torch.set_num_threads(plan.threads[0])
    say(f"evicting every {EVERY} tokens")
    contents = Contents(bench, plan.context, plan.batch)
    running = {name: contents.ours(name, plan.budget, evict_every=EVERY) for name in WHILE_DECODING}
    spent: dict[str, list[float]] = {name: [] for name in running}
    whole: dict[str, list[float]] = {name: [] for name in running}
    for cycle in range(plan.cycles + 1):
        for name, one in running.items():
            with noted(one.cache, "evict", bench.device) as seconds:
                token = bench.decode(one, EVERY)
            if cycle:
                spent[name] += seconds
                whole[name].append(1e3 * token)
    where = {"part": "evictions", "threads": plan.threads[0], "context": plan.context, "batch": plan.batch}
    rows = []
    for name in running:
        share = 1e3 * sum(spent[name]) / (EVERY * sum(whole[name]))
        row = {"policy": name, "budget": plan.budget, "tokens": EVERY * plan.cycles, "evictions": len(spent[name])}
        rows.append({**where, **row, "evict_ms": 1e3 * min(spent[name]), "share": share, **cell(whole[name], "ms")})
    return rows


def prefills(bench: Bench, plan: Plan) -> list[Row]:
    """Real prefills of one row: seconds in `evict()`, in gates and observers, and against the prefill that evicts nothing."""
    torch.set_num_threads(plan.prefill_threads)
    ids = torch.randint(1, bench.config.vocab_size, (1, plan.prefill), generator=torch.Generator().manual_seed(0))
    samples: dict[str, list[list[float]]] = {name: [] for name in IN_PREFILL}
    for turn in range(plan.prefill_repeats + 1):
        for name in IN_PREFILL:
            say(f"prefill: {name}, {'warm-up' if turn == 0 else f'repeat {turn}'}")
            policy, config = rt.POLICIES[name](), rt.CacheConfig(rt.Budget.parse(plan.budget))
            gates = bench.gates if policy.needs_gates else None
            inputs = ids[:, : plan.prefill // 16] if turn == 0 else ids
            with ExitStack() as stack:
                cache = stack.enter_context(rt.evicting(bench.model, policy, config, gates=gates))
                eviction = [(cache, x) for x in ("after_attention", "after_forward")]
                observers = [(layer, x) for layer in cache.evicting_layers for x in ("observe", "visible")]
                evict, beside = (
                    [stack.enter_context(noted(*what, bench.device)) for what in watched]
                    for watched in (eviction, [(bench.gates, "read"), *observers])
                )
                stack.enter_context(torch.inference_mode())
                asked = {"input_ids": inputs.to(bench.device), "past_key_values": cache, "use_cache": True}
                seconds = elapsed(bench.device, lambda asked=asked: bench.model(**asked, logits_to_keep=1))
            if turn:
                samples[name].append([seconds, sum(map(sum, evict)), sum(map(sum, beside))])
    whole = min(sample[0] for sample in samples["full"])
    rows = []
    for name, found in samples.items():
        total, evict_s, beside_s = (list(column) for column in zip(*found, strict=True))
        row = {"part": "prefill", "threads": plan.prefill_threads, "context": plan.prefill, "policy": name}
        row |= {"evict_s": min(evict_s), "beside_s": min(beside_s), **cell(total, "prefill_s")}
        within = [(b + c) / (a - b - c) for a, b, c in found]
        row |= {"share_noted": min(within), "share_paired": min(total) / whole - 1}
        rows.append(row)
    return rows


def held(bench: Bench, plan: Plan) -> list[Row]:
    """Bytes of keys and values, slack included, over those of the entries asked for: after prefill, and while decoding."""
    torch.set_num_threads(plan.threads[0])
    say("bytes")
    rows = []
    contents = Contents(bench, plan.context, plan.bytes_batch)
    for name, settings in POOLED.items():
        for asked in plan.kept:
            row = {"part": "bytes", "context": plan.context, "batch": plan.bytes_batch, "policy": name, "asked": asked}
            for label, every in (("", None), (f"_every_{EVERY}", EVERY)):
                ours = contents.ours(name, str(asked), evict_every=every, **settings)

                def over(tokens: int, ours: Running = ours, asked: int = asked) -> float:
                    found = ours.cache.bytes().physical
                    entries = (asked + tokens) * plan.bytes_batch * bench.heads
                    return sum(found[item] for item in ("keys", "values", "slack")) / (entries * bench.entry_bytes)

                row |= kept(ours) | {"over": max(row.get("over", 0.0), over(0))}
                decoded = []
                for tokens in range(1, EVERY + 1):
                    bench.decode(ours, 1)
                    decoded.append(over(tokens if tokens < EVERY or every is None else 0))
                row[f"over_decoding{label}"] = max(decoded)
            rows.append(row)
    return rows


def gpu(plan: GPUPlan, device: torch.device, memory: float | None = None) -> list[Row]:
    """Full and evicted caches of a 4B decoder against the time its bytes need; cells that do not fit are noted."""
    say("GPU part: building the model")
    speed = bandwidth(device, plan.megabytes)
    rows: list[Row] = [{"part": "gpu_bandwidth", "bytes_per_s": speed}]
    bench = Bench(plan.decoder, device, memory or 0.0)
    for context in plan.contexts:
        for batch in plan.batches:
            say(f"GPU part: context {context}, batch {batch}")
            try:
                contents = Contents(bench, context, batch)
                if memory is None:
                    bench.memory = 0.92 * torch.cuda.mem_get_info(device)[0]
                found = decoding(bench, contents, plan.budget, plan.rounds, plan.tokens)
            except torch.OutOfMemoryError:
                found = [{"variant": "all", "context": context, "batch": batch, "note": "ran out of memory"}]
            for row in found:
                if "ms" in row:
                    entries = context if row["variant"] in FULLS else int(plan.budget)
                    moved = bench.read_bytes() + min(entries, context) * batch * bench.heads * bench.entry_bytes
                    row["bound_ms"] = 1e3 * moved / speed
            rows += [{"part": "gpu", **row} for row in found]
            contents = None
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return rows


def cpu(plan: Plan, memory: float) -> list[Row]:
    """Everything that is measured on a CPU."""
    bench = Bench(plan.decoder, torch.device("cpu"), memory)
    return [row for part in (setting, curve, evictions, prefills, held) for row in part(bench, plan)]


def driver() -> str:
    """The GPU's driver and clocks as found."""
    fields = "driver_version,clocks.sm,clocks.mem"
    words = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0]


def main(words: list[str] | None = None) -> None:
    """Measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a miniature of everything, printed instead of written")
    parser.add_argument("--json", type=Path, help="also write rows, ratios and machine to this file")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda: the GPU part only")
    parser.add_argument("--memory-gib", type=float, default=14.0, help="what CPU caches held at one time may take")
    args = parser.parse_args(words)
    has_cuda, started, versions = torch.cuda.is_available(), time.monotonic(), package_versions()
    if args.device == "cuda" and not has_cuda:
        parser.error("expected a CUDA device for --device cuda, found none; leave it out or use --device cpu")
    plan, gpu_plan = (QUICK, GPU_QUICK) if args.quick else (Plan(), GPUPlan())
    rows = [] if args.device == "cuda" else cpu(plan, args.memory_gib * 2**30)
    if has_cuda and args.device != "cpu":
        rows += gpu(gpu_plan, torch.device("cuda"))
    values, machine = ratios(rows), hardware() | ({"driver": driver()} if has_cuda else {})
    minutes = (time.monotonic() - started) / 60
    if args.json:
        write_json(args.json, {"rows": rows, "ratios": values, "machine": machine, "versions": versions})
    command = " ".join(["python scripts/bench_decode.py", *(sys.argv[1:] if words is None else words)])
    text = page(rows, values, machine, versions, command, minutes)
    if args.quick:
        print(text)
        return
    stem = "decode_cuda" if args.device == "cuda" else "decode"
    write_text(args.out / f"{stem}.md", text)
    if args.device != "cuda":
        figure(rows, args.out / f"{stem}.png")
    print(summary(values))
    print(args.out / f"{stem}.md")


if __name__ == "__main__":
    main()
