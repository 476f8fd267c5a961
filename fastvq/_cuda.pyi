"""``fastvq._cuda``: the binding of csrc/bind_cuda.cpp.

Addresses are integers, of device memory unless said otherwise, 0 for null. ``metric`` and dtypes are the numbers of
``fastvq.backends``; tensors cross as the views of ``fastvq.backends.views``. ``stream`` is a CUDA stream. Functions
that end in ``_workspace`` return bytes. Arguments have no names at run time. csrc/fastvq_cuda.h describes each
function.
"""

from collections.abc import Sequence
from typing import TypeAlias

_Rows: TypeAlias = Sequence[int]  # rows_view
_Codes: TypeAlias = Sequence[int]  # codes_view
_Ema: TypeAlias = Sequence[int]  # ema_view
_Image: TypeAlias = tuple[int, int, Sequence[int], Sequence[int]]  # image_view
# address, dtype, shape [C_out, C_in, kh, kw], first tap, number of taps, address of the used taps or 0, channel groups,
# whether a group sees itself
_Weight: TypeAlias = tuple[int, int, Sequence[int], int, int, int, int, bool]
# metric, fast, mask, beta, deterministic
_Options: TypeAlias = tuple[int, bool, int, float, bool]
# gradient of the loss, its dtype, number of real rows (an address), factor
_Loss: TypeAlias = tuple[int, int, int, float]

most_statistics_rows: int

# The build and the machine.
def compiler() -> str: ...
def architectures() -> str: ...
def unavailable() -> str | None: ...

# Lookup.
def nearest_workspace(x: _Rows, codes: _Codes, /) -> int: ...
def nearest(
    x: _Rows, codes: _Codes, metric: int, fast: bool, mask: int, indices: int, workspace: int, stream: int, /
) -> None: ...

# Quantization. out: indices, commitment loss, codebook loss, sums or 0, counts.
def quantize_workspace(x: _Rows, codes: _Codes, statistics: bool, /) -> int: ...
def quantize_forward(
    x: _Rows,
    codes: _Codes,
    options: _Options,
    quantized: _Rows,
    out: Sequence[int],
    workspace: int,
    stream: int,
    /,
) -> None: ...
def quantize_rows_gradient(
    x: _Rows,
    codes: _Codes,
    indices: int,
    grad_quantized: _Rows | None,
    rotation: bool,
    loss: _Loss,
    grad_x: _Rows,
    stream: int,
    /,
) -> None: ...
def quantize_codes_gradient(
    codes: _Codes, sums: int, counts: int, loss: _Loss, grad_codes: _Codes, stream: int, /
) -> None: ...

# Residual quantization.
def residual_fits(x: _Rows, levels: _Codes, /) -> bool: ...
def residual_workspace(levels: _Codes, /) -> int: ...
def residual_parts(x: _Rows, levels: _Codes, /) -> int: ...
def residual_quantize(
    x: _Rows,
    levels: _Codes,
    metric: int,
    fast: bool,
    mask: int,
    quantized: _Rows,
    indices: int,
    squares: int,
    workspace: int,
    stream: int,
    /,
) -> None: ...
def residual_backward(
    x: _Rows,
    levels: _Codes,
    indices: int,
    weights: int,
    grad_quantized: _Rows | None,
    grad_x: _Rows,
    total: int,
    stream: int,
    /,
) -> None: ...

# Statistics.
def code_statistics_workspace(x: _Rows, n_codes: int, deterministic: bool, /) -> int: ...
def code_statistics(
    x: _Rows,
    indices: int,
    n_codes: int,
    deterministic: bool,
    sums: int,
    sums_double: bool,
    counts: int,
    workspace: int,
    stream: int,
    /,
) -> None: ...
def ema_update_workspace(buffers: _Ema, /) -> int: ...
def ema_update(
    buffers: _Ema,
    sums: int,
    sums_double: bool,
    counts: int,
    decay: float,
    eps: float,
    laplace: bool,
    debias: bool,
    workspace: int,
    stream: int,
    /,
) -> None: ...
def usable_rows(x: _Rows, usable: int, stream: int, /) -> None: ...

# drawn: ranks of the usable rows, dead codes, slots, uniforms.
def replace_dead_codes(buffers: _Ema, x: _Rows, drawn: Sequence[int], threshold: float, stream: int, /) -> None: ...

# Masked convolution.
def masked_conv_workspace(weight: _Weight, gated: bool, swapped: bool, /) -> int: ...
def masked_conv_forward(x: _Image, weight: _Weight, bias: int, out: _Image, workspace: int, stream: int, /) -> None: ...
def gated_masked_conv_forward(
    x: _Image,
    weight: _Weight,
    bias: int,
    condition: _Image | None,
    tanh_a: _Image | None,
    sigmoid_b: _Image | None,
    out: _Image,
    workspace: int,
    stream: int,
    /,
) -> None: ...
def masked_conv_input_grad(
    grad_out: _Image, weight: _Weight, grad_x: _Image, workspace: int, stream: int, /
) -> None: ...
def masked_conv_weight_grad_workspace(x: _Image, weight: _Weight, /) -> int: ...
def masked_conv_weight_grad(
    x: _Image,
    grad_out: _Image,
    weight: _Weight,
    grad_weight: int,
    grad_bias: int,
    workspace: int,
    stream: int,
    /,
) -> None: ...
def gate_backward(grad: _Image, tanh_a: _Image, sigmoid_b: _Image, grad_ab: _Image, stream: int, /) -> None: ...

# PixelCNN: (ids, B, H, W), (embedding, K, C), (weights, table, layers), (cache, floats an image), (condition, h, w),
# (first position, number of positions); logits, or (uniforms, mask) and how to choose.
def pixelcnn_positions(
    ids: Sequence[int],
    embedding: Sequence[int],
    layers: Sequence[int],
    cache: Sequence[int],
    condition: Sequence[int],
    positions: Sequence[int],
    arrived: int,
    logits: int,
    drawn: Sequence[int],
    temperature: float,
    top_k: int,
    top_p: float,
    stream: int,
    /,
) -> None: ...
