"""Pictures of what held-out contexts would keep, and the numbers that they show."""

import json

import pytest
import torch
from PIL import Image

from retention.budget import Budget
from retention.config import compose
from retention.data.render import Renderer
from retention.models import family_of
from retention.models.family import model_shape
from retention.objectives.distillation import Distillation
from retention.objectives.kvzap import KVzap
from retention.policies.kvzap import KVzap as KVzapPolicy
from retention.policies.trim_kv import TrimKV
from retention.tasks.needles import Needles
from retention.training.gap import target
from retention.training.pictures import PLACES, draw, survival, survival_of
from retention.training.run import run
from tests.training.test_gap import gates_with
from tests.training.test_lagrangian import SMALL


def test_shares_by_hand():
    """Two layers of one head, two rows of 4 and 2 positions; the second row's later positions are none."""
    kept = torch.tensor([[[[1, 0, 0, 1]], [[1, 1, 0, 0]]], [[[0, 0, 0, 0]], [[1, 0, 0, 0]]]]).bool()
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    visual = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0]]).bool()
    shares = survival(kept, visual, real)
    assert torch.allclose(shares.heads, torch.tensor([[4 / 6], [1 / 6]]))
    assert torch.allclose(shares.text, torch.tensor([3 / 3, 1 / 3]))
    assert torch.allclose(shares.vision, torch.tensor([1 / 3, 0 / 3]))
    assert torch.allclose(shares.places[0], torch.tensor((2 / 2 + 1 / 2) / 2))
    assert torch.allclose(shares.places[PLACES // 2], torch.tensor((1 / 2 + 0 / 2) / 2))
    assert shares.places[1].isnan()


def test_what_is_kept_is_the_budget(embedded_model, embedded_processor, tmp_path):
    renderer = Renderer(embedded_processor, family_of(embedded_model).visual_ids(embedded_model.config))
    task = Needles(n_images=3, n_needles=8, n_turns=3)
    contexts = renderer.render([task.example(0, "val", i, style="symbolic") for i in range(2)])
    policy, budget = target(Distillation(budget="10%"), "5%")
    shares = survival_of(embedded_model, gates_with(embedded_model, 80.0), policy, budget, contexts)
    shape = model_shape(embedded_model)
    assert shares.heads.shape == (shape.num_layers, shape.num_kv_heads)
    assert float(shares.heads.mean()) == pytest.approx(0.1, abs=0.01)
    with Image.open(draw(shares, tmp_path / "pictures" / "step=1.png", "step 1")) as picture:
        assert picture.size[0] > 1000


def test_the_target_is_that_of_the_objective():
    policy, budget = target(Distillation(budget="5%", scope="local"), "1%")
    assert (type(policy), budget) == (TrimKV, Budget(0.05, "fraction"))
    policy, budget = target(KVzap(), "1%")
    assert (type(policy), budget) == (KVzapPolicy, Budget(0.01, "fraction"))


@pytest.mark.parametrize("more", [[], ["objective=kvzap"]])
def test_a_run_draws_them_and_trains_the_same(more, tmp_path):
    plain, drawn = (
        run(compose("train", [*SMALL, *more, *told, f"output_dir={tmp_path / name}"]))
        for name, told in (("plain", []), ("drawn", ["trainer.picture_every=2"]))
    )
    assert sorted(file.name for file in (tmp_path / "drawn" / "pictures").iterdir()) == ["step=2.png", "step=4.png"]
    assert not (tmp_path / "plain" / "pictures").exists()
    assert (plain / "gate_model.safetensors").read_bytes() == (drawn / "gate_model.safetensors").read_bytes()
    assert json.loads((drawn / "gate_config.json").read_text())["training"]["steps"] == 4
