"""Gates on a frozen model: the identity where they retain, gradients to them alone, nothing left behind."""

import copy

import pytest
import torch
from torch.nn import functional as F

from retention import attach_gates, evicting
from retention.attach.hidden import entrance, final_hidden
from retention.gates import GATES, RetentionGates
from retention.gates.trim import Trim
from retention.ops.attention import naive_gated_attention
from retention.ops.capacity import expected_size
from retention.policies.full import Full
from tests.attach.helpers import FAMILIES, hooks, inputs_of, row_of, snapshot
from tests.cache.helpers import gates_of, model_of
from tests.tiny import IMAGE_TOKEN, tiny_llama

LENGTHS = [16, 11]


def trained(family: str, name: str = "trim", half_life: float = 8.0) -> RetentionGates:
    """Fresh gates that forget within a prompt."""
    torch.manual_seed(0)
    return RetentionGates.for_model(GATES[name](gate_hidden=8, init_half_life=half_life), model_of(family))


def run(model, batch):
    return model(**batch, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_that_never_forget_change_nothing(family):
    model, gates, batch = model_of(family), gates_of(family), inputs_of(family, LENGTHS)
    gates = copy.deepcopy(gates)
    for name, parameter in gates.named_parameters():
        if name.endswith("offset"):
            parameter.fill_(1e4)
    with torch.no_grad():
        expected = run(model, batch)
        with attach_gates(model, gates) as record:
            got = run(model, batch)
    assert all((log_beta == 0).all() for log_beta in record.stacked())
    real = batch["attention_mask"].bool()
    assert (got - expected)[real].abs().max() < 1e-5
    assert torch.equal(run(model, batch), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_that_forget_change_the_output_and_are_recorded(family):
    model, gates, batch = model_of(family), gates_of(family), inputs_of(family, LENGTHS)
    with torch.no_grad():
        expected = run(model, batch)
        with attach_gates(model, gates) as record:
            got = run(model, batch)
    real = batch["attention_mask"].bool()
    assert (got - expected)[real].abs().max() > 1e-3
    assert [beta.shape for beta in record.stacked()] == [(2, 2, 16)] * 3
    assert torch.equal(record.valid, real)
    assert torch.equal(record.visual, batch["input_ids"] == IMAGE_TOKEN)
    assert record.visual.any() == (family == "llava")
    assert record.positions[0].tolist() == list(range(16))
    assert record.positions[1, 5:].tolist() == list(range(11))


@pytest.mark.parametrize("family", FAMILIES)
def test_gated_attention_is_the_naive_form(monkeypatch, family):
    """The whole forward, with the fused attention swapped for the written-out one."""
    from retention.objectives import base

    model, gates, batch = model_of(family), gates_of(family), inputs_of(family, LENGTHS)
    with torch.no_grad():
        with attach_gates(model, gates):
            fused = run(model, batch)
        monkeypatch.setattr(base, "gated_attention", naive_gated_attention)
        with attach_gates(model, gates):
            naive = run(model, batch)
    assert (fused - naive)[batch["attention_mask"].bool()].abs().max() < 1e-5


@pytest.mark.parametrize("name", sorted(GATES))
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_gate_and_no_backbone(family, name):
    model, gates, batch = model_of(family), trained(family, name), inputs_of(family, LENGTHS)
    with attach_gates(model, gates):
        run(model, batch).square().mean().backward()
    for parameter_name, parameter in gates.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_restores_the_model_exactly(family):
    model, gates, batch = model_of(family), trained(family), inputs_of(family, LENGTHS)
    before, count = snapshot(model), hooks(model)
    with attach_gates(model, gates):
        assert hooks(model) > count
        assert model.get_decoder().config._attn_implementation == "retention"
        run(model, batch)
    assert snapshot(model) == before
    assert hooks(model) == count
    assert "forward" not in vars(model.get_decoder())
    assert model.get_decoder().config._attn_implementation == "sdpa"
    with pytest.raises(RuntimeError, match="stop"), attach_gates(model, gates):
        raise RuntimeError("stop")
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="2-D attention mask"), attach_gates(model, gates):
        model(**batch | {"attention_mask": torch.zeros(2, 1, 16, 16)}, use_cache=False)
    assert snapshot(model) == before
    with attach_gates(model, gates):
        run(model, batch)


def test_another_attention_implementation_comes_back():
    model = copy.deepcopy(model_of())
    model.set_attn_implementation("eager")
    with attach_gates(model, trained("llama")):
        pass
    assert model.config._attn_implementation == "eager"


def test_nesting_is_refused_and_leaves_the_outer_one():
    model, gates, batch = model_of(), gates_of(), inputs_of("llama", LENGTHS)
    with attach_gates(model, gates), torch.no_grad():
        expected = run(model, batch)
        count = hooks(model)
        with pytest.raises(ValueError, match="attached already"), attach_gates(model, gates):
            pass
        with pytest.raises(ValueError, match="attached already"), evicting(model, Full()):
            pass
        assert hooks(model) == count
        assert torch.equal(run(model, batch), expected)


def test_a_cache_is_refused():
    model = model_of()
    with attach_gates(model, gates_of()), torch.no_grad():
        cache = model(**inputs_of("llama", LENGTHS), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="use_cache=False"):
            model(torch.ones(2, 1, dtype=torch.long), past_key_values=cache)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, r"evictable layers 3, the model has 2"),
        ({"num_key_value_heads": 4}, r"KV heads per layer 2, the model has 4"),
        ({"hidden_size": 32}, r"hidden features 64, the model has 32"),
        ({"rope_theta": 5.0}, r"config_hash \w+\), the model is .* \(config_hash \w+\)"),
    ],
)
def test_gates_of_another_shape_are_refused_with_both_values(changes, message):
    other = tiny_llama(**changes)
    before = snapshot(other)
    with pytest.raises(ValueError, match=message), attach_gates(other, gates_of()):
        pass
    assert snapshot(other) == before


def test_gates_of_another_family_or_other_weights_are_refused():
    with (
        pytest.raises(ValueError, match="family llama, the model has qwen3"),
        attach_gates(model_of("qwen3"), gates_of("llama")),
    ):
        pass
    with (
        pytest.raises(ValueError, match="weight_hash"),
        attach_gates(tiny_llama(seed=1, initializer_range=0.15), gates_of()),
    ):
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_batch_equals_its_rows_alone(family):
    model, gates, batch = model_of(family), gates_of(family), inputs_of(family, LENGTHS)
    with torch.no_grad(), attach_gates(model, gates) as record:
        together, betas = run(model, batch), record.stacked()
        for row, length in enumerate(LENGTHS):
            alone = run(model, row_of(batch, row))
            assert (alone[0] - together[row, -length:]).abs().max() < 1e-5
            for own, both in zip(record.stacked(), betas, strict=True):
                assert (own[0] - both[row, :, -length:]).abs().max() < 1e-5


def test_final_hidden_is_what_the_head_reads():
    model, batch = model_of(), inputs_of("llama", LENGTHS)
    count = hooks(model)
    with torch.no_grad(), attach_gates(model, gates_of()):
        hidden = final_hidden(model, entrance(model, batch))
        assert torch.allclose(model.lm_head(hidden), run(model, batch), atol=1e-6)
    assert hooks(model) == count


@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_lower_distillation_and_capacity(family):
    model, batch = model_of(family), inputs_of(family, LENGTHS)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        teacher = run(model, batch).log_softmax(-1)
    for kind, rate in (("distillation", 0.5), ("capacity", 0.5)):
        gates = trained(family)
        optimizer, losses = torch.optim.SGD(gates.parameters(), lr=rate), []
        for _ in range(3):
            with attach_gates(model, gates) as record:
                student = run(model, batch).log_softmax(-1)
            if kind == "distillation":
                loss = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)[real].mean()
            else:
                queries = torch.tensor([[15], [10]])
                sizes = [expected_size(b, record.positions, queries, record.valid) for b in record.stacked()]
                loss = torch.stack(sizes).mean()
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[0] > losses[1] > losses[2], kind


def test_a_linear_gate_attaches_too():
    gates = RetentionGates.for_model(Trim(gate_hidden=0, init_half_life=4.0), model_of())
    with attach_gates(model_of(), gates) as record:
        run(model_of(), inputs_of("llama", LENGTHS)).sum().backward()
    assert len(record.stacked()) == 3
    assert all(parameter.grad.abs().sum() > 0 for parameter in gates.parameters())
