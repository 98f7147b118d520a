"""A harness's model arguments: which model, what evicts its cache, where a question begins."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from retention.budget import Budget
from retention.cache.config import CacheConfig
from retention.evaluation.config import default_policies
from retention.gates import RetentionGates
from retention.models.family import decoder_device
from retention.models.load import ModelConfig, load_configured
from retention.policies import POLICIES, Policy
from retention.policies.collect import Foresight
from retention.serving.pipeline import ranked_by
from retention.types import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POLICY = "policy."
"""What stands before a setting of the policy, as in `policy.window_size=16`."""
_MODEL = {field.name for field in fields(ModelConfig)} - {"name", "prompt_style"}
_CACHE = {field.name for field in fields(CacheConfig)} - {"budget"}


@dataclass
class Reading:
    """How prompts are read and answers are written, whatever evicts."""

    context_end: str | None = None
    """Text that stands between context and question in prompts and is taken out of them: the context is evicted before
    its question is read. Prompts without one are evicted with their question in the cache. It must not stand, nor begin
    or end, anywhere else."""
    batch_size: int = 1
    """Prompts at once, those of like length together."""
    max_length: int | None = None
    """Tokens of prompt and answer together; longer prompts lose their beginning. null is the model's own."""
    max_gen_toks: int = 256
    """Tokens of an answer where the task does not say."""
    dialogue: bool = False
    """Whether later rounds of a task are read behind the answers so far, over one cache; else each is a new prompt."""
    records: str | None = None
    """Folder for the manifest and one row per request; null writes none."""

    def __post_init__(self) -> None:
        require(
            [
                (self.context_end != "", "context_end as a text that prompts hold", self.context_end),
                (self.batch_size >= 1, "batch_size as a number of at least 1", self.batch_size),
                (self.max_length is None or self.max_length >= 2, "max_length of at least 2", self.max_length),
                (self.max_gen_toks >= 1, "max_gen_toks of at least 1", self.max_gen_toks),
            ]
        )


@dataclass
class Loaded:
    """A frozen model with what evicts its caches."""

    model: "PreTrainedModel"
    processor: Any
    name: str
    """Of the policy."""
    policy: Policy
    cache: CacheConfig
    gates: RetentionGates | None
    source: ModelConfig


def read_arguments(arguments: Mapping[str, Any]) -> tuple[Reading, Loaded]:
    """Load what a harness's `--model_args` name.

    They are `pretrained`, other fields of `ModelConfig`, `gates`, `policy` with `policy.<setting>`, `budget`, the other
    fields of `CacheConfig`, and those of `Reading`. Without a policy it is the one that the gates were trained for.

    Raises:
        ValueError: for an unknown argument, or a value that does not fit.
    """
    given = dict(arguments)
    size = str(given.get("batch_size", 1))  # as commands hand it over, where it may also be auto
    if not size.isdigit():
        raise ValueError(f"expected batch_size as a number of at least 1, got {size!r}")
    given["batch_size"] = int(size)
    reading = Reading(**_taken(given, {field.name for field in fields(Reading)}))
    source = ModelConfig(name=str(given.pop("pretrained", "")), **_taken(given, _MODEL))
    budget = Budget.parse(str(given.pop("budget", "100%")))
    cache = CacheConfig(budget, **_taken(given, _CACHE))
    artefact, name = given.pop("gates", None), given.pop("policy", None)
    own = {key.removeprefix(POLICY): given.pop(key) for key in list(given) if key.startswith(POLICY)}
    if given:
        known = sorted(
            {"pretrained", "gates", "policy", "budget", *_MODEL, *_CACHE, *(f.name for f in fields(Reading))}
        )
        raise ValueError(
            f"expected model arguments among {', '.join(known)} and policy.<setting>, got {next(iter(given))}"
        )
    gates = None if artefact is None else RetentionGates.from_pretrained(str(artefact))
    if name is None and gates is None:
        raise ValueError("expected gates=<artefact>, or policy=<name> for one that needs none, got neither")
    name = str(name or ranked_by(gates))
    policy = named_policy(name, own)
    model, processor = load_configured(source)
    if gates is not None:
        gates = gates.to(decoder_device(model)).eval()
    return reading, Loaded(model, processor, name, policy, cache, gates, source)


def named_policy(name: str, settings: Mapping[str, Any]) -> Policy:
    """A policy by its name, with settings in place of the published ones.

    Raises:
        ValueError: for an unknown name or setting, or a policy that needs more than a prompt.
    """
    if name not in POLICIES:
        raise ValueError(f"expected a policy among {', '.join(POLICIES)}, got {name!r}")
    known = [field.name for field in fields(POLICIES[name]) if field.init]
    for key in settings:
        if key not in known:
            raise ValueError(f"expected settings of {name} among {', '.join(known) or 'none'}, got {POLICY}{key}")
    policy = POLICIES[name](**settings)
    policy.bind(default_policies())
    if policy.needs_evidence or isinstance(policy.second_pass(), Foresight):
        raise ValueError(
            f"{name} reads where the answer lies, which prompts of a harness do not tell; choose another policy"
        )
    return policy


def _taken(given: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Arguments of these names, which leave the others behind."""
    return {name: given.pop(name) for name in list(given) if name in names}
