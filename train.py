"""Train retention gates: python train.py [gate=trim objective.budget=16 trainer.max_steps=200 ...]; --help lists all."""

from retention.entry import train

if __name__ == "__main__":
    train()
