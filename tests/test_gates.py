"""Both gate architectures: shapes, where they start, what they share, how large they are."""

import pytest
import torch
from torch.nn import functional as F

from retention.gates import GATES, RetentionGates, gate_from_dict
from retention.gates.dbtrim import DBTrim
from retention.gates.trim import Trim
from retention.models.family import model_shape
from retention.ops.decay import half_life
from retention.types import ModelShape
from tests.tiny import tiny_llama, tiny_llava, tiny_qwen3

D, L, H, W = 64, 3, 2, 28
KINDS = {
    "trim": Trim(),
    "linear": Trim(gate_hidden=0),
    "rows": DBTrim(),
    "scalar": DBTrim(scoring="scalar"),
}
PARAMETERS = {
    "trim": L * (W * D + W + W * H + H),
    "linear": L * (D * H + H),
    "rows": L * (W * D + W + W * W + W) + W * H + H,
    "scalar": L * (W * D + W + W * W + W) + W // H + 1,
}
every_kind = pytest.mark.parametrize("kind", KINDS)
shared_kind = pytest.mark.parametrize("kind", ["rows", "scalar"])


def shape_of(layers=L, **changes):
    values = {"num_heads": 4, "num_kv_heads": H, "head_dim": 16, "hidden_size": D} | changes
    return ModelShape("qwen3", tuple(range(layers)), **values)


def make(kind, seed=0, **shape):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RetentionGates(KINDS[kind], shape_of(**shape)).requires_grad_(False)


def hidden(*lead, seed=1000, width=D):
    return torch.randn(*lead, width, generator=torch.Generator().manual_seed(seed))


def last_projections_and_offsets(gates):
    """The last projection of every layer, or the shared one."""
    stored = gates.tensors()
    return [(stored[name.replace("offset", "weight")], stored[name]) for name in stored if name.endswith("offset")]


@every_kind
def test_every_token_and_head_gets_one_log_beta_in_fp32_at_most_zero(kind):
    gates = make(kind)
    for layer in range(L):
        found = gates(layer, hidden(2, 7))
        assert found.shape == (2, H, 7)
        assert found.dtype == torch.float32
        assert (found <= 0).all()


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trunks_give_fp32_log_beta_for_inputs_of_any_dtype(kind, dtype):
    gates, x = make(kind), hidden(2, 7)
    exact = gates(0, x)
    gates = gates.to(dtype)
    for given in (x, x.to(dtype)):
        found = gates(0, given)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact, rtol=0.05, atol=0)


def test_the_last_projection_runs_in_fp32_behind_a_half_precision_trunk():
    gates, x = make("trim").to(torch.bfloat16), hidden(1, 200)
    features = gates.stack.layers[0][:2](x.bfloat16()).float()
    weight, offset = (t.float() for t in last_projections_and_offsets(gates)[0])
    torch.testing.assert_close(gates.stack.score(0, x.bfloat16()), features @ weight.T + offset, rtol=1e-6, atol=1e-6)


@every_kind
@pytest.mark.parametrize("tokens", [100.0, 10_000.0, 1e6])
def test_gates_start_at_their_half_life_where_features_are_zero(kind, tokens):
    config = gate_from_dict(KINDS[kind].to_dict() | {"init_half_life": tokens})
    found = half_life(RetentionGates(config, shape_of()).requires_grad_(False)(0, torch.zeros(1, 3, D)))
    torch.testing.assert_close(found, torch.full((1, H, 3), tokens), rtol=1e-3, atol=0)


@every_kind
def test_half_lives_at_the_start_lie_evenly_around_the_given_one(kind):
    """The last projection is drawn symmetrically: its negative is as likely, and gives the mirrored log half-life."""
    gates, x = make(kind), hidden(2, 40)
    drawn = torch.stack([half_life(gates(layer, x)) for layer in range(L)])
    for weight, _ in last_projections_and_offsets(gates):
        weight.neg_()
    mirrored = torch.stack([half_life(gates(layer, x)) for layer in range(L)])
    both = torch.cat([drawn.flatten(), mirrored.flatten()])
    assert both.log().std() > 0.05
    assert both.log().quantile(0.5).exp().item() == pytest.approx(10_000, rel=1e-3)
    torch.testing.assert_close((drawn * mirrored).sqrt(), torch.full_like(drawn, 10_000.0), rtol=1e-3, atol=0)


@every_kind
def test_last_projections_are_drawn_symmetrically_about_zero(kind):
    drawn = torch.cat([w.flatten() for seed in range(60) for w, _ in last_projections_and_offsets(make(kind, seed))])
    assert (drawn > 0).float().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / len(drawn) ** 0.5)
    assert drawn.std() > 0


def reference(gates, kind, layer, x):
    """Pre-activations written out from the stored tensors."""
    t = gates.tensors()
    if kind == "linear":
        return x @ t[f"layers.{layer}.0.weight"].T + t[f"layers.{layer}.0.offset"]
    first = F.silu(x @ t[f"layers.{layer}.0.weight"].T + t[f"layers.{layer}.0.bias"])
    if kind == "trim":
        return first @ t[f"layers.{layer}.2.weight"].T + t[f"layers.{layer}.2.offset"]
    features = F.silu(first @ t[f"layers.{layer}.2.weight"].T + t[f"layers.{layer}.2.bias"])
    if kind == "rows":
        return features @ t["shared.weight"].T + t["shared.offset"]
    parts = [features[..., h * W // H : (h + 1) * W // H] @ t["shared.weight"][0] for h in range(H)]
    return torch.stack(parts, -1) + t["shared.offset"]


@every_kind
def test_log_beta_is_the_logsigmoid_of_the_written_out_score(kind):
    gates, x = make(kind), hidden(2, 7)
    for tensor in gates.stack.parameters():
        tensor.normal_(std=0.5, generator=torch.Generator().manual_seed(3))
    for layer in range(L):
        expected = F.logsigmoid(reference(gates, kind, layer, x)).transpose(1, 2)
        torch.testing.assert_close(gates(layer, x), expected, rtol=1e-4, atol=1e-6)


@every_kind
def test_tokens_are_gated_one_by_one(kind):
    gates, x = make(kind), hidden(2, 7)
    torch.testing.assert_close(gates(1, x)[:, :, 3:5], gates(1, x[:, 3:5]), rtol=1e-4, atol=0)


@every_kind
def test_parameter_count_follows_the_formula(kind):
    assert sum(p.numel() for p in make(kind).parameters()) == PARAMETERS[kind]
    assert sum(t.numel() for t in make(kind).tensors().values()) == PARAMETERS[kind]


@pytest.mark.parametrize(("given", "size", "width"), [(None, 64, 28), (None, 128, 56), (None, 4096, 512), (40, 64, 40)])
def test_the_hidden_width_is_resolved_per_model(given, size, width):
    assert Trim(gate_hidden=given).width(shape_of(hidden_size=size)) == width


@shared_kind
def test_one_shared_head_scores_every_layer(kind):
    gates, x = make(kind), hidden(2, 7)
    gates.stack.shared.weight.zero_()
    gates.stack.shared.offset.fill_(1.5)
    for layer in range(L):
        torch.testing.assert_close(gates(layer, x), F.logsigmoid(torch.full((2, H, 7), 1.5)))


@shared_kind
def test_the_shared_head_is_one_storage_after_save_load_and_cast(kind, tmp_path):
    make(kind).save_pretrained(tmp_path / "gates")
    gates = RetentionGates.from_pretrained(tmp_path / "gates").to(torch.bfloat16).requires_grad_(False)
    names = [name for name in gates.tensors() if "shared" in name]
    assert sorted(names) == ["shared.offset", "shared.weight"]
    assert len({t.data_ptr() for t in gates.tensors().values()}) == len(gates.tensors())
    assert len(list(gates.parameters())) == len(gates.tensors())
    gates.stack.shared.weight.zero_()
    gates.stack.shared.offset.fill_(1.5)
    for layer in range(L):
        torch.testing.assert_close(gates(layer, hidden(1, 5)), F.logsigmoid(torch.full((1, H, 5), 1.5)))


def test_scalar_scoring_scores_each_head_by_its_own_features_and_the_same_weights():
    gates = make("scalar")
    half = W // H
    features = hidden(1, 5, width=W)
    swapped = torch.cat([features[..., half:], features[..., :half]], -1)
    torch.testing.assert_close(gates.stack.shared(swapped), gates.stack.shared(features).flip(-1))


@every_kind
def test_every_parameter_receives_a_gradient(kind):
    gates = make(kind).requires_grad_(True)
    sum(gates(layer, hidden(2, 7)).sum() for layer in range(L)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gates.parameters())


def test_a_linear_gate_has_no_hidden_layer():
    assert sorted(make("linear").tensors()) == [f"layers.{i}.0.{n}" for i in range(L) for n in ("offset", "weight")]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (lambda: Trim(gate_hidden=-1), "gate_hidden of 0 .*or more, got -1"),
        (lambda: Trim(init_half_life=0.0), "half-life above 0 tokens, got 0.0; set init_half_life"),
        (lambda: DBTrim(init_half_life=-1.0), "half-life above 0 tokens, got -1.0"),
        (lambda: DBTrim(scoring="columns"), "scoring rows or scalar, got 'columns'"),
        (lambda: DBTrim(gate_hidden=0), "gate_hidden above 0 for dbtrim, got 0; .*gate=trim"),
        (lambda: DBTrim(scoring="scalar", gate_hidden=9).build(shape_of()), "multiple of 2, got 9"),
        (lambda: gate_from_dict({"name": "lstm"}), r"gate among \[.*'dbtrim', .*'trim'\], got 'lstm'"),
        (lambda: gate_from_dict({}), "gate among .*, got None"),
        (lambda: gate_from_dict({"name": "trim", "depth": 3}), "fields this version does not know.*depth"),
    ],
)
def test_configs_without_meaning_are_refused_with_a_sentence(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        config()


@every_kind
def test_a_config_survives_its_plain_values(kind):
    config = KINDS[kind]
    assert gate_from_dict(config.to_dict()) == config
    assert GATES[config.name] is type(config)


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen3, tiny_llava])
def test_gates_for_a_model_fit_it(build):
    model = build()
    gates = RetentionGates.for_model(DBTrim(), model)
    gates.check(model)
    assert gates.shape == model_shape(model)
    assert gates(2, hidden(1, 4)).shape == (1, 2, 4)


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (lambda: tiny_llama(), "family qwen3, the model has llama"),
        (lambda: tiny_qwen3(num_hidden_layers=5), "evictable layers 3, the model has 5"),
        (lambda: tiny_qwen3(num_key_value_heads=4), "KV heads per layer 2, the model has 4"),
        (lambda: tiny_qwen3(hidden_size=32), "hidden features 64, the model has 32"),
    ],
)
def test_a_model_of_another_shape_is_refused_naming_both(other, sentence):
    gates = RetentionGates.for_model(DBTrim(), tiny_qwen3())
    with pytest.raises(ValueError, match=sentence):
        gates.check(other())


def test_a_model_with_other_weights_is_refused_naming_both_bases():
    gates = RetentionGates.for_model(Trim(), named(tiny_qwen3(seed=0), "base-one"))
    with pytest.raises(ValueError, match=r"'base-one' \(weight_hash \w+\).*'base-two' \(weight_hash \w+\)"):
        gates.check(named(tiny_qwen3(seed=1), "base-two"))


def test_a_model_with_another_config_is_refused_naming_both_bases():
    gates = RetentionGates.for_model(Trim(), named(tiny_qwen3(), "base-one"))
    with pytest.raises(ValueError, match=r"'base-one' \(config_hash \w+\).*'base-two' \(config_hash \w+\)"):
        gates.check(named(tiny_qwen3(rms_norm_eps=1e-3), "base-two"))


def test_the_same_base_in_another_dtype_and_under_another_name_is_accepted():
    gates = RetentionGates.for_model(Trim(), named(tiny_qwen3(), "base-one"))
    gates.check(named(tiny_qwen3().to(torch.bfloat16), "renamed"))


def named(model, name):
    model.config.name_or_path = name
    return model


@pytest.mark.parametrize("name", GATES)
def test_default_gates_are_at_most_five_percent_of_the_embedded_model(name, embedded_model):
    gates = RetentionGates.for_model(GATES[name](), embedded_model)
    base = sum(p.numel() for p in embedded_model.parameters())
    assert sum(p.numel() for p in gates.parameters()) <= 0.05 * base
