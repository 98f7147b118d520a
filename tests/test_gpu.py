"""The identities of the CPU suite on a CUDA device; not run by default (`make test-gpu`)."""

import pytest
import torch

pytestmark = pytest.mark.gpu
PROMPT = torch.randint(0, 90, (2, 48), generator=torch.Generator().manual_seed(0))


def models(dtype: torch.dtype):
    from tests.tiny import tiny_llama, tiny_qwen3

    return [make().to("cuda", dtype).eval() for make in (tiny_llama, tiny_qwen3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_budget_over_context_generates_the_same_tokens(dtype):
    import retention as rt

    for model in models(dtype):
        stock = model.generate(PROMPT.cuda(), max_new_tokens=8, do_sample=False)
        with rt.evicting(model, rt.POLICIES["keydiff"](), rt.CacheConfig(budget=rt.Budget(1000))) as cache:
            ours = model.generate(PROMPT.cuda(), max_new_tokens=8, do_sample=False, past_key_values=cache)
        assert torch.equal(stock, ours)


@pytest.mark.parametrize("policy", ["keydiff", "snapkv", "h2o", "db_trim_kv"])
def test_eviction_frees_what_the_ledger_says(policy):
    import retention as rt
    from retention.gates.dbtrim import DBTrim

    model = models(torch.bfloat16)[1]
    gates = rt.RetentionGates.for_model(DBTrim(), model)
    with rt.evicting(model, rt.POLICIES[policy](), rt.CacheConfig(budget=rt.Budget(8)), gates=gates) as cache:
        model(input_ids=PROMPT.cuda(), past_key_values=cache)
    assert int(cache.kept().sum()) == 8 * cache.shape.num_layers * cache.shape.num_kv_heads * 2
    assert cache.bytes().total < cache.bytes().peak


def test_gated_training_equals_the_cpu():
    import retention as rt
    from retention.gates.trim import Trim
    from tests.tiny import tiny_llama

    outputs = {}
    for device in ("cpu", "cuda"):
        model = tiny_llama().to(device)
        torch.manual_seed(0)
        gates = rt.RetentionGates(Trim(init_half_life=20.0), rt.RetentionGates.for_model(Trim(), model).shape).to(
            device
        )
        with rt.attach_gates(model, gates):
            outputs[device] = model(input_ids=PROMPT.to(device), use_cache=False).logits.float().cpu()
    assert torch.allclose(outputs["cpu"], outputs["cuda"], atol=2e-3)
