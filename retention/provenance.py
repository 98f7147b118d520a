"""Where a result comes from: versions, git state and hardware, without host names or paths."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("retention", "torch", "transformers", "lightning", "hydra-core", "numpy", "huggingface_hub", "datasets")

_ABSOLUTE = re.compile(r"""(?<![^\s=,'"\[({])/[^\s,'"\])}]+""")
"""A path from the root, at the start of a text or behind what separates values."""


def package_versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on, and the git state of the checkout."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found | git_state()


def git_state() -> dict[str, str]:
    """Commit and dirty flag of the checkout this package runs from; `unknown` outside one."""
    root = Path(__file__).parents[1]

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"git": git("rev-parse", "HEAD"), "git_dirty": str(dirty).lower()}
    except (OSError, subprocess.SubprocessError):
        return {"git": "unknown", "git_dirty": "unknown"}


def hardware() -> dict[str, str]:
    """Device name, thread count and platform."""
    import torch

    cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {
        "cpu": _cpu_name(),
        "threads": str(torch.get_num_threads()),
        "cuda": cuda,
        "system": f"{platform.system()} {platform.machine()}",
    }


def without_paths(told: Any) -> Any:
    """The same settings or record, absolute paths in its texts made relative to the working folder.

    What lies outside of it keeps its last name alone: `.../gates`.
    """
    match told:
        case dict():
            return {name: without_paths(value) for name, value in told.items()}
        case list() | tuple():
            return [without_paths(value) for value in told]
        case str():
            return _ABSOLUTE.sub(lambda found: _relative(found.group()), told)
    return told


def _relative(path: str) -> str:
    inside = os.path.relpath(path)
    return f".../{Path(path).name}" if inside.startswith("..") else inside


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else "unknown"
