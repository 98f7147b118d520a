"""Run the tests of the evaluation harnesses, each in an environment of its own below `.compat/`, kept for the next time.

    python scripts/test_harness.py                  # both
    python scripts/test_harness.py --harness eval   # lm-evaluation-harness; lmms is lmms-eval

They pin and replace what the package's own environment holds. lmms-eval needs a torchvision that fits torch: both come
from the package index, with CUDA. Takes some minutes and gigabytes the first time.
"""

import argparse
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = {"eval": "tests/harness/test_lm_eval.py", "lmms": "tests/harness/test_lmms_eval.py"}
BESIDE = {"eval": ["accelerate"], "lmms": ["torch==2.9.*", "torchvision==0.24.*"]}
"""What the harness's own model needs, which ours is compared with; a torch and the torchvision that is built for it."""


def python_of(harness: str) -> Path:
    """The interpreter of a harness's environment, made where it is missing."""
    folder = ROOT / ".compat" / harness
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, "-e", f"{ROOT}[{harness}]", "beartype", "pytest", *BESIDE[harness]], check=True)
    return python


def main() -> int:
    """Exit status: 0 where every chosen harness passes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--harness", choices=tuple(TESTS), action="append")
    failed = []
    for harness in parser.parse_args().harness or list(TESTS):
        # warnings of the harnesses are not ours to mend
        line = [python_of(harness), "-m", "pytest", "-q", "-m", "harness", "-W", "default", TESTS[harness]]
        failed += [harness] if subprocess.run(line, cwd=ROOT).returncode else []
    print("passed" if not failed else f"failed: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
