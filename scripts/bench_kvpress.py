"""Measure this package beside kvpress: same weights, same tokens, same kept entries, each in its own environment.

`python scripts/bench_kvpress.py` builds kvpress's environment once (about 1.5 GB), runs both sides in turns and writes
docs/benchmarks/kvpress.md. `--quick` runs the same in miniature and prints the page; `--json PATH` also writes rows, ratios
and machine. On a CPU, one thread, random weights: figures about bytes and time, never about quality.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from kvpress_ours import Ours
from kvpress_page import KEEPS, PAIRS, TOLERANCE, of, page, ratios
from kvpress_worker import (
    ONE_LAYER,
    gap,
    serve_pipes,
)
from safetensors.torch import load_file, save_file

from retention.files import write_json, write_text
from retention.provenance import hardware, package_versions

KVPRESS, TRANSFORMERS = "0.5.5", "5.2.0"
STAMP = "bench_kvpress.json"
REPEATS = 7
SHAPE = {
    "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 32768, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "initializer_range": 0.05, "use_sliding_window": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
FULL = (
    ("kvpress", "full", "full cache, stock `DynamicCache`"),
    ("retention", "full", "full cache, stock `DynamicCache`"),
    ("retention", "full_own", "full cache, our cache (`full`)"),
)
EVICTING = (
    ("kvpress", "knorm", "`KnormPress`, uniform"),
    ("retention", "knorm", "`knorm`, uniform"),
    ("kvpress", "adakv_knorm", "`AdaKVPress(KnormPress)`, a pool per layer"),
    ("retention", "knorm_global", "`knorm`, one pool for all layers"),
)


# kvpress's environment.


def wanted() -> dict[str, str]:
    """Pinned packages: the running torch, and what kvpress's release works with."""
    return {"torch": torch.__version__.split("+")[0], "transformers": TRANSFORMERS, "kvpress": KVPRESS}


def environment(folder: Path) -> Path:
    """The Python of kvpress's environment, built if it is not there.

    Raises:
        ValueError: when the folder is somebody else's, or the packages cannot be installed.
    """
    stamp, python = folder / STAMP, folder / "bin" / "python"
    state = json.loads(stamp.read_text()) if stamp.exists() else None
    if state == wanted() and python.exists():
        return python
    if state is None and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and was not made by this script; pass another folder as --env")
    print(f"building kvpress's environment in {folder}, some minutes once", file=sys.stderr, flush=True)
    if folder.exists():
        shutil.rmtree(folder)
    write_json(stamp, "unfinished")
    pins = [f"{name}=={number}" for name, number in wanted().items()]
    for words in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins],
    ):
        try:
            subprocess.run(words, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            lines = [x for x in (getattr(error, "stderr", "") or str(error)).splitlines() if x.strip()]
            reason = next((x for x in reversed(lines) if x.startswith("ERROR")), lines[-1] if lines else "no message")
            raise ValueError(
                f"kvpress's environment could not be built in {folder} ({reason}); it needs {', '.join(pins)} from a package "
                "index once: run where one can be reached, or pass a finished environment as --env"
            ) from None
    write_json(stamp, wanted())
    return python


# What both sides load.


def write_model(folder: Path, shape: dict[str, Any], seed: int) -> None:
    """Config and random weights.

    Query and key norms get random weights: as initialised, all keys of a Qwen3 model have the same norm.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(Qwen3Config(**shape)).float()
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    save_file({name: x.detach().contiguous() for name, x in model.state_dict().items()}, folder / "model.safetensors")
    write_json(folder / "config.json", shape)


def write_inputs(folder: Path, shape: dict[str, Any], tokens: int, seed: int = 0) -> None:
    """A work folder: the model, its like with one layer, token ids that repeat as late as the vocabulary allows."""
    write_model(folder, shape, seed)
    write_model(folder / ONE_LAYER, shape | {"num_hidden_layers": 1}, seed)
    draw, vocabulary = torch.Generator().manual_seed(seed), shape["vocab_size"] - 1
    shuffled = [1 + torch.randperm(vocabulary, generator=draw) for _ in range(-(-tokens // vocabulary))]
    save_file({"ids": torch.cat(shuffled)[None, :tokens].contiguous()}, folder / "ids.safetensors")


# Taking turns.


class Worker:
    """A long-lived process that answers JSON lines; what it prints besides goes to a log file."""

    def __init__(self, name: str, words: list[str], log: Path) -> None:
        self.name, self.log = name, log
        single = {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        variables = {**os.environ, **single}
        if name == "kvpress":
            variables.pop("PYTHONPATH", None)
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=variables
            )

    def ask(self, **request: Any) -> dict:
        """One request, one reply; the caller waits, so only one worker works.

        Raises:
            ValueError: when the process has ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            said = [x for x in self.log.read_text().splitlines() if x.strip()]
            raise ValueError(f"the {self.name} process ended ({said[-1] if said else 'no message'}); see {self.log}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def entries(prompt: int, keep: float) -> int:
    """Entries per layer and head at a keep ratio, rounded half up as our budgets are."""
    return int(keep * prompt + 0.5)


def plan(prompt: int) -> list[dict]:
    """Every row's request, the two sides by turns."""
    rows = [{"side": s, "method": m, "label": t, "keep": 1.0, "asked": prompt} for s, m, t in FULL]
    for keep in KEEPS:
        rows += [
            {"side": s, "method": m, "label": t, "keep": keep, "asked": entries(prompt, keep)} for s, m, t in EVICTING
        ]
    return rows


def check_full(workers: dict[str, Worker], folder: Path, prompt: int) -> float:
    """Largest difference of the full cache's logits between the environments.

    Raises:
        ValueError: when it is above TOLERANCE, because nothing else could be compared then.
    """
    files = {}
    for side, worker in workers.items():
        reply = worker.ask(do="logits", prompt=prompt, file=f"full_{side}.safetensors")
        if "error" in reply:
            raise ValueError(f"the {side} side could not run the full cache ({reply['error']}); see {worker.log}")
        files[side] = load_file(folder / f"full_{side}.safetensors")["logits"]
    difference = gap(*files.values())
    if not difference <= TOLERANCE:
        raise ValueError(
            f"the full cache's logits differ by {difference:.1e} between the two environments, above {TOLERANCE:.0e}: "
            "they do not run the same model, so nothing was measured"
        )
    return difference


def run_rows(workers: dict[str, Worker], rows: list[dict], prompt: int, new_tokens: int, repeats: int) -> None:
    """Fill rows in: one traced run each, then `repeats` timed ones, all rows once before any row again."""
    for turn in range(repeats + 1):
        for row in rows:
            if "error" in row:
                continue
            trace = None if turn else f"trace_{row['side']}_{row['method']}_{row['asked']}.safetensors"
            asked = {"method": row["method"], "prompt": prompt, "kept": row["asked"], "new_tokens": new_tokens}
            reply = workers[row["side"]].ask(do="run", trace=trace, **asked)
            if "error" in reply:
                row["error"] = reply["error"]
            elif trace:
                timed = ("prefill_s", "prefill_wall_s", "decode_ms", "decode_wall_ms")
                row.update({k: v for k, v in reply.items() if k not in timed}, trace=trace)
            else:
                for name in ("prefill_s", "prefill_wall_s", "decode_ms", "decode_wall_ms"):
                    row.setdefault(f"{name}_all", []).append(reply[name])
    for row in rows:
        for name in ("prefill_s", "prefill_wall_s", "decode_ms", "decode_wall_ms"):
            if f"{name}_all" in row:
                row[name], row[f"{name}_median"] = min(row[f"{name}_all"]), statistics.median(row[f"{name}_all"])


def check_kept(rows: list[dict]) -> None:
    """Compared rows hold the same number of entries.

    Raises:
        ValueError: when two differ by more than 1%.
    """
    for keep in KEEPS:
        for theirs, ours in PAIRS.values():
            a, b = of(rows, "kvpress", theirs, keep), of(rows, "retention", ours, keep)
            if "kept" in a and "kept" in b and abs(a["kept"] - b["kept"]) > 0.01 * min(a["kept"], b["kept"]):
                raise ValueError(
                    f"expected equal entries at {keep:.0%}, got {a['kept']} ({a['label']}) and {b['kept']} ({b['label']})"
                )


def agreement(workers: dict[str, Worker], prompt: int, new_tokens: int, folder: Path) -> dict[str, dict]:
    """How far both sides' decoded tokens agree where they pool alike: all layers uniformly, one layer head-adaptively.

    The prompt is short enough to hold no token twice: a repeated token's keys have equal norms in the first layer, up to
    rounding, and such ties each side breaks its own way.
    """
    found = {}
    for kind, (theirs, ours) in PAIRS.items():
        for keep in KEEPS:
            asked = {"prompt": prompt, "kept": entries(prompt, keep), "new_tokens": new_tokens}
            asked["one_layer"] = kind == "adaptive"
            runs = []
            for side, method in (("kvpress", theirs), ("retention", ours)):
                trace = f"agreement_{side}_{method}_{asked['kept']}.safetensors"
                runs.append(workers[side].ask(do="run", method=method, trace=trace, **asked) | {"trace": trace})
            errors = [run["error"] for run in runs if "error" in run]
            found[f"{kind}@{keep:.0%}"] = {"error": errors[0]} if errors else compared(*runs, folder)
    return found


def compared(a: dict, b: dict, folder: Path) -> dict:
    """How many decoded tokens of two traced runs are equal, and how far apart those tokens' logits are."""
    same = 0
    while same < len(a["tokens"]) and a["tokens"][same] == b["tokens"][same]:
        same += 1
    x, y = (load_file(folder / run["trace"])["logits"][:same] for run in (a, b))
    return {"difference": gap(x, y) if same else None, "tokens": same, "of": len(a["tokens"])}


def measured(args: argparse.Namespace, python: Path, work: Path) -> dict:
    """Both workers, all rows, checks, ratios."""
    prompt, new_tokens, repeats = (512, 16, 2) if args.quick else (4096, 64, args.repeats)
    write_inputs(work, SHAPE, prompt)
    distinct = min(prompt, 512, SHAPE["vocab_size"] - 1)
    here = Path(__file__).resolve()
    workers: dict[str, Worker] = {}
    try:
        for side, words in (
            ("kvpress", [str(python), str(here.with_name("kvpress_worker.py")), str(work)]),
            ("retention", [sys.executable, str(here), "--serve", str(work)]),
        ):
            workers[side] = Worker(side, words, work / f"{side}.log")
        found = workers["kvpress"].ask(do="versions")
        full_difference = check_full(workers, work, prompt)
        checks = {side: worker.ask(do="checks") for side, worker in workers.items()}
        rows = plan(prompt)
        run_rows(workers, rows, prompt, new_tokens, repeats)
        check_kept(rows)
        agreed = agreement(workers, distinct, new_tokens, work)
    finally:
        for worker in workers.values():
            worker.close()
    command = "python scripts/bench_kvpress.py" + (" --quick" if args.quick else "")
    if not args.quick and args.repeats != REPEATS:
        command += f" --repeats {args.repeats}"
    return {
        "rows": [{k: v for k, v in row.items() if k not in ("trace", "tokens")} for row in rows],
        "ratios": ratios(rows),
        "machine": hardware(),
        "versions": {"kvpress": found, "retention": package_versions()},
        "config": {
            "command": command,
            "prompt": prompt,
            "distinct": distinct,
            "new_tokens": new_tokens,
            "repeats": repeats,
            "model": SHAPE,
        },
        "full_difference": full_difference,
        "agreement": agreed,
        "checks": checks,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def main() -> None:
    """Build, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a miniature of everything, for a check that it runs")
    parser.add_argument("--json", type=Path, help="also write rows, ratios and machine to this file")
    parser.add_argument(
        "--env", type=Path, default=Path("outputs/kvpress_env"), help="kvpress's environment, built once"
    )
    parser.add_argument("--repeats", type=int, default=REPEATS, help="timed runs of every row, at least 5")
    parser.add_argument("--work", type=Path, default=Path("outputs/bench_kvpress"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/kvpress.md"))
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)  # this script as our side's worker
    args = parser.parse_args()
    if args.serve:
        serve_pipes(Ours(args.serve))
        return
    if args.repeats < 5:
        sys.exit(f"error: expected --repeats of at least 5, got {args.repeats}; --quick is the short run")
    torch.set_num_threads(1)
    try:
        result = measured(args, environment(args.env), args.work / "quick" if args.quick else args.work)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if args.json:
        write_json(args.json, result)
    if args.quick:
        print(page(result))
        return
    write_text(args.out, page(result))
    print(*(f"{value:7.3f}  {name}" for name, value in result["ratios"].items()), args.out, sep="\n")


if __name__ == "__main__":
    main()
