"""What a run shows of itself at every step that is logged, and what stops it: a loss that is no number, a signal."""

import resource
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from retention.attach.facts import valid_tokens
from retention.models import family_of
from retention.types import Batch

Figures = dict[str, float]


def retained(
    log_beta: list[Float[Tensor, "batch kv_heads tokens"]],
    valid: Bool[Tensor, "batch tokens"],
    visual: Bool[Tensor, "batch tokens"],
) -> Figures:
    """Share of each layer's tokens that is still there behind the sequence: the mean of `beta ** age`, by modality."""
    ages = (valid.flip(1).cumsum(1).flip(1))[:, None]  # 1 for the newest token, as at the next query
    found = {}
    for number, layer in enumerate(log_beta):
        alive = (ages * layer.detach().float()).exp().mean(1)
        for name, mine in (("text", valid & ~visual), ("vision", valid & visual)):
            if mine.any():
                found[f"retained/layer{number}_{name}"] = float(alive[mine].mean())
    return found


def tokens_of(batch: Batch) -> int:
    """Tokens of a batch, padding excluded."""
    mask = batch.inputs.get("attention_mask")
    return int(batch.labels.numel() if mask is None else mask.sum())


def peak_bytes() -> int:
    """Most memory held so far: allocated on the GPU where there is one, else of the whole process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Watch(L.Callback):
    """Tokens per second, peak memory, gradient norm and retained share, at the steps that are logged."""

    def __init__(self) -> None:
        self.begin, self.tokens, self.norm = time.perf_counter(), 0, 0.0

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """The clock starts."""
        self.begin, self.tokens = time.perf_counter(), 0

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        """Norm of all gradients before they are clipped."""
        norms = [p.grad.norm() for p in module.parameters() if p.grad is not None]
        self.norm = float(torch.stack(norms).norm()) if norms else 0.0

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        """Figures since the last time."""
        batches: list[Batch] = args[1]
        self.tokens += sum(tokens_of(batch) for batch in batches) * trainer.world_size
        if trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        spent = time.perf_counter() - self.begin
        figures = {
            "speed/tokens_per_second": self.tokens / spent,
            "memory/peak_bytes": float(peak_bytes()),
            "gradient_norm": self.norm,
        }
        last = batches[-1].inputs
        ids = last["input_ids"]
        valid = valid_tokens(last.get("attention_mask"), ids.shape[0], ids.shape[1], ids.device)
        if module.last_log_beta and module.last_log_beta[0].shape[-1] == ids.shape[1]:
            visual = family_of(module.model).visual_mask(module.model.config, ids)
            log_beta = [x.cpu() for x in module.last_log_beta]
            figures |= retained(log_beta, valid.cpu(), visual.cpu())
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)
        self.begin, self.tokens = time.perf_counter(), 0


class Finite(L.Callback):
    """Stops before a loss or gradient that is no number reaches the gates."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ids = folder, ["?"]

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        """Remember which rows are under way."""
        self.ids = [name for batch in args[0] for name in batch.ids]

    def on_before_backward(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        """Look at the loss."""
        loss: Tensor = args[0]
        if not torch.isfinite(loss):
            self._stop(trainer, f"the loss is {float(loss.detach())}")

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        """Look at the gradients."""
        bad = [name for name, p in module.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
        if bad:
            self._stop(trainer, f"the gradient of {bad[0]} is not finite")

    def _stop(self, trainer: L.Trainer, what: str) -> None:
        from retention.training.resume import newest_checkpoint

        saved, step = newest_checkpoint(self.folder)
        last = f"the gates of step {step} are in {saved}" if saved is not None else "nothing was saved yet"
        raise ValueError(
            f"{what} at step {trainer.global_step}, in the batch of {', '.join(self.ids)}; {last}: go on from there with a "
            "smaller trainer.lr, or leave those rows out"
        )


class Preemption(L.Callback):
    """SIGTERM saves a checkpoint at the end of the step under way; the run then ends and can be resumed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        """Save once the signal was heard; Lightning stops behind it."""
        if trainer.received_sigterm:
            file = self.folder / "checkpoints" / f"step={trainer.global_step}.ckpt"
            if not file.exists():
                trainer.save_checkpoint(file)

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        """Tell the queue that the run is not done."""
        if trainer.received_sigterm and isinstance(exception, SystemExit):
            exception.code = 128 + signal.SIGTERM
