"""Steps in chunks of the encoder's activations, alone and under DistributedDataParallel: the gradients are those of the plain step."""

import pytest
import torch
from on_ranks import Model, assert_close, batch, needs_gloo, run, shares
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import pairloss


class Dropped(Model):
    """With random numbers, and a second output."""

    def __init__(self):
        super().__init__()
        self.encoder.insert(2, nn.Dropout(0.3))

    def forward(self, x):
        rows, tau = super().forward(x)
        return rows, rows.sin(), tau


def caching_loss(rows, others, tau, labels):
    return pairloss.snnl(rows, labels, tau) + pairloss.contrastive(rows, others, tau)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("chunk", [1, 5, 24, 100])
def test_grad_cache_is_the_plain_step(chunk):
    x, labels = batch()
    plain, cached = Dropped().eval(), Dropped().eval()
    expected = caching_loss(*plain(x), labels)
    expected.backward()
    value = pairloss.grad_cache(cached, caching_loss, chunk)(x, labels=labels)
    assert_close(value, expected)
    assert_close(gradients(cached), gradients(plain))


def test_grad_cache_draws_the_same_random_numbers_again():
    x, labels = batch()
    model, seen = Dropped(), []

    def encoder(x):
        outputs = model(x)
        seen.append(outputs[0].detach())
        return outputs

    torch.manual_seed(3)
    pairloss.grad_cache(encoder, caching_loss, 8)(x, labels=labels)
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:], strict=True))
    assert not torch.equal(seen[0][:8] == seen[0].median(), seen[1][:8] == seen[1].median())


def cache_under_ddp(rank, ranks):
    x, labels = batch()
    plain = Dropped().eval()
    caching_loss(*plain(x), labels).backward()
    for even in (True, False):
        mine = shares(len(x), ranks, even)[rank]
        model = DistributedDataParallel(Dropped().eval())
        pairloss.grad_cache(model, pairloss.distributed(caching_loss), 4)(x[mine], labels=labels[mine])
        assert_close(gradients(model.module), gradients(plain))


@needs_gloo
def test_grad_cache_under_ddp_is_the_plain_step_of_one_process(tmp_path):
    run(cache_under_ddp, 3, tmp_path)


def test_grad_cache_scales_and_refuses():
    x, labels = batch()
    models = [Dropped().eval() for _ in range(2)]
    pairloss.grad_cache(models[0], caching_loss, 7)(x, labels=labels)
    pairloss.grad_cache(models[1], caching_loss, 7)(x, labels=labels, backward=lambda loss: (4 * loss).backward())
    for name, grad in gradients(models[0]).items():
        assert_close(gradients(models[1])[name], 4 * grad)
    with pytest.raises(ValueError, match="chunk: expected"):
        pairloss.grad_cache(models[0], caching_loss, 0)
    with pytest.raises(ValueError, match="inputs: expected one or more tensors"):
        pairloss.grad_cache(models[0], caching_loss, 7)(x, labels[:5])
