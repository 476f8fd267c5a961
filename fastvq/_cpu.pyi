"""``fastvq._cpu``: the binding of csrc/bind_cpu.cpp and the headers that it includes.

Addresses are integers, 0 for null. ``isa``, ``metric`` and dtypes are the numbers of ``fastvq.backends``; tensors
cross as the views of ``fastvq.backends.views``. Arguments have no names at run time. csrc/fastvq_cpu.h describes each
function.
"""

from collections.abc import Sequence
from typing import TypeAlias

_Rows: TypeAlias = Sequence[int]  # rows_view
_Codes: TypeAlias = Sequence[int]  # codes_view
_Statistics: TypeAlias = Sequence[int]  # statistics_view
_Ema: TypeAlias = Sequence[int]  # ema_view
_Image: TypeAlias = tuple[int, int, Sequence[int], Sequence[int]]  # image_view
# address, dtype, shape [C_out, C_in, kh, kw], active taps, channel groups, whether a group sees itself
_Weight: TypeAlias = tuple[int, int, Sequence[int], Sequence[int], int, bool]
# batch, height, width, channels, number of codes, kernel sizes
_PixelCNN: TypeAlias = tuple[int, int, int, int, int, Sequence[int]]

# The build and the machine.
def compiler() -> str: ...
def available_isas() -> list[str]: ...
def amx_unavailable() -> str: ...

# Around a call: Python's signals, and the floating-point environment, which enter_call returns for leave_call.
def set_main_thread(identity: int, /) -> None: ...
def enter_call() -> bytes: ...
def leave_call(saved: bytes, /) -> None: ...

# Lookup. nearest returns the numbers of rows that were rescored and scanned.
def nearest(
    x: _Rows, codes: _Codes, metric: int, fast: bool, indices: int, isa: int, n_threads: int, packed: int, /
) -> tuple[int, int]: ...
def packed_bytes(codes: _Codes, isa: int, /) -> int: ...
def recorded_bytes(packed: int, /) -> int: ...
def pack_codebook(codes: _Codes, metric: int, isa: int, n_threads: int, packed: int, /) -> None: ...

# Quantization. quantize_forward returns the sum of squares and the number of real rows.
def quantize_forward(
    x: _Rows,
    codes: _Codes,
    metric: int,
    fast: bool,
    mask: int,
    quantized: _Rows,
    indices: int,
    isa: int,
    n_threads: int,
    packed: int,
    statistics: _Statistics | None,
    /,
) -> tuple[float, int]: ...
def quantize_backward(
    x: _Rows,
    codes: _Codes,
    indices: int,
    grad_quantized: _Rows | None,
    scale: float,
    rotation: bool,
    grad_x: _Rows,
    isa: int,
    n_threads: int,
    /,
) -> None: ...

# Residual quantization. residual_quantize returns the number of real rows.
def residual_quantize(
    x: _Rows,
    levels: _Codes,
    metric: int,
    fast: bool,
    mask: int,
    quantized: _Rows,
    indices: int,
    squares: int,
    finite_levels: int,
    isa: int,
    n_threads: int,
    /,
) -> int: ...
def residual_statistics(
    x: _Rows,
    levels: _Codes,
    indices: int,
    finite_levels: int,
    sums: int,
    sums_double: bool,
    counts: int,
    n_threads: int,
    /,
) -> None: ...
def residual_backward(
    x: _Rows,
    levels: _Codes,
    indices: int,
    grad_quantized: _Rows | None,
    scales: int,
    grad_x: _Rows,
    n_threads: int,
    /,
) -> None: ...

# Statistics. code_statistics returns the first row with a bad index, or -1; count_indices the position of the first bad
# index, or -1, and the number of real rows.
def code_statistics(x: _Rows, indices: int, n_codes: int, out: _Statistics, isa: int, n_threads: int, /) -> int: ...
def count_indices(indices: int, n_rows: int, n_levels: int, n_codes: int, /) -> tuple[int, int]: ...
def ema_update(
    buffers: _Ema,
    sums: int,
    sums_double: bool,
    counts: int,
    decay: float,
    eps: float,
    laplace: bool,
    debias: bool,
    n_threads: int,
    /,
) -> None: ...

# Masked convolution.
def masked_conv_forward(x: _Image, weight: _Weight, bias: int, out: _Image, isa: int, n_threads: int, /) -> None: ...
def gated_masked_conv_forward(
    x: _Image,
    weight: _Weight,
    bias: int,
    condition: _Image | None,
    tanh_a: _Image | None,
    sigmoid_b: _Image | None,
    out: _Image,
    isa: int,
    n_threads: int,
    /,
) -> None: ...
def masked_conv_input_grad(grad_out: _Image, weight: _Weight, grad_x: _Image, isa: int, n_threads: int, /) -> None: ...
def masked_conv_weight_grad(
    x: _Image,
    grad_out: _Image,
    weight: _Weight,
    grad_weight: int,
    grad_bias: int,
    isa: int,
    n_threads: int,
    /,
) -> None: ...
def gate_backward(
    grad: int, tanh_a: int, sigmoid_b: int, grad_ab: int, n_outer: int, n_inner: int, isa: int, n_threads: int, /
) -> None: ...

# PixelCNN. pixelcnn_sizes returns the floats of the packed weights and of the cache.
def pixelcnn_sizes(shape: _PixelCNN, isa: int, /) -> tuple[int, int]: ...
def pixelcnn_pack(shape: _PixelCNN, weights: Sequence[int], packed: int, isa: int, /) -> None: ...
def pixelcnn_step(
    shape: _PixelCNN,
    ids: int,
    weights: int,
    embedding: int,
    cache: int,
    condition: int,
    condition_height: int,
    condition_width: int,
    logits: int,
    row: int,
    column: int,
    isa: int,
    n_threads: int,
    /,
) -> None: ...
