"""The page of scripts/bench_kvpress.py: ratios, tables and what they mean, from one result."""

from kvpress_worker import PADDED, SINGLE

KEEPS = (0.5, 0.1)
SAFEGUARD = 0.2
"""kvpress's AdaKV leaves every head this share of the average; our global rows are given the same floor."""
TOLERANCE = 1e-4
SPREAD = 1.5
"""A timing whose median is this many times its minimum is marked as unsteady."""
PAIRS = {"uniform": ("knorm", "knorm"), "adaptive": ("adakv_knorm", "knorm_global")}
MEASURES = {
    "bytes": "bytes",
    "decoded_bytes": "bytes_after_decode",
    "peak": "peak_bytes",
    "ms": "decode_ms",
    "prefill": "prefill_s",
}
SAID = {
    "bytes": "bytes held after prefill",
    "decoded_bytes": "bytes held after decoding",
    "peak": "largest bytes held during prefill",
    "ms": "decode time per token",
    "prefill": "prefill time",
}
COMPARED = {
    "uniform": "uniform eviction",
    "adaptive": "head-adaptive eviction",
    "full": "no eviction (our cache against the stock cache in our own environment)",
}


def of(rows: list[dict], side: str, method: str, keep: float) -> dict:
    """The row of a side's method at a keep ratio."""
    return next(r for r in rows if (r["side"], r["method"], r["keep"]) == (side, method, keep))


def ratios(rows: list[dict]) -> dict[str, float]:
    """Ours over theirs by measure, kind of eviction and keep ratio; times are minima."""
    pairs = [
        (f"kvpress_{kind}@{keep:.0%}", of(rows, "kvpress", theirs, keep), of(rows, "retention", ours, keep))
        for keep in KEEPS
        for kind, (theirs, ours) in PAIRS.items()
    ]
    pairs.append(("stock_full", of(rows, "retention", "full", 1.0), of(rows, "retention", "full_own", 1.0)))
    return {
        f"{name}_ours_over_{pair}": ours[field] / theirs[field]
        for pair, theirs, ours in pairs
        for name, field in MEASURES.items()
        if theirs.get(field) and ours.get(field)
    }


def mib(size: float) -> str:
    """MiB with one digit, two where small."""
    size /= 2**20
    return f"{size:.1f}" if size >= 10 else f"{size:.2f}"


def timing(row: dict, name: str, digits: int) -> str:
    """Minimum (median), marked when unsteady."""
    least, median = row[name], row[f"{name}_median"]
    return f"{least:.{digits}f} ({median:.{digits}f}){' unsteady' if median > SPREAD * least else ''}"


def table(rows: list[dict]) -> list[str]:
    """Every row of the measurement."""
    lines = [
        "| kept | side | method | entries | per head, least to most | KV MiB after prefill | after decoding | largest in prefill | prefill s | decode ms/token |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        start = f"| {row['keep']:.0%} | {row['side']} | {row['label']} |"
        if "error" in row:
            lines.append(f"{start} could not be run: {row['error']} | | | | | | |".replace("\n", " "))
            continue
        lines.append(
            f"{start} {row['kept']} | {row['kept_least']} to {row['kept_most']} | {mib(row['bytes'])} | "
            f"{mib(row['bytes_after_decode'])} | {mib(row['peak_bytes'])} | {timing(row, 'prefill_s', 2)} | {timing(row, 'decode_ms', 2)} |"
        )
    return lines


def ratio_table(values: dict[str, float]) -> list[str]:
    """Ours over theirs, one row per comparison."""
    pairs = dict.fromkeys(name.split("_ours_over_")[1] for name in values)
    lines = [f"| ours over theirs | {' | '.join(SAID.values())} |", "|---|" + "---|" * len(SAID)]
    for pair in pairs:
        cells = [values.get(f"{name}_ours_over_{pair}") for name in SAID]
        lines.append(f"| {place(pair)} | {' | '.join('n/a' if x is None else f'{x:.2f}' for x in cells)} |")
    return lines


def place(pair: str) -> str:
    """A comparison's name in words."""
    kind, _, keep = pair.removeprefix("kvpress_").removeprefix("stock_").partition("@")
    return f"{COMPARED[kind]}{f', {keep} kept' if keep else ''}"


def behind(values: dict[str, float]) -> list[str]:
    """Every comparison that ours does not win, in words; less than 0.5% apart is a tie, and said too."""
    lines, ties = [], []
    for name, value in values.items():
        what, pair = name.split("_ours_over_")
        if value >= 1.005:
            lines.append(f"- {place(pair)}: {SAID[what]} {value:.2f} times theirs.")
        elif value > 0.995:
            ties.append(f"{place(pair)}: {SAID[what]}")
    return lines + ([f"- Equal within 0.5%: {'; '.join(ties)}."] if ties else [])


def checks_table(theirs: dict, ours: dict) -> list[str]:
    """Behaviour outside the rows, measured in this run."""

    def cell(found: dict, text: str) -> str:
        return f"could not be run: {found['error']}" if "error" in found else text.format(**found)

    rows = (
        (
            f"batch of {PADDED} and {SINGLE} tokens, left-padded: largest difference of the second token's logits from the single row "
            "(without eviction)",
            "{padded_difference:.1e} ({padded_difference_full:.1e})",
        ),
        (
            f"the same: entries per head kept for the row of {SINGLE} tokens, share that is padding",
            "{padded_kept}, {padded_kept_padding:.0%}",
        ),
        ("a prompt of 128 tokens in two chunks of 64: entries per head, 64 asked for", "{chunked_kept}"),
        (
            "a token after the prompt without `position_ids`: largest difference from the call with them",
            "{positions_difference:.1e}",
        ),
        ("a second turn of 48 tokens after head-adaptive eviction", "{follow_up}"),
    )
    lines = ["| situation, `Knorm`, 50% kept | kvpress | retention |", "|---|---|---|"]
    return lines + [f"| {name} | {cell(theirs, text)} | {cell(ours, text)} |" for name, text in rows]


def page(result: dict) -> str:
    """The page, from one result."""
    rows, values, machine = result["rows"], result["ratios"], result["machine"]
    mine, other, config = result["versions"]["retention"], result["versions"]["kvpress"], result["config"]
    shape = config["model"]
    agreed = [
        f"- {place(key)}: could not be run: {x['error']}."
        if "error" in x
        else f"- {place(key)}: {x['tokens']} of {x['of']} decoded tokens equal, logits of those within "
        f"{'n/a' if x['difference'] is None else format(x['difference'], '.1e')}."
        for key, x in result["agreement"].items()
    ]
    hidden = [r["beside_bytes"] for r in rows if r.get("method") == "adakv_knorm" and "beside_bytes" in r]
    beside = f" It does not count the index tensors that hide entries ({mib(min(hidden))} to {mib(max(hidden))} MiB here)." if any(hidden) else ""  # fmt: skip
    return "\n".join([
        f"# Beside kvpress {other['kvpress']}", "",
        f"Command: `{config['command']}`, {result['date']}. Machine: {machine['cpu']}, {machine['system']}, on the CPU with 1 thread.", "",
        "| environment | Python | torch | transformers | package |", "|---|---|---|---|---|",
        f"| kvpress | {other['python']} | {other['torch']} | {other['transformers']} | kvpress {other['kvpress']} |",
        f"| retention | {mine['python']} | {mine['torch']} | {mine['transformers']} | retention {mine['retention']} at {mine['git'][:10]} "
        f"(uncommitted changes: {mine['git_dirty']}) |", "",
        f"Model: Qwen3, random weights, fp32, SDPA: {shape['num_hidden_layers']} layers, hidden {shape['hidden_size']}, "
        f"{shape['num_attention_heads']} query and {shape['num_key_value_heads']} KV heads of {shape['head_dim']}. Prompt of "
        f"{config['prompt']} tokens, batch 1, then {config['new_tokens']} tokens decoded greedily. Random weights may time; they say nothing "
        "about quality, and figures of a small model on a CPU say nothing about large models or GPUs.", "",
        "## Rows", "", *table(rows), "",
        "## Ratios", "", "Below 1 is in our favour.", "", *ratio_table(values), "",
        "## Where this package does not lead", "", *(behind(values) or ["- No measured ratio is at or above 1 here."]),
        "- kvpress has many more methods than this package has policies, and works without a cache class of its own.",
        "- Nothing here compares answers: both sides keep what the same rule names.", "",
        "## Same model, same choice", "",
        f"Full-cache logits of the prompt and of one decoded token: equal within {result['full_difference']:.1e} (at most {TOLERANCE:.0e}, or "
        "the script stops). Where both sides pool alike they should keep the same entries and decode alike. Compared "
        f"on a prompt of {config['distinct']} distinct tokens (a repeated token's keys tie in norm), head-adaptive eviction on a model of "
        "one layer, where a pool per layer is one pool:", "", *agreed, "",
        "## Behaviour", "", *checks_table(result["checks"]["kvpress"], result["checks"]["retention"]), "",
        "## How it was measured", "",
        "- kvpress needs transformers below 5.3 and this package 5.4 or newer, so each side is a process in its own environment. Weights, "
        "config and token ids are exchanged as files; the two processes take turns on one request at a time.",
        f"- Every row runs once untimed, then {config['repeats']} times, all rows once before any row again. Times are CPU seconds of one "
        f"thread: minimum (median); `unsteady` marks a median above {SPREAD} times the minimum. Ratios are of minima.",
        "- Prefill: first prompt token to first logits, scoring and eviction included. Decoding: plain forward calls with explicit "
        "`position_ids`, no warm-up token; on kvpress's side outside the press, as in its own pipeline.",
        f"- KV MiB: all storages reachable from the cache object, each once, ours with positions and layout.{beside} *Largest in prefill*: "
        "the most the cache held at the end of any layer's attention; transient copies of one layer are on neither side counted.",
        "- After decoding: the stock cache holds exactly its entries and copies all of them at every token; ours keeps room to grow.",
        "- Uniform eviction frees a layer as soon as its attention is done, on both sides. Our global pool needs the scores of all layers "
        "first: without `prefill_chunk` it holds the whole prompt until then, as AdaKV does for good.",
        f"- Equal entries: kvpress is given the ratio that rounds to the same count. The `AdaKVPress` safeguard ({SAFEGUARD:.0%} of the average "
        "for every head) is given to ours as `min_per_head`. Its pool is a layer, ours all layers.", "",
    ])  # fmt: skip
