"""`python -m retention plan config.json --context 32768 --batch 4 --budget 1024`: what a cache will cost."""

import argparse
import sys


def parser() -> argparse.ArgumentParser:
    """The commands and their arguments."""
    commands = argparse.ArgumentParser(prog="python -m retention", description=__doc__)
    plan = commands.add_subparsers(dest="command", required=True).add_parser(
        "plan", help="bytes of a cache, before running"
    )
    plan.add_argument("config", help="a config.json, or the folder it lies in")
    plan.add_argument("--context", type=int, required=True, help="tokens of a prompt")
    plan.add_argument("--batch", type=int, default=1, help="prompts at once")
    plan.add_argument(
        "--budget", default="10%", help="entries per layer and head (1024), 10%% of the context or 64MiB a sequence"
    )
    plan.add_argument("--policy", default="db_trim_kv")
    plan.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of keys and values; by default the config's"
    )
    plan.add_argument("--memory", default="none", help="a memory of evicted tokens beside it: linear, slots, moment")
    plan.add_argument("--on-evict", default="memory", help="memory (on top of the budget) or memory_paid (inside it)")
    plan.add_argument("--prefill-chunk", type=int, help="evict after every so many tokens of the prompt")
    plan.add_argument("--gpu", help="memory of a device, as in 80GiB, for the largest batch")
    plan.add_argument("--reserve", type=float, default=0.1, help="part of it left to activations")
    return commands


def main() -> None:
    """Parse, plan, print; errors are one sentence."""
    args = parser().parse_args()
    try:
        from retention.planning.command import run

        sys.stdout.write(run(args) + "\n")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
