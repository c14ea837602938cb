"""csrc/cpu/bindings.cpp. Pointers are integers, 0 for null."""

class Call:
    def __init__(
        self,
        *,
        is_double: bool,
        bfloat16: bool,
        half: bool,
        symmetric: bool,
        has_ids: bool,
        n: int,
        m: int,
        d: int,
        x: int,
        y: int,
        order_x: int,
        order_y: int,
        norm: float | None,
        ids_x: int,
        ids_y: int,
        words: int,
        self_offset: int | None,
        row_bias: int,
        col_bias: int,
        circle: bool,
        margin: float,
        gamma: float,
        cutoff: float,
        logit_bound: float,
        totals: bool,
        own: bool,
        tile: int,
        threads: int,
    ) -> None: ...

def row_stats(call: Call, row_logs: int, row_sums: int, col_logs: int, col_sums: int) -> None: ...
def row_stats_backward(
    call: Call,
    row_sums: int,
    row_grads: int,
    col_sums: int,
    col_grads: int,
    dx: int,
    dy: int,
    dnorm: int,
    drow_bias: int,
    dcol_bias: int,
) -> None: ...
def pair_sum(
    call: Call,
    over_positives: bool,
    softplus: bool,
    sums: int,
    weights: int,
    dx: int,
    dy: int,
    dnorm: int,
    drow_bias: int,
    dcol_bias: int,
) -> None: ...
def own_products(call: Call, products: int) -> None: ...
def own_products_backward(call: Call, weights: int, dx: int, dy: int, dnorm: int) -> None: ...
def targets() -> list[str]: ...
def use_target(name: str) -> None: ...
