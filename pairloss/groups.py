"""Sums and counts over the candidates that share an anchor's label, O(N D): no pass over pairs, no shape that depends on labels."""

from typing import TYPE_CHECKING

from torch import Tensor

from . import ops, order, over_ranks, ranks

if TYPE_CHECKING:
    from .prepare import Rows


def positives(rows: "Rows", ids: Tensor, ref_ids: Tensor | None, backend: str | None) -> tuple[Tensor, Tensor]:
    """For every anchor i the sum over P(i) of <x_i, y_j>, and how many they are, NaN for a NaN anchor. [N] each, as floats.

    Multi-hot ids need a pass over pairs for each; equal labels have class sums.
    """
    rows = rows.normalised()
    n, itself = rows.x.shape[0], rows.y is None
    if ids.ndim > 1:

        def over_positives(x: Tensor, y: Tensor | None, row_bias: Tensor | None) -> Tensor:
            return ops.pair_sum(
                x, y, ids, ref_ids, 0 if itself else None, row_bias,
                over="positives", term="linear", product_dtype=rows.product_dtype, backend=backend,
            )  # fmt: skip

        nothing = rows.x.new_zeros(n, 1), None if rows.y is None else rows.y.new_zeros(rows.y.shape[0], 1)
        return over_positives(rows.x, rows.y, None), over_positives(*nothing, rows.x.new_ones(n)) + rows.poison()
    candidates, candidate_ids = (rows.x, ids) if rows.y is None or ref_ids is None else (rows.y, ref_ids)
    members, others = _count_and_sums(candidates, candidate_ids, ids)
    if itself:
        members, others = members - 1, others - rows.x
    return rows.products(others, backend).masked_fill(members == 0, 0), members + rows.poison()


def count(ids: Tensor, candidate_ids: Tensor) -> Tensor:
    """[N]: how many candidates have the anchor's id, itself included."""
    spread = ranks.current()
    return order.Classes(ids, candidate_ids).count if spread is None else over_ranks.count(spread, ids, candidate_ids)


def _count_and_sums(rows: Tensor, row_ids: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """[N] and [N, D]: how many rows have the id ids_i, and their sum."""
    spread = ranks.current()
    if spread is not None:
        return over_ranks.count(spread, ids, row_ids), over_ranks.class_sums(spread, rows, row_ids, ids)
    classes = order.Classes(ids, row_ids)
    return classes.count, classes.sums(rows)
