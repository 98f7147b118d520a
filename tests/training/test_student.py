"""A student with LoRA beside the gates: off for the teacher, resumed exactly, exported as anybody's adapter."""

import json
import sys
from functools import lru_cache

import pytest
import torch
from safetensors.torch import load_file

from retention.attach.hidden import entrance, final_hidden
from retention.config import compose
from retention.gates import RetentionGates
from retention.gates.dbtrim import DBTrim
from retention.models.family import decoder_of, fingerprint
from retention.models.load import load_frozen
from retention.objectives.base import Step
from retention.objectives.distillation import Distillation
from retention.objectives.hard_eviction import HardEviction
from retention.training.config import TrainerConfig
from retention.training.export import export_checkpoint
from retention.training.module import GateTrainer, collect
from retention.training.run import run
from retention.training.student import Student
from tests import zoo
from tests.attach.helpers import snapshot
from tests.cache.helpers import gap
from tests.training.test_lagrangian import SMALL, column, final_state, interrupted

LORA = ["trainer.lora_rank=2", "trainer.lora_lr=0.01"]
FAMILIES = ["llama", "phi3", "qwen3_vl", "qwen3_moe"]
TARGETS = {"phi3": ["qkv_proj", "o_proj"]}


def base_of(name):
    return load_frozen(str(zoo.saved(name)), device="cpu")[0]


def student_of(model, name="llama", **more):
    config = TrainerConfig(lora_rank=2, lora_targets=TARGETS.get(name, ["q_proj", "v_proj"]), **more)
    return Student(model, config, seed=0)


def gates_for(model):
    torch.manual_seed(1)
    return RetentionGates.for_model(DBTrim(gate_hidden=8, init_half_life=20.0), model)


def stepped(name, model, objective, student=None, recompute=False):
    """Loss and gradients of a step."""
    inputs, gates = zoo.batch(name, images=name not in zoo.TEXT), gates_for(model)
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    labels[:, : labels.shape[1] // 2] = -100
    step = Step(labels, torch.Generator().manual_seed(0))
    seen = collect(model, gates, objective, inputs, step, student=student, recompute=recompute)
    loss = objective.loss(seen)[0].loss()
    loss.backward()
    return seen, loss.detach(), [p.grad for p in gates.parameters()]


def shifted(student):
    """Weights away from their start, where B is 0."""
    generator = torch.Generator().manual_seed(3)
    for parameter in student.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return student


@pytest.mark.parametrize("name", FAMILIES)
def test_at_first_it_changes_nothing_bitwise(name):
    model = base_of(name)
    plain, kind, print_before = stepped(name, model, Distillation(budget="4")), type(model), fingerprint(model)
    state = torch.random.get_rng_state()
    student = student_of(model, name)
    assert torch.equal(torch.random.get_rng_state(), state)
    got = stepped(name, model, Distillation(budget="4"), student)
    assert torch.equal(plain[0].student, got[0].student)
    assert torch.equal(plain[0].teacher, got[0].teacher)
    assert torch.equal(plain[1], got[1])
    assert all(torch.equal(a, b) for a, b in zip(plain[2], got[2], strict=True))
    assert (type(model), fingerprint(model)) == (kind, print_before)
    assert decoder_of(model) is model.get_decoder()
    moved = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert moved
    assert all("lora_B" in name for name in moved)
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("objective", [Distillation(budget="4"), HardEviction(budget="4")], ids=lambda x: x.name)
def test_the_teacher_is_the_base(name, objective):
    model = base_of(name)
    plain = stepped(name, model, objective)[0]
    student = shifted(student_of(model, name))
    before = snapshot(model)
    seen = stepped(name, model, objective, student)[0]
    real = plain.valid
    assert gap(seen.teacher[real], plain.teacher[real]) < 1e-6
    assert (seen.student - plain.student)[real].abs().max() > 1e-2
    assert snapshot(model) == before
    assert all(p.grad is not None for p in student.parameters())


def test_layers_run_again_have_the_same_gradients():
    grads = []
    for recompute in (False, True):
        model = base_of("llama")
        student = shifted(student_of(model))
        grads.append(stepped("llama", model, HardEviction(budget="4"), student, recompute)[2])
        grads[-1] += [p.grad for p in student.parameters()]
    assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-4) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("mode", ["merged", "attached"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_export_is_an_ordinary_adapter(name, mode, tmp_path):
    model = base_of(name)
    student = shifted(student_of(model, name, lora_alpha=3.0))
    folder = student.export(tmp_path / "adapter")
    told = json.loads((folder / "adapter_config.json").read_text())
    assert (told["peft_type"], told["r"], told["lora_alpha"]) == ("LORA", 2, 3.0)
    assert told["base_model_name_or_path"] == str(zoo.saved(name))
    assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    again, _ = load_frozen(str(zoo.saved(name)), device="cpu", adapter=str(folder), adapter_mode=mode)
    inputs = zoo.batch(name, images=name not in zoo.TEXT)
    with torch.no_grad():
        expected, got = (final_hidden(x, entrance(x, inputs)) for x in (model, again))
        with student.off():
            plain = final_hidden(model, entrance(model, inputs))
    assert gap(got, expected) < 1e-4
    assert gap(got, plain) > 1e-2
    gates_for(model).check(again)


def test_only_the_decoder_gets_it():
    model = base_of("llava")
    student = student_of(model)
    assert all("language_model" in name for name, _ in student.named_parameters())
    tower = next(m for n, m in model.named_modules() if n.endswith("vision_tower"))
    assert not any("lora" in name for name, _ in tower.named_parameters())


def test_half_precision_bases_get_weights_in_full():
    model = base_of("llama").to(torch.bfloat16)
    student = shifted(student_of(model))
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert final_hidden(model, entrance(model, zoo.batch("llama"))).dtype == torch.bfloat16


# --- runs -----------------------------------------------------------------------------------------------------


@lru_cache
def embedded():
    return load_frozen(device="cpu")[0]


def test_a_run_trains_and_exports_both(tmp_path):
    artefact = run(compose("train", [*SMALL, *LORA, f"output_dir={tmp_path / 'run'}"]))
    told = json.loads((artefact / "gate_config.json").read_text())["training"]
    assert told["adapter"] == {"rank": 2, "alpha": 16.0, "targets": ["q_proj", "v_proj"]}
    model, _ = load_frozen("embedded", device="cpu", adapter=str(tmp_path / "run" / "adapter"))
    RetentionGates.from_pretrained(artefact).check(model)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, embedded().get_parameter(n))]
    assert changed
    assert all(name.endswith(("q_proj.weight", "v_proj.weight")) and "vision" not in name for name in changed)
    assert column(tmp_path / "run", "gap")
    state = final_state(tmp_path / "run")["state_dict"]
    assert all(name.startswith(("gates.", "student.")) for name in state)
    assert sum("lora_" in name for name in state) == len([n for n in state if n.startswith("student.")]) > 0
    file = next((tmp_path / "run" / "checkpoints").glob("*.ckpt"))
    for which in ("best", "last"):
        found = export_checkpoint(file, tmp_path / which, which=which)
        told, own = (json.loads((x / "adapter_config.json").read_text()) for x in (found / "adapter", tmp_path / "run" / "adapter"))  # fmt: skip
        assert told == own
        again, _ = load_frozen("embedded", device="cpu", adapter=str(found / "adapter"))
        RetentionGates.from_pretrained(found).check(again)
    tensors = load_file(tmp_path / "last" / "adapter" / "adapter_model.safetensors")
    expected = {x for x in state if x.startswith("student.")}
    assert {f"student.{name}" for name in tensors} == {
        f"student.base_model.model.{x.removeprefix('student.').replace('/', '.').replace('.student.', '.')}"
        for x in expected
    }
    key = next(name for name in expected if "lora_B" in name)
    written = f"base_model.model.{key.removeprefix('student.').replace('/', '.').replace('.student.', '.')}"
    assert torch.equal(tensors[written], state[key])
    assert tensors[written].abs().sum() > 0


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_killed_run_ends_with_bitwise_the_same_adapter(tmp_path, monkeypatch):
    run(compose("train", [*SMALL, *LORA, f"output_dir={tmp_path / 'whole'}"]))
    interrupted(monkeypatch, [*SMALL, *LORA, f"output_dir={tmp_path / 'cut'}"], tmp_path / "cut")
    assert not (tmp_path / "cut" / "adapter").exists()
    run(compose("train", [*SMALL, *LORA, f"resume={tmp_path / 'cut'}"]))
    for file in ("gates/gate_model.safetensors", "adapter/adapter_model.safetensors"):
        whole, resumed = (load_file(tmp_path / name / file) for name in ("whole", "cut"))
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(x.abs().sum() > 0 for name, x in whole.items() if "lora_B" in name)


def test_it_has_its_own_rate():
    model = base_of("llama")
    student = student_of(model)
    module = GateTrainer(model, gates_for(model), Distillation(), TrainerConfig(lora_lr=0.03), seed=0, student=student)
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert [group["initial_lr"] for group in groups] == [2e-4, 1e-2, 0.03]
    assert {id(p) for p in groups[2]["params"]} == {id(p) for n, p in model.named_parameters() if "lora_" in n}


def test_what_cannot_be_is_said_in_a_sentence(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"expected trainer.lora_targets among .*q_proj.*, got 'nothing'"):
        Student(base_of("llama"), TrainerConfig(lora_rank=2, lora_targets=["nothing"]), seed=0)
    with pytest.raises(ValueError, match=r"expected trainer.lora_rank of 0 or more"):
        TrainerConfig(lora_rank=-1)
    folder = student_of(base_of("llama")).export(tmp_path / "adapter")
    model, _ = load_frozen(str(zoo.saved("llama")), device="cpu", adapter=str(folder), adapter_mode="attached")
    with pytest.raises(ValueError, match=r"beside an adapter that is attached; set model.adapter_mode=merged"):
        student_of(model)
    with pytest.raises(ValueError, match="a memory is trained on frozen gates alone"):
        compose("train", ["memory=slots", "trainer.lora_rank=2"])
    with pytest.raises(ValueError, match=r"needs an objective that compares with the full cache, got kvzap"):
        compose("train", ["objective=kvzap", "trainer.lora_rank=2"])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"needs the package peft; install it with pip install 'retention\[peft\]'"):
        student_of(base_of("llama"))
