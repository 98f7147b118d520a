"""lm-evaluation-harness over an evicting cache: `python -m retention.harness.lm_eval --model retention ...`.

The command is the harness's own, with our model registered beside its models; it looks for no plugins by itself.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.progress import track

from retention.harness.generation import decoding_of
from retention.harness.prompt import Prompt, batches, divided, parts
from retention.harness.reader import Reader, Weighed
from retention.harness.records import Records, Row
from retention.harness.settings import read_arguments
from retention.serving.decoding import Decoding


class RetentionLM(TemplateLM):
    """A frozen model whose cache is evicted, for log-likelihood, rolling and generation tasks.

    Arguments as in `retention.harness.settings.read_arguments`.
    """

    def __init__(self, pretrained: str, **arguments: Any) -> None:
        super().__init__()
        arguments.pop("max_batch_size", None)
        if str(arguments.get("device", "")).startswith("cuda") and not torch.cuda.is_available():
            arguments["device"] = "auto"  # the command asks for cuda:0 unless told
        self.reading, self.loaded = read_arguments({"pretrained": pretrained, **arguments})
        self.reader = Reader(self.loaded)
        self.tokenizer = self.reader.tokenizer
        self.records = Records(self.reading, self.loaded)
        self.batch_size = self.reading.batch_size
        self._device = self.loaded.model.device
        self._held: list[Row | None] = []
        self._prompts: list[Prompt] = []

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "RetentionLM":
        """A model by its arguments, which win over what the command gives every model."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**given | arg_dict)

    @property
    def eot_token_id(self) -> int:
        """What ends a sequence."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        begins = self.tokenizer.bos_token_id
        return self.eot_token_id if begins is None else int(begins)

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer together."""
        own = getattr(self.loaded.model.config.get_text_config(), "max_position_embeddings", None)
        return int(self.reading.max_length or own or self.tokenizer.model_max_length)

    @property
    def max_gen_toks(self) -> int:
        """Tokens of an answer where the task does not say."""
        return self.reading.max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """Names prompts that the harness keeps for another run."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; those that begin a sequence are added unless the text has them, or it is told not to."""
        adds = self.reader.template.adds_special(string) if add_special_tokens is None else add_special_tokens
        ids: list[int] = self.tokenizer(string, add_special_tokens=adds)["input_ids"]
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as the model's template writes it."""
        how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        text: str = self.tokenizer.apply_chat_template(chat_history, tokenize=False, **how)
        return text

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        found: tuple[list[int], list[int]] = super()._encode_pair(self._plain(context), continuation)
        return found

    def _plain(self, text: str) -> str:
        return parts(text, self.reading.context_end)[0]

    def _divided(self, tokens: Sequence[int], text: str, longest: int) -> Prompt:
        return divided(tokens, text, self.reading.context_end, self.tok_encode, longest)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Weighed]:
        """Log-likelihood of each continuation behind its context, and whether it is the greedy one.

        Continuations of one context share its prefill and its eviction.
        """
        answers: list[Weighed] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        self.records.add("loglikelihood", self._prompts, self._held, _names(requests))
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Weighed]:
        """The same for token ids, with the texts that they come from."""
        told = [self._divided(own, text, max(1, self.max_length + 1 - len(more))) for (text, _), own, more in requests]
        groups: dict[Prompt, list[int]] = {}
        for number, prompt in enumerate(told):
            groups.setdefault(prompt, []).append(number)
        found: list[Weighed | None] = [None] * len(requests)
        self._prompts, self._held = told, [None] * len(requests)
        prompts = list(groups)

        def weigh(cache: Any, chosen: list[Prompt], numbers: list[int]) -> None:
            choices = [[requests[number][2] for number in groups[prompt]] for prompt in chosen]
            held = self.records.held(cache, len(chosen))
            answers = self.reader.weigh(cache, [prompt.question for prompt in chosen], choices)
            for prompt, own, facts in zip(chosen, answers, held, strict=True):
                for number, answer in zip(groups[prompt], own, strict=True):
                    found[number], self._held[number] = answer, facts
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)

        self._over(prompts, weigh, disable=disable_tqdm, title="loglikelihood")
        return [answer for answer in found if answer is not None]

    def _over(
        self, prompts: list[Prompt], work: Callable[[Any, list[Prompt], list[int]], None], *, disable: bool, title: str
    ) -> None:
        """Call `work` with a cache over the contexts of each batch of prompts, and their numbers."""
        together = batches([len(p.context) for p in prompts], self.batch_size, alike=self.reader.chunked)
        with self.reader.open() as empty:
            for numbers in track(together, title, disable=disable):
                chosen = [prompts[number] for number in numbers]
                context = self.reader.text([prompt.context for prompt in chosen]) if chosen[0].context else None
                work(self.reader.prefilled(empty, context), chosen, numbers)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts while they stream through an evicted cache.

        A text is cut into windows of `max_length`, as the harness cuts it; every window streams through a cache of its
        own, chunk by chunk, the budget holding after each: every token is predicted from what was kept of the chunks
        before and from its own chunk. With the policy `full` that is the harness's own rolling log-likelihood.
        """
        windows = [(n, row, count) for n, request in enumerate(requests) for row, count in self._windows(*request.args)]
        totals = [0.0] * len(requests)
        last: list[Row | None] = [None] * len(requests)
        together = batches([len(row) for _, row, _ in windows], self.batch_size, alike=True)
        with self.reader.open() as empty:
            for chosen in track(together, "loglikelihood_rolling", disable=disable_tqdm):
                rows, counts = [windows[place][1] for place in chosen], [windows[place][2] for place in chosen]
                cache, answers = self.reader.stream(empty, rows, counts)
                for place, answer, held in zip(chosen, answers, self.records.held(cache, len(chosen)), strict=True):
                    totals[windows[place][0]] += answer
                    last[windows[place][0]] = held
        prompts = [Prompt((), (), agnostic=True) for _ in requests]
        self.records.add("loglikelihood_rolling", prompts, last, _names(requests))
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _windows(self, text: str) -> Iterator[tuple[list[int], int]]:
        """Rows of tokens, and how many of the last of each are to be predicted; the last row repeats what is before."""
        told = {"prefix_token": self.prefix_token_id, "max_seq_len": self.max_length, "context_len": 1}
        for window in get_rolling_token_windows(self.tok_encode(text), **told):
            before, predicted = make_disjoint_window(window)
            yield [*before, *predicted], len(predicted)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop text, the end of a sequence or `max_gen_toks`; greedy unless a task samples."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        said, held = [""] * len(requests), [None] * len(requests)  # type: list[str], list[Row | None]
        prompts: dict[int, Prompt] = {}
        for group in groups.values():
            decoding = decoding_of(requests[group[0]].args[1], self.max_gen_toks)
            longest = self.max_length - decoding.max_new_tokens
            if longest < 1:
                raise ValueError(
                    f"expected max_gen_toks below max_length = {self.max_length}, got {decoding.max_new_tokens}; lower it"
                )
            texts = [requests[number].args[0] for number in group]
            own = [self._divided(self.tok_encode(self._plain(text)), text, longest) for text in texts]
            prompts |= dict(zip(group, own, strict=True))

            def write(
                cache: Any,
                chosen: list[Prompt],
                numbers: list[int],
                group: list[int] = group,
                decoding: Decoding = decoding,
            ) -> None:
                facts = self.records.held(cache, len(chosen))
                seeds = [decoding.seed + group[number] for number in numbers]
                questions = self.reader.text([prompt.question for prompt in chosen])
                written = self.reader.write(cache, questions, decoding, seeds)
                for number, tokens, row in zip(numbers, written, facts, strict=True):
                    request = requests[group[number]]
                    said[group[number]], held[group[number]] = self.reader.decode(tokens, decoding.stop), row
                    self.cache_hook.add_partial("generate_until", request.args, said[group[number]])

            self._over(own, write, disable=disable_tqdm, title="generate_until")
        self.records.add("generate_until", [prompts[n] for n in range(len(requests))], held, _names(requests))
        return said

    def get_model_info(self) -> dict[str, Any]:
        """Our manifest, beside the harness's own record of the run."""
        return {"retention": self.records.manifest()}


def _names(requests: Sequence[Instance]) -> list[Row]:
    return [{"task": r.task_name, "doc_id": r.doc_id, "number": r.idx} for r in requests]


def main() -> None:
    """The harness's command line with our model among its own."""
    import lm_eval.models  # noqa: F401  (fills the registry, which it leaves alone once it holds anything)
    from lm_eval.__main__ import cli_evaluate

    register_model("retention")(RetentionLM)
    cli_evaluate()


if __name__ == "__main__":
    main()
