"""`python -m retention plan`, `import` and `export`: what a cache will cost, and gates from and for elsewhere."""

import argparse
import sys
from collections.abc import Callable

DTYPES = ("float32", "bfloat16", "float16")


def parser() -> argparse.ArgumentParser:
    """The commands and their arguments."""
    whole = argparse.ArgumentParser(prog="python -m retention", description=__doc__)
    commands = whole.add_subparsers(dest="command", required=True)
    _plan(commands.add_parser("plan", help="bytes of a cache, before running"))
    _import(commands.add_parser("import", help="gates that others published as an artefact of ours"))
    _export(commands.add_parser("export", help="an artefact as a kvpress press, kept positions or programs"))
    return whole


def _plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("config", help="a config.json, or the folder it lies in")
    plan.add_argument("--context", type=int, required=True, help="tokens of a prompt")
    plan.add_argument("--batch", type=int, default=1, help="prompts at once")
    plan.add_argument(
        "--budget", default="10%", help="entries per layer and head (1024), 10%% of the context or 64MiB a sequence"
    )
    plan.add_argument("--policy", default="db_trim_kv")
    plan.add_argument("--dtype", choices=DTYPES, help="of keys, values and weights; by default the config's")
    plan.add_argument("--memory", default="none", help="a memory of evicted tokens beside it: linear, slots, moment")
    plan.add_argument("--on-evict", default="memory", help="memory (on top of the budget) or memory_paid (inside it)")
    plan.add_argument("--prefill-chunk", type=int, help="evict after every so many tokens of the prompt")
    plan.add_argument("--gpu", help="memory of a device, as in 80GiB, for the largest batch")
    plan.add_argument("--weights", help="their bytes, as in 5GiB, where the config does not tell them (quantised)")
    plan.add_argument("--reserve", type=float, default=0.1, help="part of it left to activations")


def _import(gates: argparse.ArgumentParser) -> None:
    gates.add_argument("source", help="a downloaded file or folder")
    gates.add_argument("--kind", required=True, help="kvzap, fastkvzip, trim_kv (also DBTrimKV), dms or locret")
    gates.add_argument("--base", required=True, help="the model they were trained for: a folder or hub id")
    gates.add_argument("--out", required=True, help="folder of the artefact")
    gates.add_argument("--storage", default="float32", help="of its tensors: float32, bfloat16, float16 or int8")
    gates.add_argument("--revision", help="of the base on the hub")
    gates.add_argument("--dtype", choices=DTYPES, help="the base is loaded in; float32 by default")


def _export(gates: argparse.ArgumentParser) -> None:
    gates.add_argument("gates", help="an artefact: a folder or hub id")
    gates.add_argument("--to", required=True, help="press (kvpress), programs (torch.export) or kept (positions)")
    gates.add_argument("--out", required=True, help="folder to write")
    gates.add_argument(
        "--budget", help="of programs of conditioned gates, in entries per head; of kept, 10%% by default"
    )
    gates.add_argument("--dtype", choices=DTYPES, help="of a program's hidden states, or the base of kept; float32")
    gates.add_argument("--prompt", help="of kept: a text file")
    gates.add_argument("--policy", help="of kept; by default the one of the gates' objective")
    gates.add_argument("--base", help="of kept: the model, a folder or hub id")
    gates.add_argument("--revision", help="of kept: of the base on the hub")


def _runner(command: str) -> Callable[[argparse.Namespace], str]:
    """What runs a command; imported here, so that `--help` is quick."""
    if command == "plan":
        from retention.planning.command import run

        return run
    from retention.interop.command import export_gates, import_gates

    return {"import": import_gates, "export": export_gates}[command]


def main() -> None:
    """Parse, run, print; errors are one sentence."""
    args = parser().parse_args()
    try:
        sys.stdout.write(_runner(args.command)(args) + "\n")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
