"""Evaluate gates and heuristics: python eval.py [gates=<dir> 'policies=[db_trim_kv,snapkv]' 'budgets=[10%,5%]' ...]."""

import sys

import hydra
from omegaconf import DictConfig

from retention.config import register, to_config

register()


@hydra.main(version_base="1.3", config_path="configs", config_name="eval")
def main(composed: DictConfig) -> None:
    """Compose, check, evaluate, print the table and where the report is."""
    try:
        config = to_config(composed)
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        from retention.evaluation.run import run

        result = run(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"\n{result.table}\n")
    for path in result.files:
        print(path)


if __name__ == "__main__":
    main()
