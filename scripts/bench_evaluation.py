"""Time a large evaluation on the embedded model; write docs/benchmarks/evaluation.md.

    python scripts/bench_evaluation.py              # 30 policies at 5 budgets over 200 contexts, in two processes
    python scripts/bench_evaluation.py --quick      # the same in miniature, printed
    python scripts/bench_evaluation.py --processes 1

Policies need no trained gates, so that this runs anywhere; every context is read once and forked for all of them. The aim
is 15 minutes on two cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from retention.files import write_text
from retention.provenance import hardware, package_versions

ROOT = Path(__file__).parent.parent
AIM = 15 * 60
BUDGETS = ("20%", "10%", "5%", "2.5%", "1.25%")


def policies() -> list[str]:
    """The first 30 presets, in the order of their names, that need neither gates nor the questions' answers."""
    from retention.config import compose

    known = compose("eval", []).policy
    free = [name for name, policy in sorted(known.items()) if not policy.needs_gates and name not in ("full", "quota")]
    return free[:30]


def command(names: list[str], *, contexts: int, processes: int, folder: Path) -> list[str]:
    """The evaluation, as anybody would start it."""
    start = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]  # fmt: skip
    budgets = ",".join(f"'{budget}'" for budget in BUDGETS)
    told = [f"policies=[{','.join(names)}]", f"budgets=[{budgets}]", f"examples={contexts}", f"output_dir={folder}"]
    return [*start, str(ROOT / "eval.py"), "gates=null", "tasks=[ask_subset]", *told]


def measured(names: list[str], *, contexts: int, processes: int) -> dict[str, Any]:
    """Seconds of the whole command, and how many answers it gave."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        told = command(names, contexts=contexts, processes=processes, folder=Path(folder))
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
        subprocess.run(told, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        spent = time.perf_counter() - begin
        manifest = json.loads((Path(folder) / "manifest.json").read_text())
    return {"seconds": spent, "rows": manifest["rows"], "policies": len(names), "contexts": contexts, "processes": processes}  # fmt: skip


def page(found: dict[str, Any]) -> str:
    """What was measured, and where."""
    verdict = "met" if found["seconds"] <= AIM else "missed"
    machine = "\n".join(f"- {key}: {value}" for key, value in {**package_versions(), **hardware()}.items())
    return (
        "# The time of an evaluation\n\nFrom `python scripts/bench_evaluation.py`: `eval.py` on the embedded model from its "
        f"start to its report, {found['policies']} policies at {len(BUDGETS)} budgets over {found['contexts']} contexts of "
        f"`ask_subset` with 8 questions each, in {found['processes']} process(es).\n\n"
        f"{found['seconds'] / 60:.1f} minutes for {found['rows']:,} answers; the aim of {AIM // 60} minutes is {verdict}.\n\n"
        f"Machine:\n\n{machine}\n"
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    names = policies()
    found = measured(names[:2] if options.quick else names, contexts=8 if options.quick else 200, processes=options.processes)  # fmt: skip
    print(found)
    if not options.quick:
        write_text(ROOT / "docs" / "benchmarks" / "evaluation.md", page(found))


if __name__ == "__main__":
    main()
