"""The frozen base spread over a run's processes: each holds a share of every decoder layer, whole for its forward only."""

from typing import TYPE_CHECKING

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from retention.models.family import decoder_of
from retention.training.devices import world_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shard_base(model: "PreTrainedModel", device: torch.device) -> None:
    """Leave each process its share of the decoder's layers, gathered layer by layer in forwards and backwards.

    Each layer is a unit of its own (torch's `fully_shard`), so the decoder may be entered anywhere, as teacher and
    student do. Held whole by every process: norms and biases, which identify a base; what is trained; and what is not
    run equally often by all, as gathering needs: embeddings, head (as many chunks as there are labels) and vision tower
    (not at all in rows of text). Layers go to the device one at a time. The processes must have joined.
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    for layer in decoder_of(model).layers:
        whole = {p for p in layer.parameters() if p.dim() < 2 or p.requires_grad}
        fully_shard(layer.to(device), mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it without its signature
