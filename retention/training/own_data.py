"""Own data as a config describes it: sources opened once, encoded for the model, dealt out to processes."""

from pathlib import Path

from retention.data.batches import Limits
from retention.data.encode import Encoder, Rules
from retention.data.example import Example
from retention.data.held_out import questions, split
from retention.data.hub import folder_of, open_source
from retention.data.loader import Maker, MixtureLoader
from retention.data.plan import Plan, Source
from retention.data.render import Renderer
from retention.data.source import SourceConfig
from retention.training.config import DataConfig


class OwnData:
    """The sources of a run, their held-out rows apart."""

    def __init__(self, config: DataConfig, renderer: Renderer) -> None:
        """Open every source.

        Raises:
            ValueError: for a source that cannot be opened.
        """
        self.config = config
        lengths = [length for length in (config.max_length, config.max_tokens) if length is not None]
        rules = Rules(
            config.loss_on,
            min(lengths, default=None),  # a row alone may not break the budget of its batch
            config.truncate,
            config.max_images,
            config.video_frames,
            config.videos,
            config.video_fps,
        )
        self.encoder = Encoder(renderer.processor, renderer.visual_ids.tolist(), rules)
        self.sources: list[Source] = [_opened(source) for source in config.sources]
        self.held: list[Source] = []
        if config.held_out:
            self.sources, self.held = split(self.sources, config.held_out, config.seed)

    def loader(self, steps: int, ranks: int, rank: int) -> MixtureLoader:
        """Batches of one of several processes."""
        c = self.config
        limits = Limits(c.batch_size, c.max_tokens, c.max_images, c.packing)
        plan = Plan(self.sources, limits, seed=c.seed, bucket=c.bucket, image_tokens=c.image_tokens, ranks=ranks)
        maker, refuse = Maker(self.sources, self.encoder, limits), c.on_bad == "refuse"
        return MixtureLoader(plan, maker, steps=steps, num_workers=c.num_workers, refuse=refuse, rank=rank)

    def questions(self) -> list[Example]:
        """Held-out rows to ask about under eviction."""
        return questions(self.held, self.encoder, self.config.val_examples)


def _opened(config: SourceConfig) -> Source:
    name = config.path if config.name is None else f"{config.path}/{config.name}"
    name = Path(name).name if Path(config.path).exists() else name
    return Source(name, open_source(config), config.columns, folder_of(config), config.weight)
