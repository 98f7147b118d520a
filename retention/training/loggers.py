"""Where a run is tracked: CSV always, Weights & Biases beside it if asked; the only file that imports wandb."""

import logging
import netrc
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger
from torch import Tensor

log = logging.getLogger(__name__)


class Tracking:
    """The loggers of a run, and what only some of them can show."""

    def __init__(self, kind: str, folder: Path, name: str, config: dict[str, Any], start: int) -> None:
        version = "" if start == 0 else f"from_step_{start}"
        self.loggers: list[Logger] = [CSVLogger(folder, name="csv", version=version)]
        self.wandb: Any = _wandb_logger(folder, name, config) if kind == "wandb" else None
        if self.wandb is not None:
            self.loggers.append(self.wandb)

    def histogram(self, lives: Tensor, step: int) -> None:
        """log10 half-lives [layers, values] as one histogram per layer."""
        if self.wandb is not None:
            import wandb

            pictures = {f"half_life/layer{i}": wandb.Histogram(row.cpu().numpy()) for i, row in enumerate(lives)}
            self.wandb.experiment.log({**pictures, "trainer/global_step": step})

    def picture(self, path: Path, step: int) -> None:
        """A picture that lies in the run's folder."""
        if self.wandb is not None:
            import wandb

            self.wandb.experiment.log({"survival": wandb.Image(str(path)), "trainer/global_step": step})

    def finish(self, rows: list[dict[str, Any]], artefact: Path) -> None:
        """The final table, and gates and adapter as an artefact with their metrics, a new version of its name each run."""
        if self.wandb is not None:
            import wandb

            table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
            self.wandb.experiment.log({"validation under hard eviction": table})
            stored = wandb.Artifact(
                "gates", type="model", metadata={f"{r['scope']}_{r['budget']}": r["accuracy"] for r in rows}
            )
            stored.add_dir(str(artefact))
            if (artefact.parent / "adapter").exists():
                stored.add_dir(str(artefact.parent / "adapter"), name="adapter")
            self.wandb.experiment.log_artifact(stored)
            self.wandb.experiment.finish()


def _wandb_logger(folder: Path, name: str, config: dict[str, Any]) -> Any:
    """A W&B logger, offline unless the user is logged in; None, with one line, where the package is missing."""
    try:
        import wandb
        from lightning.pytorch.loggers import WandbLogger
    except ImportError:
        log.warning("wandb is not installed, logging to CSV only; pip install 'retention[wandb]' brings it")
        return None
    mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
    settings = wandb.Settings(silent=True, console="off")
    return WandbLogger(
        name=name,
        save_dir=str(folder),
        project="retention",
        config=config,
        log_model=False,
        mode=mode,
        settings=settings,
    )


def _logged_in() -> bool:
    """Whether an API key is set or stored."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
