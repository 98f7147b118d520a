"""`retention.pipeline`: a model whose every conversation is held within a budget, in one line."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from retention import checkpoint
from retention.attach.hard import evicting
from retention.attach.switch import use_gates
from retention.budget import Budget
from retention.cache.config import CacheConfig
from retention.cache.evicting import EvictingCache
from retention.gates import GateSets, RetentionGates
from retention.gates.loading import folder_of
from retention.models.load import load_frozen
from retention.policies import POLICIES, Policy, policy_of
from retention.serving.conversation import Conversation, resumed
from retention.serving.decoding import Answer, Decoding, steps
from retention.serving.engine import Engine, Job
from retention.serving.prompt import Prompts

TASKS = ("image-text-to-text", "text-generation")
EVICT_EVERY = 64
CHUNK = 2048


class Pipeline:
    """A frozen model, what evicts its caches, and the thread its forwards run in; to be closed."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        policy: Policy,
        config: CacheConfig,
        gates: Mapping[str | None, RetentionGates],
        *,
        active: int = 8,
    ) -> None:
        """`gates` are sets by name, or one without a name, or none; `active` answers are written at a time, in turns.

        Raises:
            ValueError: for gates that do not fit the model, the policy or each other.
        """
        self.model, self.prompts = model, Prompts(processor)
        self.tokenizer = self.prompts.template.tokenizer
        first, *others = list(gates) or [None]
        with ExitStack() as stack:
            empty = stack.enter_context(
                evicting(model, policy, config, gates=gates.get(first), tokenizer=self.tokenizer)
            )
            self._empty = {first: empty} | {name: use_gates(empty.fork(), gates[name]) for name in others}
            self.engine = Engine(active)
            stack.callback(self.engine.close)
            self._open = stack.pop_all()

    @property
    def gate_sets(self) -> list[str]:
        """Names of the gate sets, the first of which is in force unless another is asked for; none for gates without."""
        return [name for name in self._empty if name is not None]

    def __call__(self, messages: Any, *, gates: str | None = None, **decoding: Any) -> Any:
        """Answer a text or a chat, or several of them in one batch; `decoding` as in `Decoding`.

        Returns {"generated_text", "finish_reason", "cache_bytes"}, or a list of these.
        """
        several = not isinstance(messages, str) and all(not isinstance(one, dict) for one in messages)
        chats = list(messages) if several else [messages]
        found = self._batch(chats, self.conversation(gates).cache, Decoding(**decoding))
        return found if several else found[0]

    def stream(self, messages: Any, *, gates: str | None = None, **decoding: Any) -> Answer:
        """The answer to a text or a chat, to be read while it is written."""
        return self.conversation(gates).stream(messages, **decoding)

    def conversation(self, gates: str | None = None) -> Conversation:
        """An empty one, with a cache of its own, whose tokens are scored by the gate set of that name.

        Raises:
            ValueError: for a name that is none.
        """
        name = next(iter(self._empty)) if gates is None else gates
        if name not in self._empty:
            known = ", ".join(self.gate_sets) or "none, since this pipeline was opened without gate sets"
            raise ValueError(f"expected a gate set among {known}, got {name!r}")
        return Conversation(self, self._empty[name].fork(), name)

    def resume(self, folder: str | Path) -> Conversation:
        """A saved one, under the gate set that it was had with.

        Raises:
            ValueError: where there is none, or it fits neither the model nor a gate set.
        """
        return resumed(self, folder)

    def close(self) -> None:
        """End what is under way and leave the model as it was."""
        self._open.close()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _batch(self, chats: Sequence[Any], cache: EvictingCache, how: Decoding) -> list[dict[str, Any]]:
        """Chats answered together, over one cache with a row for each."""
        read = [self.prompts.read(chat) for chat in chats]
        answers = [Answer(self.tokenizer) for _ in chats]

        def begin() -> Any:
            inputs = self.prompts.first([messages for messages, _ in read], [images for _, images in read])
            yield from steps(self.model, cache, inputs, answers, how)

        self.engine.submit(Job(begin, answers, lambda: None))
        texts = [answer.whole() for answer in answers]
        held = cache.bytes().total // len(chats)
        return [
            {"generated_text": text, "finish_reason": answer.reason, "cache_bytes": held}
            for text, answer in zip(texts, answers, strict=True)
        ]


def pipeline(
    task: str = "image-text-to-text",
    *,
    model: Any = "embedded",
    processor: Any = None,
    gates: RetentionGates | GateSets | str | Path | None = None,
    budget: str | int = "256MiB",
    policy: str | Policy | None = None,
    cache: CacheConfig | None = None,
    active: int = 8,
    **loading: Any,
) -> Pipeline:
    """Load a model for conversations whose caches are held within a budget.

    Args:
        task: image-text-to-text or text-generation, as transformers names them.
        model: a hub id or folder, or a loaded model, for which `processor` is needed too.
        processor: of a loaded model; the tokenizer of a text model.
        gates: an artefact's folder or hub id, or loaded gates; or several sets of gates, of which every conversation
            may have its own: `GateSets`, or the folder or hub id that they lie in.
        budget: bytes per conversation ("256MiB"), entries per layer and head (512), or a share of the context ("10%").
        policy: a policy, or its name; by default the one that ranks by these gates (by the first of several).
        cache: everything else about the cache, in place of the defaults and of `budget`.
        active: answers that are written at a time, in turns.
        loading: further arguments of `load_frozen`.

    Raises:
        ValueError: for what cannot be loaded or does not fit together.
    """
    if task not in TASKS:
        raise ValueError(f"expected a task among {', '.join(TASKS)}, got {task!r}")
    if isinstance(model, str | Path):
        model, processor = load_frozen(str(model), **loading)
    elif processor is None or loading:
        raise ValueError("expected a processor, and no arguments of loading, beside a loaded model")
    if isinstance(gates, str | Path):
        gates = _read(gates)
    sets = {name: gates[name] for name in gates} if isinstance(gates, GateSets) else {None: gates}
    placed = {name: one.to(model.device).eval() for name, one in sets.items() if one is not None}
    chosen = _policy(policy, next(iter(placed.values()), None))
    pipe = Pipeline(model, processor, chosen, cache or _config(chosen, budget), placed, active=active)
    if task == "image-text-to-text" and pipe.prompts.template.text_only:
        pipe.close()
        raise ValueError("expected a model that sees for image-text-to-text, got a text model; say text-generation")
    return pipe


def _read(name: str | Path) -> RetentionGates | GateSets:
    """The artefact of a folder or hub id, or the sets where there is none but below it."""
    folder = folder_of(name, [checkpoint.CONFIG, f"*/{checkpoint.CONFIG}"])
    several = not (folder / checkpoint.CONFIG).exists() and any(folder.glob(f"*/{checkpoint.CONFIG}"))
    return (GateSets if several else RetentionGates).from_pretrained(name)


def _policy(policy: str | Policy | None, gates: RetentionGates | None) -> Policy:
    if isinstance(policy, Policy):
        return policy
    if policy is None and gates is None:
        raise ValueError("expected gates=<artefact>, or policy=<name> for one that needs none, got neither")
    name = policy or ranked_by(gates)
    if name not in POLICIES:
        raise ValueError(f"expected a policy among {', '.join(POLICIES)}, got {name!r}")
    return POLICIES[name]()


def ranked_by(gates: RetentionGates | None) -> str:
    """Name of the policy that gates were trained for."""
    assert gates is not None
    if gates.decays:
        return "trim_kv" if gates.training_record.get("scope") == "local" else "db_trim_kv"
    return policy_of(gates.objective)


def _config(policy: Policy, budget: str | int) -> CacheConfig:
    """Bounded at any time: evicted chunk by chunk and while decoding, where the policy has a rule for that."""
    decodes = policy.evicts_while_decoding and not policy.steps
    return CacheConfig(Budget.parse(str(budget)), prefill_chunk=CHUNK, evict_every=EVICT_EVERY if decodes else None)
