"""Validation under hard eviction, the best gates so far, and the random state: all part of every checkpoint."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from retention.gates.calibration import Calibration
from retention.ops.decay import half_life

Row = dict[str, Any]


def record(trainer: L.Trainer, figures: dict[str, float]) -> None:
    """Log figures at this step only; `module.log` would repeat them in every later row."""
    for logger in trainer.loggers:
        logger.log_metrics(figures, step=trainer.global_step)


class HardEvictionValidation(L.Callback):
    """Every `every` steps: accuracy under hard eviction; the gates of the best step are kept for export.

    So is the student's adapter, where there is one. It runs before the checkpoint of the same step is written, so a
    resumed run chooses the same. `further` gives figures that are logged beside and choose nothing.
    """

    def __init__(
        self,
        measure: Callable[[], tuple[list[Row], Calibration]],
        every: int,
        steps: int,
        further: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        self.measure, self.every, self.steps, self.further = measure, every, steps, further
        self.best: dict[str, Tensor] = {}
        self.best_student: dict[str, Tensor] = {}
        self.best_rows: list[Row] = []
        self.best_curve: dict[str, Any] | None = None
        self.best_step, self.best_accuracy = 0, -1.0

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        """Validate when a multiple of `every` or the end is reached."""
        step = trainer.global_step
        if step % self.every and step != self.steps:
            return
        rows, curve = self.measure()
        chosen = [row["accuracy"] for row in rows if row["scope"] == "global" and row["budget"] != "full"]
        accuracy = sum(chosen) / len(chosen)
        figures = {f"val/{row['scope']}_{row['budget']}": row["accuracy"] for row in rows}
        figures |= {} if self.further is None else self.further()
        record(trainer, {**figures, "val/hard_accuracy": accuracy})
        module.log("val", accuracy, prog_bar=True, logger=False)
        if accuracy >= self.best_accuracy:
            self.best = {k: v.detach().clone() for k, v in module.gates.state_dict().items()}
            student = getattr(module, "student", None)  # a memory's trainer has none
            state = {} if student is None else student.state_dict()
            self.best_student = {k: v.detach().clone() for k, v in state.items()}
            self.best_rows, self.best_step, self.best_accuracy = rows, step, accuracy
            self.best_curve = asdict(curve)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to choose the same gates after a resume."""
        found = {"rows": self.best_rows, "step": self.best_step, "accuracy": self.best_accuracy}
        return {"best": self.best, "student": self.best_student, "curve": self.best_curve, **found}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the choice so far."""
        self.best, self.best_rows, self.best_curve = state["best"], state["rows"], state.get("curve")
        self.best_student = state.get("student", {})
        self.best_step, self.best_accuracy = state["step"], state["accuracy"]


class HalfLives(L.Callback):
    """Quantiles of the gates' half-lives by layer, logged every `every` steps; histograms where the logger draws them."""

    def __init__(self, every: int, draw: Callable[[Tensor, int], None]) -> None:
        self.every, self.draw = every, draw

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        """log10 half-life over all layers and tokens of the last batch."""
        if trainer.global_step % self.every:
            return
        log_beta = torch.stack([x.detach() for x in module.last_log_beta])
        lives = half_life(log_beta.clamp(max=-1e-9)).log10().flatten(1)
        names = ("p10", "p50", "p90")
        rows = np.quantile(
            lives.cpu().numpy(), [0.1, 0.5, 0.9], axis=1
        ).T.tolist()  # torch's takes 2 ** 24 values at most
        record(
            trainer,
            {f"half_life/layer{i}_{name}": v for i, row in enumerate(rows) for name, v in zip(names, row, strict=True)},
        )
        self.draw(lives, trainer.global_step)


class RandomState(L.Callback):
    """Torch's global random state, restored when the first batch after a resume starts."""

    pending: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """The state to go on from."""
        return {"torch": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember it until the loaders have drawn what they draw."""
        self.pending = state["torch"]

    def on_train_batch_start(self, *args: Any) -> None:
        """Restore once."""
        if self.pending is not None:
            torch.set_rng_state(self.pending)
            self.pending = None
