"""lmms-eval over an evicting cache: `lmms-eval --model retention`, which it finds by an entry point of ours."""

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from rich.progress import track

from retention.cache.evicting import EvictingCache
from retention.harness.chat import Chats, Written, prompts_of
from retention.harness.generation import decoding_of
from retention.harness.prompt import Prompt
from retention.harness.reader import Reader
from retention.harness.records import Records, Row
from retention.harness.settings import read_arguments

MANIFEST = ModelManifest(model_id="retention", chat_class_path="retention.harness.lmms_eval.RetentionLMM")
RECORDS = "outputs/lmms_eval"
"""Where manifest and rows go unless told: the harness's own results have no place for them."""


class RetentionLMM(lmms):
    """A frozen model whose cache is evicted, for generation tasks with images, of one round or several.

    Arguments as in `retention.harness.settings.read_arguments`; `records` is `outputs/lmms_eval` unless told.
    """

    is_simple = False

    def __init__(self, pretrained: str, **arguments: Any) -> None:
        super().__init__()
        arguments.pop("max_batch_size", None)
        self.reading, self.loaded = read_arguments({"pretrained": pretrained, "records": RECORDS, **arguments})
        self.reader = Reader(self.loaded)
        self.chats = Chats(self.loaded.processor, self.reading.context_end)
        self.records = Records(self.reading, self.loaded)
        self.batch_size = self.reading.batch_size

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refused: what chats with images are asked is generated.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "expected generation tasks, got one of log-likelihood; run text tasks by lm-evaluation-harness"
        )

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers up to a stop text, the end of a sequence or the task's longest; greedy unless a task samples."""
        chats = [self._written(request) for request in requests]
        groups: dict[tuple, list[int]] = {}
        for number, (request, chat) in enumerate(zip(requests, chats, strict=True)):
            # padding would move where a context is evicted while it is read
            alone = (number,) if self.reader.chunked else ()
            groups.setdefault((str(request.args[2]), *chat.manner, *alone), []).append(number)
        parts = [g[i : i + self.batch_size] for g in groups.values() for i in range(0, len(g), self.batch_size)]
        said: dict[int, GenerationResult] = {}
        held: dict[int, tuple[Prompt, Row | None]] = {}
        with self.reader.open() as empty:
            for numbers in track(parts, "generate_until"):
                together = [chats[number] for number in numbers]
                _, prompts, facts, written = self._answered(empty, together, requests[numbers[0]].args[2], numbers)
                for number, prompt, row, (text, tokens) in zip(numbers, prompts, facts, written, strict=True):
                    said[number] = GenerationResult(text, TokenCounts(output_tokens=len(tokens)))
                    held[number] = prompt, row
        self._record("generate_until", requests, [held[number] for number in range(len(requests))])
        return [said[number] for number in range(len(requests))]

    def _answered(
        self, empty: EvictingCache, chats: Sequence[Written], told: dict[str, Any], seeds: Sequence[int]
    ) -> tuple[EvictingCache, list[Prompt], list[Row | None], list[tuple[str, list[int]]]]:
        """The cache behind the answers to chats, what they are in tokens, what was held, and the answers."""
        decoding = decoding_of(told, self.reading.max_gen_toks)
        contexts, questions = self.chats.inputs(chats)
        cache = self.reader.prefilled(empty, contexts)
        facts = self.records.held(cache, len(chats))
        written = self.reader.write(cache, questions, decoding, list(seeds))
        answers = [(self.reader.decode(tokens, decoding.stop), tokens) for tokens in written]
        return cache, prompts_of(chats, contexts, questions), facts, answers

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Answers to all rounds of each request, as its task asks them.

        Each round is a prompt of its own, as in the harness's models; with `dialogue` it is read behind the answers so
        far, over the one cache whose context was evicted in the first round.
        """
        found, held = [], []
        with self.reader.open() as empty:
            for number, request in enumerate(track(requests, "generate_until_multi_round")):
                answers, first = self._rounds(empty, request, number)
                found.append(answers)
                held.append(first)
        self._record("generate_until_multi_round", requests, held)
        return found

    def _rounds(
        self, empty: EvictingCache, request: Instance, seed: int
    ) -> tuple[list[str], tuple[Prompt, Row | None]]:
        """Answers of all rounds, and what the first was given from."""
        chat, told, said = self._written(request), request.args[2], []  # type: Written, dict[str, Any], list[str]
        cache, prompts, facts, answers = self._answered(empty, [chat], told, [seed])
        first, info, history = (prompts[0], facts[0]), None, self.chats.read(self._asked(request))[0]
        while True:
            said.append(answers[0][0])
            more = self._asked(request, round_idx=len(said), previous_output=said[:], previous_round_info=info)
            if not isinstance(more, tuple) or len(more) != 4 or more[1]:
                return said, first
            messages, _, _, info = more
            new, images = self.chats.read(messages)
            if self.reading.dialogue:
                history = [*history, {"role": "assistant", "content": [{"type": "text", "text": said[-1]}]}]
                last = answers[0][1][-1]
                questions = self.chats.following(history, new, images, last, ended=last in self.reader.ends)
                decoding = decoding_of(told, self.reading.max_gen_toks)
                tokens = self.reader.write(cache, questions, decoding, [seed])[0]
                answers, history = [(self.reader.decode(tokens, decoding.stop), tokens)], [*history, *new]
            else:
                cache, _, _, answers = self._answered(empty, [self.chats.written(new, images)], told, [seed])

    def _asked(self, request: Instance, **round_of: Any) -> Any:
        """What a task's document asks, in its first round or a later one."""
        _, messages_of, _, doc_id, task, split = request.args
        return messages_of(self.task_dict[task][split][doc_id], **round_of)

    def _written(self, request: Instance) -> Written:
        return self.chats.written(*self.chats.read(self._asked(request)))

    def _record(self, kind: str, requests: Sequence[Instance], held: Sequence[tuple[Prompt, Row | None]]) -> None:
        names = [{"task": r.task_name, "doc_id": r.doc_id, "number": r.idx} for r in requests]
        self.records.add(kind, [prompt for prompt, _ in held], [row for _, row in held], names)
