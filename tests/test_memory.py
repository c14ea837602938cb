"""The queue: which rows stay, checkpoints in every state, gradients after an enqueue, empty slots; how others went wrong."""

import copy

import pytest
import torch

from pairloss import contrastive, snnl
from pairloss.nn import FeatureQueue

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def rows(start: int, n: int, dim: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that say when they came, from 1."""
    labels = torch.arange(start, start + n)
    return labels[:, None].float() + torch.zeros(dim), labels


def oldest_first(queue: FeatureQueue) -> list[int]:
    size, fill = len(queue.labels), queue.fill.item()
    slots = (queue.pointer - fill + torch.arange(fill, device=queue.labels.device)) % size
    labels = queue.labels[slots]
    assert torch.equal(queue.features[slots], labels[:, None] + torch.zeros_like(queue.features[slots]))
    empty = queue.bias == -torch.inf
    assert empty.sum().item() == size - fill
    assert (queue.bias[~empty] == 0).all()
    assert (queue.labels[empty] == queue.ignore_index).all()
    assert (queue.features[empty] == 0).all()
    return labels.tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1, 4, 10, 11])
@pytest.mark.parametrize("batches", [[8, 8], [4, 4, 4, 4], [3, 0, 3, 3, 3, 3], [10, 1], [25, 3, 25], [11, 11]], ids=str)
def test_the_last_rows_stay_in_order(size, batches, device):
    queue, came = FeatureQueue(size, 2).to(device), 0
    for n in batches:
        features, labels = rows(came + 1, n)
        queue.enqueue(features.to(device), labels.to(device))
        came += n
        assert oldest_first(queue) == list(range(1, came + 1))[-size:]


def test_13_no_row_is_lost_where_the_queue_wraps():
    """lightly: 8 rows into 10 slots after 8, and only 2 are stored."""
    queue = FeatureQueue(10, 2)
    queue.enqueue(*rows(1, 8))
    queue.enqueue(*rows(9, 8))
    assert queue.labels.tolist() == [11, 12, 13, 14, 15, 16, 7, 8, 9, 10]
    assert queue.pointer.item() == 6


@pytest.mark.parametrize("batches", [[], [3], [4, 4, 4], [7, 7]], ids=["empty", "half full", "full", "wrapped"])
def test_8_a_checkpoint_brings_back_the_queue_in_every_state(batches, tmp_path):
    """PML's CrossBatchMemory: pointer and filled flag are not in the state, a restored queue counts as empty."""
    queue, came = FeatureQueue(10, 2), 0
    for n in batches:
        queue.enqueue(*rows(came + 1, n))
        came += n
    torch.save(queue.state_dict(), tmp_path / "queue.pt")
    other = FeatureQueue(10, 2)
    other.enqueue(*rows(100, 6))
    other.load_state_dict(torch.load(tmp_path / "queue.pt"))
    for restored in (other, copy.deepcopy(queue)):
        assert oldest_first(restored) == oldest_first(queue)
        restored.enqueue(*rows(came + 1, 5))
        assert oldest_first(restored) == list(range(1, came + 6))[-10:]


def test_a_state_that_is_held_does_not_change():
    queue = FeatureQueue(4, 2)
    queue.enqueue(*rows(1, 3))
    state = queue.state_dict()
    queue.enqueue(*rows(4, 3))
    queue.clear()
    queue.load_state_dict(state)
    assert oldest_first(queue) == [1, 2, 3]


@pytest.mark.parametrize("loss", ["cosine", "dot", "sqeuclidean", "contrastive", "logits"])
@pytest.mark.parametrize("rows_before", [5, 6], ids=["empty slots", "full"])
def test_backward_after_enqueue_is_that_of_the_queue_before(loss, rows_before):
    """MoCo's order: loss, enqueue, backward. Rows that are overwritten in place raise in autograd, or give a wrong gradient."""
    generator = torch.Generator().manual_seed(0)
    queue = FeatureQueue(6, 3)
    queue.enqueue(torch.randn(rows_before, 3, generator=generator), torch.arange(rows_before) % 2)
    x, labels = torch.randn(4, 3, generator=generator).requires_grad_(), torch.arange(4) % 2

    def value():
        if loss == "logits":
            return (x @ queue.features.T + queue.bias).logsumexp(1).sum()
        if loss == "contrastive":
            return contrastive(x, x.detach(), 0.5, metric="dot", negative_keys=queue.features, negative_bias=queue.bias)
        ignore_index = None if rows_before == 6 else queue.ignore_index
        return snnl(x, labels, 0.5, metric=loss, ref_features=queue.features, ref_labels=queue.labels, ignore_index=ignore_index)

    (expected,) = torch.autograd.grad(value(), x)
    pending = value()
    queue.enqueue(x, labels)
    queue.clear()
    assert torch.equal(torch.autograd.grad(pending, x)[0], expected)
    assert not queue.features.requires_grad


@pytest.mark.parametrize("metric", ["cosine", "dot", "sqeuclidean"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("filled", [0, 5])
def test_empty_slots_are_neither_positives_nor_negatives(metric, backend, filled):
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(5, 3, generator=generator)[:filled], (torch.arange(5) % 2)[:filled]
    queue = FeatureQueue(64, 3)
    queue.enqueue(features, labels)
    x, y = torch.randn(4, 3, generator=generator).requires_grad_(), torch.arange(4) % 2
    loss = snnl(
        x,
        y,
        0.5,
        metric=metric,
        backend=backend,
        ref_features=queue.features,
        ref_labels=queue.labels,
        ignore_index=queue.ignore_index,
    )
    (gradient,) = torch.autograd.grad(loss, x)
    if filled:
        expected = snnl(x, y, 0.5, metric=metric, backend=backend, ref_features=features, ref_labels=labels)
        torch.testing.assert_close((loss, gradient), (expected, torch.autograd.grad(expected, x)[0]))
    else:
        assert loss.item() == 0
        assert torch.equal(gradient, torch.zeros_like(x))


def test_the_bias_masks_empty_slots():
    queue = FeatureQueue(5, 2, dtype=torch.float64)
    queue.enqueue(*rows(1, 3))
    assert queue.bias.tolist() == [0, 0, 0, -torch.inf, -torch.inf]
    assert queue.bias.dtype == torch.float64
    logits = torch.ones(2, dtype=torch.float64) @ queue.features.T + queue.bias
    torch.testing.assert_close(logits.logsumexp(0), queue.features[:3].sum(1).logsumexp(0))


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("filled", "in_batch"), [(0, True), (0, False), (5, True), (5, False)])
def test_empty_slots_are_no_negatives_of_a_contrastive_loss(metric, backend, filled, in_batch):
    generator = torch.Generator().manual_seed(0)
    keys, query, key = (torch.randn(n, 3, generator=generator) for n in (5, 4, 4))
    queue = FeatureQueue(64, 3)
    queue.enqueue(keys[:filled])
    query.requires_grad_()
    options = {"metric": metric, "backend": backend, "in_batch": in_batch}
    loss = contrastive(query, key, 0.5, negative_keys=queue.features, negative_bias=queue.bias, **options)
    (gradient,) = torch.autograd.grad(loss, query)
    if filled or in_batch:
        expected = contrastive(query, key, 0.5, negative_keys=keys[:filled] if filled else None, **options)
        torch.testing.assert_close((loss, gradient), (expected, torch.autograd.grad(expected, query)[0]))
    else:
        assert loss.item() == 0
        assert torch.equal(gradient, torch.zeros_like(query))


def test_rows_are_detached_and_take_the_dtype_of_the_queue():
    queue = FeatureQueue(4, 2, dtype=torch.bfloat16, ignore_index=-1)
    assert queue.labels.tolist() == [-1] * 4
    features, labels = rows(1, 2)
    for dtype in (torch.float64, torch.float32, torch.float16):
        queue.enqueue((features.to(dtype).requires_grad_() * 1), labels.to(torch.int32))
        assert queue.features.dtype == torch.bfloat16
        assert queue.labels.dtype == torch.long
        assert not queue.features.requires_grad
    assert oldest_first(queue) == [1, 2, 1, 2]
    assert oldest_first(queue.double()) == [1, 2, 1, 2]


def test_labels_left_out_are_0_and_clear_empties():
    queue = FeatureQueue(4, 2)
    queue.enqueue(rows(1, 3)[0])
    assert queue.labels.tolist() == [0, 0, 0, -100]
    queue.clear()
    assert oldest_first(queue) == []
    queue.enqueue(*rows(7, 2))
    assert queue.labels.tolist() == [7, 8, -100, -100]


def test_rows_of_an_inference_serve_a_training_step():
    queue = FeatureQueue(4, 3)
    with torch.inference_mode():
        queue.enqueue(torch.eye(3), torch.tensor([0, 1, 0]))
    x = torch.randn(2, 3, requires_grad=True)
    snnl(x, torch.tensor([0, 1]), 1.0, metric="dot", ref_features=queue.features, ref_labels=queue.labels, ignore_index=-100).backward()
    assert x.grad.abs().sum() > 0


def test_compiles_to_one_graph_with_the_same_queue():
    torch.compiler.reset()
    queues = [FeatureQueue(10, 2), FeatureQueue(10, 2)]

    def step(queue, x, labels):
        loss = snnl(x, labels % 2, 5.0, ref_features=queue.features, ref_labels=queue.labels % 2, metric="sqeuclidean")
        queue.enqueue(x, labels)
        return loss, queue.bias

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for start, n in ((1, 4), (5, 4), (9, 4), (13, 12), (25, 3)):
        results = []
        for function, queue in zip((step, compiled), queues, strict=True):
            features, labels = rows(start, n)
            loss, bias = function(queue, features.requires_grad_(), labels)
            results.append((loss, bias, *torch.autograd.grad(loss, features), queue.state_dict()))
        torch.testing.assert_close(*results)
    assert oldest_first(queues[1]) == list(range(18, 28))


def test_nothing_waits_for_the_device():
    """On the meta device a value that is looked at would raise."""
    queue = FeatureQueue(10, 2).to("meta")
    for n in (4, 7, 12):
        queue.enqueue(*(v.to("meta") for v in rows(1, n)))
        queue.enqueue(rows(1, n)[0].to("meta"))
    assert {v.device.type for v in (*queue.state_dict().values(), queue.bias)} == {"meta"}
    queue.clear()
    assert repr(queue) == "FeatureQueue(size=10, dim=2, ignore_index=-100, dtype=torch.float32)"


X, L = rows(1, 3)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "features: expected a torch.Tensor, got list", {"features": [[1.0, 2.0]]}),
        (ValueError, r"features: expected shape \[N, 2\], as the queue has 2 columns, got \[3, 1\]", {"features": X[:, :1]}),
        (ValueError, r"features: expected shape \[N, 2\], as the queue has 2 columns, got \[2\]", {"features": X[0]}),
        (TypeError, "features: expected a floating-point dtype, got torch.int64", {"features": X.long()}),
        (TypeError, "features: expected a floating-point dtype, got torch.complex64", {"features": X.to(torch.complex64)}),
        (ValueError, "features: expected the device of the queue, cpu, got meta", {"features": X.to("meta")}),
        (TypeError, "labels: expected a torch.Tensor, got list", {"labels": [0, 1, 2]}),
        (TypeError, "labels: expected an integer dtype, got torch.float32", {"labels": L.float()}),
        (ValueError, r"labels: expected shape \[3\], got \[2\]", {"labels": L[:2]}),
        (ValueError, "labels: expected the device of the features, cpu, got meta", {"labels": L.to("meta")}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_rows_are_refused_by_name_and_change_nothing(error, message, arguments):
    queue = FeatureQueue(4, 2)
    with pytest.raises(error, match=message):
        queue.enqueue(**({"features": X, "labels": L} | arguments))
    assert oldest_first(queue) == []


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "size: expected an integer >= 1, got 0", {"size": 0}),
        (TypeError, "size: expected an integer, got float", {"size": 4.0}),
        (TypeError, "size: expected an integer, got bool", {"size": True}),
        (ValueError, "dim: expected an integer >= 1, got -1", {"dim": -1}),
        (TypeError, "ignore_index: expected an integer, got str", {"ignore_index": "-1"}),
        (TypeError, "dtype: expected a floating-point dtype, got torch.int64", {"dtype": torch.int64}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_sizes_are_refused_by_name(error, message, arguments):
    with pytest.raises(error, match=message):
        FeatureQueue(**({"size": 4, "dim": 2} | arguments))
