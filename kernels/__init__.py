"""The engine "triton": fused kernels for NVIDIA GPUs, compute capability 8.0 and later.

Imports without Triton; why_not says what is missing. With TRITON_INTERPRET=1 the same kernels run on CPU tensors.
"""

import functools
import os
import re

import torch
from torch import Tensor

from .. import engines, selection
from ..engines import Call, Statistics, SumsAndGrads

OLDEST_TRITON = (3, 6)  # the oldest seen: bench/notes.md
OLDEST_CAPABILITY = (8, 0)  # bfloat16 and tf32 matrix units, asynchronous copies


def why_not(call: Call) -> str | None:
    return _wrong_device(call.x.device) or _wrong_call(call) or _missing_triton()


def arranges(call: Call) -> bool:
    return False


label_order_pays = engines.label_order_pays
own_products_fwd, own_products_bwd = selection.own_products_fwd, selection.own_products_bwd


def scaled_rows_fwd(rows: Tensor, norm: Tensor, order: Tensor | None, product_dtype: torch.dtype) -> Tensor:
    from . import launch

    return launch.scaled_rows_fwd(rows, norm, order, product_dtype)


def scaled_rows_bwd(rows: Tensor, norm: Tensor, order: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor]:
    from . import launch

    return launch.scaled_rows_bwd(rows, norm, order, grad)


def row_stats_fwd(call: Call) -> Statistics:
    from . import launch

    return launch.row_stats_fwd(call)


def row_stats_bwd(
    call: Call, row_sums: Tensor, row_grads: Tensor, col_sums: Tensor, col_grads: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    from . import launch

    return launch.row_stats_bwd(call, row_sums, row_grads, col_sums, col_grads, needs)


def pair_sum_fwd_bwd(call: Call, over: str, term: str, with_sums: bool, weights: Tensor | None, needs: list[bool]) -> SumsAndGrads:
    from . import launch

    return launch.pair_sum_fwd_bwd(call, over, term, with_sums, weights, needs)


@functools.cache
def _missing_triton() -> str | None:
    try:
        import triton
    except ImportError:
        return "Triton is not installed"
    version = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))
    return f"Triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}" if version < OLDEST_TRITON else None


def _wrong_device(device: torch.device) -> str | None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type == "cpu":
        return "the tensors are on the CPU, where Triton runs only with TRITON_INTERPRET=1"
    if device.type != "cuda" or torch.version.hip:
        return f"the tensors are on {'an AMD GPU' if torch.version.hip else device.type}, not on an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, below {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]}"
    return None


def _wrong_call(call: Call) -> str | None:
    if torch.float64 in (call.x.dtype, call.product_dtype):
        return "float64 is not served"
    if call.ids_x is not None and call.ids_x.ndim > 1:
        return "multi-hot ids are not served"
    return None
