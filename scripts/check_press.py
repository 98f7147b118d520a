"""Check exported presses against kvpress itself: the same kept positions as ours, per head, on the same weights and tokens.

`python scripts/check_press.py` builds kvpress's environment once (as scripts/bench_kvpress.py does, about 1.5 GB), exports
random gates of every architecture and kind of score for a Llama and a Qwen3 model, runs the presses there and writes
docs/exported_press.md; it ends with an error where kept sets differ. On a CPU, fp32.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_kvpress import SHAPE, Worker, environment
from safetensors.torch import load_file, save_file
from torch.nn.functional import logsigmoid

import retention as rt
from retention.cache.inputs import states
from retention.files import write_text
from retention.gates import GateConfig
from retention.gates.dbtrim import DBTrim
from retention.gates.fastkvzip import FastKVzip
from retention.gates.trim import Trim
from retention.interop.kvpress import export_press
from retention.policies import policy_of
from retention.provenance import package_versions

LENGTH, BUDGET = 512, 128
TOLERANCE = 1e-5
"""Largest difference of scores, as a part of the largest; the two environments run different transformers."""
SMALL = SHAPE | {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "initializer_range": 0.15}  # fmt: skip
MODELS = {"llama": ("LlamaConfig", "LlamaForCausalLM"), "qwen3": ("Qwen3Config", "Qwen3ForCausalLM")}
GATES: dict[str, tuple[GateConfig, str]] = {
    "trim": (Trim(init_half_life=50.0), "distillation"),
    "dbtrim": (DBTrim(init_half_life=50.0), "distillation"),
    "dbtrim, scalar": (DBTrim(scoring="scalar", init_half_life=50.0), "distillation"),
    "trim, gelu": (Trim(activation="gelu"), "kvzap"),
    "trim, linear": (Trim(gate_hidden=0), "locret"),
    "trim, linear, delayed": (Trim(gate_hidden=0, delayed=True), "dms"),
    "fastkvzip": (FastKVzip(norm_eps=1e-6), "fastkvzip"),
}


def write_model(folder: Path, family: str) -> Any:
    """A random model, written for the other side with a prompt of tokens that do not repeat."""
    import transformers

    config, factory = (getattr(transformers, name) for name in MODELS[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = factory(config(**SMALL)).float().eval().requires_grad_(False)
    model.config.save_pretrained(folder)
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, folder / "weights.safetensors")
    ids = 1 + torch.randperm(SMALL["vocab_size"] - 1, generator=torch.Generator().manual_seed(0))[None, :LENGTH]
    save_file({"ids": ids.contiguous()}, folder / "ids.safetensors")
    return model


def random_gates(model: Any, config: GateConfig, objective: str) -> rt.RetentionGates:
    """Gates that disagree about tokens, with a record as training writes it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        gates = rt.RetentionGates.for_model(config, model).eval().requires_grad_(False)
    kind = "decay" if objective == "distillation" else "static"
    gates.training_record = {"objective": objective, "score_kind": kind}
    return gates


@torch.no_grad()
def own(model: Any, gates: rt.RetentionGates, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Our scores and kept entries, [layers, kv_heads, tokens], each head for itself."""
    policy = rt.POLICIES[policy_of(gates.objective)]()
    config = rt.CacheConfig(rt.Budget(BUDGET), allocator="uniform", selector="head")
    with rt.evicting(model, policy, config, gates=gates) as cache:
        with cache.hold():
            model(input_ids=ids, past_key_values=cache)
        scores = torch.stack([policy.score(state)[0] for state in states(cache)])
        cache.evict()
        return scores, cache.kept_table()[:, 0]


def checked(python: Path, folder: Path) -> dict[str, Any]:
    """Every gate on every model."""
    rows = []
    folder.mkdir(parents=True, exist_ok=True)
    models = {family: write_model(folder / family, family) for family in MODELS}
    worker = Worker("kvpress", [str(python), str(Path(__file__).with_name("press_worker.py")), str(folder)], folder / "kvpress.log")  # fmt: skip
    try:
        versions = worker.ask(do="versions")
        for family, model in models.items():
            ids = load_file(folder / family / "ids.safetensors")["ids"]
            for number, (name, (config, objective)) in enumerate(GATES.items()):
                gates, press = random_gates(model, config, objective), f"{family}_press_{number}"
                export_press(gates, folder / press)
                reply = worker.ask(
                    do="run", model=family, press=press, share=1 - BUDGET / LENGTH, file="out.safetensors"
                )
                if "error" in reply:
                    raise ValueError(f"the press of {name} gates failed: {reply['error']}; see {worker.log}")
                rows.append({"family": family, "gates": name, "objective": objective} | compared(gates, model, ids, folder, reply))  # fmt: skip
    finally:
        worker.close()
    return {"rows": rows, "versions": versions}


def compared(
    gates: rt.RetentionGates, model: Any, ids: torch.Tensor, folder: Path, reply: dict[str, Any]
) -> dict[str, Any]:
    """Differences of one press from our policy. Entries that the press protects have an infinite score there."""
    theirs = load_file(folder / "out.safetensors")
    scores, kept = own(model, gates, ids)
    said = logsigmoid(theirs["scores"]) if gates.objective == "fastkvzip" else theirs["scores"]  # ours ranks by logs
    known = theirs["scores"].isfinite() & (scores.abs() < 80)  # what nothing was read for yet is 85 on both sides
    gap, scale = (said - scores)[known].abs().max(), scores[known].abs().max()
    differ = (theirs["kept"] != kept).any(-1)
    return {
        "difference": float(gap), "scale": float(scale), "heads": differ.numel(), "equal": int((~differ).sum()),
        "held": sorted(set(reply["held"])),
    }  # fmt: skip


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What differs beyond rounding."""
    found = []
    for row in rows:
        name = f"{row['gates']} on {row['family']}"
        if row["difference"] > TOLERANCE * row["scale"]:
            found.append(f"{name}: scores differ by {row['difference']:.1e} of {row['scale']:.1e}")
        if row["equal"] != row["heads"]:
            found.append(f"{name}: {row['heads'] - row['equal']} of {row['heads']} heads keep other positions")
        if row["held"] != [BUDGET]:
            found.append(f"{name}: kvpress holds {row['held']} entries per head, asked for {BUDGET}")
    return found


def page(result: dict[str, Any]) -> str:
    """What was checked, against which versions."""
    mine, theirs = package_versions(), result["versions"]
    lines = [
        "# Exported presses inside kvpress", "",
        "`python scripts/check_press.py` writes this page: gates exported by `retention.interop.kvpress.export_press` run as a `ScorerPress` of "
        f"[kvpress](https://github.com/NVIDIA/kvpress) {theirs['kvpress']} (torch {theirs['torch']}, transformers {theirs['transformers']}), beside our "
        f"policy of the same gates with every head for itself (torch {mine['torch']}, transformers {mine['transformers']}, retention {mine['retention']}). "
        f"Random gates, random models ({SMALL['num_hidden_layers']} layers, {SMALL['num_key_value_heads']} KV heads, fp32, CPU), {BUDGET} of {LENGTH} tokens kept.", "",
        "| model | gates | objective | scores differ by at most | of | heads with equal kept positions |", "|---|---|---|---:|---:|---:|",
    ]  # fmt: skip
    for row in result["rows"]:
        figures = f"{row['difference']:.1e} | {row['scale']:.1e} | {row['equal']} of {row['heads']}"
        lines.append(f"| {row['family']} | {row['gates']} | {row['objective']} | {figures} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Build, export, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", type=Path, default=Path("outputs/kvpress_env"), help="kvpress's environment")
    parser.add_argument("--work", type=Path, default=Path("outputs/check_press"))
    parser.add_argument("--out", type=Path, default=Path("docs/exported_press.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.perf_counter()
    try:
        result = checked(environment(args.env), args.work)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(page(result))
    found = failures(result["rows"])
    if found:
        sys.exit("error: " + "; ".join(found))
    write_text(args.out, page(result))
    print(f"{args.out} ({time.perf_counter() - begun:.0f} s)")


if __name__ == "__main__":
    main()
