"""Train retention gates: python train.py [gate=trim objective.budget=16 trainer.max_steps=200 ...]; --help lists all."""

import sys

import hydra
from omegaconf import DictConfig

from retention.config import register, to_config

register()


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(composed: DictConfig) -> None:
    """Compose, check, train, say where the gates are."""
    try:
        config = to_config(composed)
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        from retention.training.devices import rank
        from retention.training.run import run

        artefact = run(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if rank() == 0:
        print(f"gates: {artefact}\nevaluate them: python eval.py gates={artefact}")


if __name__ == "__main__":
    main()
