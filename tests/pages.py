"""What a page of documentation tells its readers to type, and whether that would work. Nothing here imports `retention`."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """Lines of its shell blocks as words, without comments, continued lines joined."""
    joined = "\n".join(blocks(text, "bash")).replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def inline_commands(text: str) -> list[list[str]]:
    """Commands in the middle of its sentences."""
    return [shlex.split(line) for line in re.findall(r"`((?:python|make) [^`\n]+)`", text)]


def run_python(text: str, name: str, names: dict) -> dict:
    """Run its Python blocks in order, in one namespace; returns the namespace."""
    for number, block in enumerate(blocks(text, "python"), start=1):
        exec(compile(block, f"{name}, block {number}", "exec"), names)
    return names


def check(words: list[str]) -> None:
    """Whether a command would start: its file, target or extra exists, its settings compose, its flags are known."""
    match words:
        case ["python" | "retention-train" | "retention-eval", *_] if (root := _root(words)) is not None:
            _check_settings(root, words[2:] if words[0] == "python" else words[1:])
        case ["python", "-m", "retention", *arguments]:
            from retention.__main__ import parser

            parser().parse_args(arguments)
        case ["python", "-m", "retention.harness.lm_eval", *arguments] | ["lmms-eval", *arguments]:
            assert arguments[arguments.index("--model") + 1] == "retention"
            _check_model_arguments(arguments[arguments.index("--model_args") + 1])
        case ["python", script, *arguments] if script.startswith(("scripts/", "examples/")):
            source = (ROOT / script).read_text()
            for flag in (word.partition("=")[0] for word in arguments if word.startswith("--")):
                assert f'"{flag}"' in source, f"{script} has no {flag}"
        case ["srun", *rest]:
            check(rest)
        case ["torchrun", "--nproc-per-node", _, *rest]:
            check(["python", *rest])
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
        case ["pip", "install", requirement] if extras := re.fullmatch(r"retention\[([\w,]+)\]", requirement):
            known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(extras[1].split(",")) <= set(known)
        case _:
            pytest.fail(f"nobody checks {shlex.join(words)}; teach tests/pages.py to")


def _root(words: list[str]) -> str | None:
    """train or eval, where the command is one of the two."""
    name = words[1] if words[0] == "python" and len(words) > 1 else words[0]
    return {"train.py": "train", "retention-train": "train", "eval.py": "eval", "retention-eval": "eval"}.get(name)


def _check_settings(root: str, words: list[str]) -> None:
    from retention.config import compose

    overrides = [word for word in words if not word.startswith(("-", "hydra/")) and "=" in word]
    if "-m" in words:  # one run of the sweep
        overrides = [word if "{" in word else word.split(",")[0] for word in overrides]
    config = compose(root, overrides)
    for word in overrides:
        key, value = word.split("=", 1)
        if "." in key and not key.startswith("task.") and not value.startswith("["):
            part, name = key.split(".")
            found = getattr(getattr(config, part), name)
            assert str(found).lower() == value.lower() or found == _number(value), word


def _check_model_arguments(told: str) -> None:
    """What a harness is told of our model: names that something reads, and a budget."""
    from dataclasses import fields

    from retention.budget import Budget
    from retention.cache.config import CacheConfig
    from retention.harness.settings import Reading
    from retention.models.load import ModelConfig

    arguments = dict(part.split("=", 1) for part in told.split(","))
    known = {field.name for part in (Reading, CacheConfig, ModelConfig) for field in fields(part)}
    assert set(arguments) <= known | {"pretrained", "gates", "policy"}
    Budget.parse(arguments["budget"])


def _number(text: str) -> float | None:
    """A number that Python writes another way, as 1e-5 or 0.10."""
    try:
        return float(text)
    except ValueError:
        return None
