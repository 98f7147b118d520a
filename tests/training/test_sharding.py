"""A base spread over processes computes what a whole one does, and each process holds a share of it."""

import json
import os
import socket

import pytest
import torch
from torch import multiprocessing

WORLD = 2


def worker(rank, port, folder):
    """One of the processes: the same step on a whole and on a shared base, and decoding under eviction."""
    from retention import Budget, CacheConfig, RetentionGates, evicting
    from retention.gates.dbtrim import DBTrim
    from retention.objectives.base import Step
    from retention.objectives.distillation import Distillation
    from retention.policies import POLICIES
    from retention.training.config import TrainerConfig
    from retention.training.module import collect
    from retention.training.sharding import shard_base
    from retention.training.student import Student
    from tests.tiny import tiny_llama

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=WORLD)
    found = []
    for shared in (False, True):
        model = tiny_llama()
        student = Student(model, TrainerConfig(lora_rank=2), seed=0)
        torch.manual_seed(0)
        gates = RetentionGates.for_model(DBTrim(gate_hidden=8, init_half_life=20.0), model)
        if shared:
            shard_base(model, torch.device("cpu"))
        ids = torch.randint(3, 90, (2, 20 + rank), generator=torch.Generator().manual_seed(rank))
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < 15 - 3 * rank, -100)  # unlike numbers of scored tokens
        results = {}
        for recompute in (False, True):
            step, objective = Step(labels, torch.Generator().manual_seed(0)), Distillation(budget="4", queries=0)
            how = {"recompute": recompute, "student": student}
            loss = objective.loss(collect(model, gates, objective, {"input_ids": ids}, step, **how))[0].loss()
            own = [*gates.parameters(), *student.parameters()]
            grads = torch.autograd.grad(loss, own, allow_unused=True)
            results[f"step, recompute={recompute}"] = [loss.detach(), *(g for g in grads if g is not None)]
        config = CacheConfig(Budget.parse("6"))
        with torch.no_grad(), evicting(model, POLICIES["db_trim_kv"](), config, gates=gates) as cache:
            model(input_ids=ids[:, :16], past_key_values=cache)
            results["decoding"] = [model(input_ids=ids[:, 16:17], past_key_values=cache).logits]
        held = sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters() if not p.requires_grad)
        found.append((results, held))
    (whole, all_held), (apart, some_held) = found
    gaps = {
        name: max(float((a - b).abs().max()) for a, b in zip(whole[name], apart[name], strict=True)) for name in whole
    }
    counts = {name: len(values) for name, values in whole.items()}
    layers = sum(p.numel() for p in tiny_llama().model.layers.parameters())
    told = {"gaps": gaps, "counts": counts, "held": [all_held, some_held], "layers": layers}
    (folder / f"{rank}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each process found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(worker, (port, folder), WORLD)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


def test_losses_gradients_and_decoding_are_those_of_a_whole_base(told):
    for found in told:
        assert set(found["gaps"]) == {"step, recompute=False", "step, recompute=True", "decoding"}
        assert min(found["counts"].values()) >= 1
        assert found["counts"]["step, recompute=True"] > 10
        assert max(found["gaps"].values()) < 1e-6


def test_each_process_holds_its_share_of_the_layers(told):
    for found in told:
        whole, apart = found["held"]
        assert whole - apart == pytest.approx(found["layers"] * (1 - 1 / WORLD), rel=0.01)
