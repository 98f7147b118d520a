"""Gates that are about the token before: what the cache knows of every entry, against all readings in a row."""

import pytest
import torch

from retention import Budget, CacheConfig, RetentionGates, attach_gates, evicting
from retention.cache.delayed import OPEN, shifted
from retention.gates.trim import Trim
from retention.ops.decay import log_beta_from_score
from retention.policies.dms import DMS
from tests.cache.helpers import Conversation, left_padded, model_of, tokens


def delayed_gates():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        gates = RetentionGates.for_model(Trim(gate_hidden=0, init_half_life=3.0, delayed=True), model_of())
    return gates.eval().requires_grad_(False)


class Listener:
    """Notes what the gates read off every token, padding left out, by layer and row."""

    def __init__(self, gates, monkeypatch):
        self.said, self.valid, read = {}, None, gates.read

        def noting(layer, hidden, visual=None, valid=None, heard=None):
            found = read(layer, hidden, visual, valid, heard)
            for row, keep in enumerate(valid):
                past = self.said.get((layer, row), torch.zeros(2, 0))
                self.said[layer, row] = torch.cat([past, log_beta_from_score(found.score[row][:, keep])], -1)
            return found

        monkeypatch.setattr(gates, "read", noting)

    def check(self, cache):
        """Every entry is known by what the token behind it said, the newest by nothing yet."""
        checked = 0
        for number, layer in enumerate(cache.evicting_layers):
            state = layer.state()
            for row in range(len(state.valid)):
                behind = torch.cat([self.said[number, row][:, 1:], torch.full((2, 1), OPEN)], -1)
                for head in range(2):
                    valid = state.valid[row, head]
                    positions = state.positions[row, head][valid]
                    assert state.log_beta[row, head][valid].equal(behind[head, positions])
                    checked += len(positions)
        return checked


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_entries_are_known_by_what_the_next_token_said(chunk, scope, monkeypatch):
    gates, model = delayed_gates(), model_of()
    listener = Listener(gates, monkeypatch)
    config = CacheConfig(Budget(8.0), allocator=scope, prefill_chunk=chunk, evict_every=3)
    with evicting(model, DMS(recent_size=1), config, gates=gates) as cache:
        told = Conversation(model, cache)
        told.feed(*left_padded(tokens(2, 20, seed=1), [20, 5]))
        assert listener.check(cache) > 0
        assert int(cache.kept().sum()) < 2 * 20 * 6
        for step in range(5):
            told.feed(tokens(2, 1, seed=step))
            listener.check(cache)
        told.feed(*left_padded(tokens(2, 9, seed=2), [9, 4]))
        listener.check(cache)
        told.feed(tokens(2, 1, seed=9))
        listener.check(cache)


def test_a_fork_settles_its_own_newest_token(monkeypatch):
    gates, model = delayed_gates(), model_of()
    with evicting(model, DMS(), CacheConfig(Budget(40.0)), gates=gates) as cache:
        Conversation(model, cache).feed(tokens(1, 10))
        twin = cache.fork()
        before = cache.evicting_layers[0].state().log_beta.clone()
        with torch.no_grad():
            model(input_ids=tokens(1, 1), past_key_values=twin, position_ids=torch.tensor([[10]]))
        assert cache.evicting_layers[0].state().log_beta.equal(before)
        assert (before[..., -1] == OPEN).all()
        settled = twin.evicting_layers[0].state().log_beta
        assert (settled[..., 9] < OPEN).all()
        assert settled[..., :9].equal(before[..., :9])


def test_padding_says_nothing_of_anyone():
    log_beta = -torch.arange(1.0, 7).expand(1, 2, 6)
    valid = torch.tensor([[False, True, False, True, True, False]])
    first, own = shifted(log_beta, valid)
    assert first[0, 0].tolist() == [-2]
    assert own[0, 0][valid[0]].tolist() == [-4, -5, OPEN]
    first, _ = shifted(log_beta, torch.zeros_like(valid))
    assert first.isnan().all()


def test_the_newest_token_ranks_above_all():
    gates, model = delayed_gates(), model_of()
    with evicting(model, DMS(recent_size=0), CacheConfig(Budget(1.0), allocator="uniform"), gates=gates) as cache:
        Conversation(model, cache).feed(tokens(1, 12))
        assert cache.kept_table()[..., -1].all()


def test_they_rank_and_are_not_trained():
    with pytest.raises(ValueError, match=r"gate\.delayed"), attach_gates(model_of(), delayed_gates()):
        pass
    with pytest.raises(ValueError, match=r"gate\.delayed or gate\.budget_conditioned"):
        Trim(delayed=True, budget_conditioned=True)
