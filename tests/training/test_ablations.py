"""Every experiment preset changes what it says and trains; the calibration curve that every artefact carries."""

import json
from dataclasses import fields
from functools import lru_cache

import pytest
import torch

import retention as rt
from retention.config import compose, presets
from retention.gates import RetentionGates
from retention.gates.calibration import SHARES, Calibration, pool_threshold
from retention.models.load import load_frozen
from retention.training.export import export_checkpoint
from retention.training.run import run
from tests.cache.helpers import Conversation, gates_of, model_of, tokens

SMALL = [
    "trainer=smoke", "trainer.max_steps=2", "data.batch_size=2", "data.val_examples=2", "logger=csv", "data.n_turns=4",
    "task.n_images=4", "task.n_needles=12", "task.n_turns=4",
]  # fmt: skip
CHANGES = {
    "budget_conditioned": {"gate.budget_conditioned": True, "gate.budget_min": 2.0, "gate.budget_max": 16.0},
    "capacity_active": {"objective.capacity_reduction": "active_mean"},
    "capacity_exact": {"objective.capacity_norm": "exact"},
    "capacity_paper": {"objective.capacity_norm": "paper"},
    "large_budget": {"objective.budget": "10%"},
    "linear_gate": {"gate": "trim", "gate.gate_hidden": 0},
    "local_capacity": {"objective.scope": "local"},
    "modality_embedding": {"gate.modality": "embedding"},
    "narrow_gate": {"gate.gate_hidden": 14},
    "published_offset": {"gate.init_half_life": 4.55e7},
    "rows_sharing": {"gate.scoring": "rows"},
    "small_budget": {"objective.budget": "1.25%"},
    "text_prior": {"gate.text_prior": True},
    "trim_global": {"gate": "trim"},
    "trim_kv": {"gate": "trim", "objective.scope": "local"},
    "wide_gate": {"gate.gate_hidden": 112},
    "without_capacity": {"objective.capacity_weight": 0.0},
    "without_kl": {"objective.kl_weight": 0.0},
    "without_ntp": {"objective.ntp_weight": 0.0},
    "zero_offset": {"gate.init_half_life": 1.0},
}
PARTS = (
    "budget_conditioned", "capacity_active", "capacity_paper", "linear_gate", "modality_embedding", "rows_sharing",
    "text_prior", "trim_kv", "without_capacity", "zero_offset",
)  # fmt: skip
"""Those that run other lines than the demo, or could run into other numbers."""


def values(config):
    """Gate and objective by dotted names, architectures by theirs."""
    found = {"gate": config.gate.name}
    for part in ("gate", "objective"):
        found |= {
            f"{part}.{field.name}": getattr(getattr(config, part), field.name)
            for field in fields(getattr(config, part))
        }
    return found


@lru_cache
def demo_values():
    return values(compose("train"))


def test_the_presets_are_these():
    assert set(CHANGES) <= set(presets("experiment"))


@pytest.mark.parametrize("name", CHANGES)
def test_an_ablation_changes_what_it_says_and_nothing_else(name):
    demo, ablated = demo_values(), values(compose("train", [f"experiment={name}"]))
    differing = {k for k in demo.keys() & ablated.keys() if demo[k] != ablated[k]}
    assert differing == {k for k in CHANGES[name] if k in demo}
    assert {k: ablated[k] for k in CHANGES[name]} == CHANGES[name]


@pytest.mark.parametrize("name", PARTS)
def test_an_ablation_trains(name, tmp_path):
    config = compose("train", [*SMALL, "task.n_asked=6", f"experiment={name}", f"output_dir={tmp_path / 'run'}"])
    artefact = run(config)
    trained, fresh = RetentionGates.from_pretrained(artefact), RetentionGates(config.gate, gates_shape(artefact))
    assert trained.config == config.gate
    assert trained.tensors().keys() == fresh.tensors().keys()
    assert all(torch.isfinite(x).all() for x in trained.tensors().values())
    curve = trained.training_record["calibration"]
    assert len(curve["thresholds"]) == len(SHARES)
    assert curve["thresholds"] == sorted(curve["thresholds"], reverse=True)


def gates_shape(artefact):
    return RetentionGates.from_pretrained(artefact).shape


def test_active_mean_says_that_it_is_biased_at_sampled_queries(caplog):
    compose("train", ["objective.capacity_reduction=active_mean"])
    assert "biased where queries are sampled" in caplog.text


# --- the curve ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curve") / "run"
    return run(
        compose(
            "train", [*SMALL, "data.val_examples=4", "task.n_asked=6", "gate.init_half_life=60", f"output_dir={folder}"]
        )
    )


@pytest.mark.parametrize("share", [0.05, 0.0707, 0.2])
def test_a_threshold_from_the_curve_keeps_about_the_budget(artefact, share):
    """On a context the curve has not seen; the realised budget is an output."""
    from retention.data.render import Renderer
    from retention.tasks.answering import prefill

    model, processor = load_frozen("embedded")
    gates = RetentionGates.from_pretrained(artefact)
    config = compose("train", [*SMALL, "task.n_asked=6"])
    renderer = Renderer(processor, rt.models.family_of(model).visual_ids(model.config))
    rendered = renderer.render([config.task.example(5, "test", i, style=config.model.prompt_style) for i in range(4)])
    kept = {}
    for selector in ("threshold", None):
        cache_config = rt.CacheConfig(budget=rt.Budget(share, "fraction"), selector=selector)
        with rt.evicting(model, rt.POLICIES["db_trim_kv"](), cache_config, gates=gates) as cache:
            prefill(model, cache, rendered)
            kept[selector] = float(cache.kept().sum() / cache.seen().sum() / len(cache.kept()) / 2)
    assert kept["threshold"] == pytest.approx(kept[None], rel=0.25)


def test_the_exported_checkpoint_carries_the_same_curve(artefact, tmp_path):
    checkpoint = next((artefact.parent / "checkpoints").glob("*.ckpt"))
    again = export_checkpoint(checkpoint, tmp_path / "gates")
    curves = [json.loads((x / "gate_config.json").read_text())["training"]["calibration"] for x in (artefact, again)]
    assert curves[0] == curves[1]


def test_a_pool_threshold_keeps_its_share_of_what_is_there():
    scores = torch.randn(2, 3, 2, 50, generator=torch.Generator().manual_seed(0))
    valid = torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    threshold = pool_threshold(scores, valid, 0.1)
    assert int((scores[valid] >= threshold).sum()) == round(0.1 * int(valid.sum()))


def test_the_curve_is_linear_in_the_log_of_the_budget_and_ends_at_its_ends():
    curve = Calibration([2.0, 8.0, 32.0], [-1.0, -3.0, -11.0], 100.0)
    found = curve.at(torch.tensor([1, 2, 4, 8, 16, 32, 99]))
    torch.testing.assert_close(found, torch.tensor([-1.0, -1.0, -2.0, -3.0, -7.0, -11.0, -11.0]))


def curved():
    gates = RetentionGates(gates_of().config, gates_of().shape, gates_of().base)
    gates.load_state_dict(gates_of().state_dict())
    gates.training_record = {"calibration": {"budgets": [2.0, 20.0], "thresholds": [-0.5, -50.0], "seen": 20.0}}
    return gates


def threshold(**more):
    return rt.CacheConfig(rt.Budget(6.0), selector="threshold", **more)


@pytest.mark.parametrize(
    ("policy", "gates", "sentence"),
    [
        (rt.POLICIES["db_trim_kv"](), gates_of, "needs gates with a calibration curve, these carry none"),
        (rt.POLICIES["knorm"](), lambda: None, "needs gates with a calibration curve, got none"),
        (rt.POLICIES["knorm"](), curved, "of their own policy at its default settings"),
        (rt.POLICIES["trim_kv"](lookahead=4), curved, "of their own policy at its default settings"),
    ],
)
def test_a_threshold_without_a_curve_is_refused_with_a_sentence(policy, gates, sentence):
    with (
        rt.evicting(model_of(), policy, threshold(), gates=gates()) as cache,
        pytest.raises(ValueError, match=sentence),
    ):
        Conversation(model_of(), cache).feed(tokens(2, 20))


def test_each_row_has_the_threshold_of_its_own_budget():
    gates = curved()
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :8] = 0
    config = rt.CacheConfig(rt.Budget(0.5, "fraction"), selector="threshold")
    with rt.evicting(model_of(), rt.POLICIES["trim_kv"](), config, gates=gates, extra_collectors=("gate",)) as cache:
        with cache.hold():
            Conversation(model_of(), cache).feed(tokens(2, 20) * mask, mask)
        limits = Calibration.from_record(gates.training_record).at(torch.tensor([10, 6]))
        states = [layer.state() for layer in cache.evicting_layers]
        expected = [(rt.POLICIES["trim_kv"]().score(x) >= limits[:, None, None]) & x.valid for x in states]
        cache.evict()
        assert torch.equal(cache.kept(), torch.stack([x.sum(-1) for x in expected]))
        assert 0 < int(cache.kept().sum()) < 3 * 2 * 32


def test_a_floor_for_every_head_is_a_setting_of_an_evaluation():
    from retention.evaluation.protocol import Protocol

    config = compose("eval", ["cache.min_per_head=2"]).cache_for("4", Protocol())
    assert config.min_per_head == 2
    held = {}
    for floor, cache_config in ((2, config), (0, rt.CacheConfig(rt.Budget(4.0)))):
        with rt.evicting(model_of(), rt.POLICIES["db_trim_kv"](), cache_config, gates=gates_of()) as cache:
            Conversation(model_of(), cache).feed(tokens(2, 20))
            held[floor] = cache.kept()
    assert held[0].min() < 2 <= held[2].min()
    assert held[0].sum((0, 2)).tolist() == held[2].sum((0, 2)).tolist() == [4 * 6] * 2
