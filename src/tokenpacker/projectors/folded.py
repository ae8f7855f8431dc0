"""TokenPacker for inference: the tokens of `token_packer.py` from folded weights, in fewer multiplications.

Folding is algebra, exact but for rounding:

- A LayerNorm after a linear layer. LayerNorm subtracts the mean; centring the linear's weight and bias does that
  beforehand. It then divides by the root mean square, which no rotation changes. So with the centred weight A = Q R,
  Q a rotation and R upper triangular, LayerNorm(A x + b) = g * Q (y / rms(y)) + beta, where y = R x + Q^T b.
  R costs half of A; g, Q and beta go into the linear layers that read the norm's output.
- Keys. A score is the product of a query with a projected key. It equals the product of the key itself with the query
  projected back, once for each head. The softmax cancels what beta and the projection's bias add to every score.
- Values. The shares of a window sum to one, so values are mixed first and projected once for each window.
- The output projection of the attention and the first linear of the output MLP are one linear layer.

The first linears of keys and values stay apart: one product with 2C outputs was no faster and needs more memory.

Shapes: as in `token_packer.py`; n tiles at a time, E = C/H.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenpacker.features import VisionFeatures
from tokenpacker.projectors.base import Projector
from tokenpacker.projectors.layers import two_linears
from tokenpacker.projectors.token_packer import (
    LAYER_NORM_EPS,
    TokenPacker,
    TokenPackerProjectorConfig,
    coarse_query,
    split_windows,
    window_mask,
)

PATCHES_AT_A_TIME = 2304  # four tiles of CLIP-L/336: enough for full speed
BLOCK = 256  # columns of a triangular product that are computed together


class TriangularNorm(nn.Module):
    """A linear layer with an upper triangular weight (C, C), and the factor for a mean square of 1 after it."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, C) -> the linear's result (rows, C), and for each row the factor (rows, 1) still to multiply by."""
        hidden = torch.empty_like(tokens)
        for start in range(0, len(self.bias), BLOCK):
            block = slice(start, start + BLOCK)
            hidden[:, block] = F.linear(tokens[:, start:], self.weight[block, start:], self.bias[block])
        at_least_float32 = torch.promote_types(hidden.dtype, torch.float32)
        norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=at_least_float32)
        return hidden, (norm.square() / hidden.shape[-1] + LAYER_NORM_EPS).rsqrt().to(hidden.dtype)


class FoldedTokenPacker(Projector):
    """A `TokenPacker` with folded weights, which `TokenPacker.fold` makes. Its weights are frozen: it is not trained.

    Its tokens differ from the projector's by rounding, in float32 about 1e-6 of the largest value. Both are equally
    near to the exact ones. A model that holds it is not saved: save the model with the projector itself.

    The attention takes a few tiles at a time, so that its memory does not grow with their number. A compiled or
    exported graph, which serves any number of tiles, takes all at once.
    """

    config: TokenPackerProjectorConfig

    def __init__(self, config: TokenPackerProjectorConfig):
        super().__init__()
        self.config = config
        dim, levels_dim, heads = config.vision_dim, config.vision_dim * config.num_levels, config.num_heads
        self.query_norm = TriangularNorm(dim)
        self.query_proj = nn.Linear(dim, dim)  # scaled for the softmax
        self.key_in = nn.Linear(levels_dim, dim)
        self.key_norm = TriangularNorm(dim)
        self.key_proj = nn.Parameter(torch.empty(heads, dim // heads, dim))  # (H, E, C)
        self.value_in = nn.Linear(levels_dim, dim)
        self.value_norm = TriangularNorm(dim)
        self.value_proj = nn.Parameter(torch.empty(heads, dim, dim // heads))  # (H, C, E)
        self.output_mlp = two_linears(dim, config.language_dim)

    def forward(self, features: VisionFeatures, scale_factor: int | None = None) -> Tensor:
        """Returns packed tokens (N, T, D), as `TokenPacker.forward`; raises ValueError under its conditions."""
        self.check_features(features)
        grid = features.patch_grid
        scale = self.config.resolve_scale(grid, scale_factor)
        if torch.compiler.is_compiling():
            attended = self._attend(features.query, features.levels, grid, scale)
        else:
            at_a_time = max(1, PATCHES_AT_A_TIME // features.levels.shape[1])
            parts = zip(features.query.split(at_a_time), features.levels.split(at_a_time), strict=True)
            attended = torch.cat([self._attend(query, levels, grid, scale) for query, levels in parts])
        return self.output_mlp(attended)  # (N, T, C) -> (N, T, D)

    def _attend(self, query: Tensor, levels: Tensor, grid: tuple[int, int], scale: int) -> Tensor:
        """Returns (n, T, C), the attended windows of n tiles before the output MLP."""
        num_heads, num_tokens, window = self.config.num_heads, self.config.num_tokens(grid, scale), scale * scale
        queries, factor = self.query_norm(coarse_query(query, grid, scale).flatten(0, 1))  # (n*T, C), (n*T, 1)
        queries = self.query_proj(queries * factor).unflatten(-1, (num_heads, -1)).transpose(0, 1)  # (H, n*T, E)
        wanted = torch.bmm(queries, self.key_proj).transpose(0, 1)  # (n*T, H, C)

        keys, factor = self.key_norm(F.gelu(_in_windows(self.key_in(levels), grid, scale)))  # (n*T*W, C), (n*T*W, 1)
        scores = torch.bmm(wanted, keys.unflatten(0, (-1, window)).transpose(1, 2)) * factor.view(-1, 1, window)
        del wanted, keys  # the values take their memory
        scores = scores.unflatten(0, (-1, num_tokens))  # (n, T, H, W)
        mask = window_mask(grid, scale, scores.device)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], float("-inf"))
        shares = scores.softmax(dim=-1).flatten(0, 1)  # (n*T, H, W)

        values, factor = self.value_norm(F.gelu(_in_windows(self.value_in(levels), grid, scale)))
        mixed = torch.bmm(shares * factor.view(-1, 1, window), values.unflatten(0, (-1, window)))  # (n*T, H, C)
        attended = torch.bmm(mixed.transpose(0, 1), self.value_proj)  # (H, n*T, E)
        return attended.transpose(0, 1).flatten(1).unflatten(0, (-1, num_tokens))


def _in_windows(tokens: Tensor, grid: tuple[int, int], scale: int) -> Tensor:
    """(n, L, C) -> (n*T*W, C), in the order of the windows."""
    return split_windows(tokens, grid, scale).transpose(2, 3).flatten(0, 4)  # (n, rows, cols, s, s, C) before


def fold(packer: TokenPacker) -> FoldedTokenPacker:
    """Returns the projector with folded weights, computed in float64 and rounded once to the projector's dtype.

    Raises:
        ValueError: unless `packer` is a `TokenPacker` with the paper's settings and its original parts, and with its
            weights in memory.
    """
    _check_foldable(packer)
    like = packer.query_proj.weight
    with torch.inference_mode(False), torch.no_grad():
        weights = _folded_weights(packer)
        with torch.device("meta"):
            folded = FoldedTokenPacker(packer.config)
        own = {name: weight.to(like.device, like.dtype, copy=True) for name, weight in weights.items()}
        folded.load_state_dict(own, assign=True)
    return folded.eval().requires_grad_(False)


def _folded_weights(packer: TokenPacker) -> dict[str, Tensor]:
    """The state of a `FoldedTokenPacker`, in float64 on the CPU: other devices may not have that type."""
    given = {name: weight.to("cpu", torch.float64) for name, weight in packer.state_dict().items()}
    heads = (packer.config.num_heads, -1)

    def linear(name: str) -> tuple[Tensor, Tensor]:
        return given[f"{name}.weight"], given[f"{name}.bias"]

    folded: dict[str, Tensor] = {}
    readers, shifts = {}, {}  # what a linear that reads a norm is multiplied by (C, C), and what is added before it
    for part, before in (("query", "query_proj"), ("key", "key_mlp.2"), ("value", "value_mlp.2")):
        weight = given[f"{before}.weight"]
        bias = given.get(f"{before}.bias", weight.new_zeros(len(weight)))
        rotation, triangle = torch.linalg.qr(weight - weight.mean(0))
        folded[f"{part}_norm.weight"] = triangle
        folded[f"{part}_norm.bias"] = rotation.T @ (bias - bias.mean())
        scale, shifts[part] = linear(f"{part}_norm")
        readers[part] = scale[:, None] * rotation
    for part in ("key", "value"):
        folded[f"{part}_in.weight"], folded[f"{part}_in.bias"] = linear(f"{part}_mlp.0")

    weight, bias = linear("attention.query_proj")
    softmax_scale = (len(weight) // heads[0]) ** -0.5
    folded["query_proj.weight"] = weight @ readers["query"] * softmax_scale
    folded["query_proj.bias"] = (weight @ shifts["query"] + bias) * softmax_scale
    weight, _ = linear("attention.key_proj")
    folded["key_proj"] = (weight @ readers["key"]).unflatten(0, heads)
    weight, bias = linear("attention.value_proj")
    folded["value_proj"] = (weight @ readers["value"]).unflatten(0, heads).transpose(1, 2)
    shift = weight @ shifts["value"] + bias
    weight, bias = linear("attention.output_proj")
    shift = weight @ shift + bias
    first, first_bias = linear("output_mlp.0")
    folded["output_mlp.0.weight"] = first @ weight
    folded["output_mlp.0.bias"] = first @ shift + first_bias
    folded["output_mlp.2.weight"], folded["output_mlp.2.bias"] = linear("output_mlp.2")
    return folded


def _check_foldable(packer: TokenPacker) -> None:
    """Raises ValueError if the module may compute something else than the equations of `TokenPacker`."""
    if type(packer) is not TokenPacker:
        raise ValueError(f"fold takes a TokenPacker, not {type(packer).__name__}, whose equations may be others")
    if packer.config.beyond_the_paper:
        raise ValueError(
            f"fold knows the paper's TokenPacker, not {packer.config.beyond_the_paper}; use the projector itself"
        )
    with torch.device("meta"):
        parts, built = _parts(packer), _parts(TokenPacker(packer.config))
    changed = sorted(name for name in parts.keys() | built.keys() if parts.get(name) != built.get(name))
    changed += [name for name, part in packer.named_modules() if name and _is_hooked(part)]
    if _is_forward_replaced(
        packer
    ):  # hooks on the projector itself may be transformers', which records outputs by them
        changed.append("forward")
    if changed:
        raise ValueError(
            f"fold takes a TokenPacker as it was built, but these parts were replaced or hooked: {', '.join(changed)};"
            " merge adapters and remove hooks, or use the projector itself"
        )
    for name, weight in packer.named_parameters():
        if weight.is_meta or not weight.is_floating_point():
            raise ValueError(
                f"fold needs the weights in memory in a floating-point type, but {name} is {weight.dtype} on"
                f" {weight.device}; load the model without offloading and quantization"
            )


def _parts(packer: TokenPacker) -> dict[str, tuple[type, str]]:
    """The class and the settings of every part; the settings as it prints them, such as a GELU's approximation."""
    return {name: (type(part), part.extra_repr()) for name, part in packer.named_modules()}


def _is_hooked(part: nn.Module) -> bool:
    return bool(part._forward_hooks or part._forward_pre_hooks) or _is_forward_replaced(part)


def _is_forward_replaced(part: nn.Module) -> bool:
    """Whether the instance has another `forward` than its class. accelerate leaves the original one on the instance."""
    own = vars(part).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(part).forward
