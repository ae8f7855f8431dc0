"""TokenPacker where nothing is differentiated: the same function from folded weights, in fewer multiplications.

The plain path in `token_packer.py` is the definition; this is algebra on it, exact but for rounding:

- A norm after a linear. LayerNorm subtracts the mean, which centring the linear's weight and bias does beforehand,
  then divides by the root mean square, which no rotation changes. So with the centred weight A = Q R, Q a rotation and
  R upper triangular, LayerNorm(A x + b) = g * Q (y / rms(y)) + beta where y = R x + Q^T b. R costs half of A, and g, Q
  and beta go into the linears that read the norm's output.
- Keys. A score is the query's product with a projected key, so also the product of the query, projected back once for
  each head, with the key itself. What this adds equally to all scores of a window cancels in the softmax: beta and the
  projection's bias.
- Values. The shares of a window sum to one, so values are mixed first, and projected once for each window.
- The attention's output projection and the first linear of the output MLP are one linear.

Windows are made while GELU writes its result, so no tokens are copied to bring them in order. The first linears of keys
and values stay two products: as one, with 2C outputs, they computed no faster (143 against 144 GFLOP/s at 2,304 patches
on two cores) and would hold both results at once.

Shapes: n tiles at a time, E = C/H; others as in `token_packer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenpacker.features import VisionFeatures
from tokenpacker.projectors.base import build

if TYPE_CHECKING:
    from tokenpacker.projectors.token_packer import TokenPacker, TokenPackerProjectorConfig

PATCHES_AT_A_TIME = 2304  # four tiles of CLIP-L/336: large enough for full speed, and memory does not grow with N
TOKENS_AT_A_TIME = 1152  # rows of the output MLP, likewise: its weights are large, and a third as many rows lose 12 %
BLOCK = 128  # columns of a triangular product that are computed together; narrower ones gain nothing more
MIN_PATCHES = 2304  # of a call that folds unasked: a second of folding is repaid by many tiles, not by one image
MIN_VISION_DIM = 256  # below, more and smaller products take longer than multiplications are saved
FOLDED_DTYPES = (torch.float32, torch.float64)  # half precision would round the folded weights once more


@dataclass(frozen=True)
class Windows:
    """Where the windows lie.

    Args:
        patch_grid: (h, w) of the features.
        extended: (rows*s, cols*s), the grid that the windows fill.
        scale: s.
        mask: (T, W), True where a patch exists; None where all do.
    """

    patch_grid: tuple[int, int]
    extended: tuple[int, int]
    scale: int
    mask: Tensor | None

    def activate(self, hidden: Tensor) -> Tensor:
        """GELU of (n, L, C) in the order of the windows, (n*T*W, C)."""
        image = hidden.unflatten(1, self.patch_grid)  # (n, h, w, C)
        if self.extended != self.patch_grid:
            (height, width), (full_height, full_width) = self.patch_grid, self.extended
            image = F.pad(image, (0, 0, 0, full_width - width, 0, full_height - height))
        image = image.unflatten(2, (-1, self.scale)).unflatten(1, (-1, self.scale))  # (n, rows, s, cols, s, C)
        windows = image.transpose(2, 3)  # (n, rows, cols, s, s, C)
        activated = torch.empty(windows.shape, dtype=hidden.dtype, device=hidden.device)
        torch.ops.aten.gelu.out(windows, out=activated)
        return activated.flatten(0, 4)


@dataclass(frozen=True)
class RotatedNorm:
    """A linear and the LayerNorm after it, up to a rotation and the norm's scale and shift.

    Args:
        weight: (C, C), upper triangular.
        bias: (C,).
        eps: the norm's.
    """

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, tokens: Tensor, out: Tensor) -> Tensor:
        """(rows, 1), what each row of `out` (rows, C) is still to be multiplied by; tokens are (rows, C) too."""
        for start in range(0, len(self.bias), BLOCK):
            block = slice(start, start + BLOCK)
            torch.addmm(self.bias[block], tokens[:, start:], self.weight[block, start:].T, out=out[:, block])
        power = torch.linalg.vector_norm(out, dim=-1, keepdim=True).square_().div_(out.shape[1])
        return power.add_(self.eps).rsqrt_()


@dataclass(frozen=True)
class FoldedTokenPacker:
    """A `TokenPacker` for inference; weights that folding leaves as they are belong to it, the others are its own."""

    query: RotatedNorm
    query_proj: nn.Linear  # of the query for all heads, scaled
    key_in: nn.Linear
    key: RotatedNorm
    key_proj: Tensor  # (H, E, C), a head's query to what it looks for in normed keys
    value_in: nn.Linear
    value: RotatedNorm
    value_proj: Tensor  # (H, C, E), mixed normed values to a head's result
    output_in: nn.Linear
    output: nn.Linear

    @property
    def num_own_bytes(self) -> int:
        """Memory beside the projector's."""
        own = [self.key_proj, self.value_proj]
        own += [tensor for norm in (self.query, self.key, self.value) for tensor in (norm.weight, norm.bias)]
        own += [*self.query_proj.parameters(), *self.output_in.parameters()]
        return sum(tensor.numel() * tensor.element_size() for tensor in own)

    def __call__(self, coarse: Tensor, levels: Tensor, windows: Windows) -> Tensor:
        """(N, T, D) from coarse queries (N, T, C) and levels (N, L, M*C)."""
        num_tiles, num_tokens, dim = coarse.shape
        attended = coarse.new_empty(num_tiles * num_tokens, dim)  # (N*T, C)
        at_a_time = max(1, PATCHES_AT_A_TIME // levels.shape[1])
        for start in range(0, num_tiles, at_a_time):
            tiles = slice(start, start + at_a_time)
            part = self._attend(coarse[tiles], levels[tiles], windows)
            attended[start * num_tokens : start * num_tokens + len(part)] = part
        packed = coarse.new_empty(len(attended), self.output.out_features)  # (N*T, D)
        num_chunks = max(1, -(-len(attended) // TOKENS_AT_A_TIME))  # no tiles at all are a chunk too
        for tokens, out in zip(attended.chunk(num_chunks), packed.chunk(num_chunks), strict=True):
            self._put_out(tokens, out)
        return packed.unflatten(0, (num_tiles, num_tokens))

    def _put_out(self, attended: Tensor, out: Tensor) -> None:
        """The output MLP of some of the tokens, (rows, C) -> (rows, D)."""
        hidden = self.output_in(attended)
        torch.ops.aten.gelu_(hidden)
        torch.addmm(self.output.bias, hidden, self.output.weight.T, out=out)

    def _attend(self, coarse: Tensor, levels: Tensor, windows: Windows) -> Tensor:
        """(n*T, C), what each head of each query takes from its window."""
        coarse = coarse.flatten(0, 1)  # (n*T, C)
        queries = torch.empty_like(coarse)
        queries *= self.query(coarse, out=queries)
        heads = self.query_proj(queries).unflatten(-1, (len(self.key_proj), -1)).transpose(0, 1)  # (H, n*T, E)
        wanted = torch.bmm(heads, self.key_proj).transpose(0, 1)  # (n*T, H, C)

        keys, key_scale = _normed(self.key_in, self.key, levels, windows)  # (n*T, W, C), (n*T, 1, W)
        scores = torch.bmm(wanted, keys.transpose(1, 2)).mul_(key_scale)  # (n*T, H, W)
        del wanted, keys  # the values take their place
        if windows.mask is not None:
            by_tile = scores.unflatten(0, (-1, len(windows.mask)))  # (n, T, H, W)
            by_tile.masked_fill_(~windows.mask[:, None], float("-inf"))
        shares = scores.softmax(dim=-1)

        values, value_scale = _normed(self.value_in, self.value, levels, windows)
        mixed = torch.bmm(shares.mul_(value_scale), values)  # (n*T, H, C)
        attended = torch.bmm(mixed.transpose(0, 1), self.value_proj)  # (H, n*T, E)
        return attended.transpose(0, 1).flatten(1)


def _normed(first: nn.Linear, norm: RotatedNorm, levels: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Keys or values of each window (n*T, W, C), and what each is still to be multiplied by, (n*T, 1, W)."""
    hidden = first(levels)  # (n, L, C)
    activated = windows.activate(hidden)  # (n*T*W, C)
    # The memory of `hidden` takes the result where the grid was not extended, so that it holds as many tokens.
    tokens = hidden.flatten(0, 1) if hidden.numel() == activated.numel() else torch.empty_like(activated)
    scale = norm(activated, out=tokens)
    size = windows.scale**2
    return tokens.unflatten(0, (-1, size)), scale.view(-1, 1, size)


def fold(packer: TokenPacker) -> FoldedTokenPacker:
    """The projector with folded weights, computed in float64 and rounded once to the dtype of the parameters."""
    with torch.inference_mode(False), torch.no_grad():
        attention = packer.attention
        (key_in, key_out), (value_in, value_out) = _linears(packer.key_mlp), _linears(packer.value_mlp)
        first, output = _linears(packer.output_mlp)
        query, query_reader, query_shift = _rotate(packer.query_proj, packer.query_norm)
        key, key_reader, _ = _rotate(key_out, packer.key_norm)
        value, value_reader, value_shift = _rotate(value_out, packer.value_norm)
        scale = (packer.config.vision_dim // attention.num_heads) ** -0.5
        query_weight, query_bias = _doubles(attention.query_proj)
        key_weight, _ = _doubles(attention.key_proj)
        value_weight, value_bias = _doubles(attention.value_proj)
        output_weight, output_bias = _doubles(attention.output_proj)
        first_weight, first_bias = _doubles(first)
        shift = output_weight @ (value_weight @ value_shift + value_bias) + output_bias
        dtype, heads = packer.query_proj.weight.dtype, (attention.num_heads, -1)
        return FoldedTokenPacker(
            query=query,
            query_proj=_frozen_linear(
                query_weight @ query_reader * scale, (query_weight @ query_shift + query_bias) * scale, dtype
            ),
            key_in=key_in,
            key=key,
            key_proj=(key_weight @ key_reader).unflatten(0, heads).to(dtype),
            value_in=value_in,
            value=value,
            value_proj=(value_weight @ value_reader).unflatten(0, heads).to(dtype).transpose(1, 2),
            output_in=_frozen_linear(first_weight @ output_weight, first_weight @ shift + first_bias, dtype),
            output=output,
        )


def _linears(mlp: nn.Sequential) -> tuple[nn.Linear, nn.Linear]:
    first, _, second = mlp
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    return first, second


def _rotate(linear: nn.Linear, norm: nn.LayerNorm) -> tuple[RotatedNorm, Tensor, Tensor]:
    """The two as a `RotatedNorm`; in float64 what a linear that reads the norm is multiplied by (C, C), and beta."""
    weight, bias = _doubles(linear)
    rotation, triangle = torch.linalg.qr(weight - weight.mean(0))
    rotated = rotation.T @ (bias - bias.mean())
    dtype = linear.weight.dtype
    return (
        RotatedNorm(triangle.to(dtype), rotated.to(dtype), norm.eps),
        norm.weight.double()[:, None] * rotation,
        norm.bias.double(),
    )


def _doubles(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    weight = linear.weight.double()
    return weight, weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.double()


def _frozen_linear(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = (nn.Parameter(tensor.to(dtype), requires_grad=False) for tensor in (weight, bias))
    return linear


class FastPath:
    """Holds a projector's folded weights for as long as they are what its parameters say; copies start without."""

    def __init__(self) -> None:
        self._folded: FoldedTokenPacker | None = None
        self._places: list[tuple[int, int]] = []
        self._samples = torch.empty(0)

    def __getstate__(self) -> dict:
        return {}

    def __setstate__(self, state: dict) -> None:
        self.__init__()  # type: ignore[misc]

    def drop(self) -> None:
        """Forgets the folded weights."""
        self._folded = None

    def folded(self, packer: TokenPacker, features: VisionFeatures) -> FoldedTokenPacker | None:
        """The folded projector, from its present weights; None where the plain path must be taken.

        Weights are folded at the first call. They are folded again when a parameter is another tensor, was written to
        in place, or differs in a sample of its numbers, which has some of every row and every column: that also finds
        writes that went through `.data`, unless they were to single numbers.
        """
        if packer.config.vision_dim < MIN_VISION_DIM:
            return None
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None  # a graph must hold the weights, not what was made of them
        if _differentiated(packer, features):
            self.drop()  # weights that learn change at every step, some optimizers do it unseen
            return None
        if not (_wanted(packer, features) and _computes_here(packer, features) and _is_as_built(packer)):
            return None
        parameters = list(packer.parameters())
        places = [(parameter.data_ptr(), parameter._version) for parameter in parameters]
        samples = torch.cat([_sample(parameter.detach()) for parameter in parameters])
        if self._folded is None or places != self._places or not torch.equal(samples, self._samples):
            self.drop()  # before the new ones take memory
            self._folded, self._places, self._samples = fold(packer), places, samples
        return self._folded


def _sample(parameter: Tensor) -> Tensor:
    """A number of every row and every column of a weight; all of a bias."""
    if parameter.ndim == 1:
        return parameter
    places = torch.arange(max(parameter.shape))
    return parameter[places % parameter.shape[0], places % parameter.shape[1]]


def _wanted(packer: TokenPacker, features: VisionFeatures) -> bool:
    if packer.folds_weights is None:
        return features.levels.shape[:2].numel() >= MIN_PATCHES
    return packer.folds_weights


def _differentiated(packer: nn.Module, features: VisionFeatures) -> bool:
    tensors = (features.query, features.levels, *packer.parameters())
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    return any(torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _computes_here(packer: nn.Module, features: VisionFeatures) -> bool:
    """Whether all numbers are plain tensors of one type in this process's memory, and computed in that type.

    Only processors: what folding gains on other devices is not measured.
    """
    tensors = (features.query, features.levels, *packer.parameters())
    if torch.is_autocast_enabled("cpu") or features.levels.dtype not in FOLDED_DTYPES:
        return False
    if any(type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu" for tensor in tensors):
        return False
    if any(tensor.dtype != features.levels.dtype for tensor in tensors):
        return False
    # Parameters made in inference mode do not count their changes; what `torch.vmap` passes has no memory of its own.
    return not any(parameter.is_inference() for parameter in packer.parameters()) and _has_memory(features.levels)


def _has_memory(tensor: Tensor) -> bool:
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def _is_as_built(packer: TokenPacker) -> bool:
    """Whether nobody has put other parts in, or wants to see what goes through them."""
    if getattr(getattr(packer, "_hf_hook", None), "offload", False):
        return False  # accelerate brings the weights for each call alone
    if _parts(packer) != _parts_of_new(packer.config):
        return False
    parts = [part for child in packer.children() for part in child.modules()]
    return not any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in parts)


def _parts(packer: nn.Module) -> list[tuple[str, type, str]]:
    """Name, class and settings of every module; settings as they print, a GELU's approximation among them."""
    return [(name, type(part), part.extra_repr()) for name, part in packer.named_modules()]


@cache
def _parts_of_new(config: TokenPackerProjectorConfig) -> list[tuple[str, type, str]]:
    with torch.device("meta"):
        return _parts(build(config))
