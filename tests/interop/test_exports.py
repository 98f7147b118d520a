"""Our gates for others: the press, kept positions, exported programs."""

import importlib.util
import json
import sys
import types
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file

from retention import POLICIES, Budget, CacheConfig, RetentionGates, evicting
from retention.cache.inputs import states
from retention.gates.dbtrim import DBTrim
from retention.gates.fastkvzip import FastKVzip
from retention.gates.per_head import PerHead
from retention.gates.trim import Trim
from retention.interop.kept import Kept, kept_positions
from retention.interop.kvpress import export_press
from retention.interop.program import export_gate
from retention.policies import policy_of
from tests.cache.helpers import left_padded, tokens
from tests.tiny import tiny_gemma3, tiny_qwen3

KINDS = {
    "trim": (Trim(init_half_life=20.0), "distillation"),
    "linear": (Trim(gate_hidden=0), "locret"),
    "gelu": (Trim(activation="gelu"), "kvzap"),
    "delayed": (Trim(gate_hidden=0, delayed=True), "dms"),
    "rows": (DBTrim(init_half_life=20.0), "distillation"),
    "scalar": (DBTrim(scoring="scalar", init_half_life=20.0), "distillation"),
    "untied": (DBTrim(tied=False), "distillation"),
    "fastkvzip": (FastKVzip(norm_eps=1e-6), "fastkvzip"),
}
MODELS = {"qwen3": tiny_qwen3(), "gemma3": tiny_gemma3()}


def gates_of(config, objective, model=None):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        gates = RetentionGates.for_model(config, model or MODELS["qwen3"]).eval().requires_grad_(False)
    kind = "decay" if objective == "distillation" else "static"
    gates.training_record = {"objective": objective, "score_kind": kind}
    return gates


@pytest.fixture
def press_of(monkeypatch):
    """The press of an exported folder, over a stand-in of kvpress's class: scripts/check_press.py runs the real one."""

    @dataclass
    class ScorerPress:
        compression_ratio: float = 0.0

        def __post_init__(self):
            pass

        def compress(self, module, hidden, keys, values, attentions, kwargs):
            return "evicted", self.score(module, hidden, keys, values, attentions, kwargs)

    known = types.ModuleType("kvpress.presses.scorer_press")
    known.ScorerPress = ScorerPress
    for name in ("kvpress", "kvpress.presses"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, known.__name__, known)

    def load(folder, **settings):
        spec = importlib.util.spec_from_file_location("retention_press", folder / "retention_press.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "retention_press", module)
        spec.loader.exec_module(module)
        return module.RetentionPress(**settings)

    return load


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", MODELS)
def test_the_press_scores_as_the_policy_does(kind, family, press_of, tmp_path):
    """Layer by layer on the hidden states of one prompt; protected entries are infinite there."""
    model, seen = MODELS[family], {}
    gates = gates_of(*KINDS[kind], model)
    press = press_of(export_press(gates, tmp_path), compression_ratio=0.5)
    press.post_init_from_model(model)

    def note(module, args, kwargs):
        seen[module.layer_idx] = (module, kwargs["hidden_states"])

    hooks = [x.self_attn.register_forward_pre_hook(note, with_kwargs=True) for x in model.model.layers]
    policy = POLICIES[policy_of(gates.objective)]()
    with torch.no_grad(), evicting(model, policy, CacheConfig(Budget(20.0)), gates=gates) as cache:
        with cache.hold():
            model(input_ids=tokens(1, 40), past_key_values=cache)
        ours = [policy.score(state) for state in states(cache)]
    for hook in hooks:
        hook.remove()
    for layer, score in zip(gates.shape.layers, ours, strict=True):
        _, theirs = press.compress(*seen[layer], None, None, None, {})
        theirs = torch.nn.functional.logsigmoid(theirs) if kind == "fastkvzip" else theirs
        free = score.shape[-1] - policy.recent(20) - kind.count("delayed")
        torch.testing.assert_close(theirs[..., :free], score[..., :free], rtol=1e-5, atol=1e-5)
        if policy.recent(20):
            assert (theirs[..., -policy.recent(20) :] >= 0).all()
    for layer in set(seen) - set(gates.shape.layers):
        assert press.compress(*seen[layer][:2], "keys", "values", None, {}) == ("keys", "values")


def test_the_folder_is_an_artefact_and_a_press(press_of, tmp_path):
    gates = gates_of(*KINDS["gelu"])
    folder = export_press(gates, tmp_path / "press")
    assert RetentionGates.from_pretrained(folder).tensors().keys() == gates.tensors().keys()
    assert json.loads((folder / "press.json").read_text()) == {
        "objective": "kvzap",
        "decays": False,
        "recent_size": 128,
    }
    source = (folder / "retention_press.py").read_text()
    compile(source, "retention_press.py", "exec")
    assert "import retention" not in source
    press = press_of(folder, compression_ratio=0.5, recent_size=3, sink_size=2)
    module = types.SimpleNamespace(layer_idx=0)
    score = press.score(module, torch.zeros(1, 9, 64), None, None, None, {})
    assert (score == torch.inf).sum(-1).eq(5).all()
    with pytest.raises(ValueError, match="hidden_size 64, the model has 32"):
        press.post_init_from_model(types.SimpleNamespace(config=tiny_qwen3(hidden_size=32).config))
    with pytest.raises(ValueError, match="num_attention_heads 4, the model has 8"):
        press.post_init_from_model(types.SimpleNamespace(config=tiny_qwen3(num_attention_heads=8).config))
    with pytest.raises(ValueError, match="layers up to 2, the model has 2"):
        press.post_init_from_model(types.SimpleNamespace(config=tiny_qwen3(num_hidden_layers=2).config))


def test_gates_that_a_press_cannot_ask_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a press ranks within a head"):
        export_press(gates_of(PerHead(), "duo_attention"), tmp_path)
    for export in (export_press, export_gate):
        with pytest.raises(ValueError, match="hidden states alone"):
            export(gates_of(Trim(modality="embedding"), "distillation"), tmp_path)
    with pytest.raises(ValueError, match="no budget for gates that read none"):
        export_gate(gates_of(Trim(), "distillation"), tmp_path, budget=5)
    assert list(tmp_path.iterdir()) == []


NO_KEPT = {
    "list": b"[]",
    "deep": b"[" * 100_000,
    "text": b"nothing",
    "newer": b'{"format_version": 2}',
    "word": b'{"format_version": "1"}',
}


@pytest.mark.parametrize("told", NO_KEPT.values(), ids=list(NO_KEPT))
def test_kept_positions_with_another_card_are_refused(told, tmp_path):
    positions = torch.arange(4, dtype=torch.int32)
    counts, seen = torch.tensor([[[3, 1]]], dtype=torch.int32), torch.tensor([9], dtype=torch.int32)
    Kept(positions, counts, seen, {"format_version": 1}).save(tmp_path)
    assert Kept.load(tmp_path).of_head(0, 0, 1).tolist() == [3]
    (tmp_path / "kept.json").write_bytes(told)
    with pytest.raises(ValueError, match=r"^expected kept[^\n]*$"):
        Kept.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("counts"),
        lambda t: t.update(positions=t["positions"][:3]),
        lambda t: t.update(counts=torch.tensor([[[5, -1]]], dtype=torch.int32)),
        lambda t: t.update(seen=torch.zeros(2, dtype=torch.int32)),
        lambda t: t.update(positions=t["positions"].float()),
    ],
)
def test_kept_positions_that_do_not_fit_each_other_are_refused(change, tmp_path):
    tensors = {"positions": torch.arange(4), "counts": torch.tensor([[[3, 1]]]), "seen": torch.tensor([9])}
    tensors = {name: x.int() for name, x in tensors.items()}
    change(tensors)
    save_file(tensors, tmp_path / "kept.safetensors")
    (tmp_path / "kept.json").write_text('{"format_version": 1}')
    with pytest.raises(ValueError, match="are no kept positions; write them again"):
        Kept.load(tmp_path)
    (tmp_path / "kept.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="got SafetensorError"):
        Kept.load(tmp_path)


@pytest.mark.parametrize("kind", ["rows", "fastkvzip"])
def test_programs_say_what_gates_say(kind, tmp_path):
    gates = gates_of(*KINDS[kind])
    files = export_gate(gates, tmp_path)
    assert [file.name for file in files] == ["layer_0.pt2", "layer_1.pt2", "layer_2.pt2"]
    for number, file in enumerate(files):
        program = torch.export.load(file).module()
        for rows, count in ((1, 1), (1, 17), (5, 2)):
            x = torch.randn(rows, count, 64, generator=torch.Generator().manual_seed(number))
            torch.testing.assert_close(program(x), gates(number, x), rtol=1e-6, atol=1e-6)
    about = json.loads((tmp_path / "programs.json").read_text())
    assert about["files"] == [file.name for file in files]
    assert (about["decays"], about["delayed"]) == (kind == "rows", False)


def test_a_program_holds_its_own_layer_and_the_shared_head(tmp_path):
    gates = gates_of(*KINDS["scalar"])
    program = torch.export.load(export_gate(gates, tmp_path)[1])
    held = sum(x.numel() for x in program.state_dict.values())
    assert held == sum(x.numel() for x in [*gates.stack.layers[1].parameters(), *gates.stack.shared.parameters()])


def test_programs_of_conditioned_gates_are_for_one_budget(tmp_path):
    gates = gates_of(Trim(budget_conditioned=True, gate_hidden=0), "distillation")
    for name, x in gates.named_parameters():
        if "tilt" in name:
            x.data.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2))
    for budget in (None, 40.0):
        program = torch.export.load(export_gate(gates, tmp_path, budget=budget)[0]).module()
        expected = gates.score(0, x, budget=None if budget is None else torch.tensor([budget] * 2))
        torch.testing.assert_close(program(x), torch.nn.functional.logsigmoid(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "scope"), [("db_trim_kv", "global"), ("trim_kv", "uniform")])
@pytest.mark.parametrize("family", MODELS)
def test_kept_positions_are_the_caches(name, scope, family, tmp_path):
    model = MODELS[family]
    gates = gates_of(Trim(init_half_life=20.0), "distillation", model)
    ids, mask = left_padded(tokens(2, 30), [30, 19])
    config = CacheConfig(Budget(0.2, "fraction"), sink_size=2)
    inputs = {"input_ids": ids, "attention_mask": mask}
    kept = Kept.load(kept_positions(model, inputs, POLICIES[name](), config, gates=gates).save(tmp_path))
    with torch.no_grad(), evicting(model, POLICIES[name](), config, gates=gates) as cache:
        model(**inputs, past_key_values=cache, use_cache=True)
        table, counts = cache.kept_table(), cache.kept()
    assert kept.counts.equal(counts.int())
    assert kept.seen.tolist() == [30, 19]
    assert kept.about["layers"] == list(gates.shape.layers)
    assert kept.about["budget"] == "20%"
    assert kept.about["budget_resolved"] == [6, 4]
    assert kept.about["base"]["weight_hash"]
    for layer, row, head in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        positions = kept.of_head(layer, row, head)
        assert positions.tolist() == torch.nonzero(table[layer, row, head]).flatten().tolist()
        assert positions[:2].tolist() == [0, 1]


def test_kept_positions_of_a_newer_format_or_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected kept\.json and kept\.safetensors"):
        Kept.load(tmp_path)
    model = MODELS["qwen3"]
    kept_positions(model, {"input_ids": tokens(1, 9)}, POLICIES["knorm"](), CacheConfig(Budget(4.0))).save(tmp_path)
    (tmp_path / "kept.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(ValueError, match="update retention"):
        Kept.load(tmp_path)
