"""How far a patch lies from its image's root, as a weight: two- and three-dimensional retention, in closed form."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

Places = Int[Tensor, "batch heads keys 4"]
"""Image, frame, row and column of each entry; the image of what is no patch is -1."""
NEAR, FAR = 5.0, 9.0
"""`-log2(1 - gamma)` of the first and the last head: 1 - 1/32 to 1 - 1/512, the range of retention networks."""


def geometric_log_gammas(heads: int) -> Float[Tensor, " heads"]:
    """Log decay per step of distance of each head, `1 - gamma` falling geometrically (RetNet, arXiv 2307.08621)."""
    return torch.log1p(-(2.0 ** -torch.linspace(NEAR, FAR, heads)))


def root_places(
    places: Places, score: Float[Tensor, "batch heads keys"], root: str
) -> Float[Tensor, "batch heads keys 3"]:
    """Frame, row and column of the root of each entry's image: its patch of largest score, or its middle (`center`).

    Of equal scores the later entry counts. Entries of no image get anything.
    """
    image, where = places[..., 0].clamp(min=0).long(), places[..., 1:]
    patch = places[..., 0] >= 0
    shape = (*image.shape[:2], int(image.max()) + 1 if image.numel() else 1)

    def over_image(x: Tensor, how: str) -> Tensor:
        """Largest or smallest of each image, at each of its entries."""
        nothing = torch.full(shape, float("-inf" if how == "amax" else "inf"), device=x.device, dtype=x.dtype)
        return nothing.scatter_reduce(2, image, x.masked_fill(~patch, nothing[0, 0, 0].item()), how).gather(2, image)

    if root == "center":
        axes = where.to(score.dtype).unbind(-1)
        return torch.stack([(over_image(x, "amax") + over_image(x, "amin")) / 2 for x in axes], -1)
    columns = torch.arange(image.shape[2], device=image.device, dtype=torch.float64).expand(image.shape)
    best = score.detach() == over_image(score.detach(), "amax")
    chosen = over_image(columns.masked_fill(~best, -1.0), "amax").clamp(min=0).long()
    return where.gather(2, chosen[..., None].expand(where.shape)).to(score.dtype)


def spatial_decay(
    places: Places, roots: Float[Tensor, "batch heads keys 3"], log_gammas: Float[Tensor, "3 heads"]
) -> Float[Tensor, "batch heads keys"]:
    """`gamma_t^|t - t0| gamma_y^|y - y0| gamma_x^|x - x0|` (arXiv 2605.04075 in form; a reconstruction); 1 elsewhere.

    Separable: a scan over the rows and one over the columns of their results weigh every patch the same.
    """
    distance = (places[..., 1:] - roots).abs()
    decay = (distance * log_gammas.T[None, :, None].to(distance.dtype)).sum(-1).exp()
    return torch.where(places[..., 0] >= 0, decay, 1.0)
