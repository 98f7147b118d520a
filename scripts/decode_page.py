"""What `bench_decode.py` says of its rows: ratios beside their targets, tables, a picture."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Row = dict[str, Any]
FULLS = ("dynamic", "static", "unlimited")
NO_GAIN = 1.05
"""A speed-up up to this is none."""
TARGETS = {
    "unlimited_over_dynamic": ("<=", 1.0, "ours without a budget over `DynamicCache`, ms/token"),
    "speedup_over_fastest_full": (">=", 3.0, "fastest full cache over ours evicted (global pool), ms/token"),
    "global_over_uniform": ("<=", 1.15, "global pool over equal heads, equal entries, ms/token"),
    "eviction_share": ("<=", 0.05, "part of decoding time spent in `evict()`, the worst policy"),
    "prefill_share": ("<=", 0.10, "gates, scoring and evicting after a prefill, part of that prefill, `db_trim_kv`"),
    "bytes_over_budget": ("<=", 1.03, "KV bytes after prefill over the budget's, the worst global policy and budget"),
}
NAMES = {
    "dynamic": "full, `DynamicCache`", "static": "full, `StaticCache`", "unlimited": "full, ours without a budget",
    "global": "ours, `db_trim_kv`, one pool (global)", "uniform": "ours, same scores, equal heads (uniform)",
}  # fmt: skip
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#B07500")


def of(rows: Iterable[Row], part: str, **where: Any) -> list[Row]:
    """Rows of one part of the measurements."""
    return [row for row in rows if row["part"] == part and all(row.get(k) == v for k, v in where.items())]


def fastest(rows: Iterable[Row]) -> Row | None:
    """The fastest of the full caches that were timed."""
    fulls = [row for row in rows if row["variant"] in FULLS and "ms" in row]
    return min(fulls, key=lambda row: row["ms"], default=None)


def compared(rows: list[Row]) -> dict[str, float]:
    """Decoding ratios of variants that took turns, where both sides were timed; times are minima."""
    ms = {row["variant"]: row["ms"] for row in rows if "ms" in row}
    grown = {row["variant"]: row["ms"] + row["growth_ms"] for row in rows if "ms" in row}
    fulls = [grown[name] for name in FULLS if name in grown]
    best, found = fastest(rows), {}
    for name, above, below in (
        ("unlimited_over_dynamic", ms.get("unlimited"), ms.get("dynamic")),
        ("speedup_over_fastest_full", best and best["ms"], ms.get("global")),
        ("global_over_uniform", ms.get("global"), ms.get("uniform")),
        ("unlimited_over_dynamic_with_growth", grown.get("unlimited"), grown.get("dynamic")),
        ("speedup_over_fastest_full_with_growth", min(fulls, default=None), grown.get("global")),
    ):
        if above and below:
            found[name] = above / below
    return found


def ratios(rows: list[Row]) -> dict[str, float]:
    """Every ratio; one that was measured with several numbers of threads is the worst of them under its plain name."""
    found: dict[str, float] = {}
    for threads in dict.fromkeys(row["threads"] for row in of(rows, "setting")):
        for name, value in compared(of(rows, "setting", threads=threads)).items():
            worst = min if name.startswith("speedup") else max
            found[name] = worst(found.get(name, value), value)
            found[f"{name}@{threads}_threads"] = value
    evictions = {row["policy"]: row for row in of(rows, "evictions")}
    if evictions:
        found["eviction_share"] = max(row["share"] for row in evictions.values())
        found["h2o_over_knorm_while_decoding"] = evictions["h2o"]["ms"] / evictions["knorm"]["ms"]
    for row in of(rows, "prefill"):
        if row["policy"] != "full":
            name = "prefill_share" if row["policy"] == "db_trim_kv" else f"prefill_share@{row['policy']}"
            found[name] = max(row["share_noted"], row["share_paired"])
    stored = of(rows, "bytes")
    if stored:
        found["bytes_over_budget"] = max(row["over"] for row in stored)
        found["bytes_over_budget_while_decoding"] = max(row["over_decoding"] for row in stored)
    for context, batch in dict.fromkeys((row["context"], row["batch"]) for row in of(rows, "gpu")):
        cell = of(rows, "gpu", context=context, batch=batch)
        found |= {f"gpu_{name}@{context}x{batch}": value for name, value in compared(cell).items()}
    return found


def met(name: str, value: float) -> bool:
    """Whether a ratio reaches its target."""
    sign, goal, _ = TARGETS[name]
    return value <= goal if sign == "<=" else value >= goal


def summary(values: dict[str, float]) -> str:
    """One line per target that was measured."""
    known = [name for name in TARGETS if name in values]
    return "\n".join(f"{'met' if met(n, values[n]) else 'NOT':<4} {values[n]:7.3f}  {n}" for n in known)


def table(header: str, lines: Iterable[Sequence[Any]]) -> list[str]:
    """A markdown table; the header's cells are divided by bars."""
    cells = [x.strip() for x in header.split("|")]
    return [
        f"| {' | '.join(cells)} |",
        "|" + "---|" * len(cells),
        *(f"| {' | '.join(map(str, x))} |" for x in lines),
        "",
    ]


def timed(row: Row, name: str = "ms", digits: int = 2) -> str:
    """Minimum and median, or why there are none."""
    if name not in row:
        return str(row.get("note", ""))
    return f"{row[name]:.{digits}f} ({row[f'{name}_median']:.{digits}f}){' noisy' if row['noisy'] else ''}"


def counted(threads: int) -> str:
    """`1 thread`, `2 threads`."""
    return f"{threads} thread{'s' if threads > 1 else ''}"


def heads(row: Row) -> str:
    """Entries per head: fewest, median, most."""
    return f"{row['kept_min']} / {row['kept_median']:g} / {row['kept_max']}" if "kept_min" in row else "all"


def _setting(rows: list[Row]) -> list[str]:
    first = of(rows, "setting")[0]
    speeds = (f"{r['bytes_per_s'] / 1e9:.1f} GB/s with {counted(r['threads'])}" for r in of(rows, "bandwidth"))
    lines = []
    for row in of(rows, "setting"):
        best = fastest(of(rows, "setting", threads=row["threads"]))
        gain = f"{best['ms'] / row['ms']:.2f}" if best and "ms" in row else ""
        growth = [f"{row['first_ms']:.1f}", f"{row['growth_ms']:.2f}"] if "ms" in row else ["", ""]
        lines.append((row["threads"], NAMES[row["variant"]], heads(row), timed(row), gain, *growth))
    return [
        f"## Decoding: context {first['context']}, batch {first['batch']}, {first['budget']} kept", "",
        *table("threads | cache | kept per head: fewest / median / most | ms/token | speed-up over the fastest full cache | first token, ms | making room, ms/token", lines),
        f"Memory is read or copied at {', '.join(speeds)}. The first token after a prompt makes room: ours copies what is not in pages, without a "
        "budget the whole cache, then again whenever it has grown by a sixteenth. *Making room* is that cost, timed once and on memory never touched before, spread over the tokens it is "
        "made for; it comes on top of ms/token and is in the ratios named `with_growth` only. `DynamicCache` copies everything for every token; "
        "`StaticCache` was given the room it needed, which a caller has to know beforehand.", "",
    ]  # fmt: skip


def _curve(rows: list[Row]) -> list[str]:
    points = of(rows, "curve", variant="global")
    lines = []
    for row in points:
        gain = row["full_ms"] / row["ms"]
        said = f"{gain:.2f}" if gain > NO_GAIN else f"{gain:.2f}: **no speed-up**"
        lines.append(
            (row["context"], row["budget"], heads(row), timed(row), f"{row['full_ms']:.2f}, {row['fastest']}", said)
        )
    fulls = [(r["context"], NAMES[r["variant"]], timed(r), "yes" if r["by_turns"] else "no, one after the other") for r in of(rows, "curve") if r not in points]  # fmt: skip
    where = points[0]
    return [
        f"## By context and budget: batch {where['batch']}, {counted(where['threads'])}", "", "![Decoding](decode.png)", "",
        *table("context | kept | per head: fewest / median / most | ms/token, ours global | fastest full, ms/token | speed-up", lines),
        *table("context | full cache | ms/token | by turns", fulls),
    ]  # fmt: skip


def _evictions(rows: list[Row]) -> list[str]:
    found = of(rows, "evictions")
    base = next(row for row in found if row["policy"] == "knorm")
    limit = TARGETS["eviction_share"][1]
    lines = [
        (f"`{r['policy']}`", timed(r), f"{r['ms'] / base['ms']:.2f}", f"{r['evict_ms']:.1f}", r["evictions"],
         f"{r['share']:.2%}", "yes" if r["share"] <= limit else "**no**")
        for r in found
    ]  # fmt: skip
    slow = next(row for row in found if row["policy"] == "h2o")
    return [
        f"## Evicting every 64 tokens: context {base['context']}, batch {base['batch']}, {base['budget']} kept, {counted(base['threads'])}", "",
        *table(f"policy | ms/token, evictions included | over `knorm` | one `evict()`, ms | evictions | share of decoding | at most {limit:.0%}", lines),
        f"{base['tokens']} tokens each, in cycles of 64 by turns. `h2o` reads the attention of every decoded token a second time, "
        f"outside `evict()`: its tokens take {slow['ms'] / base['ms']:.2f} times those of `knorm`, which keeps as many entries.", "",
    ]  # fmt: skip


def _prefill(rows: list[Row]) -> list[str]:
    found = of(rows, "prefill")
    limit = TARGETS["prefill_share"][1]
    lines = []
    for r in found:
        share = max(r["share_noted"], r["share_paired"])
        shares = ("", "", "") if r["policy"] == "full" else (f"{r['share_noted']:.2%}", f"{r['share_paired']:.2%}", "yes" if share <= limit else "**no**")  # fmt: skip
        lines.append(
            (f"`{r['policy']}`", timed(r, "prefill_s"), f"{r['beside_s']:.3f}", f"{r['evict_s']:.3f}", *shares)
        )
    first = found[0]
    return [
        f"## Prefill that evicts: {first['context']} tokens, batch 1, {counted(first['threads'])}", "",
        *table(f"policy | prefill, s | gates and observers, s | evictions, s | share, parts timed | share, against `full` | larger at most {limit:.0%}", lines),
        "Real forwards through the model. *Parts timed* is what gates, observers and evictions took over the rest of the same prefill; *against `full`* is the whole prefill "
        "over the one that evicts nothing, which also sees what no part shows, and the machine's noise. The larger of the two is quoted.", "",
    ]  # fmt: skip


def _bytes(rows: list[Row]) -> list[str]:
    found = of(rows, "bytes")
    every = next(name for name in found[0] if name.startswith("over_decoding_every"))
    lines = [(f"`{r['policy']}`", r["asked"], heads(r), f"{r['over']:.3f}", f"{r['over_decoding']:.3f}", f"{r[every]:.3f}") for r in found]  # fmt: skip
    return [
        f"## Bytes over the budget's, one pool for all layers: context {found[0]['context']}, batch {found[0]['batch']}", "",
        *table("policy | entries asked per head | held per head: fewest / median / most | after prefill | most in 64 tokens | the same, evicting every 64", lines),
        "Allocated bytes of keys and values with all slack, over those of the entries asked for and the tokens decoded since; "
        "room is made for at least 16 tokens, and for 64 where every 64 are followed by an eviction. Positions, gate outputs and the layout come on top: 8 bytes an entry and some kilobytes.", "",
    ]  # fmt: skip


def _gpu(rows: list[Row]) -> list[str]:
    found = of(rows, "gpu")
    if not found:
        return ["## GPU", "", "Not measured: no CUDA device was used.", ""]
    lines = []
    for row in found:
        best = fastest(of(rows, "gpu", context=row["context"], batch=row["batch"]))
        stock = next(
            (r for r in of(rows, "gpu", context=row["context"], batch=row["batch"], variant="dynamic") if "ms" in r),
            None,
        )
        gain = [f"{x['ms'] / row['ms']:.2f}" if x and "ms" in row else "" for x in (best, stock)]
        bound = f"{row['bound_ms']:.2f}, {row['bound_ms'] / row['ms']:.0%} of it reached" if "ms" in row else ""
        lines.append(
            (
                row["context"],
                row["batch"],
                NAMES.get(row["variant"], row["variant"]),
                heads(row) if "ms" in row else "",
                timed(row),
                *gain,
                bound,
            )
        )
    speed = of(rows, "gpu_bandwidth")[0]["bytes_per_s"]
    return [
        "## GPU: the dims of a 4B decoder, bf16", "",
        *table("context | batch | cache | kept per head: fewest / median / most | ms/token | over fastest full | over `DynamicCache` | limit by bytes, ms", lines),
        f"Budget 1024 entries per head. Stock caches run torch's SDPA, which chooses its flash kernel by itself. The limit is what weights and kept keys and values "
        f"take at {speed / 1e9:.0f} GB/s, the better of a large copy and a large sum here. Events with synchronisation on both ends; no graphs, no compilation.", "",
    ]  # fmt: skip


def page(rows: list[Row], values: dict[str, float], machine: Row, versions: Row, command: str, minutes: float) -> str:
    """Conditions, targets, one section per part that was measured."""
    device = (
        "" if machine["cuda"] == "none" else f", {machine['cuda']} (driver, SM and memory clocks: {machine['driver']})"
    )
    goals = [
        (f"`{name}`: {said}", f"{sign} {goal:g}", f"{values[name]:.3f}", "yes" if met(name, values[name]) else "**no**")
        for name, (sign, goal, said) in TARGETS.items()
        if name in values
    ]
    others = [(f"`{name}`", f"{value:.3f}") for name, value in sorted(values.items()) if name not in TARGETS]
    parts = {"setting": _setting, "curve": _curve, "evictions": _evictions, "prefill": _prefill, "bytes": _bytes}
    return "\n".join([
        "# Decoding, evicting, bytes", "",
        f"Command: `{command}`, {time.strftime('%Y-%m-%d')}, {minutes:.0f} min. Machine: {machine['cpu']}, {machine['system']}{device}. "
        f"Python {versions['python']}, torch {versions['torch']}, transformers {versions['transformers']}, retention {versions['retention']} "
        f"at {versions['git'][:10]} (uncommitted changes: {versions['git_dirty']}).", "",
        "A random Llama, and caches filled with random keys and values by the calls a forward makes: figures about time and bytes, never about "
        "quality, and figures of a small model on a CPU say nothing about large models or GPUs.", "",
        "## Targets", "", *table("ratio | target | measured | met", goals), *table("other ratios | measured", others),
        "Where several numbers of threads were measured the worst is quoted.", "",
        *(line for part, told in parts.items() if of(rows, part) for line in told(rows)), *_gpu(rows),
        "## How it was timed", "",
        "- All caches of a table are held at once and take turns, block by block; a block is some tokens, its time the mean. Tables show the minimum "
        "of the blocks and, in brackets, the median; `noisy` marks a median above 1.5 times the minimum. Ratios are of minima.",
        "- Wall clock of whole forwards of one token per row with explicit positions: weights, gates of decoded tokens and the cache's bookkeeping included, sampling "
        "not. 8 tokens of warm-up; the first of them is shown apart. On the CPU fp32.",
        "- Stock caches run on the untouched model (SDPA), ours inside `retention.evicting`. Each layer holds keys and values of its own in memory.",
        "- Gate outputs are log-normal with a factor for every layer and one for every row and head, so that one pool leaves heads of very different length.", "",
    ])  # fmt: skip


def figure(rows: list[Row], path: Path) -> None:
    """Milliseconds per token at the default setting, and the speed-up by context and budget."""
    drawn = Figure(figsize=(11.6, 4.4), layout="constrained")
    left, right = drawn.subplots(1, 2)
    found = [row for row in of(rows, "setting") if "ms" in row]
    names = list(dict.fromkeys(row["variant"] for row in found))
    threads = list(dict.fromkeys(row["threads"] for row in found))
    height = 0.8 / len(threads)
    for i, count in enumerate(threads):
        chosen = [row for row in found if row["threads"] == count]
        places = [names.index(row["variant"]) + (i - (len(threads) - 1) / 2) * height for row in chosen]
        bars = left.barh(places, [row["ms"] for row in chosen], height, color=COLOURS[i], label=counted(count))
        left.bar_label(bars, fmt="%.0f", padding=3, fontsize=9)
    left.set_yticks(
        range(len(names)), [NAMES[name].replace("`", "").replace(", ", ",\n", 1) for name in names], fontsize=9
    )
    left.invert_yaxis()
    where = found[0]
    left.set_title(
        f"context {where['context']}, batch {where['batch']}, {where['budget']} kept",
        fontsize=12,
        loc="left",
        fontweight="bold",
    )
    left.set_xlabel("ms per token", fontsize=11)
    left.legend(frameon=False)
    points = of(rows, "curve", variant="global")
    for i, context in enumerate(dict.fromkeys(row["context"] for row in points)):
        line = [(float(r["budget"].rstrip("%")), r["full_ms"] / r["ms"]) for r in points if r["context"] == context]
        colour = COLOURS[i % len(COLOURS)]
        right.plot(*zip(*line, strict=True), color=colour, label=f"context {context}")
        for budget, gain in line:
            right.plot(budget, gain, "o", color=colour, markerfacecolor=colour if gain > NO_GAIN else "white")
    right.axhline(1, color="#777777", linewidth=1, linestyle="--")
    right.set_xscale("log")
    ticks = sorted({float(row["budget"].rstrip("%")) for row in points})
    right.set_xticks(ticks, [f"{tick:g}%" for tick in ticks], minor=False)
    right.minorticks_off()
    right.set_title("speed-up over the fastest full cache", fontsize=12, loc="left", fontweight="bold")
    right.set_xlabel("kept part of the cache (hollow: no speed-up)", fontsize=11)
    right.legend(frameon=False)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=150, facecolor="white")
