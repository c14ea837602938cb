"""csrc/cuda/bindings.cpp. Pointers are integers, 0 for null; dtype is that of the products, by torch's name."""

device_type: str

class Side:
    def __init__(self, *, n: int, rows: int, ids: int, id_ranges: int, bias: int, weights: int, weight_ranges: int) -> None: ...

class Call:
    def __init__(
        self,
        *,
        x: Side,
        y: Side,
        symmetric: bool,
        d: int,
        sets: int,
        words: int,
        self_offset: int | None,
        circle: bool,
        margin: float,
        gamma: float,
        cutoff: int,
        device: int,
        stream: int,
    ) -> None: ...

def tile(dtype: str) -> tuple[int, int, int, int]: ...
def row_stats(
    dtype: str,
    call: Call,
    rows_m: int,
    rows_s: int,
    cols_m: int,
    cols_s: int,
    span_x: int,
    span_y: int,
    bounded: bool,
) -> None: ...
def gradients(
    dtype: str,
    call: Call,
    term: str,
    over: int,
    visits: int,
    parts: int,
    rows: int,
    bias: int,
    sums: int,
) -> None: ...
