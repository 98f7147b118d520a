"""`retention.pipeline`: a model whose every conversation is held within a budget, in one line."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from retention.attach.hard import evicting
from retention.budget import Budget
from retention.cache.config import CacheConfig
from retention.gates import RetentionGates
from retention.models.load import load_frozen
from retention.policies import POLICIES, Policy, policy_of
from retention.serving.conversation import Conversation
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
        gates: RetentionGates | None = None,
        *,
        active: int = 8,
    ) -> None:
        """`active` answers are written at a time, in turns."""
        self.model, self.prompts = model, Prompts(processor)
        self.tokenizer = self.prompts.template.tokenizer
        self._open = ExitStack()
        self._empty = self._open.enter_context(evicting(model, policy, config, gates=gates, tokenizer=self.tokenizer))
        self.engine = Engine(active)
        self._open.callback(self.engine.close)

    def __call__(self, messages: Any, **decoding: Any) -> Any:
        """Answer a text or a chat, or several of them in one batch; `decoding` as in `Decoding`.

        Returns {"generated_text", "finish_reason", "cache_bytes"}, or a list of these.
        """
        several = not isinstance(messages, str) and all(not isinstance(one, dict) for one in messages)
        found = self._batch(list(messages) if several else [messages], Decoding(**decoding))
        return found if several else found[0]

    def stream(self, messages: Any, **decoding: Any) -> Answer:
        """The answer to a text or a chat, to be read while it is written."""
        return self.conversation().stream(messages, **decoding)

    def conversation(self) -> Conversation:
        """An empty one, with a cache of its own."""
        return Conversation(self, self._empty.fork())

    def resume(self, folder: str | Path) -> Conversation:
        """A saved one.

        Raises:
            ValueError: where there is none, or it does not fit the model.
        """
        found = self.conversation()
        found.restore(folder)
        return found

    def close(self) -> None:
        """End what is under way and leave the model as it was."""
        self._open.close()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _batch(self, chats: Sequence[Any], how: Decoding) -> list[dict[str, Any]]:
        """Chats answered together, over one cache with a row for each."""
        read, cache = [self.prompts.read(chat) for chat in chats], self._empty.fork()
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
    gates: RetentionGates | str | Path | None = None,
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
        gates: an artefact's folder or hub id, or loaded gates.
        budget: bytes per conversation ("256MiB"), entries per layer and head (512), or a share of the context ("10%").
        policy: a policy, or its name; by default the one that ranks by these gates.
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
        gates = RetentionGates.from_pretrained(gates)
    if gates is not None:
        gates = gates.to(model.device).eval()
    chosen = _policy(policy, gates)
    pipe = Pipeline(model, processor, chosen, cache or _config(chosen, budget), gates, active=active)
    if task == "image-text-to-text" and pipe.prompts.template.text_only:
        pipe.close()
        raise ValueError("expected a model that sees for image-text-to-text, got a text model; say text-generation")
    return pipe


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
