"""Build sdist and wheel, install each away from the checkout, train and evaluate there, and resolve every extra.

    python scripts/check_release.py                      # all of it: some minutes, with a package index
    python scripts/check_release.py --skip-extras        # without resolving the extras
    python scripts/check_release.py --folder build/release   # keep what was built, and the environment, for the next time

Ends with `passed`, or stops at the first thing that is wrong. An extra may add packages but may not replace torch, which
users choose by hand for their machine.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRAIN = ["trainer=smoke", "logger=csv", "data.batch_size=2", "data.val_examples=2"]
EVAL = ["policies=[db_trim_kv,random]", "budgets=[10%]", "examples=2", "quota_examples=2"]


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, away from this checkout's paths and settings."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=cwd, env=kept | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def environment(folder: Path) -> Path:
    """The interpreter of a virtual environment, made where it is missing."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    return python


def sources(folder: Path) -> Path:
    """A copy of what git has or would add: build leftovers and ignored files never reach a release."""
    shutil.rmtree(folder, ignore_errors=True)
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def build(folder: Path) -> tuple[Path, Path]:
    """Sdist, and the wheel that is built from nothing but the sdist."""
    python = environment(folder / "builder")
    run(python, "-m", "pip", "install", "--quiet", "build", cwd=folder)
    shutil.rmtree(folder / "dist", ignore_errors=True)
    run(python, "-m", "build", "--outdir", folder / "dist", sources(folder / "sources"), cwd=folder)
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path, tree: Path) -> None:
    """Every module, config and data file of the tree is in both; nothing else is in the wheel."""
    package = [path for path in (tree / "retention").rglob("*") if path.is_file()]
    configs = list((tree / "configs").rglob("*.yaml"))
    wanted = {str(path.relative_to(tree)) for path in package} | {f"retention/{p.relative_to(tree)}" for p in configs}
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    if wanted != found:
        sys.exit(f"failed: the wheel lacks {sorted(wanted - found)} and should not have {sorted(found - wanted)}")
    with tarfile.open(sdist) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    missing = {str(path.relative_to(tree)) for path in (*package, *configs)} - shipped
    missing |= {"LICENSE", "NOTICE", "README.md", "CITATION.cff", "tests/tiny.py"} - shipped
    if missing:
        sys.exit(f"failed: the sdist lacks {sorted(missing)}")
    print(f"{wheel.name}: {len(found)} files, {wheel.stat().st_size / 2**20:.1f} MiB; {sdist.name}: {sdist.stat().st_size / 2**20:.1f} MiB")  # fmt: skip


def demo(python: Path, package: Path, folder: Path, *how: str) -> None:
    """Install one file into an environment; train a few steps and evaluate, from an empty folder."""
    run(python, "-m", "pip", "install", "--quiet", *how, package, cwd=folder)
    outside = folder / "outside"
    shutil.rmtree(outside, ignore_errors=True)
    outside.mkdir()
    where = run(python, "-c", "import retention; print(retention.__file__)", cwd=outside).strip()
    if not Path(where).is_relative_to(python.parents[1]):
        sys.exit(f"failed: retention is imported from {where}")
    said = run(python.with_name("retention-train"), *TRAIN, cwd=outside)
    if "retention-eval gates=" not in said:
        sys.exit(f"failed: training ended without the command that evaluates:\n{said}")
    table = run(python.with_name("retention-eval"), *EVAL, cwd=outside)
    if not list(outside.glob("outputs/eval/*/report.html")):
        sys.exit("failed: no report was written")
    run(python, "-m", "retention", "plan", "--help", cwd=outside)
    rows = next(part for part in table.split("\n\n") if "db_trim_kv" in part)
    print(f"{package.name} outside the checkout, 4 steps and 2 contexts:\n{rows.strip()}", flush=True)


def check_extras(python: Path, wheel: Path, folder: Path) -> None:
    """Whether pip finds packages for every extra, beside the torch that is there."""
    torch = run(python, "-c", "import torch; print(torch.__version__)", cwd=folder).strip()
    wrong = []
    for extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]:
        command = [python, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", f"{wheel}[{extra}]"]
        report = json.loads(run(*command, cwd=folder))
        added = {item["metadata"]["name"].lower() for item in report["install"]} - {"retention"}
        replaced = "torch" in added
        wrong += [extra] if replaced else []
        print(f"retention[{extra}]: {len(added)} packages more, torch {'REPLACED' if replaced else torch}", flush=True)
    if wrong:
        sys.exit(f"failed: torch is replaced by the extras {', '.join(wrong)}")


def main() -> None:
    """Build, check, install, run, resolve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--skip-extras", action="store_true", help="do not resolve the extras")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        sdist, wheel = build(folder)
        check_contents(sdist, wheel, folder / "sources")
        python = environment(folder / "fresh")
        demo(python, wheel, folder)
        if not options.skip_extras:
            check_extras(python, wheel, folder)
        demo(python, sdist, folder, "--force-reinstall", "--no-deps")
    print("passed")


if __name__ == "__main__":
    main()
