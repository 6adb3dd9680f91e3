"""What a layer of torch.nn wants to be given, in words, and the width of what it returns."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

_SPATIAL = {1: "length", 2: "height, width", 3: "depth, height, width"}


def wants(layer: nn.Module) -> str | None:
    """Describe the input that fits a layer: "(…, 784) float32"; None for a layer that does not say."""
    for kind, words in _WANTS:
        if isinstance(layer, kind):
            return words(layer) + _dtype(layer)
    return None


def out_width(layer: nn.Module) -> int | None:
    """Return the channels or features that a layer gives, whatever it is given."""
    for name in ("out_features", "out_channels", "embedding_dim", "hidden_size", "embed_dim", "num_features"):
        width = getattr(layer, name, None)
        if isinstance(width, int):
            return width
    return None


def _dtype(layer: nn.Module) -> str:
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return ""
    weight = next(layer.parameters(), None)
    return f" {str(weight.dtype).removeprefix('torch.')}" if weight is not None else ""


def _convolution(layer: nn.Module) -> str:
    weight = layer.weight
    dims = weight.dim() - 2 if isinstance(weight, Tensor) else 2
    return f"(batch, {layer.in_channels}, {_SPATIAL[dims]})"


def _sequence(layer: nn.Module, features: str) -> str:
    order = "batch, sequence" if getattr(layer, "batch_first", False) else "sequence, batch"
    return f"({order}, {getattr(layer, features)})"


_WANTS: tuple[tuple[tuple[type[nn.Module], ...], Callable[[nn.Module], str]], ...] = (
    ((nn.Linear,), lambda layer: f"(…, {layer.in_features})"),
    ((nn.Bilinear,), lambda layer: f"(…, {layer.in1_features}) and (…, {layer.in2_features})"),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _convolution),
    ((nn.Embedding, nn.EmbeddingBag), lambda layer: f"integers 0..{int(layer.num_embeddings) - 1}"),  # type: ignore[arg-type]
    ((nn.RNNBase,), lambda layer: _sequence(layer, "input_size")),
    ((nn.RNNCellBase,), lambda layer: f"(batch, {layer.input_size})"),
    ((nn.MultiheadAttention,), lambda layer: _sequence(layer, "embed_dim")),
    ((nn.Transformer,), lambda layer: _sequence(layer, "d_model")),
    ((nn.LayerNorm, nn.RMSNorm), lambda layer: "(…, " + ", ".join(map(str, layer.normalized_shape)) + ")"),  # type: ignore[arg-type]
    (
        (nn.BatchNorm1d,),
        lambda layer: f"(batch, {layer.num_features}) or (batch, {layer.num_features}, length)",
    ),
    ((nn.BatchNorm2d, nn.InstanceNorm2d), lambda layer: f"(batch, {layer.num_features}, height, width)"),
    ((nn.BatchNorm3d,), lambda layer: f"(batch, {layer.num_features}, depth, height, width)"),
    ((nn.GroupNorm,), lambda layer: f"(batch, {layer.num_channels}, …)"),
)
