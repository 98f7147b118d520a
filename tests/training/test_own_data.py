"""Training on own data from end to end: config, loader, validation, artefact, and a killed run's continuation."""

import json
import logging

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from retention.config import compose
from retention.data.chat import read_chat
from retention.data.held_out import as_example
from retention.data.loader import MixtureLoader
from retention.data.media import BadRow
from retention.data.render import Renderer
from retention.data.source import SourceConfig
from retention.models import family_of
from retention.tasks.needles import Needles
from retention.training.config import DataConfig
from retention.training.datamodule import GateData
from retention.training.run import run
from tests import hub, zoo

BAD = {"missing image": 1, "empty text": 1}


@pytest.fixture
def chats(tmp_path):
    """24 rows with an image, one without its image, one without text, as JSON lines."""
    (tmp_path / "images").mkdir()
    rows = []
    for i in range(24):
        Image.fromarray(zoo.picture(16 + 4 * (i % 3), 16, seed=i)).save(tmp_path / "images" / f"{i}.png")
        value = "<image>\n" + "What is this here? " * (1 + i % 4)
        told = [{"from": "human", "value": value}, {"from": "gpt", "value": f"it is {i}, or not"}]
        rows.append({"image": f"images/{i}.png", "conversations": told})
    rows[5]["image"] = "images/nowhere.png"
    rows[11]["conversations"][1]["value"] = ""
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture
def texts(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"What is {i}? " * 9}, {"role": "assistant", "content": f"it is {i}"}]} for i in range(12)]  # fmt: skip
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def config(name, folder, *more):
    return compose(
        "train",
        [
            "trainer=smoke", "data=own", f"model.name={zoo.saved(name)}", "model.device=cpu", "model.prompt_style=natural",
            "logger=csv", f"output_dir={folder}", "data.batch_size=2", "data.val_examples=2", "data.max_tokens=500",
            "task.n_images=2", "task.n_needles=4", "task.n_asked=4", "task.n_turns=2", "task.cell_px=8", *more,
        ],
    )  # fmt: skip


def gates(folder):
    return load_file(folder / "gates" / "gate_model.safetensors")


@pytest.mark.parametrize(("name", "validated"), [("qwen3_vl", "task"), ("smolvlm", "rows"), ("qwen2", "rows")])
def test_a_run_on_own_data(name, validated, chats, texts, tmp_path):
    source, held = chats, ["data.held_out=0.2"] if validated == "rows" else []
    if name in zoo.TEXT:
        source = texts
        zoo.TEXT[name](vocab_size=hub.VOCAB).save_pretrained(tmp_path / "model")
        hub.tokenizer({}).save_pretrained(tmp_path / "model")
        held += [f"model.name={tmp_path / 'model'}"]
    artefact = run(config(name, tmp_path / "run", f"data.sources=[{{path: {source}}}]", *held))
    record = json.loads((artefact / "gate_config.json").read_text())["training"]
    assert record["steps"] == 4
    assert record["data"]["sources"][0]["path"] == str(source)
    assert record["data"]["loss_on"] == "answers"
    assert set(record["data"]["bad_rows"]) <= set(BAD)
    assert gates(tmp_path / "run")


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(("workers", "packing"), [(0, False), (2, True)])
def test_a_resumed_run_ends_with_the_same_gates(workers, packing, chats, tmp_path, monkeypatch):
    told = [f"data.sources=[{{path: {chats}}}]", f"data.num_workers={workers}", "trainer.max_steps=6"]
    told.append(f"data.packing={packing}")
    run(config("qwen3_vl", tmp_path / "whole", *told))
    run_until(4, config("qwen3_vl", tmp_path / "cut", *told), monkeypatch)
    run(config("qwen3_vl", tmp_path / "cut", *told, f"resume={tmp_path / 'cut'}"))
    whole, cut = gates(tmp_path / "whole"), gates(tmp_path / "cut")
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())


def run_until(step, config, monkeypatch):
    """A run that dies after a checkpoint."""
    read = MixtureLoader.__iter__

    def dying(self):
        for batch in read(self):
            if self.done > step:
                raise RuntimeError("killed")
            yield batch

    with monkeypatch.context() as patched:
        patched.setattr(MixtureLoader, "__iter__", dying)
        with pytest.raises(RuntimeError, match="killed"):
            run(config)


def data(name, steps, **settings):
    model, processor = zoo.loaded(name)
    renderer = Renderer(processor, family_of(model).visual_ids(model.config))
    return GateData(Needles(), renderer, DataConfig(**settings), "natural", steps)


def test_bad_rows_are_told(chats, caplog):
    own = data("llava", 6, sources=[SourceConfig(str(chats))], batch_size=4)
    with caplog.at_level(logging.WARNING):
        batches = list(own.batches())
    assert sum(len(batch.ids) for batch in batches) == 22
    assert own.bad_rows == BAD
    assert "left out row 5 of chats.jsonl: missing image" in caplog.text
    refusing = data("llava", 6, sources=[SourceConfig(str(chats))], batch_size=4, on_bad="refuse")
    with pytest.raises(ValueError, match=r"row (5|11) of chats.jsonl cannot be used: (missing image|empty text)"):
        list(refusing.batches())


def test_held_out_rows_are_never_trained_on(chats, texts):
    sources = [SourceConfig(str(chats)), SourceConfig(str(texts))]
    own = data("llava", 30, sources=sources, batch_size=4, held_out=0.25, val_examples=4)
    asked = {example.id for example in own.validation_contexts().examples}
    trained = {id for batch in own.batches() for id in batch.ids}
    assert len(asked) == 4
    assert not asked & trained
    assert len(trained) >= 22 + 12 - 6 - 3


def test_a_chat_as_a_question_on_its_context():
    chat = read_chat({"image": zoo.picture(8, 8), "prompt": "What?", "response": "A cat."}, "x")
    example = as_example(chat, 8)
    assert [segment.kind for segment in example.segments] == ["image"]
    assert [(turn.question, turn.answer) for turn in example.turns] == [("What?", "A cat.")]
    long = as_example(read_chat({"prompt": "A long story. What?", "response": "A cat."}, "x"), 8)
    assert ([segment.payload for segment in long.segments], long.turns[0].question) == (["A long story. What?"], "")
    with pytest.raises(BadRow, match="no question and answer"):
        as_example(read_chat({"text": "A cat."}, "x"), 8)


WRONG = [
    (["data.loss_on=some"], "data.loss_on answers or all, got 'some'"),
    (["data.on_bad=cry"], "data.on_bad skip or refuse, got 'cry'"),
    (["data.max_tokens=0"], "data.max_tokens of at least 1, got 0"),
    (["data.held_out=0.1"], "data.held_out with data.sources"),
    (["data.held_out=0.1", "data.sources=[{path: a/b, streaming: true}]"], "none of them streaming"),
    (["data.sources=[{split: train}]"], "a file, a folder or a hub id, got ''"),
    (["data.sources=[{path: a, weight: 2}, {path: b}]"], r"in every one of data.sources or in none, got \[2.0, None\]"),
]


@pytest.mark.parametrize(("overrides", "words"), WRONG)
def test_wrong_settings_are_named(overrides, words):
    with pytest.raises(ValueError, match=words):
        compose("train", overrides)
