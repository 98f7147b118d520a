"""kvpress's side of scripts/bench_kvpress.py, and the measuring that both sides share.

Runs inside kvpress's own environment (torch, transformers, safetensors, kvpress) and imports no `retention`. Started with
the work folder, it reads one JSON request per line and answers each with one JSON line, so that two long-lived processes
can take turns and only one works at a time.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PADDED, SINGLE = 64, 40
"""Tokens of the long and of the left-padded row in the check of padded batches."""
ONE_LAYER = "one_layer"
"""Where, in the work folder, the model of one layer is: a pool per layer and one pool for all are the same there."""


# Both sides.


def held_bytes(root: Any) -> int:
    """Bytes of all storages reachable from an object, each counted once; modules are not entered."""
    storages: dict[int, int] = {}
    known: set[int] = set()
    todo = [root]
    while todo:
        item = todo.pop()
        if id(item) in known or isinstance(item, nn.Module | type):
            continue
        known.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            todo.extend(item.values())
        elif isinstance(item, list | tuple | set):
            todo.extend(item)
        elif type(item).__module__.split(".")[0] not in ("builtins", "torch"):
            todo.extend(vars(item).values() if hasattr(item, "__dict__") else [])
            slots = [name for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ())]
            todo.extend(getattr(item, name) for name in slots if hasattr(item, name))
    return sum(storages.values())


def load_model(folder: Path) -> Any:
    """The Qwen3 model of a work folder, fp32, SDPA."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**json.loads((folder / "config.json").read_text()))
    config._attn_implementation = "sdpa"
    model = Qwen3ForCausalLM(config).float().eval().requires_grad_(False)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


@contextmanager
def watched(model: Any, cache: Any, seen: list[int]) -> Iterator[None]:
    """Note what the cache holds at the end of each layer's attention, before anything else that hooks into it."""
    hooks = [
        layer.self_attn.register_forward_hook(lambda *_: seen.append(held_bytes(cache))) for layer in model.model.layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def measure(
    model: Any,
    ids: Tensor,
    new_tokens: int,
    cache: Any,
    prefilling: Callable[[], AbstractContextManager] = nullcontext,
    after_prefill: Callable[[], dict] = dict,
    trace: Path | None = None,
) -> dict:
    """One prompt of `ids` [1, tokens], then greedy decoding by plain forward calls with explicit positions.

    Seconds are CPU time of this process, which runs one thread; wall clock beside them. With `trace` nothing is timed
    for use: the peak while prefilling is noted, and the decoded tokens' logits are written to that file.
    """
    peaks: list[int] = []
    with watched(model, cache, peaks) if trace else nullcontext(), prefilling():
        begun, wall = time.process_time(), time.perf_counter()
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        row: dict[str, Any] = {"prefill_s": time.process_time() - begun, "prefill_wall_s": time.perf_counter() - wall}
    row["bytes"] = held_bytes(cache)
    row |= after_prefill()
    tokens, rows = [], []
    begun, wall = time.process_time(), time.perf_counter()
    for step in range(new_tokens):
        place = torch.tensor([[ids.shape[1] + step]])
        logits = model(input_ids=token, past_key_values=cache, position_ids=place, use_cache=True).logits
        tokens.append(int(token))
        token = logits[:, -1].argmax(-1, keepdim=True)
        if trace:
            rows.append(logits[0, -1])
    row["decode_ms"] = 1000 * (time.process_time() - begun) / new_tokens
    row["decode_wall_ms"] = 1000 * (time.perf_counter() - wall) / new_tokens
    row["bytes_after_decode"] = held_bytes(cache)
    if trace:
        row["peak_bytes"] = max(*peaks, row["bytes"])
        row["tokens"] = tokens
        save_file({"logits": torch.stack(rows)}, trace)
    return row


@torch.no_grad()
def write_full_logits(model: Any, ids: Tensor, file: Path) -> dict:
    """The stock cache's logits of the whole prompt and of one decoded token, for the other side to compare."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    prompt = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0]
    place = torch.tensor([[ids.shape[1]]])
    token = ids[:, :1]
    step = model(input_ids=token, past_key_values=cache, position_ids=place, use_cache=True).logits[0]
    save_file({"logits": torch.cat([prompt, step])}, file)
    return {"entries": cache.get_seq_length()}


def padded_batch(ids: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two rows of PADDED and SINGLE tokens, the second left-padded; and the second alone."""
    rows = torch.zeros(2, PADDED, dtype=torch.long)
    mask = torch.ones(2, PADDED, dtype=torch.long)
    rows[0], rows[1, -SINGLE:] = ids[0, :PADDED], ids[0, PADDED : PADDED + SINGLE]
    mask[1, :-SINGLE] = 0
    alone = {"input_ids": rows[1:, -SINGLE:], "attention_mask": mask[1:, -SINGLE:]}
    return {"input_ids": rows, "attention_mask": mask}, alone


def generated(model: Any, inputs: dict[str, Tensor], cache: Any) -> Tensor:
    """Logits of the second token that `generate()` makes of the last row: the first one that sees an evicted cache."""
    done = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=2,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return done.logits[1][-1]


def gap(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    return float((a - b).abs().max())


def described(error: Exception) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def serve(answer: Callable[[dict], dict], requests: Iterable[str], replies: TextIO) -> None:
    """Answer JSON lines until the requests end; what goes wrong is answered too."""
    for line in requests:
        try:
            reply = answer(json.loads(line))
        except Exception as error:
            reply = {"error": described(error)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def serve_pipes(answer: Callable[[dict], dict]) -> None:
    """`serve` over stdin and stdout, one thread; what libraries print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    serve(answer, iter(sys.stdin.readline, ""), replies)


class Side:
    """Answers a request by the method that it names."""

    answers: tuple[str, ...]

    def __call__(self, request: dict) -> dict:
        """Dispatch by `do`."""
        do = request.pop("do")
        if do not in self.answers:
            raise ValueError(f"expected {', '.join(self.answers[:-1])} or {self.answers[-1]}, got {do!r}")
        return getattr(self, do)(**request)

    def versions(self) -> dict:
        """Of what scores and keep depend on."""
        return {name: version(name) for name in ("kvpress", "torch", "transformers")}


class MeasuredSide(Side):
    """A side of the benchmark: two models and one prompt, read from the work folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = load_model(folder)
        self.one_layer = load_model(folder / ONE_LAYER)
        self.ids = load_file(folder / "ids.safetensors")["ids"]

    def logits(self, prompt: int, file: str) -> dict:
        """Of the stock cache."""
        return write_full_logits(self.model, self.ids[:, :prompt], self.folder / file)


# kvpress's side.


def forget_masks(model: Any) -> None:
    """Head-adaptive presses leave their masks on the modules, where the next run would find them."""
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None


class Kvpress(MeasuredSide):
    """Answers requests with kvpress."""

    answers = ("versions", "logits", "run", "checks")

    def versions(self) -> dict:
        """And of Python."""
        return {"python": sys.version.split()[0]} | super().versions()

    def press(self, method: str, share: float) -> Any:
        """The press of a row that evicts this share."""
        from kvpress import AdaKVPress, KnormPress

        press = KnormPress(compression_ratio=share)
        return AdaKVPress(press) if method == "adakv_knorm" else press

    def kept(self, model: Any, cache: Any) -> dict:
        """Entries attention can still see, and the bytes of the index tensors that hide the others."""
        masks = [layer.self_attn.masked_key_indices for layer in model.model.layers]
        counts = []
        for layer, mask in zip(cache.layers, masks, strict=True):
            count = torch.full((layer.keys.shape[1],), layer.keys.shape[2])
            if mask is not None:
                count -= torch.bincount(mask[1], minlength=len(count))
            counts.append(count)
        table = torch.stack(counts)
        least, most = table.min(), table.max()
        return {
            "kept": int(table.sum()), "kept_least": int(least), "kept_most": int(most), "beside_bytes": held_bytes(masks)
        }  # fmt: skip

    def run(
        self, method: str, prompt: int, kept: int, new_tokens: int, trace: str | None = None, one_layer: bool = False
    ) -> dict:
        """One row: prefill inside the press, decode outside, as kvpress's own pipeline does."""
        from transformers import DynamicCache

        model = self.one_layer if one_layer else self.model
        forget_masks(model)
        # kvpress rounds tokens x (1 - ratio) down: half an entry more gives exactly what is asked for.
        press = None if method == "full" else self.press(method, 1 - (kept + 0.5) / prompt)
        cache = DynamicCache(config=model.config)
        try:
            return measure(
                model,
                self.ids[:, :prompt],
                new_tokens,
                cache,
                nullcontext if press is None else lambda: press(model),
                lambda: self.kept(model, cache),
                self.folder / trace if trace else None,
            )
        finally:
            forget_masks(model)

    @torch.no_grad()
    def checks(self) -> dict:
        """How kvpress behaves at 50% in situations that the rows avoid."""
        from transformers import DynamicCache

        model, found = self.model, {}
        batch, alone = padded_batch(self.ids)
        logits, caches = {}, {}
        for name, press in (("none", None), ("knorm", self.press("knorm", 0.5))):
            for inputs, of in ((batch, "batch"), (alone, "alone")):
                forget_masks(model)
                caches[name, of] = DynamicCache(config=model.config)
                with nullcontext() if press is None else press(model):
                    logits[name, of] = generated(model, inputs, caches[name, of])
        found["padded_difference_full"] = gap(logits["none", "batch"], logits["none", "alone"])
        found["padded_difference"] = gap(logits["knorm", "batch"], logits["knorm", "alone"])
        slots = [
            self.slots(*pair)
            for pair in zip(caches["knorm", "batch"].layers, caches["none", "batch"].layers, strict=True)
        ]
        found["padded_kept"] = slots[0].shape[-1]
        found["padded_kept_padding"] = float((torch.stack(slots) < PADDED - SINGLE).float().mean())

        cache = DynamicCache(config=model.config)
        with self.press("knorm", 0.5)(model):
            for start in (0, 64):
                place = torch.arange(start, start + 64)[None]
                model(input_ids=self.ids[:, start : start + 64], past_key_values=cache, position_ids=place)
        found["chunked_kept"] = cache.get_seq_length()

        steps = []
        for place in (None, torch.tensor([[128]])):
            forget_masks(model)
            cache = DynamicCache(config=model.config)
            with self.press("knorm", 0.5)(model):
                model(input_ids=self.ids[:, :128], past_key_values=cache)
            steps.append(model(input_ids=self.ids[:, 128:129], past_key_values=cache, position_ids=place).logits)
        found["positions_difference"] = gap(*steps)

        forget_masks(model)
        cache = DynamicCache(config=model.config)
        with self.press("adakv_knorm", 0.5)(model):
            model(input_ids=self.ids[:, :128], past_key_values=cache)
        try:
            model(input_ids=self.ids[:, 128:176], past_key_values=cache, position_ids=torch.arange(128, 176)[None])
            found["follow_up"] = "ran"
        except Exception as error:
            found["follow_up"] = described(error)
        forget_masks(model)
        return found

    def slots(self, evicted: Any, full: Any) -> Tensor:
        """Columns of the padded row's prompt that an evicted layer still holds, by head: keys are looked up by value."""
        kept, known = evicted.keys[1, :, :-1], full.keys[1, :, :PADDED]
        return (kept[:, :, None] - known[:, None]).abs().amax(-1).argmin(-1)


if __name__ == "__main__":
    serve_pipes(Kvpress(Path(sys.argv[1])))
