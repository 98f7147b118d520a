"""Plans against the ledger of caches that really ran."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import retention
from retention import POLICIES, Budget, CacheConfig, evicting
from retention.gates import RetentionGates
from retention.gates.trim import Trim
from retention.memory import MEMORIES, RetentionMemory
from retention.memory.moment import Moment
from retention.planning.sizes import sizes_of
from tests import zoo
from tests.cache.helpers import tokens
from tests.tiny import tiny_gemma3, tiny_llama, tiny_qwen3_next

CONTEXT, BATCH = 60, 2
HYBRID = ("gemma3_text", "gemma3", "qwen3_next")
COUNTER = 8
"""Bytes of the counter that transformers holds for a layer with a window."""


def ran(model, name, config, gates=None, memory=None, more=0):
    """The ledger after a prompt and so many decoded tokens."""
    with torch.no_grad(), evicting(model, POLICIES[name](), config, gates=gates, memory=memory) as cache:
        model(input_ids=tokens(BATCH, CONTEXT), past_key_values=cache, use_cache=True)
        found = cache.bytes()
        for step in range(more):
            model(input_ids=tokens(BATCH, 1, seed=step), past_key_values=cache, use_cache=True)
            found = cache.bytes()
        return found


def gates_for(model):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return RetentionGates.for_model(Trim(init_half_life=20.0), model).eval().requires_grad_(False)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text", "qwen3_next", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("name", ["trim_kv", "db_trim_kv", "knorm", "full"])
def test_a_plan_is_the_ledger(family, name):
    """Every item of every family, from the model and from its config alone; sliding layers as after the next token."""
    model, _ = zoo.loaded(family)
    gates = gates_for(model) if POLICIES[name].gates_of else None
    config = CacheConfig(Budget(8.0))
    ledger, later = ran(model, name, config, gates), ran(model, name, config, gates, more=1)
    planned = retention.plan(zoo.saved(family), CONTEXT, BATCH, 8, policy=name)
    assert planned == retention.plan(model, CONTEXT, BATCH, 8, policy=name)
    held = planned.evicted
    windows = COUNTER * sum(kind == "sliding_attention" for kind in planned.sizes.kinds)
    for item in ("keys", "values", "scores", "positions", "memory", "layout", "slack"):
        if not (item == "layout" and name == "db_trim_kv"):
            assert held.items[item] == ledger.physical[item], item
    assert 0 <= later.physical["outside"] - held.items["outside"] <= windows
    assert sum(held.by_kind.values()) + held.items["layout"] == held.total
    if family in HYBRID or name == "db_trim_kv":
        assert 0.6 * held.peak <= ledger.peak <= held.peak + windows
    else:
        assert ledger.peak == held.peak


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", ["7", "25%", "20KiB", "100%"])
def test_budgets_and_dtypes(dtype, budget):
    model = copy.deepcopy(zoo.loaded("llama")[0]).to(dtype)
    gates = gates_for(model)
    ledger = ran(model, "trim_kv", CacheConfig(Budget.parse(budget)), gates)
    planned = retention.plan(model, CONTEXT, BATCH, budget, policy="trim_kv")
    assert planned == retention.plan(model.config, CONTEXT, BATCH, budget, policy="trim_kv", dtype=dtype)
    assert planned.evicted.total == ledger.total
    assert planned.evicted.peak == ledger.peak
    assert planned.entries == ledger.logical["keys"] // (BATCH * 3 * 2 * 16 * 2)


@pytest.mark.parametrize("name", ["linear", "slots", "moment"])
@pytest.mark.parametrize("on_evict", ["memory", "memory_paid"])
def test_memories_are_planned_as_they_are_held(name, on_evict):
    model, memory = zoo.loaded("qwen3")[0], MEMORIES[name]()
    config = CacheConfig(Budget(40.0), on_evict=on_evict)
    ledger = ran(model, "knorm", config, memory=RetentionMemory(memory, sizes_of(model).shape))
    planned = retention.plan(model, CONTEXT, BATCH, 40, policy="knorm", memory=memory, on_evict=on_evict)
    for item in ("keys", "values", "scores", "positions", "memory", "layout"):
        assert planned.evicted.items[item] == ledger.physical[item], item
    assert planned.evicted.items["memory"] > 0
    without = retention.plan(model, CONTEXT, BATCH, 40, policy="knorm")
    assert (planned.entries == without.entries) == (on_evict == "memory")


@pytest.mark.parametrize("chunk", [16, 25])
def test_chunks_lower_the_peak_as_planned(chunk):
    model = zoo.loaded("llama")[0]
    ledger = ran(model, "trim_kv", CacheConfig(Budget(8.0), prefill_chunk=chunk), gates_for(model))
    whole, planned = (
        retention.plan(model, CONTEXT, BATCH, 8, policy="trim_kv", prefill_chunk=n) for n in (None, chunk)
    )
    assert planned.evicted.peak < whole.evicted.peak
    assert planned.evicted.total == ledger.total
    assert 0.8 * planned.evicted.peak <= ledger.peak <= planned.evicted.peak


@pytest.mark.parametrize("name", ["trim_kv", "db_trim_kv", "full"])
def test_decoding_reserves_no_more_than_planned(name):
    model = zoo.loaded("llama")[0]
    gates = gates_for(model) if POLICIES[name].gates_of else None
    planned = retention.plan(model, CONTEXT, BATCH, 8, policy=name)
    once, twice = (ran(model, name, CacheConfig(Budget(8.0)), gates, more=n) for n in (1, 2))
    assert 0 < once.physical["slack"] <= planned.slack
    items = ("keys", "values", "scores")
    assert sum(twice.physical[i] - once.physical[i] for i in items) == planned.per_token


def test_the_largest_batch_fits_and_one_more_does_not():
    room = 40 * 2**20
    given = {"policy": "trim_kv", "device_memory": room, "reserve": 0.0}
    planned = retention.plan(tiny_llama().config, 512, 1, 16, **given)
    for name in ("full", "evicted"):
        most = planned.largest[name]
        peaks = [getattr(retention.plan(tiny_llama().config, 512, n, 16, **given), name).peak for n in (most, most + 1)]
        assert planned.sizes.weights + peaks[0] <= room < planned.sizes.weights + peaks[1]
    assert planned.largest["evicted"] > 2 * planned.largest["full"]
    chunked = retention.plan(tiny_llama().config, 512, 1, 16, prefill_chunk=32, **given)
    assert chunked.largest["evicted"] > planned.largest["evicted"]
    none = retention.plan(tiny_llama().config, 512, 1, 16, policy="trim_kv", device_memory=1000)
    assert none.largest == {"full": 0, "evicted": 0}


def test_weights_are_counted_without_loading_them():
    for model in (tiny_gemma3(), tiny_qwen3_next()):
        expected = sum(x.numel() * x.element_size() for x in model.parameters())
        assert sizes_of(model).weights == sizes_of(model.config, torch.float32).weights == expected


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"model_type": "deepseek_v3"}, "multi-head latent attention"),
        ({"model_type": "nobody_knows"}, "expected a model_type that transformers knows"),
        ([1], "expected a model_type"),
        ({"model_type": "mistral", "sliding_window": 8}, "full-attention layers"),
        (
            {"model_type": "lfm2", "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
            "whose state is not known here",
        ),
        ({"model_type": "gpt2"}, "expected one number num_key_value_heads"),
        ({"model_type": ["llama"]}, "expected a model_type that transformers knows .* got \\['llama'\\]"),
        ({"model_type": "llama", "hidden_size": "64"}, "transformers refuses the config in .*hidden_size"),
        ({"model_type": "llama", "dtype": "many"}, "transformers refuses the config"),
        ({"model_type": "llama", "dtype": 3}, "expected a dtype of torch in the config, got 3"),
        ({"model_type": "llama", "num_key_value_heads": 0}, "num_key_value_heads above 0 in the config, got 0"),
        ({"model_type": "llama", "head_dim": -4}, "expected head_dim above 0"),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": -4},
            "sliding_window .*above 0 .* got -4",
        ),
        ({"model_type": "gemma3n_text"}, "read the keys and values of other layers .num_kv_shared_layers"),
        ({"model_type": "mllama"}, "layers that read another sequence"),
        ({"model_type": "t5gemma"}, "expected a decoder alone"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_words(told, reason, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=rf"^[^\n]*{reason}[^\n]*$"):
        retention.plan(tmp_path, 100, 1, 8)


@pytest.mark.parametrize("text", ['{"a":' * 100_000, '{"model_type": "llama", "model_type": "qwen3"}', "\ufeff{}"])
def test_a_file_that_is_no_plain_json_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"^expected a config.json or its folder[^\n]*$"):
        retention.plan(tmp_path, 100, 1, 8)


def test_weights_of_a_quantised_model_are_named_not_guessed(tmp_path):
    told = tiny_llama().config.to_dict() | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(told, default=str))
    given = {"policy": "trim_kv", "device_memory": 2**24}
    assert retention.plan(tmp_path, 100, 1, 8, policy="trim_kv").sizes.weights is None
    with pytest.raises(ValueError, match=r"name them \(--weights"):
        retention.plan(tmp_path, 100, 1, 8, **given)
    found = [
        retention.plan(tmp_path, 100, 1, 8, weights=weights, **given).largest["full"] for weights in (2**20, 2**23)
    ]
    assert found[0] > 1.5 * found[1] > 0


def test_a_model_that_transformers_does_not_build_is_planned_without_its_weights():
    config = tiny_llama().config
    config.head_dim, config.hidden_act = 16, "no such activation"
    planned = retention.plan(config, 100, 1, 8, policy="trim_kv")
    assert planned.sizes.weights is None
    assert planned.full.total == retention.plan(tiny_llama().config, 100, 1, 8, policy="trim_kv").full.total


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"context": 0}, "context and batch of at least 1"),
        ({"policy": "best"}, "policy among"),
        ({"reserve": 1.0}, "reserve"),
        ({"budget": "many"}, "expected a budget"),
        ({"memory": Moment(), "on_evict": "drop"}, "on_evict among"),
    ],
)
def test_settings_are_checked(changes, reason):
    given = {"context": 100, "batch": 1, "budget": 8} | changes
    with pytest.raises(ValueError, match=reason):
        retention.plan(tiny_llama().config, **given)


def called(monkeypatch, *words):
    from retention.__main__ import main

    monkeypatch.setattr(sys, "argv", ["retention", *words])
    main()


def test_the_command_prints_bytes_and_gib(tmp_path):
    file, root = tmp_path / "some_config.json", Path(__file__).parents[1]
    file.write_text(json.dumps(tiny_llama().config.to_dict(), default=str))
    words = ["plan", str(file), "--context", "1000", "--batch", "4", "--budget", "100", "--gpu", "1GiB"]
    done = subprocess.run([sys.executable, "-m", "retention", *words], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    planned = retention.plan(file, 1000, 4, 100, device_memory=2**30)
    for figure in (planned.full.total, planned.evicted.total, planned.evicted.peak, planned.sizes.weights):
        assert f"{figure:,} B ({figure / 2**30:.3f} GiB)" in done.stdout
    assert f"{planned.largest['evicted']} evicted" in done.stdout


def test_the_command_shows_a_memory_beside_none(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(tiny_llama().config.to_dict(), default=str))
    words = ["plan", str(tmp_path), "--context", "100", "--budget", "10", "--memory", "moment", "--dtype", "bfloat16"]
    called(monkeypatch, *words)
    said = capsys.readouterr().out
    planned = retention.plan(tmp_path, 100, 1, 10, memory=Moment(), dtype=torch.bfloat16)
    assert f"{planned.evicted.items['memory']:,} B" in said
    assert "with memory moment" in said


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nothing.json", "--context", "9"], "^error: expected a config.json or its folder[^\n]*$"),
        (["{}", "--context", "9", "--gpu", "10"], "^error: expected --gpu in bytes[^\n]*$"),
        (["{}", "--context", "9", "--memory", "no"], "^error: expected a memory among[^\n]*$"),
    ],
)
def test_errors_of_the_command_are_one_sentence(words, reason, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(tiny_llama().config.to_dict(), default=str))
    with pytest.raises(SystemExit, match=reason):
        called(monkeypatch, "plan", *(word.format(tmp_path) for word in words))
