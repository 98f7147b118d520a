"""Gates trained elsewhere, in their published layouts: the same numbers, the right policies, and refusals by name."""

import json
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from retention import POLICIES, Budget, CacheConfig, RetentionGates, evicting
from retention.config import compose
from retention.interop import dms, fastkvzip, kvzap, layout, locret, settings, trim_kv
from retention.policies import policy_of
from tests.cache.helpers import tokens
from tests.interop import published
from tests.tiny import tiny_gemma3, tiny_llama, tiny_phi3, tiny_qwen2, tiny_qwen3, tiny_qwen3_vl

X = published.drawn(2, 7, published.HIDDEN, seed=999, scale=1.0)


def close(found, expected, rtol=1e-5):
    torch.testing.assert_close(found.transpose(1, 2).double(), expected.double(), rtol=rtol, atol=1e-5)


def evicts(gates, model, policy, **settings):
    """Whether the policy takes these gates, and physically evicts by them."""
    with (
        torch.no_grad(),
        evicting(model, POLICIES[policy](), CacheConfig(Budget(8.0), **settings), gates=gates) as cache,
    ):
        model(input_ids=tokens(1, 30), past_key_values=cache)
        kept = cache.kept()
    return int(kept.sum()) < 30 * kept.numel()


def gate_logits(gates, layer):
    with torch.no_grad():
        return gates.score(layer, X)


def saved_and_read(gates, folder):
    gates.save_pretrained(folder)
    return RetentionGates.from_pretrained(folder)


@pytest.mark.parametrize("width", [None, 10])
def test_kvzap(width, tmp_path):
    model, (tensors, config) = tiny_qwen3(), published.kvzap(width)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    gates = saved_and_read(kvzap.load(tmp_path, model), tmp_path / "gates")
    for i in range(published.LAYERS):
        close(gate_logits(gates, i), published.kvzap_score(tensors, i, X))
    assert (gates.objective, gates.decays) == ("kvzap", False)
    assert gates.training_record["imported"]["layout"] == kvzap.LAYOUT
    assert evicts(gates, model, "kvzap")
    with pytest.raises(ValueError, match="ranks by gates trained with objective distillation"):
        evicts(gates, model, "trim_kv")


def test_kvzap_evicts_by_the_papers_threshold():
    model, (tensors, config) = tiny_qwen3(), published.kvzap(None)
    gates = kvzap.from_state_dict(tensors, config, model)
    how = CacheConfig(Budget(30.0), allocator="uniform", selector="threshold", threshold=0.1)
    with torch.no_grad(), evicting(model, POLICIES["kvzap"](recent_size=0), how, gates=gates) as cache:
        with cache.hold():
            model(input_ids=tokens(1, 30), past_key_values=cache)
        from retention.cache.inputs import states

        expected = torch.stack([cache.policy.score(state) >= 0.1 for state in states(cache)])
        cache.evict()
        assert cache.kept_table().equal(expected)
        assert not expected.all()
        assert expected.any()


@pytest.mark.parametrize("as_numpy", [False, True])
def test_fastkvzip(as_numpy, tmp_path):
    model, layers = tiny_qwen3(), published.fastkvzip()
    file = tmp_path / "q2_dim16_sink16.pt"
    extra = {"score": np.zeros(3)} if as_numpy else {}
    torch.save({"module": layers} | extra, file)
    gates = saved_and_read(fastkvzip.load(file, model), tmp_path / "gates")
    for i, layer in enumerate(layers):
        close(torch.sigmoid(gate_logits(gates, i)), published.fastkvzip_probability(layer, X))
    assert evicts(gates, model, "fastkvzip")
    (tmp_path / "other.pt").unlink(missing_ok=True)
    torch.save({"modules": layers}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="a list of layers under 'module'"):
        fastkvzip.load(tmp_path / "other.pt", model)


@pytest.mark.parametrize(("kind", "policy"), [("rg", "trim_kv"), ("rg10", "db_trim_kv")])
def test_trim_kv(kind, policy, tmp_path):
    model, tensors = tiny_qwen3(), published.trim_kv(kind)
    torch.save(tensors, tmp_path / "trimkv_weights.pth")
    config = {"retention_gate": kind, "hidden_act": "silu", "memory_size": 128, "tie_retention_gate_layers": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    gates = saved_and_read(trim_kv.load(tmp_path, model), tmp_path / "gates")
    for i in range(published.LAYERS):
        expected = published.trim_kv_log_beta(tensors, f"model.layers.{i}.self_attn.retention_gate", X)
        with torch.no_grad():
            close(gates(i, X), expected)
    assert ("shared.weight" in gates.tensors()) == (kind == "rg10")
    assert gates.decays
    assert gates.training_record["imported"]["budget"] == 128
    assert evicts(gates, model, policy)
    assert policy_of(gates.objective) == "trim_kv"


def test_db_trim_kv_untied_and_inside_a_vision_language_model():
    model = tiny_qwen3_vl()
    tensors = published.trim_kv("rg10", prefix="model.language_model.layers", tied=False)
    config = {"memory_size": 32, "text_config": {"retention_gate": "rg10", "tie_retention_gate_layers": False}}
    gates = trim_kv.from_state_dict(tensors, config, model)
    for i in range(published.LAYERS):
        own = f"model.language_model.layers.{i}.self_attn.retention_gate"
        with torch.no_grad():
            close(gates(i, X), published.trim_kv_log_beta(tensors, own, X))
    config["text_config"]["tie_retention_gate_layers"] = True
    with pytest.raises(ValueError, match=r"linear3.weight of layer 1 differs from the first layer's"):
        trim_kv.from_state_dict(tensors, config, model)


@pytest.mark.parametrize("build", [tiny_llama, tiny_phi3, tiny_qwen2])
@pytest.mark.parametrize("act", ["silu", "relu"])
def test_locret(build, act, tmp_path):
    model, tensors = build(), published.locret()
    for name, x in model.named_parameters():
        if name.endswith("proj.bias"):
            x.data.normal_(generator=torch.Generator().manual_seed(3))
    torch.save(tensors, tmp_path / "heads.bin")
    gates = locret.load(tmp_path / "heads.bin", model, hidden_act=act)
    for i in range(published.LAYERS):
        attention = model.model.layers[i].self_attn
        parts = [attention.qkv_proj] if hasattr(attention, "qkv_proj") else [attention.q_proj, attention.k_proj, attention.v_proj]  # fmt: skip
        qkv = torch.cat([part(X) for part in parts], -1)
        first, second = (tensors[f"model.layers.{i}.self_attn.{name}.weight"] for name in ("fc1", "fc2"))
        close(gate_logits(gates, i), getattr(torch.nn.functional, act)(qkv @ first.T) @ second.T, rtol=1e-4)
    assert evicts(gates, model, "locret")


def test_locret_refuses_normalised_queries():
    with pytest.raises(ValueError, match="linear in the attention's input"):
        locret.from_state_dict(published.locret(), {}, tiny_qwen3())


@pytest.mark.parametrize("build", [tiny_qwen3, tiny_gemma3])
@pytest.mark.parametrize(("bias", "per"), [(False, "head"), (True, "layer")])
def test_dms_reads_the_residual_stream_off_the_attention_input(build, bias, per, tmp_path):
    """Whatever form the norm's weight is stored in; only the gates' tensors are read of a whole model's."""
    model, (tensors, config) = build(), published.dms(bias)
    config["dms_alpha_per"] = per
    if build is tiny_gemma3:
        tensors |= {
            k.replace(".0.", ".3."): v.clone() for k, v in tensors.items() if ".0." in k
        }  # a fourth layer, with a window
    save_file(tensors, tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    gates = saved_and_read(dms.load(tmp_path, model), tmp_path / "gates")
    for number, i in enumerate(gates.shape.layers):
        norm = model.model.layers[i].input_layernorm
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        with torch.no_grad():
            found = gates.score(number, norm(X))
        expected = -published.dms_logit(tensors, config, i, X, eps)
        torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-4, atol=1e-4)
    assert gates.config.delayed
    assert gates.training_record["imported"]["window"] == 512


def test_dms_inside_the_queries_is_refused():
    tensors, config = published.dms()
    with pytest.raises(ValueError, match="dms_separate_alpha"):
        dms.from_state_dict(tensors, config | {"dms_separate_alpha": False}, tiny_qwen3())


def test_norms_that_are_none_are_refused():
    model, (tensors, config) = tiny_qwen3(), published.dms()
    model.model.layers[1].input_layernorm.weight.data[3] = 0
    with pytest.raises(ValueError, match="RMS norm without zeros before the attention of layer 1"):
        dms.from_state_dict(tensors, config, model)


def refused(kind, change):
    """Import changed tensors and settings; returns what is said."""
    model = tiny_qwen3()
    tensors, config = {
        "kvzap": published.kvzap(None),
        "trim_kv": (published.trim_kv("rg"), {"retention_gate": "rg"}),
        "dms": published.dms(),
    }[kind]
    change(tensors, config)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        {"kvzap": kvzap, "trim_kv": trim_kv, "dms": dms}[kind].from_state_dict(tensors, config, model)
    return str(error.value)


GATE = "model.layers.2.self_attn.retention_gate"


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("kvzap", lambda t, c: t.pop("layers.1.bias"), "layers.1.bias"),
        ("kvzap", lambda t, c: t.update({"layers.0.weight": torch.zeros(2, 63)}), "layers.0.weight of shape (2, 64)"),
        ("kvzap", lambda t, c: t.update({"layers.3.bias": torch.zeros(2)}), "layers.3.bias"),
        ("kvzap", lambda t, c: c.update(n_modules=36), "n_modules 3 for this model, got 36"),
        ("kvzap", lambda t, c: t.update({"layers.0.weight": torch.zeros(2, 64, dtype=torch.int8)}), "torch.int8"),
        ("trim_kv", lambda t, c: t.pop(f"{GATE}.linear2.weight"), "layers.2.linear2.weight"),
        ("trim_kv", lambda t, c: c.update(retention_gate="rg7"), "'rg7'"),
        ("trim_kv", lambda t, c: c.update(hidden_act="tanh"), "'tanh'"),
        ("trim_kv", lambda t, c: c.update(retention_gate="rg10"), "layers.0.linear2.weight of shape (12, 12)"),
        ("trim_kv", lambda t, c: t.clear(), "layers.<number>.self_attn.retention_gate"),
        ("trim_kv", lambda t, c: t.update({f"a.{GATE}.bias": t[f"{GATE}.bias"]}), "expected one"),
        (
            "dms",
            lambda t, c: t.pop("model.layers.0.self_attn.dms_proj_alpha_norm.weight"),
            "dms_proj_alpha_norm.weight",
        ),
        ("dms", lambda t, c: c.update(dms_alpha_per="token"), "'token'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(kind, change, said):
    assert said in refused(kind, change)


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        (
            "kvzap",
            lambda t, c: t["layers.0.bias"].fill_(torch.nan),
            "got some in these gates that are not (layers.0.0.offset",
        ),
        ("kvzap", lambda t, c: t.update({"layers.0.bias": t["layers.0.bias"].to("meta")}), "sparse or empty"),
        ("kvzap", lambda t, c: t.update({"layers.0.bias": t["layers.0.bias"].to_sparse()}), "sparse or empty"),
        ("kvzap", lambda t, c: c.update(hidden_dim="8"), "hidden_dim to be a whole number above 0 or nothing, got '8'"),
        ("trim_kv", lambda t, c: c.update(hidden_act=["silu"]), "hidden_act among silu, gelu, relu, got ['silu']"),
        ("trim_kv", lambda t, c: c.update(text_config=[1]), "text_config of TRIM-KV gates to be a JSON object"),
        ("trim_kv", lambda t, c: c.update(memory_size=[1]), "memory_size to be a whole number"),
        (
            "trim_kv",
            lambda t, c: t.update({GATE.replace(".2.", ".0.") + ".linear1.weight": torch.zeros(0, 64)}),
            "got none",
        ),
        ("dms", lambda t, c: c.update(dms_alpha_scale=None), "dms_alpha_scale to be a number, got None"),
        ("dms", lambda t, c: c.update(dms_alpha_scale=float("nan")), "dms_alpha_scale to be a number, got nan"),
        ("dms", lambda t, c: c.update(dms_alpha_scale=1e308), "expected finite numbers"),
        ("dms", lambda t, c: c.update(dms_separate_alpha="false"), "to be true or false, got 'false'"),
    ],
)
def test_numbers_and_settings_that_are_none_are_refused(kind, change, said):
    assert said in refused(kind, change)


def test_the_record_says_how_the_authors_evict():
    """Settings as an evaluation reads them; the age of TRIM-KV's public code is one more than ours."""
    model, found = tiny_qwen3(), {}
    for kind in ("rg", "rg10"):
        gates = trim_kv.from_state_dict(published.trim_kv(kind), {"retention_gate": kind}, model)
        found[kind] = gates.training_record["imported"]["as_published"]
    tensors, config = published.kvzap(None)
    found["kvzap"] = kvzap.from_state_dict(tensors, config, model).training_record["imported"]["as_published"]
    assert {kind: compose("eval", told.split()) for kind, told in found.items()}
    assert found["rg10"] == "policy.db_trim_kv.age_offset=1"


def test_tensors_that_lie_in_two_files_are_refused(tmp_path):
    for name in ("a", "b"):
        save_file({"w": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"expected every tensor once in .*, got w in several files"):
        layout.read_tensors(tmp_path)


def test_an_archive_that_unfolds_is_refused(tmp_path):
    torch.save({"w": torch.zeros(10_000)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as old,
        zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for part in old.namelist():
            new.writestr(part, old.read(part))
    assert layout.read_tensors(tmp_path / "plain.pt")["w"].shape == (10_000,)
    with pytest.raises(ValueError, match=r"holds no plain tensors \(it unfolds to \d+ bytes\)"):
        layout.read_tensors(tmp_path / "small.pt")


@pytest.mark.parametrize("content", [b'{"a":' * 100_000, b'{"a": 1, "a": 2}', b"[]", b"\xff", b'{"a": "\\ud800"}'])
def test_configs_that_readers_would_not_read_alike_are_refused(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"^expected a (config.json|JSON object) [^\n]*$"):
        settings.read_config(tmp_path)


def test_fastkvzip_of_another_base_is_refused_by_name():
    layers = published.fastkvzip()
    with pytest.raises(ValueError, match="3 layers for this model, got 2"):
        fastkvzip.from_state_dict(layers[:2], {}, tiny_qwen3())
    layers[1]["b"] = torch.zeros(2, 1, 3)
    with pytest.raises(ValueError, match=r"b of shape \(2, 1, 2\) for this model, got \(2, 1, 3\)"):
        fastkvzip.from_state_dict(layers, {}, tiny_qwen3())


class Evil:
    def __reduce__(self):
        return print, ("ran",)


def test_files_that_would_run_something_are_refused(tmp_path, capsys):
    torch.save({"module": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="holds no plain tensors"):
        layout.read_tensors(tmp_path / "evil.pt")
    assert "ran" not in capsys.readouterr().out
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for file, said in (("broken.safetensors", "no safetensors file"), ("missing.pt", "found none")):
        with pytest.raises(ValueError, match=said):
            layout.read_tensors(tmp_path / file)
    with pytest.raises(ValueError, match=r"expected a config.json at"):
        settings.read_config(tmp_path)
