"""Check any model of the hub, or a folder, in a few minutes: identities, memory, speed, an answer under each policy.

    python scripts/smoke_hf.py llava-hf/llava-1.5-7b-hf
    python scripts/smoke_hf.py Qwen/Qwen3-VL-4B-Instruct --dtype bfloat16 --budget 10% --images 8
    python scripts/smoke_hf.py my/model --quantization 4bit

Ends with a block to paste into a report where something is off; the exit status is the number of failed checks.
"""

import argparse
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import retention as rt
from retention.attach.hidden import entrance, final_hidden
from retention.attach.soft import attach_gates
from retention.data.example import Example, Segment, Turn
from retention.data.render import Rendered, Renderer
from retention.gates.dbtrim import DBTrim
from retention.models import FAMILIES, family_of
from retention.models.family import head_of, model_shape
from retention.models.load import QUANTIZATIONS, load_frozen
from retention.policies import POLICIES
from retention.provenance import hardware, package_versions
from retention.tasks.answering import answer_turns, prefill
from retention.tasks.needles import Needles

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
"""Largest difference of logits by the largest logit, of computations that are the same but for rounding."""
CITIES = ("Oslo", "Quito", "Cairo", "Lima", "Perth", "Turin", "Kyoto", "Accra", "Delhi", "Bergen", "Porto", "Leeds")


@dataclass
class Smoke:
    """One model under check, and what was found."""

    model: Any
    renderer: Renderer
    rendered: Rendered
    budget: str
    found: list[tuple[str, bool, str]] = field(default_factory=list)

    def note(self, what: str, holds: bool, seen: str) -> None:
        """Print a check and remember it."""
        self.found.append((what, holds, seen))
        print(f"{'ok  ' if holds else 'FAIL'}  {what}: {seen}", flush=True)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The context on the model's device; pixels in its precision."""
        dtype = self.model.dtype
        moved = {k: v.to(self.model.device) for k, v in self.rendered.inputs.items()}
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in moved.items()}


def facts(count: int) -> Example:
    """A text in which one of many facts is asked about."""
    draw = random.Random(0)
    numbers = {f"{city}-{i}": draw.randrange(100, 1000) for i in range(count) for city in [draw.choice(CITIES)]}
    text = "Remember these numbers.\n" + "\n".join(f"The number of {k} is {v}." for k, v in numbers.items())
    asked = draw.choice(list(numbers))
    turn = Turn(f"\nWhat is the number of {asked}? Answer with the number only.", str(numbers[asked]), max_new_tokens=8)
    return Example("facts", [Segment("text", text)], [turn], "deferred_turn")


def pictures(images: int) -> Example:
    """Rendered pictures, one of whose digits is asked about."""
    task = Needles(n_images=images, n_needles=2 * images, n_turns=1, cell_px=56)
    return task.example(0, "test", 0, style="natural")


def identities(smoke: Smoke) -> rt.RetentionGates:
    """Open gates, an ample budget, one training step; gives fresh gates."""
    model, inputs = smoke.model, smoke.inputs
    gates = rt.RetentionGates.for_model(DBTrim(), model)
    for name, parameter in gates.named_parameters():
        if "offset" in name:
            torch.nn.init.constant_(parameter, 1e4)
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits[:, -1].float()
        with attach_gates(model, gates):
            got = model(**inputs, use_cache=False).logits[:, -1].float()
    far = float((got - expected).abs().max() / expected.abs().max())
    smoke.note("gates that never forget give the base", far <= TOLERANCE[model.dtype], f"logits differ by {far:.1e}")
    full, ample = answer(smoke, "full", None), answer(smoke, "knorm", rt.Budget(1e6))
    smoke.note("a budget beyond the context answers as the full cache", full == ample, f"{ample!r} and {full!r}")
    gates = rt.RetentionGates.for_model(DBTrim(), model)
    with attach_gates(model, gates) as record:
        hidden = final_hidden(model, entrance(model, inputs))
        loss = head_of(model)(hidden[:, -8:]).float().logsumexp(-1).mean() + sum(x.mean() for x in record.stacked())
        loss.backward()
    learned = all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in gates.parameters())
    touched = any(p.grad is not None for p in model.parameters())
    smoke.note("a training step reaches every gate and no weight of the base", learned and not touched, "gradients")
    hooks = sum(len(m._forward_pre_hooks) for m in model.get_decoder().modules())
    smoke.note("leaving takes everything off the model", not hooks, f"{hooks} hooks on the decoder")
    return gates


def answer(smoke: Smoke, policy: str, budget: rt.Budget | None, **more: Any) -> str:
    """What the model says to the question under a policy."""
    config = rt.CacheConfig(**({} if budget is None else {"budget": budget}))
    tokenizer = smoke.renderer.processor
    with rt.evicting(smoke.model, POLICIES[policy](), config, tokenizer=tokenizer, **more) as cache:
        prefill(smoke.model, cache, typed(smoke), pad=smoke.renderer.pad)
        ids = answer_turns(smoke.model, cache, smoke.rendered, pad=smoke.renderer.pad)[0][0]
    return smoke.renderer.decode(ids)


def typed(smoke: Smoke) -> Rendered:
    """The context with pixels in the model's precision."""
    smoke.rendered.inputs = smoke.inputs
    return smoke.rendered


def memory_and_speed(smoke: Smoke, steps: int) -> None:
    """Bytes of the cache, and tokens a second over a full and an evicted one, in turns."""
    model, budget = smoke.model, rt.Budget.parse(smoke.budget)
    with rt.evicting(model, POLICIES["full"](), rt.CacheConfig()) as cache, torch.no_grad():
        prefill(model, cache, typed(smoke), pad=smoke.renderer.pad)
        small = cache.fork(POLICIES["knorm"](), rt.CacheConfig(budget=budget, allocator="global"))
        small.evict()
        held = [sum(c.bytes().physical[item] for item in ("keys", "values", "slack")) for c in (cache, small)]
        spent, token = [0.0, 0.0], torch.zeros(1, 1, dtype=torch.long, device=model.device)
        for step in range(2 * (steps + 1)):
            number = step % 2
            begin = time.perf_counter()
            model(input_ids=token, past_key_values=(cache, small)[number], use_cache=True)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            spent[number] += (time.perf_counter() - begin) * (step > 1)  # the first of each warms up
    share = held[1] / held[0]
    wanted = 1.2 * int(small.kept().sum()) / int(cache.kept().sum()) + 0.02
    smoke.note("evicted bytes are freed", share <= wanted, f"{held[1] / 2**20:.2f} of {held[0] / 2**20:.2f} MiB")
    rate = [steps / s for s in spent]
    print(
        f"      decoding: {rate[0]:.1f} tokens/s full, {rate[1]:.1f} at {smoke.budget} ({rate[1] / rate[0]:.2f} times)"
    )


def answers(smoke: Smoke) -> None:
    """One answer under every policy that needs no trained gates."""
    asked = smoke.rendered.examples[0].turns[0]
    print(
        f"\nanswers at {smoke.budget} of {smoke.rendered.lengths[0]} tokens; {asked.question.strip()!r} is {asked.answer!r}"
    )
    for name in sorted(POLICIES):
        if POLICIES[name]().needs_gates or POLICIES[name].allocator == "quota" or name.endswith("oracle"):
            continue
        try:
            print(f"      {name:20} {answer(smoke, name, rt.Budget.parse(smoke.budget))!r}", flush=True)
        except ValueError as error:
            print(f"      {name:20} does not apply: {error}", flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quantization", default="none", choices=QUANTIZATIONS)
    parser.add_argument("--budget", default="25%", help="of the policies' answers, such as 25%% or 512")
    parser.add_argument("--images", type=int, default=4, help="pictures of the context, for vision-language models")
    parser.add_argument("--facts", type=int, default=100, help="facts of the context, for text models")
    parser.add_argument("--steps", type=int, default=32, help="decoded tokens that are timed")
    return parser.parse_args()


def main() -> int:
    """Exit status: failed checks."""
    options, begin = parse(), time.perf_counter()
    dtype = getattr(torch, options.dtype)
    model, processor = load_frozen(options.model, dtype=dtype, device=options.device, quantization=options.quantization)
    family, shape = family_of(model), model_shape(model)
    visual = family.visual_ids(model.config)
    renderer = Renderer(processor, visual)
    rendered = renderer.render([pictures(options.images) if visual else facts(options.facts)])
    listed = "listed" if model.config.model_type in FAMILIES else "not listed, treated as a standard decoder"
    print(f"{options.model}: {model.config.model_type} ({listed}), {family}")
    print(f"{shape.num_layers} evictable layers of {len(model.get_decoder().layers)}, {shape.num_kv_heads} KV heads of {shape.head_dim}")  # fmt: skip
    print(f"context: {rendered.lengths[0]} tokens, {int(rendered.visual.sum())} of them visual\n")
    smoke = Smoke(model, renderer, rendered, options.budget)
    if visual:
        marked = int(rendered.visual.sum())
        smoke.note("visual tokens are found", marked > 0, f"{marked} of {options.images} images")
    identities(smoke)
    memory_and_speed(smoke, options.steps)
    answers(smoke)
    failed = [what for what, holds, _ in smoke.found if not holds]
    print(f"\n{len(smoke.found) - len(failed)} of {len(smoke.found)} checks hold, {time.perf_counter() - begin:.0f} s")
    if failed:
        print("\nto report:")
        for key, value in {"command": " ".join(sys.argv[1:]), **package_versions(), **hardware()}.items():
            print(f"  {key}: {value}")
        for what, holds, seen in smoke.found:
            print(f"  {'ok  ' if holds else 'FAIL'}  {what}: {seen}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
