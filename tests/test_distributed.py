"""Losses whose batch is spread over ranks, by gloo on this machine: value and gradients are those of one process with all rows."""

import datetime
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import assert_rule
from on_ranks import START, Model, assert_close, batch, has_rows, needs_gloo, part, run, shares, start_rank
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import pairloss
from pairloss.testing import LOSSES, Sample

pytestmark = needs_gloo

STRATEGIES = ("gather", "ring")
ALL = [(loss, option) for loss, spec in LOSSES.items() for option in spec.options]
# One of every path: each loss, other sets of candidates, pools, selections, words, both sides, copies of an item.
WORDS = (
    "ref", "multi-hot", "sqeuclidean", "pairs", "batch", "top_k", "both_sides", "negative_ids", "ids", "each", "weight", "sum", "beta",
)  # fmt: skip
FEW = [(loss, option) for loss, option in ALL if option == LOSSES[loss].options[0] or any(word in option.split("-") for word in WORDS)]


def compare_with_one_process(rank, ranks, cases, even, device="cpu"):
    for loss, option in cases:
        spec = LOSSES[loss]
        sample = spec.sample(12, 5, 12, option).on(device)
        value, grads = sample.run(spec.function)
        if value.ndim:  # an option "none": per anchor, below
            continue
        mine = Sample(part(sample.differentiable, rank, ranks, even), part(sample.others, rank, ranks, even))
        grads = part(grads, rank, ranks, even)
        for strategy in STRATEGIES:
            of_all, of_mine = mine.run(pairloss.distributed(spec.function, strategy=strategy))
            what = f"{loss} {option} {strategy}, rank {rank}"
            assert_close(of_all, value, what)
            for name, grad in of_mine.items():
                # Rows of a rank: averaging over ranks, as DistributedDataParallel does with parameters, is still to come.
                assert_close(grad / ranks if has_rows(name, grad) else grad, grads[name], f"{what}, {name}")


@pytest.mark.parametrize(("ranks", "even"), [(1, True), (2, True), (3, False)])
def test_value_and_gradients_are_those_of_one_process(tmp_path, ranks, even):
    run(compare_with_one_process, ranks, tmp_path, FEW, even)


@pytest.mark.slow
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_option_on_2_to_4_ranks(tmp_path, ranks, even):
    run(compare_with_one_process, ranks, tmp_path, ALL, even)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("backend", ["cpu:gloo,cuda:nccl", "nccl"])
@pytest.mark.parametrize("even", [True, False])
def test_gpus(tmp_path, even, backend):
    run(compare_with_one_process, torch.cuda.device_count(), tmp_path, FEW, even, "cuda", backend=backend)


def trained(model, x, labels, loss, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in range(steps):
        rows, tau = model(x)
        optimizer.zero_grad()
        loss(rows, labels, tau).backward()
        optimizer.step()
    return model


def train_with_ddp(rank, ranks):
    x, labels = batch()
    expected = trained(Model(), x, labels, pairloss.snnl)
    for even in (True, False):
        mine = shares(len(x), ranks, even)[rank]
        for strategy in STRATEGIES:
            loss = pairloss.distributed(pairloss.snnl, strategy=strategy)
            model = trained(DistributedDataParallel(Model()), x[mine], labels[mine], loss).module
            for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
                assert_close(ours, theirs)


def test_training_with_ddp_is_that_of_one_process(tmp_path):
    run(train_with_ddp, 3, tmp_path)


class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Model().encoder

    def forward(self, x):
        return self.encoder(x), 0.3


def train_with_fsdp(rank, ranks):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    x, labels = batch()
    expected = trained(Rows(), x, labels, pairloss.supcon)
    model = Rows()
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    mine = shares(len(x), ranks, False)[rank]
    trained(model, x[mine], labels[mine], pairloss.distributed(pairloss.supcon, strategy="ring"))
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert_close(ours.full_tensor(), theirs)


def test_training_with_fsdp_is_that_of_one_process(tmp_path):
    run(train_with_fsdp, 3, tmp_path)


class Tuple(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        return x, self.encoder(x)


def layers_of_all_ranks(rank, ranks):
    x, labels = batch()
    mine = shares(len(x), ranks, True)[rank]
    gradients = []
    for rows, share in ((x, False), (x[mine], True)):
        model = Tuple(Model().encoder)
        criterion = pairloss.nn.LayerwiseSNNL(
            model, primary=lambda outputs, labels: cross_entropy(outputs[1], labels), factor=0.5, learnable=True
        ).double()
        wrapped = DistributedDataParallel(model) if share else model
        loss = (pairloss.distributed(criterion) if share else criterion)(wrapped(rows), labels[mine] if share else labels)
        loss.loss.backward()
        gradients.append([loss.snnl_per_layer, criterion.log_tau.grad, *(p.grad for p in model.parameters())])
    assert_close(gradients[1], gradients[0])


def test_layers_of_a_model(tmp_path):
    run(layers_of_all_ranks, 2, tmp_path)


def anchors_of_a_rank(rank, ranks):
    x, labels = batch()
    mine = shares(len(x), ranks, False)[rank]
    losses = pairloss.snnl(x, labels, 0.3, reduction="none")
    for strategy in STRATEGIES:
        ours = pairloss.distributed(pairloss.snnl, strategy=strategy)(x[mine], labels[mine], 0.3, reduction="none")
        assert_close(ours, losses[mine])


def changed_labels(rank, ranks):
    x, labels = batch()
    mine = labels[shares(len(x), ranks, True)[rank]].clone()
    rows = x[shares(len(x), ranks, True)[rank]].requires_grad_()
    for strategy in STRATEGIES:
        loss = pairloss.distributed(pairloss.supcon, strategy=strategy)(rows, mine, 0.3)
        mine.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_labels_that_change_before_the_backward_pass_are_noticed(tmp_path):
    run(changed_labels, 2, tmp_path)


def test_none_gives_the_anchors_of_the_rank(tmp_path):
    run(anchors_of_a_rank, 3, tmp_path)


def modules_of_a_group(rank, ranks):
    x, labels = batch()
    mine = shares(len(x), ranks, True)[rank]
    for strategy in STRATEGIES:
        module = pairloss.nn.SNNL(0.3, learnable=True, group="world", strategy=strategy).double()
        alone = pairloss.nn.SNNL(0.3, learnable=True).double()
        loss, expected = module(x[mine], labels[mine]), alone(x, labels)
        assert_close(loss, expected)
        loss.backward()
        expected.backward()
        assert_close(module.log_tau.grad, alone.log_tau.grad)
    pair = dist.new_group([0, 1])
    if rank < 2:
        rows = shares(len(x), ranks, True)
        both = slice(0, rows[1].stop)
        assert_close(
            pairloss.nn.SNNL(0.3, group=pair).double()(x[mine], labels[mine]), pairloss.nn.SNNL(0.3).double()(x[both], labels[both])
        )


def test_modules_of_the_world_and_of_a_group_within(tmp_path):
    run(modules_of_a_group, 3, tmp_path)


def half_precision(rank, ranks):
    sample = LOSSES["snnl"].sample(64, 32, 0, "number-tau").to(torch.bfloat16)
    truth = sample.to(torch.float64).run(pairloss.snnl, backend="reference")
    eager = sample.run(pairloss.snnl, backend="reference")
    mine = Sample(part(sample.differentiable, rank, ranks, False), part(sample.others, rank, ranks, False))
    for strategy in STRATEGIES:
        value, grads = mine.run(pairloss.distributed(pairloss.snnl, strategy=strategy))
        assert_rule("loss", value, truth[0], eager[0], torch.bfloat16)
        for name, grad in grads.items():
            of_truth, of_eager = (part(of_all[1], rank, ranks, False)[name] for of_all in (truth, eager))
            if grad.numel():
                assert_rule(name, grad / ranks, of_truth, of_eager, torch.bfloat16)


def test_half_rows(tmp_path):
    run(half_precision, 3, tmp_path)


def different_calls(rank, ranks):
    x, labels = batch()
    loss = pairloss.distributed(pairloss.snnl)
    with pytest.raises(ValueError, match=r"expected the same call on all ranks, got snnl\(.* by gather on rank 0, snnl\(.* on rank 1"):
        loss(x, labels, 0.1 + rank)
    with pytest.raises(ValueError, match=r"expected the same call .*float64.*float32"):
        loss(x.float() if rank else x, labels, 0.1)
    with pytest.raises(ValueError, match="expected the same call"):
        loss(x[:, : 6 - rank], labels, 0.1)
    with pytest.raises(ValueError, match="expected the same call"):
        pairloss.distributed(pairloss.snnl, strategy=STRATEGIES[rank])(x, labels, 0.1)
    with pytest.raises(ValueError, match="expected the same call"):
        (loss if rank else pairloss.distributed(pairloss.supcon))(x, labels, 0.1)
    # One rank's own mistake is told to the other, which would wait for it.
    with pytest.raises(ValueError, match=r"^labels: expected shape" if rank else r"on rank 1.*|ValueError: labels: expected shape"):
        loss(x, labels[: 24 - rank], 0.1)
    assert_close(loss(x, labels, 0.1), pairloss.snnl(torch.cat([x, x]), torch.cat([labels, labels]), 0.1))  # and it goes on
    with pytest.raises(ValueError, match=r"backend: expected an engine under pairloss\.distributed, got 'reference'"):
        loss(x, labels, 0.1, backend="reference")


def test_calls_that_differ_are_refused_on_all_ranks(tmp_path):
    run(different_calls, 2, tmp_path)


def repeat(times, function, *args):
    for _ in range(times):
        function(*args)


def one_rank_dies(rank, ranks, results):
    x, labels = batch(n=600, d=64)
    loss = pairloss.distributed(pairloss.snnl, strategy="ring")
    loss(x, labels, 0.1)
    dist.barrier()
    start = time.monotonic()
    try:
        repeat(5, loss, x, labels, 0.1)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        repeat(100_000, loss, x, labels, 0.1)
    except RuntimeError as error:
        (results / str(rank)).write_text(f"{time.monotonic() - start} {error}")
    os._exit(0)


def test_a_rank_that_dies_ends_the_others_with_an_error(tmp_path):
    context = mp.get_context(START)
    arguments = (one_rank_dies, 3, f"file://{tmp_path}/store", (tmp_path,))
    processes = [context.Process(target=start_rank, args=(rank, *arguments)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL, 0]
    for rank in (0, 2):
        seconds, message = (tmp_path / str(rank)).read_text().split(" ", 1)
        assert float(seconds) < 60
        assert f"pairloss.distributed: rank {rank} of 3 lost contact with another rank" in message


def on_a_host():
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    compare_with_one_process(rank, ranks, [(loss, spec.options[0]) for loss, spec in LOSSES.items()], False)
    dist.barrier()

    x, labels = batch(n=600, d=64)
    loss = pairloss.distributed(pairloss.snnl, dist.new_group(timeout=datetime.timedelta(seconds=5)), strategy="ring")
    loss(x, labels, 0.1)
    if rank == 1:
        subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="lost contact with another rank"):
        repeat(100_000, loss, x, labels, 0.1)
    assert time.monotonic() - start < 30
    os.write(1, b"done\n")
    os._exit(0)  # without a word to those who can't hear it


HOSTS = Path(__file__).parent / "hosts.sh"


def why_no_hosts() -> str | None:
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return "no unshare and ip (util-linux, iproute2)"
    done = subprocess.run([HOSTS, "1", "0", "true"], capture_output=True, text=True)
    return None if done.returncode == 0 else f"no network namespaces here: {done.stderr.strip()}"


def test_three_hosts_and_a_cable_that_is_pulled():
    if (reason := why_no_hosts()) is not None:
        pytest.skip(reason)
    command = [HOSTS, "3", "0", sys.executable, "-c", "import test_distributed; test_distributed.on_a_host()"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 3


def test_the_group_must_be_there():
    with pytest.raises(RuntimeError, match="init_process_group"):
        pairloss.distributed(pairloss.snnl)(*batch(), 0.1)
    with pytest.raises(ValueError, match="strategy: expected one of"):
        pairloss.distributed(pairloss.snnl, strategy="star")
    with pytest.raises(ValueError, match="strategy: expected one of"):
        pairloss.nn.SNNL(0.1, strategy="star")
    with pytest.raises(ValueError, match="group: expected one of"):
        pairloss.nn.SNNL(0.1, group="word")
    with pytest.raises(TypeError, match="loss: expected a callable, got str"):
        pairloss.distributed("snnl")


PAGE = (Path(__file__).parent.parent / "docs/distributed.md").read_text()
SCRIPTS = dict(re.findall(r'```py title="(.*?)"\n(.*?)```', PAGE, re.DOTALL))


# One run in fifty aborts at the interpreter's end, on a loaded machine: a worker of gloo, which DistributedDataParallel keeps alive
# beyond destroy_process_group, drops its last work and waits there for the GIL (torch 2.13, its pull request 179291).
WITHOUT_AN_END = """
import os, runpy, sys
runpy.run_path(sys.argv[1], run_name="__main__")
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_in_the_documentation_run_as_pasted(tmp_path, name):
    (tmp_path / name).write_text(SCRIPTS[name])
    (tmp_path / "run.py").write_text(WITHOUT_AN_END)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "run.py", name]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (loss,) = re.findall(r"^loss (\d\.\d{3})$", done.stdout, re.MULTILINE)
    assert 0 < float(loss) < 10
