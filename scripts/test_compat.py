"""Run the family identities on the oldest and the newest transformers and torch that pyproject.toml admits.

Each end of the range gets an environment of its own below `.compat/`, which is kept for the next time:

    python scripts/test_compat.py                  # both ends
    python scripts/test_compat.py --end oldest     # one of them
    python scripts/test_compat.py tests/models     # other tests

torchvision is installed with the oldest pair only, whose image processors cannot do without it; with the newest, images
go without. Takes some minutes and gigabytes the first time: older torch comes from the package index, with CUDA.
"""

import argparse
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = [f"tests/models/test_{name}.py" for name in ("identities", "generic", "load", "family")]
TESTS += ["tests/data/test_families.py", "tests/data/test_native_video.py", "tests/cache/test_mrope.py"]
TORCHVISION = {"2.9": "0.24"}
"""Which torchvision belongs to the oldest torch."""
QUIET = ["ignore:__array_wrap__ must accept context:DeprecationWarning", "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"]  # fmt: skip
"""numpy 2 about tensors that older processors, inside transformers, hand to it."""


def declared(package: str) -> tuple[str, str]:
    """Requirement of a package in pyproject.toml, and its lower bound."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    requirement = next(line for line in wanted if re.match(rf"{package}\b", line))
    found = re.search(r">=([\d.]+)", requirement)
    assert found is not None
    return requirement, found.group(1)


def pins(end: str) -> list[str]:
    """What to install beside the package itself."""
    if end == "newest":
        return [declared(package)[0] for package in ("torch", "transformers")]
    oldest = {package: declared(package)[1] for package in ("torch", "transformers")}
    return [*(f"{package}=={version}.*" for package, version in oldest.items()), f"torchvision=={TORCHVISION[oldest['torch']]}.*"]  # fmt: skip


def python_of(end: str) -> Path:
    """The interpreter of an end's environment, made where it is missing."""
    folder = ROOT / ".compat" / end
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    newer = ["--upgrade"] if end == "newest" else []
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *newer]
    subprocess.run([*install, "-e", f"{ROOT}[test]", *pins(end)], check=True)
    return python


def main() -> int:
    """Exit status: 0 where every chosen end passes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--end", choices=("oldest", "newest"), action="append")
    parser.add_argument("tests", nargs="*", default=TESTS)
    options = parser.parse_args()
    failed = []
    for end in options.end or ["oldest", "newest"]:
        python = python_of(end)
        told = "import torch, transformers as t; print(f'torch {torch.__version__}, transformers {t.__version__}')"
        print(f"{end}: {subprocess.run([python, '-c', told], check=True, capture_output=True, text=True).stdout.strip()}", flush=True)  # fmt: skip
        run = subprocess.run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"-W{warning}" for warning in QUIET), *options.tests], cwd=ROOT)  # fmt: skip
        failed += [end] if run.returncode else []
    print("passed" if not failed else f"failed: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
