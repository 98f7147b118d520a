"""The student's own weights: LoRA beside the frozen decoder's, trained with the gates, exported as a PEFT adapter."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from retention.files import write_bytes, write_json
from retention.models.family import decoder_of
from retention.training.config import TrainerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "student"


class Student(nn.Module):
    """LoRA (arXiv 2106.09685) on linear layers of a decoder: `W x + alpha / rank * B A x`, B = 0 at first.

    The layers are put in place inside the model, which keeps its class; this module holds the same parameters, for
    optimiser and checkpoints. They stay in the model, on except inside `off()`.
    """

    def __init__(self, model: "PreTrainedModel", config: TrainerConfig, *, seed: int) -> None:
        super().__init__()
        self.frozen = (model,)
        self.config = _lora(model, config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _peft().inject_adapter_in_model(self.config, model, adapter_name=NAME)
        for name, parameter in model.named_parameters():
            if f".{NAME}." in name:
                parameter.data = parameter.data.float()  # a half-precision base would round the optimiser's steps away
                self.register_parameter(name.replace(".", "/"), parameter)
        model.eval()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the model is the frozen base."""
        layers = self._layers()
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def _layers(self) -> list[Any]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        return [module for module in self.frozen[0].modules() if isinstance(module, BaseTunerLayer)]

    def card(self) -> dict[str, Any]:
        """The adapter's settings as PEFT writes them."""
        told = {k: sorted(v) if isinstance(v, set) else v for k, v in self.config.to_dict().items()}
        return told | {"inference_mode": True, "base_model_name_or_path": self.frozen[0].config.name_or_path}

    def export(self, folder: Path) -> Path:
        """Write the layers as they are now."""
        return write_adapter(folder, self.state_dict(), self.card())


def write_adapter(folder: Path, state: Mapping[str, Tensor], card: Mapping[str, Any]) -> Path:
    """Write a student's state as an ordinary PEFT adapter: each file whole or not at all, the one readers look for last."""
    own = {name.replace("/", ".").replace(f".{NAME}.", "."): x for name, x in state.items()}
    tensors = {f"base_model.model.{name}": x.detach().cpu().contiguous() for name, x in own.items()}
    write_bytes(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_json(folder / "adapter_config.json", dict(card))
    return folder


def adapter_record(config: TrainerConfig) -> dict[str, Any]:
    """What the gates' card says of the adapter they were trained beside."""
    return {"rank": config.lora_rank, "alpha": config.lora_alpha, "targets": config.lora_targets}


def _peft() -> Any:
    """The package, or a sentence that says how to get it."""
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            "trainer.lora_rank needs the package peft; install it with pip install 'retention[peft]'"
        ) from error
    return peft


def _lora(model: "PreTrainedModel", config: TrainerConfig) -> Any:
    """The adapter's settings; its layers are those of the decoder alone, since images are encoded once for both."""
    lora, decoder = _peft().LoraConfig, decoder_of(model)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "a student of its own cannot be trained beside an adapter that is attached; set model.adapter_mode=merged"
        )
    inside = next(name for name, module in model.named_modules() if module is decoder)
    pattern = rf"{re.escape(inside)}\..*\.(?:{'|'.join(map(re.escape, config.lora_targets))})"
    names = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    missing = [x for x in config.lora_targets if not any(name.endswith(f".{x}") for name in names)]
    if missing:
        linear = (name for name, module in decoder.named_modules() if isinstance(module, nn.Linear))
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(f"expected trainer.lora_targets among {', '.join(known)}, got {missing[0]!r}")
    return lora(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=pattern)
