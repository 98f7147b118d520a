"""What a run has used so far, in every checkpoint: rows, tokens, bad rows, and forwards of the frozen base."""

from collections import Counter
from typing import Any

import lightning as L

from retention.models.family import decoder_of
from retention.training.callbacks import record
from retention.training.devices import of_all_ranks
from retention.training.watch import tokens_of
from retention.types import Batch


class Passes:
    """Counts the tokens that go through a decoder: forwards, backwards, and layers that are run again in the backward.

    A forward counts 1 per token, padding included, since it is computed. So does its backward, which is of activations
    alone (the weights are frozen) and comes where the output asks for gradients; and so does what the last gated layer
    computes outside a forward, which is recomputation. Vision tower and head are not counted.
    """

    def __init__(self, model: Any, layer: int) -> None:
        self.tokens, self.inside = 0, False
        decoder = decoder_of(model)
        self.hooks = [
            decoder.register_forward_pre_hook(self._enter),
            decoder.register_forward_hook(self._leave),
            decoder.layers[layer].self_attn.register_forward_pre_hook(self._again, with_kwargs=True),
        ]

    def stop(self) -> int:
        """The tokens so far; counts no more."""
        for hook in self.hooks:
            hook.remove()
        return self.tokens

    def _enter(self, module: Any, args: Any) -> None:
        self.inside = True

    def _leave(self, module: Any, args: Any, out: Any) -> None:
        hidden = out.last_hidden_state
        self.inside = False
        self.tokens += hidden[..., 0].numel() * (2 if hidden.requires_grad else 1)

    def _again(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not self.inside:
            self.tokens += kwargs["hidden_states"][..., 0].numel()


class Cost(L.Callback):
    """Sums over all steps and processes, so that runs of different objectives compare at equal cost."""

    def __init__(self) -> None:
        self.before: Counter[str] = Counter()
        """Of the run that is gone on with."""
        self.own: Counter[str] = Counter()
        """Of this process since."""
        self.passes: Passes | None = None
        self.bad: dict[str, int] = {}
        self.final: dict[str, int] = {}

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        """Count from here."""
        self.passes = Passes(module.model, module.gates.shape.layers[-1])

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        """Behind the last backward; what validates is not counted."""
        assert self.passes is not None
        self.own.update(forwards=self.passes.stop())

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        """Add up the step's rows, and tell at the steps that are logged and at the end."""
        batches: list[Batch] = args[1]
        self.own.update(rows=sum(len(batch.ids) for batch in batches), tokens=sum(map(tokens_of, batches)))
        if trainer.global_step % trainer.log_every_n_steps and trainer.global_step != trainer.max_steps:  # type: ignore[attr-defined]
            return
        self.final, self.bad = dict(self.total()), dict(of_all_ranks(trainer.datamodule.bad_rows))  # type: ignore[attr-defined]
        figures = {f"cost/{name}": float(count) for name, count in self.final.items()}
        record(trainer, figures | {f"data/bad_rows/{why}": float(count) for why, count in self.bad.items()})

    def total(self) -> Counter[str]:
        """Of the whole run, over all processes, which must all ask."""
        return self.before + of_all_ranks(self.own)

    def state_dict(self) -> dict[str, Any]:
        """What was used up to here."""
        return dict(self.total())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.before, self.final = Counter(state), dict(state)
