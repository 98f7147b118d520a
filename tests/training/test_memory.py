"""Training a memory of evicted tokens: the simulated eviction is the physical one, and only the memory learns."""

import pytest
import torch

from retention import Budget, CacheConfig, evicting
from retention.attach.capture import capture_attention
from retention.attach.simulate import simulate_eviction
from retention.config import compose
from retention.gates import RetentionGates
from retention.memory import RetentionMemory
from retention.memory.linear import Linear
from retention.memory.slots import Slots
from retention.models.family import model_shape
from retention.training.config import MemoryTraining
from retention.training.memory import draw_eviction, fit_scales, regression
from retention.training.run import run
from tests.cache.helpers import Conversation, gates_of, model_of, small, tokens

IDS = tokens(2, 24, seed=4)
SIMULATED = [
    None, Slots(4), Linear(features=4, hidden=8), Linear(features=4, hidden=8, entropy="across_heads", readout="paper"),
    Linear(features=4, hidden=8, transition="delta", readout="gated", entropy="pointwise"),
]  # fmt: skip


def memory_of(config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        memory = RetentionMemory(config, model_shape(model_of()))
        for name, parameter in memory.named_parameters():
            if "entropy" in name or "attention" in name or "gain" in name:
                torch.nn.init.constant_(parameter, 0.7)
        return memory


def drawn(policies=("trim_kv",), kept="20%-20%"):
    with torch.no_grad(), capture_attention(model_of(), gates_of()) as capture:
        logits = model_of()(input_ids=IDS, use_cache=False).logits
    training = MemoryTraining(kept=kept, policies=list(policies))
    return draw_eviction(capture, training, torch.Generator().manual_seed(0)), capture, logits


@pytest.mark.parametrize("name", ["trim_kv", "db_trim_kv"])
@pytest.mark.parametrize("config", SIMULATED, ids=str)
def test_a_simulated_eviction_is_the_physical_one(name, config):
    eviction, _, _ = drawn([name])
    memory = None if config is None else memory_of(config)
    with torch.no_grad(), simulate_eviction(model_of(), eviction, memory):
        simulated = model_of()(input_ids=IDS, use_cache=False).logits[:, eviction.first :]
    budget = CacheConfig(Budget(0.2, "fraction"), on_evict="drop" if memory is None else "memory")
    with evicting(model_of(), small(name), budget, gates=gates_of(), memory=memory) as cache:
        told = Conversation(model_of(), cache)
        told.feed(IDS[:, : eviction.first])
        assert torch.equal(cache.kept_table()[..., : eviction.first], eviction.kept[..., : eviction.first])
        with cache.hold():
            physical = told.feed(IDS[:, eviction.first :])
    assert (simulated - physical).abs().max() < 1e-4


def test_a_simulation_leaves_the_model_as_it_was():
    eviction, _, before = drawn()
    with torch.no_grad(), simulate_eviction(model_of(), eviction, None):
        changed = model_of()(input_ids=IDS, use_cache=False).logits
    with torch.no_grad():
        after = model_of()(input_ids=IDS, use_cache=False).logits
    assert torch.equal(before, after)
    assert (changed - before)[:, eviction.first :].abs().max() > 1e-3
    assert (changed - before)[:, : eviction.first].abs().max() < 1e-4


def test_perfect_recall_has_no_regression_loss():
    eviction, capture, _ = drawn()
    whole = memory_of(Slots(64))
    for number in range(3):
        loss, figures = regression(whole.layer(number), eviction, number, capture)
        assert loss < 1e-6
        assert figures["recovered"] > 0.99
        assert 0 < figures["missing_mass"] < 1


def test_scales_are_fitted_so_that_the_mass_of_a_bank_is_right_on_average():
    eviction, capture, _ = drawn()
    memory = memory_of(Linear(features=4, hidden=8))
    for number, layer in enumerate(memory.layers):
        before, (_, figures) = layer.log_scale.clone(), regression(layer, eviction, number, capture)
        fit_scales(layer, eviction, number, capture)
        assert torch.equal(layer.log_scale[0], before[0]), "no vision here"
        captured, first = capture.layers[number], eviction.first
        leaving = eviction.evicted(layer, number, captured.query, captured.key, captured.value, captured.scaling)
        state = layer.absorb(layer.empty(2, IDS.device), leaving)
        later = captured.query[:, :, first:].unflatten(1, (2, -1))
        with torch.no_grad():
            known = layer.estimate(state, later.flatten(2, 3), captured.scaling)[1].view(later.shape[:-1])
        logits = captured.scaling * later @ captured.key[:, :, None].transpose(-1, -2)
        lse = logits.masked_fill(~leaving.mask[:, :, None, None], float("-inf")).logsumexp(-1)
        assert (known - lse).mean((0, 2, 3)).abs().max() < 1e-4
        assert figures["missing_mass"] > 0


def test_both_stages_reach_every_parameter_of_the_memory_and_nothing_else():
    eviction, capture, _ = drawn()
    memory = memory_of(Linear(features=4, hidden=8, vision_decay="step"))
    with torch.no_grad():
        for p in memory.parameters():
            p.add_(0.1 * torch.randn_like(p))
    sum(regression(memory.layer(i), eviction, i, capture)[0] for i in range(3)).backward()
    missed = {n for n, p in memory.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert not missed
    memory.zero_grad()
    with simulate_eviction(model_of(), eviction, memory):
        model_of()(input_ids=IDS, use_cache=False).logits[:, eviction.first :].square().mean().backward()
    assert not {n for n, p in memory.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert all(p.grad is None for p in [*model_of().parameters(), *gates_of().parameters()])


@pytest.mark.parametrize("name", ["paper", "delta", "joint_spatial", "gated"])
def test_every_preset_has_finite_gradients_through_the_model(name):
    eviction, _, _ = drawn()
    memory = memory_of(compose("train", [f"memory={name}"]).memory)
    with simulate_eviction(model_of(), eviction, memory):
        model_of()(input_ids=IDS, use_cache=False).logits[:, eviction.first :].square().mean().backward()
    grads = [p.grad for p in memory.parameters() if p.grad is not None]
    assert grads
    assert all(torch.isfinite(g).all() for g in grads)


def test_nothing_is_drawn_where_everything_fits():
    assert drawn(kept="100%-100%")[0] is None


def test_a_run_trains_the_memory_and_exports_it_with_its_gates(tmp_path):
    gates_folder = tmp_path / "gates"
    from retention.gates.dbtrim import DBTrim
    from retention.models.load import load_frozen

    model, _ = load_frozen()
    torch.manual_seed(0)
    plain = RetentionGates.for_model(DBTrim(), model)
    plain.save_pretrained(gates_folder)
    overrides = [
        "memory=retentive", f"memory_training.gates={gates_folder}", "trainer=memory", "trainer.max_steps=4", "trainer.val_every=4",
        "trainer.save_every=2", "data.batch_size=2", "data.val_examples=2", "logger=csv", f"output_dir={tmp_path / 'run'}",
        "trainer.val_budgets=[5%]",
    ]  # fmt: skip
    trained = RetentionGates.from_pretrained(run(compose("train", overrides)))
    assert trained.memory is not None
    assert trained.memory.config == Linear()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = RetentionMemory(Linear(), trained.shape)
    assert any(not torch.equal(a, b) for a, b in zip(trained.memory.parameters(), fresh.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(trained.stack.parameters(), plain.stack.parameters(), strict=True))
    assert trained.training_record["memory"]["steps"] == 4
    again = run(compose("train", [*(x for x in overrides if "output_dir" not in x), f"resume={tmp_path / 'run'}"]))
    assert again == tmp_path / "run" / "gates"


@pytest.mark.parametrize(
    "wrong", [{"kept": "5%"}, {"kept": "30%-5%"}, {"policies": ["full"]}, {"regression_share": 2.0}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="memory_training"):
        MemoryTraining(**wrong)
