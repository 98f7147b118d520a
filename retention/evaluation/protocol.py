"""How an evaluation runs: four independent choices that every row names."""

from dataclasses import dataclass

WORDS = {
    "agnostic": ("question", "agnostic"),
    "aware": ("question", "aware"),
    "one_shot": ("trigger", "after_prefill"),
    "streaming": ("trigger", "chunked(image)"),
    "original": ("positions", "original"),
    "packed": ("positions", "packed"),
}


@dataclass(frozen=True)
class Protocol:
    """Whether eviction saw the question, when it ran, and whether kept keys move; turns always grow one dialogue."""

    question: str = "agnostic"
    trigger: str = "after_prefill"
    positions: str = "original"

    @property
    def prefill(self) -> tuple[str, str]:
        """What decides the prefill: protocols that agree in it share one."""
        return self.question, self.trigger

    @classmethod
    def parse(cls, text: str) -> "Protocol":
        """Read words joined by `+`: agnostic (default) or aware, one_shot or streaming, original or packed.

        Raises:
            ValueError: for a word that is none of these.
        """
        chosen: dict[str, str] = {}
        for word in text.split("+"):
            if word not in WORDS:
                raise ValueError(f"expected a protocol made of {', '.join(WORDS)} joined by +, got {text!r}")
            axis, value = WORDS[word]
            chosen[axis] = value
        return cls(**chosen)

    def __str__(self) -> str:
        """Question / turns / trigger / positions, as rows name it."""
        return f"{self.question}/multi/{self.trigger}/{self.positions}"
