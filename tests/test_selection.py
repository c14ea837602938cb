"""top_k and the products of what it chose."""

import pytest
import torch

from pairloss import selection
from pairloss.ops import selected_products, top_k


def arguments(option: str):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(23, 5, generator=generator), torch.randn(31, 5, generator=generator)
    others: dict[str, object] = {}
    if "ties" in option:  # few different products
        x, y = x.sign(), y.sign()
    if "self" in option:
        y, others["self_offset"] = None, 0
    elif "offset" in option:
        others["self_offset"] = 4
    if "ids" in option:
        others["ids_x"] = torch.arange(23) % 4
        others["ids_y"] = None if y is None else torch.arange(31) % 4
    if "words" in option:
        others |= {name: v if v is None else (1 << v)[:, None] for name, v in others.items() if name.startswith("ids")}
    if "cutoff" in option:
        others["cutoff"] = torch.tensor(0.5)
    if "bias" in option:
        others["col_bias"] = torch.where(torch.arange(23 if y is None else 31) % 3 == 0, -torch.inf, 0.0)
    return x, y, others


@pytest.mark.parametrize("slab", [40, 1 << 21])
@pytest.mark.parametrize("looking", [True, False])
@pytest.mark.parametrize("k", [1, 7, 23])
@pytest.mark.parametrize(
    "option",
    [
        "two",
        "ties",
        "self",
        "self-ties-ids",
        "offset-ties",
        "ids-words",
        "ties-ids-bias-offset",
        "two-cutoff",
        "ties-cutoff-bias",
        "self-bias",
    ],
)
def test_the_same_choice_as_a_stable_sort(monkeypatch, option, k, looking, slab):
    x, y, others = arguments(option)
    monkeypatch.setattr(selection, "SLAB", slab)
    if not looking:
        monkeypatch.setattr(selection, "_may_look", lambda s: False)
    assert torch.equal(top_k(x, y, k, **others), top_k(x, y, k, **others, backend="reference"))


def test_nan_is_chosen():
    x, y, _ = arguments("two")
    y[11] = torch.nan
    chosen = top_k(x, y, 3)
    assert (chosen == 11).any(1).all()
    assert selected_products(x, y, chosen).isnan().any(1).all()


@pytest.mark.parametrize("slab", [16, 1 << 21])
def test_gradcheck_of_the_selected_products(monkeypatch, slab):
    monkeypatch.setattr(selection, "SLAB", slab)
    x, y, _ = arguments("two")
    x, y = x.double().requires_grad_(), y.double().requires_grad_()
    index = top_k(x, y, 4)
    index[2, 1:] = -1
    assert (selected_products(x, y, index)[2, 1:] == -torch.inf).all()

    def function(x, y):
        return selected_products(x, y, index).masked_fill(index < 0, 0)

    assert torch.autograd.gradcheck(function, (x, y))


def test_k_out_of_range():
    with pytest.raises(ValueError, match="k: expected 1 <= k <= 31, the number of candidates, got 32"):
        top_k(*arguments("two")[:2], 32)
