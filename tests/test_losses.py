"""Distillation terms and the capacity hinge against dense float64 formulas."""

import pytest
import torch
from torch.nn import functional as F

from retention.losses import capacity_loss, distillation_terms
from retention.ops.capacity import expected_size, naive_expected_size, sample_queries
from retention.types import LossTerms

WIDTH, VOCAB = 6, 11


def number(scalar):
    return scalar.item()


def head(hidden):
    return hidden @ torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(9)).T.to(hidden.dtype)


def draw(tokens=8, batch=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(batch, tokens, WIDTH, generator=g) for _ in range(2))
    labels = torch.randint(0, VOCAB, (batch, tokens), generator=g)
    labels[torch.rand(batch, tokens, generator=g) < 0.4] = -100
    labels[:, 0] = -100
    return student, teacher, labels


def dense(student, teacher, labels):
    """Both sums and their count, token by token, float64."""
    kl = ntp = torch.zeros((), dtype=torch.double)
    count = 0
    for row in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            if labels[row, t + 1] != -100:
                own = head(student[row, t].double()).log_softmax(-1)
                other = head(teacher[row, t].double()).log_softmax(-1)
                kl = kl + (other.exp() * (other - own)).sum()
                ntp = ntp - own[labels[row, t + 1]]
                count += 1
    return kl, ntp, count


def test_terms_equal_the_dense_formulas():
    (kl, n_kl), (ntp, n_ntp) = distillation_terms(*draw(), head)
    expected_kl, expected_ntp, count = dense(*draw())
    assert number(kl) == pytest.approx(number(expected_kl), rel=1e-5)
    assert number(ntp) == pytest.approx(number(expected_ntp), rel=1e-5)
    assert number(n_kl) == number(n_ntp) == count


@pytest.mark.parametrize("term", [0, 1])
def test_gradients_equal_the_dense_formulas(term):
    student, teacher, labels = draw()
    ours, truth = student.clone().requires_grad_(), student.double().requires_grad_()
    distillation_terms(ours, teacher, labels, head, chunk=3)[term][0].backward()
    dense(truth, teacher, labels)[term].backward()
    torch.testing.assert_close(ours.grad.double(), truth.grad, rtol=1e-4, atol=1e-6)


def test_kl_and_its_gradient_vanish_when_the_student_is_the_teacher():
    student, _, labels = draw()
    student.requires_grad_()
    (kl, count), _ = distillation_terms(student, student, labels, head)
    (gradient,) = torch.autograd.grad(kl, student)
    assert count > 0
    assert abs(number(kl)) < 1e-5
    assert gradient.abs().max() < 1e-6


def test_the_teacher_receives_no_gradient():
    student, teacher, labels = draw()
    student.requires_grad_()
    teacher.requires_grad_()
    (kl, _), (ntp, _) = distillation_terms(student, teacher, labels, head)
    (kl + ntp).backward()
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("chunk", [1, 2, 5, 1000])
def test_the_chunk_size_changes_neither_values_nor_gradients(chunk):
    found = []
    for size in (4, chunk):
        student, teacher, labels = draw()
        student.requires_grad_()
        (kl, n), (ntp, _) = distillation_terms(student, teacher, labels, head, chunk=size)
        found.append([kl, ntp, n, torch.autograd.grad(kl + 2 * ntp, student)[0]])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_logits_exist_for_at_most_one_chunk():
    rows = []

    def counting(hidden):
        rows.append(len(hidden))
        return head(hidden)

    student, teacher, labels = draw()
    student.requires_grad_()
    (kl, n), _ = distillation_terms(student, teacher, labels, counting, chunk=4)
    kl.backward()
    assert max(rows) == 4
    assert sum(rows) >= 2 * int(n)


def test_kl_and_next_token_read_the_position_before_each_label():
    student, teacher, labels = draw()
    labels[:] = -100
    labels[1, 5] = 3
    student.requires_grad_()
    for term in (0, 1):
        total, count = distillation_terms(student, teacher, labels, head)[term]
        (gradient,) = torch.autograd.grad(total, student)
        assert count == 1
        assert gradient.abs().sum(-1).nonzero().tolist() == [[1, 4]]


@pytest.mark.parametrize("pad", [(0, 0, 3, 0), (0, 0, 0, 3)])
def test_padding_changes_nothing(pad):
    student, teacher, labels = draw()
    wide = [F.pad(x, pad, value=7.0) for x in (student, teacher)]
    padded = distillation_terms(*wide, F.pad(labels, pad[2:], value=-100), head)
    torch.testing.assert_close(padded, distillation_terms(student, teacher, labels, head), rtol=1e-6, atol=1e-6)


def test_batches_add_up():
    student, teacher, labels = draw()
    whole = distillation_terms(student, teacher, labels, head)
    parts = [distillation_terms(student[i : i + 1], teacher[i : i + 1], labels[i : i + 1], head) for i in range(3)]
    for term in (0, 1):
        for part in (0, 1):
            assert number(whole[term][part]) == pytest.approx(sum(number(p[term][part]) for p in parts), rel=1e-5)


def test_no_label_gives_zero_over_zero_and_a_mean_of_zero():
    student, teacher, labels = draw()
    kl, ntp = distillation_terms(student, teacher, torch.full_like(labels, -100), head)
    assert [number(x) for x in (*kl, *ntp)] == [0.0] * 4
    assert float(LossTerms({"kl": kl, "ntp": ntp}, {"kl": 1.0, "ntp": 1.0}).loss()) == 0.0


def test_the_loss_is_the_weighted_sum_of_the_means():
    pairs = {"a": (torch.tensor(6.0), torch.tensor(4.0)), "b": (torch.tensor(1.0), torch.tensor(0.0))}
    terms = LossTerms(pairs, {"a": 2.0, "b": 10.0})
    assert {k: number(v) for k, v in terms.means().items()} == {"a": 1.5, "b": 1.0}
    assert number(terms.loss()) == 13.0


every_norm = pytest.mark.parametrize("norm", ["exact", "public", "budget", "paper"])
every_reduction = pytest.mark.parametrize("reduction", ["mean", "active_mean"])
QUERIES = torch.tensor([[3, 6, 9, 12], [5, 6, 7, 8]])
BUDGET = torch.tensor([4.0, 2.5])


def sizes(seed=0, layers=2, kv_heads=3):
    """Expected sizes between 1 and t + 1."""
    g = torch.Generator().manual_seed(seed)
    return 1 + torch.rand(layers, 2, kv_heads, 4, generator=g) * QUERIES[None, :, None]


def dense_capacity(values, queries, budget, scope, norm, reduction="mean"):
    """Total and count, element by element, float64."""
    values, total, rows = values.double(), torch.zeros((), dtype=torch.double), 0
    layers, batch, kv_heads, _ = values.shape
    for row in range(batch):
        limit, row_terms = number(budget[row]), []
        for j, t in enumerate(queries[row].tolist()):
            if t < limit:
                continue
            scale = {"exact": t + 1 - limit, "public": max(1.0, t - limit), "budget": limit, "paper": t + 1}[norm]
            if scope == "global":
                held = [values[:, row, :, j].mean()]
            else:
                held = [values[layer, row, h, j] for layer in range(layers) for h in range(kv_heads)]
            row_terms += [((x - limit).clamp(min=0) / scale) for x in held]
        if row_terms:
            active = max(1, sum(number(x) > 0 for x in row_terms)) if reduction == "active_mean" else len(row_terms)
            total, rows = total + torch.stack(row_terms).sum() / active, rows + 1
    return total, rows


@every_norm
@every_reduction
@pytest.mark.parametrize("scope", ["global", "local"])
def test_capacity_and_its_gradient_equal_the_dense_formula(scope, norm, reduction):
    ours, truth = sizes().requires_grad_(), sizes().requires_grad_()
    total, count = capacity_loss(ours, QUERIES, BUDGET, scope=scope, norm=norm, reduction=reduction)
    expected, rows = dense_capacity(truth, QUERIES, BUDGET, scope, norm, reduction)
    total.backward()
    expected.backward()
    assert number(total) == pytest.approx(number(expected), rel=1e-5)
    assert number(count) == rows == 2
    torch.testing.assert_close(ours.grad, truth.grad, rtol=1e-5, atol=1e-7)


@every_norm
@every_reduction
@pytest.mark.parametrize("scope", ["global", "local"])
def test_capacity_is_zero_exactly_when_no_size_exceeds_the_budget(scope, norm, reduction):
    form = {"scope": scope, "norm": norm, "reduction": reduction}
    limit = BUDGET[None, :, None, None]
    within = torch.minimum(sizes(), limit)
    assert number(capacity_loss(within, QUERIES, BUDGET, **form)[0]) == 0.0
    at_limit = limit.expand_as(within).clone()
    assert number(capacity_loss(at_limit, QUERIES, BUDGET, **form)[0]) == 0.0
    at_limit[1, 1, 2, 3] += 0.01
    assert number(capacity_loss(at_limit, QUERIES, BUDGET, **form)[0]) > 0.0


def test_a_query_at_the_budget_is_counted():
    values = torch.tensor([5.0, 9.0]).expand(1, 1, 1, 2)
    total, count = capacity_loss(values, torch.tensor([[4, 8]]), torch.tensor([4.0]), norm="budget")
    assert (number(total), number(count)) == (pytest.approx((1 / 4 + 5 / 4) / 2), 1)


def test_global_scope_lets_one_head_hold_more_when_another_holds_less():
    uneven = BUDGET[None, :, None, None].expand(2, 2, 3, 4).clone()
    uneven[0] += 1.0
    uneven[1] -= 1.0
    assert number(capacity_loss(uneven, QUERIES, BUDGET, scope="global")[0]) == 0.0
    assert number(capacity_loss(uneven, QUERIES, BUDGET, scope="local")[0]) > 0.0


@every_reduction
@pytest.mark.parametrize("scope", ["global", "local"])
def test_capacity_is_one_when_nothing_is_forgotten(scope, reduction):
    everything = (QUERIES + 1.0)[None, :, None].expand(2, 2, 3, 4)
    total, count = capacity_loss(everything, QUERIES, BUDGET, scope=scope, norm="exact", reduction=reduction)
    assert number(total / count) == pytest.approx(1.0, abs=1e-6)


@every_norm
@every_reduction
def test_local_equals_global_when_all_heads_are_equal(norm, reduction):
    equal, form = sizes()[:1, :, :1].expand(2, 2, 3, 4), {"norm": norm, "reduction": reduction}
    local, glob = (capacity_loss(equal, QUERIES, BUDGET, scope=scope, **form) for scope in ("local", "global"))
    assert number(local[0]) > 0
    torch.testing.assert_close(local, glob)


def test_local_is_never_below_global():
    local, glob = (number(capacity_loss(sizes(3), QUERIES, BUDGET, scope=s)[0]) for s in ("local", "global"))
    assert local >= glob > 0


@every_norm
@pytest.mark.parametrize("scope", ["global", "local"])
def test_a_sequence_within_its_budget_contributes_nothing(scope, norm):
    queries = torch.tensor([[3, 6, 9, 12], [5, 5, 5, 5]])
    values = sizes().requires_grad_()
    total, count = capacity_loss(values, queries, torch.tensor([4.0, 6.0]), scope=scope, norm=norm)
    alone = capacity_loss(values[:, :1], queries[:1], torch.tensor([4.0]), scope=scope, norm=norm)
    torch.testing.assert_close((total, count), alone)
    assert count == 1
    (gradient,) = torch.autograd.grad(total, values)
    assert gradient[:, 1].abs().max() == 0
    nothing = capacity_loss(values[:, 1:], queries[1:], torch.tensor([6.0]), scope=scope, norm=norm)
    assert [number(x) for x in nothing] == [0.0, 0.0]


def test_over_violations_the_last_one_weighs_as_much_as_all_of_them():
    """The count carries no gradient."""
    pulls = []
    for violated in (1, 3):
        values = BUDGET[None, :, None, None].expand(1, 2, 1, 4) - 1.0
        values[0, 1, 0, :violated] += 2.0
        values.requires_grad_()
        capacity_loss(values, QUERIES, BUDGET, norm="budget", reduction="active_mean")[0].backward()
        pulls.append(number(values.grad.sum()))
    assert pulls == [pytest.approx(1 / 2.5)] * 2


def test_the_mean_at_all_queries_is_what_samples_average_to():
    """K = all positions is the mean itself; fewer are unbiased for it, and for violations they are not."""
    g = torch.Generator().manual_seed(0)
    log_beta, budget, lengths = -torch.rand(1, 2, 24, generator=g) * 0.8, torch.tensor([4.0]), torch.tensor([24])
    positions = torch.arange(24)[None]

    def loss(queries, reduction="mean"):
        return number(
            capacity_loss(expected_size(log_beta, positions, queries)[None], queries, budget, reduction=reduction)[0]
        )

    whole = loss(positions)
    truth = naive_expected_size(log_beta[0], positions[0]).mean(0)[4:]
    assert whole == pytest.approx(number(((truth - 4).clamp(min=0) / (positions[0, 4:] - 3)).mean()), rel=1e-5)
    assert loss(sample_queries(lengths, budget, 20, g)) == pytest.approx(whole, rel=1e-5), "one in each of 20 strata"
    drawn = [sample_queries(lengths, budget, 3, g) for _ in range(1500)]
    assert sum(map(loss, drawn)) / 1500 == pytest.approx(whole, rel=0.01)
    assert abs(sum(loss(q, "active_mean") for q in drawn) / 1500 / loss(positions, "active_mean") - 1) > 0.02
