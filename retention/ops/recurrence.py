"""Linear recurrences of a key-value state, a token at a time and all at once: how a memory absorbs what leaves."""

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 128
"""Tokens of the delta rule that are solved for together."""

State = Float[Tensor, "*heads features width"]
Keys = Float[Tensor, "*heads tokens features"]
Values = Float[Tensor, "*heads tokens width"]
Weights = Float[Tensor, "*heads tokens"]


def naive_decayed_sum(state: State, keys: Keys, values: Values, weights: Weights, log_eta: Weights) -> State:
    """`S <- eta_i S + w_i k_i v_i^T` for each token in order (arXiv 2605.04075, in form; Mamba-2's scalar decay)."""
    for i in range(keys.shape[-2]):
        step = weights[..., i, None, None] * keys[..., i, :, None] * values[..., i, None, :]
        state = log_eta[..., i, None, None].exp() * state + step
    return state


def decayed_sum(state: State, keys: Keys, values: Values, weights: Weights, log_eta: Weights) -> State:
    """The same at once: `exp(c_n) S + sum_i exp(c_n - c_i) w_i k_i v_i^T`, c the running sum of log eta."""
    running = log_eta.cumsum(-1)
    part = ((running[..., -1:] - running).exp() * weights)[..., None] * keys
    return running[..., -1:, None].exp() * state + part.transpose(-1, -2) @ values


def naive_delta_rule(state: State, keys: Keys, values: Values, weights: Weights, log_eta: Weights) -> State:
    """`S <- eta_i S; u = w_i (v_i - S^T k_i); S <- S + k_i u^T` for each token in order, keys of unit norm.

    The gated delta rule (arXiv 2412.06464): a key that is there already is overwritten, not added to.
    """
    for i in range(keys.shape[-2]):
        state = log_eta[..., i, None, None].exp() * state
        error = values[..., i, :] - (keys[..., i, None, :] @ state)[..., 0, :]
        state = state + keys[..., i, :, None] * (weights[..., i, None] * error)[..., None, :]
    return state


def delta_rule(state: State, keys: Keys, values: Values, weights: Weights, log_eta: Weights) -> State:
    """The same in blocks: all u of a block solve one unit-triangular system.

    With `S_i = exp(c_i) S + sum_{j <= i} exp(c_i - c_j) k_j u_j^T`, u_i depends on earlier u_j alone:
    `u_i + w_i sum_{j < i} exp(c_i - c_j) (k_i . k_j) u_j = w_i (v_i - exp(c_i) S^T k_i)`.
    """
    for start in range(0, keys.shape[-2], BLOCK):
        rows = slice(start, start + BLOCK)
        k, v, w = keys[..., rows, :], values[..., rows, :], weights[..., rows, None]
        running = log_eta[..., rows].cumsum(-1)
        since = (running[..., :, None] - running[..., None, :]).tril().exp()
        earlier = (w * since * (k @ k.transpose(-1, -2))).tril(-1)
        aimed = w * (v - running.exp()[..., None] * (k @ state))
        eye = torch.eye(k.shape[-2], device=k.device, dtype=k.dtype)
        u = torch.linalg.solve_triangular(earlier + eye, aimed, upper=False, unitriangular=True)
        part = (running[..., -1:] - running).exp()[..., None] * k
        state = running[..., -1:, None].exp() * state + part.transpose(-1, -2) @ u
    return state
