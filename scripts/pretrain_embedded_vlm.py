"""Train the shipped embedded vision-language model from nothing, on one CPU core.

A SigLIP tower (one token per 8 x 8 cell), LLaVA's projector and a four-layer Qwen3 decoder learn, along a
curriculum, to answer "which digit is right of this key?" over many images. Seeded; a killed run continues
from its last checkpoint with the same command; a finished run replaces `--out` as a whole.

Usage: python scripts/pretrain_embedded_vlm.py [--seed 0] [--out retention/embedded/weights] [--work outputs/pretrain] [--threads 1]
"""

import argparse
import json
import os
import shutil
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from embedded_parts import ASK, BOS, CELL0, DIGIT0, END, IMAGE, KEY0, PATCHES, START, build_model, build_processor
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from retention.embedded import WEIGHTS
from retention.tasks.scene import N_KEYS, draw_scene

VISION_STEPS, LM_STEPS, WARM_UP, DECAY_FROM = 1500, 1500, 100, 0.6
SAVE_EVERY = 50


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum; the next one starts when running accuracy reaches `advance`."""

    name: str
    batch: int
    advance: float
    images: tuple[int, ...] = ()
    keys: tuple[int, int] = (0, 0)
    questions: int = 0


STAGES = (
    Stage("repeat", 64, 0.95),
    Stage("text 8", 96, 0.95, keys=(8, 8), questions=8),
    Stage("text 16", 64, 0.95, keys=(16, 16), questions=16),
    Stage("images 4", 48, 0.93, (4,), (6, 10), 8),
    Stage("images 8", 32, 0.93, (8,), (12, 20), 16),
    Stage("images 16", 16, 0.93, (16,), (20, 44), 20),
    Stage("images 16-32", 12, 2.0, (16, 24, 32), (24, 64), 24),
)


def pixels(images: np.ndarray) -> torch.Tensor:
    """The processor's normalisation, for a batch of uint8 [n, 32, 32, 3] pictures."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.3) / 0.35


def vision_features(model: nn.Module, images: np.ndarray) -> torch.Tensor:
    """Projected patch features, [n, 16, hidden]."""
    states = model.model.vision_tower(pixel_values=pixels(images)).last_hidden_state
    return model.model.multi_modal_projector(states)


def generator(seed: int, phase: int, step: int) -> np.random.Generator:
    """Randomness of one step, independent of all others: resuming needs no replay."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, phase, step])))


def vision_step(model: nn.Module, rng: np.random.Generator, split: str = "train") -> tuple[torch.Tensor, float]:
    """Stage A: classify every cell into the tied token table by cosine, and match the table's norm."""
    scene = draw_scene(rng, rng.integers(N_KEYS, size=160), n_images=64, split=split, jitter=split == "train")
    features = vision_features(model, scene.images).flatten(0, 1)
    table = model.get_input_embeddings().weight
    target = torch.from_numpy(scene.cells).flatten() + CELL0
    logits = 16 * F.normalize(features, dim=-1) @ F.normalize(table, dim=-1).T
    norms = (features.norm(dim=-1) - table.detach()[target].norm(dim=-1)).square().mean()
    accuracy = (logits.argmax(-1) == target).float().mean().item()
    return F.cross_entropy(logits, target) + 0.1 * norms, accuracy


def repeat_batch(rng: np.random.Generator, stage: Stage) -> tuple[torch.Tensor, torch.Tensor]:
    """Repeated random sequences of random period: what teaches induction. ids and labels [batch, 64]."""
    ids, labels = np.zeros((2, stage.batch, 64), np.int64)
    for row in range(stage.batch):
        period = int(rng.integers(4, 30))
        ids[row] = np.resize(rng.integers(DIGIT0, KEY0 + N_KEYS, period), 64)
        labels[row] = np.where(np.arange(64) >= period, ids[row], -100)
    return torch.from_numpy(ids), torch.from_numpy(labels)


def questions(rng: np.random.Generator, pairs: list[tuple[int, int]], count: int) -> tuple[list[int], list[int]]:
    """`count` turns (ask, key, digit) about distinct keys; labels on the digits only."""
    ids, labels = [], []
    for i in rng.permutation(len(pairs))[:count]:
        key, digit = pairs[i]
        ids += [ASK, KEY0 + key, DIGIT0 + digit]
        labels += [-100, -100, DIGIT0 + digit]
    return ids, labels


def text_batch(rng: np.random.Generator, stage: Stage) -> tuple[torch.Tensor, torch.Tensor]:
    """Key-digit pairs and as many blanks in random order, then questions."""
    rows, targets = [], []
    for _ in range(stage.batch):
        pairs = [(int(k), int(rng.integers(10))) for k in rng.permutation(N_KEYS)[: stage.keys[0]]]
        units = [[KEY0 + k, DIGIT0 + d] for k, d in pairs] + [[CELL0]] * len(pairs)
        context = [BOS] + [t for i in rng.permutation(len(units)) for t in units[i]]
        ids, labels = questions(rng, pairs, stage.questions)
        rows.append(context + ids)
        targets.append([-100] * len(context) + labels)
    return torch.tensor(rows), torch.tensor(targets)


def image_batch(
    model: nn.Module, rng: np.random.Generator, stage: Stage, split: str = "train"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [batch, tokens, hidden] and labels of contexts of images followed by questions."""
    n = int(rng.choice(stage.images))
    n_keys = int(rng.integers(stage.keys[0], min(stage.keys[1], 4 * n, N_KEYS) + 1))
    batch = max(4, round(stage.batch * min(stage.images) / n)) if len(stage.images) > 1 else stage.batch
    rows, targets, images = [], [], []
    for _ in range(batch):
        scene = draw_scene(rng, rng.permutation(N_KEYS)[:n_keys], n_images=n, split=split)
        ids, labels = questions(rng, [(x.key, x.digit) for x in scene.needles], stage.questions)
        context = [BOS] + [START, *[IMAGE] * PATCHES, END] * n
        rows.append(context + ids)
        targets.append([-100] * len(context) + labels)
        images.append(scene.images)
    tokens = torch.tensor(rows)
    with torch.no_grad():
        features = vision_features(model, np.concatenate(images))
    embeds = model.get_input_embeddings()(tokens)
    mask = (tokens == IMAGE)[..., None].expand_as(embeds)
    return embeds.masked_scatter(mask, features), torch.tensor(targets)


def answer_loss(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Next-token cross-entropy and accuracy on labelled positions; inputs are ids or embeddings."""
    name = "input_ids" if inputs.dtype == torch.long else "inputs_embeds"
    hidden = model.get_decoder()(**{name: inputs}, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:] != -100
    logits, target = model.lm_head(hidden[wanted]), labels[:, 1:][wanted]
    return F.cross_entropy(logits, target), (logits.argmax(-1) == target).float().mean().item()


def language_step(model: nn.Module, rng: np.random.Generator, stage: Stage) -> tuple[torch.Tensor, float]:
    """Loss and accuracy of one curriculum batch."""
    if stage.images:
        return answer_loss(model, *image_batch(model, rng, stage))
    return answer_loss(model, *(text_batch if stage.questions else repeat_batch)(rng, stage))


class Run:
    """Model, optimiser and counters of a resumable run; its state is one file written atomically."""

    def __init__(self, seed: int, work: Path) -> None:
        self.seed, self.file = seed, work / f"seed{seed}.pt"
        self.model = build_model(seed)
        self.phase, self.step, self.stage, self.elapsed = 0, 0, 0, 0.0
        self.recent: deque[float] = deque(maxlen=12)
        self.log: list[dict] = []
        self.start_phase()
        work.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            self.load()
        self.clock = time.monotonic() - self.elapsed

    def start_phase(self) -> None:
        """Optimiser for vision and token table (phase 0) or for the decoder with both frozen (phase 1).

        The table stays frozen with the projector that was fitted to it: patches keep meaning tokens.
        """
        model = self.model
        vision = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
        table = [model.get_input_embeddings().weight]
        for p in vision + table:
            p.requires_grad_(self.phase == 0)
        params = vision + table if self.phase == 0 else [p for p in model.get_decoder().parameters() if p.requires_grad]
        rate, decay, betas = ((3e-3, 0.05, (0.9, 0.999)), (2e-3, 0.01, (0.9, 0.98)))[self.phase]
        self.optimiser = torch.optim.AdamW(params, rate, betas, weight_decay=decay)
        total = (VISION_STEPS, LM_STEPS)[self.phase]
        warm = (1, WARM_UP)[self.phase]
        flat = (0.0, DECAY_FROM)[self.phase] * total
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda s: min((s + 1) / warm, 1.0, max(0.0, (total - s) / (total - flat)))
        )

    def save(self) -> None:
        """Write the whole state beside its final name, then rename."""
        state = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "counters": [self.phase, self.step, self.stage],
            "recent": list(self.recent),
            "log": json.dumps(self.log),
            "elapsed": time.monotonic() - self.clock,
        }
        torch.save(state, self.file.with_suffix(".tmp"))
        os.replace(self.file.with_suffix(".tmp"), self.file)

    def load(self) -> None:
        """Continue from the saved state."""
        state = torch.load(self.file, weights_only=True)  # noqa: TID251  (our own resume file, tensors only)
        self.phase, self.step, self.stage = state["counters"]
        self.model.load_state_dict(state["model"])
        self.start_phase()
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.recent.extend(state["recent"])
        self.log, self.elapsed = json.loads(state["log"]), state["elapsed"]

    def advance(self) -> str:
        """One optimisation step; returns a line for the progress bar."""
        rng = generator(self.seed, self.phase, self.step)
        stage = STAGES[self.stage]
        loss, accuracy = vision_step(self.model, rng) if self.phase == 0 else language_step(self.model, rng, stage)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in self.optimiser.param_groups for p in g["params"]], 1.0)
        self.optimiser.step()
        self.schedule.step()
        self.step += 1
        self.recent.append(accuracy)
        running = sum(self.recent) / len(self.recent)
        if self.phase == 1 and len(self.recent) == self.recent.maxlen and running >= stage.advance:
            self.note(f"passed {stage.name}", running)
            self.stage, self.recent = self.stage + 1, deque(maxlen=self.recent.maxlen)
        return f"{'vision' if self.phase == 0 else stage.name}: loss {loss.item():.3f} accuracy {running:.3f}"

    def note(self, event: str, accuracy: float) -> None:
        """Record an event with its step and elapsed seconds."""
        elapsed = round(time.monotonic() - self.clock)
        self.log.append({"event": event, "step": self.step, "seconds": elapsed, "accuracy": round(accuracy, 4)})

    def run(self) -> None:
        """Both phases with a progress bar, saving every `SAVE_EVERY` steps."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns) as bar:
            task = bar.add_task("start", total=VISION_STEPS + LM_STEPS)
            while self.phase < 2:
                total = (VISION_STEPS, LM_STEPS)[self.phase]
                while self.step < total:
                    line = self.advance()
                    bar.update(task, description=line, completed=self.step + self.phase * VISION_STEPS)
                    if self.step % SAVE_EVERY == 0:
                        self.save()
                        bar.console.log(f"step {self.step} {line}", highlight=False)
                self.note(f"end of phase {self.phase}", sum(self.recent) / len(self.recent))
                self.phase, self.step = self.phase + 1, 0
                self.recent.clear()
                if self.phase < 2:
                    self.start_phase()
                self.save()


@torch.no_grad()
def held_out(model: nn.Module) -> dict[str, float]:
    """Accuracy on validation scans: cells, and answers with 16, 24 and 32 images (gold answers fed back)."""
    report = {"cells": vision_step(model, generator(1, 9, 0), "val")[1]}
    for n, keys in ((16, 24), (16, 40), (24, 36), (32, 48)):
        stage = Stage("held out", 32, 2.0, (n,), (keys, keys), 8)
        scores = [
            answer_loss(model, *image_batch(model, generator(1, 10 + n + keys, i), stage, "val"))[1] for i in range(4)
        ]
        report[f"{n} images, {keys} keys"] = round(sum(scores) / len(scores), 4)
    return report


def name_as_published(file: Path) -> None:
    """The tower's weights under the names that LLaVA checkpoints of the hub have, which every transformers reads."""
    with safe_open(file, "pt") as held:
        tensors, metadata = {name: held.get_tensor(name) for name in held.keys()}, held.metadata()  # noqa: SIM118
    tower, level = "vision_tower.", "vision_tower.vision_model."
    named = {
        level + name.removeprefix(tower) if name.startswith(tower) and not name.startswith(level) else name: tensor
        for name, tensor in tensors.items()
    }
    save_file(named, file, metadata=metadata)


def export(run: Run, out: Path, report: dict) -> None:
    """Write model, processor and training record to a temporary folder, then swap it in."""
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    run.model.save_pretrained(fresh)
    name_as_published(fresh / "model.safetensors")
    build_processor().save_pretrained(fresh)
    record = {
        "seed": run.seed,
        "held_out_full_cache": report,
        "log": run.log,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": hf.__version__,
    }
    (fresh / "training_record.json").write_text(json.dumps(record, indent=2) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(fresh, out)


def main() -> None:
    """Train, measure on held-out scans, export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--work", type=Path, default=Path("outputs/pretrain"))
    parser.add_argument(
        "--threads", type=int, default=1, help="one makes the weights independent of the number of cores"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = Run(args.seed, args.work)
    run.run()
    report = held_out(run.model.eval())
    print(json.dumps({"held_out": report, "log": run.log}, indent=2))
    export(run, args.out, report)


if __name__ == "__main__":
    main()
