"""The line that train.py ends with is one that eval.py takes: the same model, the same task."""

import shlex
from pathlib import Path

import pytest

from retention.config import compose
from retention.entry import eval_command
from retention.training.run import run
from tests.training import test_own_data

chats = test_own_data.chats


def told(command):
    """The config of a printed line."""
    python, script, *overrides = shlex.split(command)
    assert (python, script) == ("python", "eval.py")
    return compose("eval", overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model=hf", "model.name='/tmp/a folder, with=signs (1)'", "model.revision='123'"],
        ["experiment=hub_vlm", "model.name=llava-hf/llava-1.5-7b-hf", "model.quantization=4bit"],
        ["task=needles_580", "task.cell_px=56"],
    ],
    ids=str,
)
def test_model_and_task_are_those_of_the_run(overrides):
    config = compose("train", overrides)
    command = eval_command(config, Path("outputs/train/2026-01-01_00-00-00/gates"))
    found = told(command)
    assert found.gates == "outputs/train/2026-01-01_00-00-00/gates"
    assert found.model == config.model
    (task,) = found.tasks
    assert found.task[task] == config.task
    if not overrides:
        assert command == "python eval.py gates=outputs/train/2026-01-01_00-00-00/gates"


def test_a_student_brings_its_adapter():
    command = eval_command(compose("train", ["trainer.lora_rank=2"]), Path("run/gates"))
    assert told(command).model.adapter == "run/adapter"


def test_it_works_as_it_is_after_own_data(chats, tmp_path):
    from retention.evaluation.run import run as evaluate

    config = test_own_data.config("qwen3_vl", tmp_path / "run", f"data.sources=[{{path: {chats}}}]")
    command = eval_command(config, run(config))
    few = [
        "examples=1",
        "policies=[db_trim_kv]",
        "budgets=[10%]",
        f"output_dir={tmp_path / 'eval'}",
        "quota_examples=1",
    ]
    found = evaluate(told(f"{command} {shlex.join(few)}"))
    assert "db_trim_kv" in found.table
