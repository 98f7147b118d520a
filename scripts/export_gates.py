"""Export gates from a training checkpoint: python scripts/export_gates.py RUN/checkpoints/step=100.ckpt gates/.

A student's LoRA that was trained beside them goes to gates/adapter, for model.adapter=gates/adapter.
"""

import argparse
import sys
from pathlib import Path

from retention.training.export import export_checkpoint


def main() -> None:
    """Parse, export, say where."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--which", choices=("best", "last"), default="best", help="best under hard eviction, or last")
    args = parser.parse_args()
    try:
        print(export_checkpoint(args.checkpoint, args.folder, which=args.which))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
