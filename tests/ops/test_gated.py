"""Which form of gated attention is taken, and documents of one row that see nothing of each other."""

import pytest
import torch

from retention.ops import gated
from retention.ops.gated import FORMS, form_for, gated_attention
from retention.ops.logits import Scaling
from tests.ops.test_attention import SCALING, draw, images_in, upto

LENGTHS = [[5, 1, 7], [13]]
NUMBERS = torch.tensor([[3] * 5 + [1] * 1 + [2] * 7, [0] * 13])
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
IN_FP32 = ["naive", "blocked", "augmented"]


def typed(form, inputs):
    q, k, v, log_beta = inputs
    return (q.bfloat16(), k.bfloat16(), v.bfloat16(), log_beta) if form == "split" else inputs


def near(form):
    return {"rtol": 0.02, "atol": 0.02} if form == "split" else {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize(
    ("dtype", "dim", "cap", "masked", "form"),
    [
        (torch.float32, 8, None, False, "augmented"),
        (torch.float16, 8, None, False, "augmented"),
        (torch.bfloat16, 8, None, False, "augmented"),
        (torch.bfloat16, 8, 30.0, False, "blocked"),
        (torch.bfloat16, 8, None, True, "blocked"),
        (torch.float32, 8, 30.0, True, "blocked"),
    ],
)
def test_the_form_follows_from_dtype_width_mask_and_cap(monkeypatch, dtype, dim, cap, masked, form):
    q, k, v, log_beta = draw(13, dim=dim)
    given = (q.to(dtype), k.to(dtype), v.to(dtype), log_beta)
    allowed, scaling = images_in(13) if masked else None, Scaling(0.25, cap)
    assert form_for(*given[:3], scaling=scaling, allowed=allowed) == form
    taken = []
    for name, function in FORMS.items():
        monkeypatch.setitem(gated.FORMS, name, lambda *a, n=name, f=function, **how: (taken.append(n), f(*a, **how))[1])
    out = gated_attention(*given, scaling=scaling, positions=upto(13), allowed=allowed)
    assert taken == [form]
    assert out.dtype == dtype


def test_the_split_form_is_taken_where_it_fits(monkeypatch):
    given = typed("split", draw(13))[:3]
    asked = []
    monkeypatch.setattr(gated, "split_fits", lambda *a: asked.append(a) or True)
    assert form_for(*given, scaling=SCALING) == "split"
    assert asked == [(torch.bfloat16, torch.device("cpu"), 6, 6)]
    assert form_for(*given, scaling=Scaling(SCALING, 5.0)) == "blocked"


@pytest.mark.parametrize("wide", [0, 1, 2])
def test_mixed_dtypes_are_attended_in_fp32(monkeypatch, wide):
    monkeypatch.setattr(gated, "split_fits", lambda *a: True)
    given = list(typed("split", draw(13)))
    given[wide] = given[wide].float()
    assert form_for(*given[:3], scaling=SCALING) == "augmented"
    assert gated_attention(*given, scaling=SCALING, positions=upto(13)).dtype == given[0].dtype
    with pytest.raises(ValueError, match="in bfloat16, got"):
        gated_attention(*given, scaling=SCALING, positions=upto(13), form="split")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_can_be_asked_for(form):
    inputs = draw(13)
    out = gated_attention(*typed(form, inputs), scaling=SCALING, positions=upto(13), form=form)
    expected = gated_attention(*inputs, scaling=SCALING, positions=upto(13), form="naive")
    torch.testing.assert_close(out.float(), expected, **near(form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("padded", [False, True])
def test_documents_of_one_row_are_rows_of_their_own(form, padded):
    inputs = typed(form, draw(13))
    valid = torch.ones(2, 13, dtype=torch.bool)
    valid[0, 3:5] = valid[0, 11:] = not padded  # behind the first and the last document
    options = {"scaling": SCALING, "form": form}
    mask = valid if padded else None
    packed = gated_attention(*inputs, **options, positions=POSITIONS, valid=mask, documents=NUMBERS)
    for row, lengths in enumerate(LENGTHS):
        at = 0
        for length in lengths:
            own, real = slice(at, at + length), valid[row, at : at + length]
            given = [x[row : row + 1, :, own][:, :, real] for x in inputs]
            alone = gated_attention(*given, **options, positions=upto(int(real.sum()), 1))
            torch.testing.assert_close(packed[row : row + 1, :, own][:, :, real], alone, **near(form))
            at += length


@pytest.mark.parametrize("form", [*IN_FP32, "split"])
def test_gradients_stay_inside_a_document(form):
    leaves = [x.requires_grad_() for x in typed(form, draw(13))]
    out = gated_attention(*leaves, scaling=SCALING, positions=POSITIONS, documents=NUMBERS, form=form)
    for grad in torch.autograd.grad(out[0, :, :5].float().square().sum(), leaves):
        assert grad[0, :, :4].abs().sum() > 0
        assert grad[0, :, 5:].abs().sum() == 0
        assert grad[1].abs().sum() == 0


def test_what_cannot_be_is_refused():
    inputs, options = draw(13), {"scaling": SCALING, "positions": upto(13)}
    with pytest.raises(ValueError, match="got 'fast'"):
        gated_attention(*inputs, **options, form="fast")
    with pytest.raises(ValueError, match="in bfloat16, got"):
        gated_attention(*inputs, **options, form="split")
    for form in gated.FUSED:
        with pytest.raises(ValueError, match="without a cap"):
            gated_attention(*inputs, **options, form=form, allowed=images_in(13))
        with pytest.raises(ValueError, match="without a cap"):
            gated_attention(*inputs, **options | {"scaling": Scaling(SCALING, 5.0)}, form=form)
