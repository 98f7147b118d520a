"""Locret: highest predicted logit of an answer's attention, per head (arXiv 2410.01805)."""

from dataclasses import dataclass

from retention.policies.static import StaticPolicy


@dataclass
class Locret(StaticPolicy):
    """Each head keeps its best. The paper also keeps the newest 2,500 tokens while a prompt comes in chunks."""

    gates_of = "locret"
