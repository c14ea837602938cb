"""LayerwiseSNNL and EntanglementMonitor: the sum over layers by hand, hooks that come and go, wrapped models, checkpoints, bad input."""

import copy
import doctest
import io
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.checkpoint import checkpoint

import pairloss
from pairloss import layerwise, schedules, snnl
from pairloss.nn import EntanglementMonitor, LayerwiseSNNL

N, CLASSES = 24, 3
LAYERS = ("1", "3")


def mlp(outputs=CLASSES, seed=0, inputs=6, widths=(8, 5)):
    torch.manual_seed(seed)
    a, b = widths
    return nn.Sequential(nn.Linear(inputs, a), nn.Tanh(), nn.Linear(a, b), nn.Tanh(), nn.Linear(b, outputs))


def batch(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, 6, generator=generator, dtype=dtype), torch.arange(N) % CLASSES


def hidden(model, x):
    """What LAYERS give, by hand."""
    first = model[:2](x)
    return first, model[2:4](first)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def assert_same_step(ours, truth, ours_model, truth_model):
    """Losses, and gradients of all parameters."""
    torch.testing.assert_close(ours, truth)
    gradients = [torch.autograd.grad(loss, list(m.parameters())) for loss, m in ((ours, ours_model), (truth, truth_model))]
    assert any(g.abs().max() > 1e-4 for g in gradients[1])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("factor", [0.7, -0.3])
@pytest.mark.parametrize("options", [{}, {"metric": "sqeuclidean", "eps": 1e-5}, {"focal": 1.0, "no_positive": "zero", "ignore_index": 2}])
@pytest.mark.parametrize("aggregate", ["sum", "mean", "min"])
def test_classifier_is_the_sum_by_hand(factor, options, aggregate):
    model, (x, labels) = mlp().double(), batch(dtype=torch.float64)
    criterion = LayerwiseSNNL(model, LAYERS, factor=factor, tau=0.5, aggregate=aggregate, **options)
    loss, primary, per_layer = criterion(model(x), labels)
    by_hand = [snnl(h, labels, 0.5, **options) for h in hidden(model, x)]
    torch.testing.assert_close(primary, cross_entropy(model(x), labels))
    torch.testing.assert_close(per_layer, torch.stack(by_hand))
    assert by_hand[0] != by_hand[1]
    together = {"sum": sum(by_hand), "mean": sum(by_hand) / 2, "min": min(by_hand)}[aggregate]
    assert_same_step(loss, cross_entropy(model(x), labels) + factor * together, model, model)


@pytest.mark.parametrize("code_units", [None, 4, {"3": 2}, {"1": 3, "3": 100}])
def test_autoencoder_and_code_units_are_the_sum_by_hand(code_units):
    model, (x, labels) = mlp(outputs=6).double(), batch(dtype=torch.float64)
    criterion = LayerwiseSNNL(model, LAYERS, primary=nn.MSELoss(), factor=2, tau=0.5, code_units=code_units)
    units = code_units if isinstance(code_units, dict) else dict.fromkeys(LAYERS, code_units)
    layers = [h[:, : units.get(name)] for name, h in zip(LAYERS, hidden(model, x), strict=True)]
    truth = mse_loss(model(x), x) + 2 * sum(snnl(h, labels, 0.5) for h in layers)
    assert_same_step(criterion(model(x), x, labels).loss, truth, model, model)


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4 * 16, CLASSES)

    def forward(self, image):
        x = self.stem(image)
        x = self.shared(self.shared(x).relu()).relu()
        return self.head(x.flatten(1))


def test_feature_maps_are_flattened_and_a_shared_layer_has_the_mean_of_its_calls():
    torch.manual_seed(0)
    model, labels = Convolutional().double(), batch()[1]
    image = torch.randn(N, 1, 6, 6, dtype=torch.float64)
    criterion = LayerwiseSNNL(model, ["stem.1", "stem", "shared"], tau=0.5)
    outputs = model(image)
    per_layer = criterion(outputs, labels).snnl_per_layer
    stem = model.stem(image)
    first = model.shared(stem)
    second = model.shared(first.relu())
    by_hand = [snnl(v.flatten(1), labels, 0.5) for v in (stem, stem, first, second)]
    # The ReLU works in place, so it shows in what stem.1 gave.
    truth = torch.stack([by_hand[0], by_hand[1], (by_hand[2] + by_hand[3]) / 2])
    assert_same_step(per_layer.sum(), truth.sum(), model.stem, model.stem)
    torch.testing.assert_close(per_layer, truth)


def test_layers_that_are_found_are_those_with_weights_but_the_last():
    assert LayerwiseSNNL(mlp()).layers == ("0", "2")
    assert LayerwiseSNNL(Convolutional()).layers == ("stem.0", "shared")


def test_factor_0_is_the_primary_loss_alone(monkeypatch):
    monkeypatch.setattr("pairloss.layerwise.snnl", lambda *a, **k: pytest.fail("computed"))
    model, (x, labels) = mlp(), batch()
    criterion = LayerwiseSNNL(model, LAYERS, factor=0)
    loss, primary, per_layer = criterion(model(x), labels)
    assert torch.equal(loss, cross_entropy(model(x), labels))
    assert primary is loss
    assert per_layer.shape == (2,)
    assert per_layer.isnan().all()


def test_learnable_temperatures_are_one_per_layer_and_get_gradients():
    model, (x, labels) = mlp().double(), batch(dtype=torch.float64)
    criterion = LayerwiseSNNL(model, LAYERS, tau=0.5, learnable=True).double()
    assert [name for name, _ in criterion.named_parameters()] == ["log_tau"]
    with torch.no_grad():
        criterion.log_tau.copy_(torch.tensor([0.5, 2.0]).log())
    (ours,) = torch.autograd.grad(criterion(model(x), labels).loss, criterion.log_tau)
    taus = [criterion.log_tau.detach()[i].exp().requires_grad_() for i in (0, 1)]
    by_hand = [torch.autograd.grad(snnl(h, labels, t), t)[0] * t.detach() for h, t in zip(hidden(model, x), taus, strict=True)]
    torch.testing.assert_close(ours, torch.stack(by_hand))
    torch.testing.assert_close(criterion.tau, torch.tensor([0.5, 2.0], dtype=torch.float64), rtol=1e-6, atol=0)


def test_training_disentangles_entangles_and_learns_the_temperatures():
    """Seeds 0 to 5 gave 0.25 to 0.26 disentangled, 0.33 to 0.38 without the loss, 1.1 to 1.5 entangled, and temperatures near 0.38."""
    digits = load_digits(n_class=CLASSES)
    x, labels = torch.tensor(digits.data[:90] / 16, dtype=torch.float32), torch.tensor(digits.target[:90])
    for seed in range(2):
        after = {}
        for factor in (1.0, 0.0, -0.3):
            model = mlp(inputs=64, widths=(16, 8), seed=seed)
            criterion = LayerwiseSNNL(model, LAYERS, factor=factor, tau=0.5, learnable=factor > 0)
            optimizer = torch.optim.Adam([*model.parameters(), *criterion.parameters()], lr=0.01)
            for _ in range(30):
                optimizer.zero_grad()
                criterion(model(x), labels).loss.backward()
                optimizer.step()
            after[factor] = EntanglementMonitor(model, LAYERS, tau=0.5).measure(0, x, labels).loss.sum().item()
            if factor > 0:
                assert ((criterion.tau > 0.3) & (criterion.tau < 0.45)).all()
        assert after[1.0] < after[0.0] - 0.03
        assert after[-0.3] > after[0.0] + 0.5


def test_schedule_checkpoints_and_sets_the_temperature():
    model, (x, labels) = mlp(), batch()
    criterion = LayerwiseSNNL(model, LAYERS, schedule=schedules.annealed)
    assert criterion.tau == 1
    for epoch in range(1, 4):
        criterion.step()
        assert int(criterion.epoch) == epoch
        torch.testing.assert_close(criterion.tau, torch.tensor((1 + epoch) ** -0.55))
    by_hand = torch.stack([snnl(h, labels, 4**-0.55) for h in hidden(model, x)])
    torch.testing.assert_close(criterion(model(x), labels).snnl_per_layer, by_hand)

    file = io.BytesIO()
    torch.save(criterion.state_dict(), file)
    file.seek(0)
    again = LayerwiseSNNL(mlp(), LAYERS, schedule=schedules.annealed)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert (again.epoch, again.tau) == (criterion.epoch, criterion.tau)
    again.step()
    torch.testing.assert_close(again.tau, torch.tensor(5**-0.55))
    again.set_epoch(0)
    assert again.tau == 1


def test_the_model_is_no_part_of_the_criterion_and_its_own_state_is_untouched():
    model = mlp()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    criterion = LayerwiseSNNL(model, LAYERS)
    assert list(criterion.parameters()) == []
    assert set(criterion.state_dict()) == {"epoch", "_tau"}
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["remove", "with", "dropped", "removed twice"])
def test_hooks_are_removed(how):
    model, (x, labels) = mlp(), batch()
    criterion = LayerwiseSNNL(model, LAYERS)
    assert hooks(model) == 4
    if how == "with":
        with criterion as entered:
            entered(model(x), labels)
    elif how == "dropped":
        del criterion
    else:
        for _ in range(1 + (how == "removed twice")):
            criterion.remove()
    assert hooks(model) == 0
    if how != "dropped":
        with pytest.raises(RuntimeError, match="its hooks have been removed from the model"):
            criterion(model(x), labels)


def test_repr_names_the_layers_and_the_options():
    shown = repr(LayerwiseSNNL(mlp(), LAYERS, learnable=True))
    assert shown.startswith("LayerwiseSNNL(layers=('1', '3'), factor=1, aggregate='sum', tau=learnable, metric='cosine', eps=0.0, ")
    assert "tau=scheduled" in repr(LayerwiseSNNL(mlp(), LAYERS, schedule=schedules.annealed))


def test_two_criteria_on_a_model_leave_each_other_alone():
    model, (x, labels) = mlp(), batch()
    first, second = LayerwiseSNNL(model, ["1"]), LayerwiseSNNL(model, ["3"])
    outputs = model(x)
    first(outputs, labels)
    first.remove()
    assert hooks(model) == 3
    second(outputs, labels)


def test_activations_are_let_go_after_the_call():
    model, (x, labels) = mlp(), batch()
    kept = []
    model[1].register_forward_hook(lambda module, inputs, output: kept.append(weakref.ref(output)))
    criterion = LayerwiseSNNL(model, LAYERS)
    loss = criterion(model(x), labels).loss
    loss.backward()
    del loss
    assert [v() for v in kept] == [None]
    with torch.no_grad():
        for _ in range(2):
            model(x)
    assert [v() is None for v in kept] == [True, True, False]  # without the criterion, of the last pass only
    criterion.remove()
    assert kept[-1]() is None


def test_every_call_wants_a_pass_of_its_own():
    model, (x, labels) = mlp(), batch()
    criterion = LayerwiseSNNL(model, LAYERS)
    message = "no forward pass of the model since the last call"
    with pytest.raises(RuntimeError, match=message):
        criterion(torch.zeros(N, CLASSES), labels)
    outputs = model(x)
    criterion(outputs, labels)
    with pytest.raises(RuntimeError, match=message):
        criterion(outputs, labels)
    # What is not a pass of the whole model, or not a complete one, is not seen.
    model[:4](x)
    with pytest.raises(RuntimeError, match=message):
        criterion(outputs, labels)
    outputs = model(x)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(x[:, :5])
    with pytest.raises(RuntimeError, match=message):
        criterion(outputs, labels)


def test_a_pass_without_gradients_is_not_taken_for_that_of_the_outputs():
    model, (x, labels) = mlp(), batch()
    criterion = LayerwiseSNNL(model, LAYERS)
    outputs = model(x)
    EntanglementMonitor(model, LAYERS, tau=0.5).measure(0, x, labels)
    with pytest.raises(RuntimeError, match="the outputs have gradients, but the model's last forward pass ran without"):
        criterion(outputs, labels)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_gives_the_same_values(context):
    model, (x, labels) = mlp(), batch()
    criterion = LayerwiseSNNL(model, LAYERS, learnable=True)
    trained = criterion(model(x), labels)
    model.eval()
    criterion.eval()
    with context():
        evaluated = criterion(model(x), labels)
    torch.testing.assert_close(tuple(evaluated), tuple(trained))
    assert not evaluated.loss.requires_grad
    criterion(model(x), labels).loss.backward()  # and training goes on


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("criterion_first", [False, True])
def test_copies_of_both_work_together(copied, criterion_first):
    model, (x, labels) = mlp(), batch()
    criterion = LayerwiseSNNL(model, LAYERS, factor=0.5, schedule=schedules.annealed)
    criterion.set_epoch(3)
    outputs = model(x)  # a pending pass must not be in the way
    if criterion_first:
        criterion_, model_ = copied((criterion, model))
    else:
        model_, criterion_ = copied((model, criterion))
    truth = criterion(outputs, labels)
    assert_same_step(criterion_(model_(x), labels).loss, truth.loss, model_, model)
    assert criterion_.tau == criterion.tau
    criterion_.remove()
    assert (hooks(model_), hooks(model)) == (0, 4)
    criterion(model(x), labels)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))], ids=["deepcopy", "pickle"])
def test_a_copy_of_one_alone_keeps_nothing_and_leaves_the_original_alone(copied):
    model, (x, labels) = mlp(), batch()
    criterion = LayerwiseSNNL(model, LAYERS)
    outputs = model(x)
    model_ = copied(model)
    kept = []
    model_[1].register_forward_hook(lambda module, inputs, output: kept.append(weakref.ref(output)))
    torch.testing.assert_close(model_(x), outputs)
    assert kept[0]() is None
    alone = copied(criterion)
    del alone
    assert hooks(model) == 4
    criterion(outputs, labels)


def test_compiled_model_gives_the_same_and_does_not_compile_anew():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    x, labels = batch()
    eager = mlp()
    criteria = [LayerwiseSNNL(eager, LAYERS, schedule=schedules.annealed)]
    model = mlp()
    criteria.append(LayerwiseSNNL(model, LAYERS, schedule=schedules.annealed))
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for epoch in range(3):
        for criterion in criteria:
            criterion.set_epoch(epoch)
        assert_same_step(criteria[1](compiled(x), labels).loss, criteria[0](eager(x), labels).loss, model, eager)
        compiled(x)  # a pass without a criterion's call in between
    assert counter.frame_count == 1


def test_whole_step_compiles_to_one_graph_for_all_temperatures():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    x, labels = batch()
    model = mlp()
    criterion = LayerwiseSNNL(torch.compile(model), LAYERS, schedule=schedules.annealed)  # a wrapped one, too, has the plain names
    step = torch.compile(lambda x, labels: criterion(model(x), labels), fullgraph=True, backend=counter)
    for epoch in range(3):
        criterion.set_epoch(epoch)
        assert_same_step(step(x, labels).loss, criterion(model(x), labels).loss, model, model)
    assert counter.frame_count == 1


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrapped_first", [False, True])
@pytest.mark.parametrize("learnable", [False, True])
def test_distributed_data_parallel(wrapped_first, learnable):
    x, labels = batch()
    plain = mlp()
    truth = LayerwiseSNNL(plain, LAYERS, learnable=learnable)
    truth(plain(x), labels).loss.backward()
    model = mlp()
    if wrapped_first:
        parallel = nn.parallel.DistributedDataParallel(model)
        criterion = LayerwiseSNNL(parallel, LAYERS, learnable=learnable)
    else:
        criterion = LayerwiseSNNL(model, LAYERS, learnable=learnable)
        parallel = nn.parallel.DistributedDataParallel(model)
    called = nn.parallel.DistributedDataParallel(criterion) if learnable else criterion
    for _ in range(2):
        parallel.zero_grad()
        called.zero_grad()
        called(parallel(x), labels).loss.backward()
        gradients = [[p.grad for m in pair for p in m.parameters()] for pair in ((model, criterion), (plain, truth))]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_layers_that_run_again_in_the_backward_pass_are_seen_once(use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()
            self.head = nn.Linear(CLASSES, CLASSES)

        def forward(self, x):
            return self.head(checkpoint(self.body, x, use_reentrant=use_reentrant))

    model, (x, labels) = Checkpointed(), batch()
    criterion = LayerwiseSNNL(model, ["body"])  # the output of the region, as reentrant ones have no graph inside
    truth = cross_entropy(model.head(model.body(x)), labels) + snnl(model.body(x), labels, 0.1)
    assert_same_step_backward(criterion(model(x.requires_grad_()), labels).loss, truth, model)
    with pytest.raises(RuntimeError, match="no forward pass"):
        criterion(torch.zeros(N, CLASSES), labels)


def assert_same_step_backward(ours, truth, model):
    """With backward(), which reentrant checkpoints want."""
    gradients = []
    for loss in (ours, truth):
        model.zero_grad()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(ours, truth)
    torch.testing.assert_close(*gradients)


def test_monitor_is_snnl_or_entanglement_by_hand_and_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model, labels = Convolutional(), batch()[1]
    image = torch.randn(N, 1, 6, 6)
    model.shared.eval()  # as a user may have it, beside a batch norm that trains
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    for tau in (0.3, None):
        monitor = EntanglementMonitor(model, ["stem", "shared"], tau=tau)
        found = monitor.measure(0, image, labels)
        assert hooks(model) == 0
        assert [m.training for m in model.modules()] == modes
        torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
        stem = copy.deepcopy(model.stem).eval()(image)
        first = model.shared(stem)
        layers = [v.detach().flatten(1) for v in (stem, first, model.shared(first.relu()))]
        if tau is None:
            by_hand = [torch.stack(pairloss.entanglement(v, labels)) for v in layers]
        else:
            by_hand = [torch.stack([snnl(v, labels, tau), torch.tensor(tau)]) for v in layers]
        truth = torch.stack([by_hand[0], (by_hand[1] + by_hand[2]) / 2], dim=1)
        torch.testing.assert_close(tuple(found), (truth[0], truth[1]))
        assert not found.loss.requires_grad


def test_monitor_keeps_a_history_that_a_plot_can_use():
    model, (x, labels) = mlp(), batch()
    monitor = EntanglementMonitor(torch.compile(model), LAYERS, tau=0.5)
    criterion = LayerwiseSNNL(model, LAYERS, tau=0.5)
    losses = []
    for epoch in (0, 5, 7):
        monitor.measure(epoch, (x,), labels)
        losses.append(criterion(model(x), labels).snnl_per_layer.tolist())
        with torch.no_grad():
            model[0].weight.mul_(0.5)
    assert list(monitor.history) == [0, 5, 7]
    assert list(monitor.curves()) == list(LAYERS)
    torch.testing.assert_close(list(zip(*monitor.curves().values(), strict=True)), [tuple(v) for v in losses])
    assert len({tuple(v) for v in losses}) == 3


class Recurrent(nn.Module):
    def __init__(self, runs=True):
        super().__init__()
        self.runs, self.lstm, self.pool, self.head = runs, nn.LSTM(6, 4, batch_first=True), nn.Identity(), nn.Linear(4, CLASSES)

    def forward(self, x):
        rows = self.lstm(x[:, None])[0][:, 0]
        return self.head(self.pool(rows) if self.runs else rows)


class Empty(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 3), nn.Linear(3, 3))
        self[0].register_forward_hook(lambda module, inputs, output: output[:, :0])

    def forward(self, x):
        self[0](x)
        return self[1](x[:, :3])


X, L = batch()


@pytest.mark.parametrize(
    ("error", "message", "model", "layers", "call"),
    [
        (TypeError, "layer 'lstm': expected a tensor as output, got tuple; name", Recurrent(), ["lstm"], (L,)),
        (RuntimeError, "layer 'pool': it did not run in the model's last forward pass", Recurrent(runs=False), ["pool"], (L,)),
        (
            ValueError,
            r"layer '1': expected output \[N, ...\] with one row per label, labels \[24\], got \[24\]",
            nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)),
            ["1"],
            (L,),
        ),
        (ValueError, r"layer '0': expected at least one row and one column, got \[24, 0\]", Empty(), ["0"], (L,)),
        (
            ValueError,
            r"layer '1': expected output \[N, ...\] with one row per label, labels \[23\], got \[24, 8\]",
            mlp(),
            LAYERS,
            (X, L[1:]),
        ),
        (
            TypeError,
            "labels: expected them as third argument, as the target is not a tensor of integers but torch.float32",
            mlp(),
            LAYERS,
            (X,),
        ),
        (TypeError, "labels: expected them as third argument, .* but list", mlp(), LAYERS, ([1],)),
        (TypeError, "labels: expected a torch.Tensor, got list", mlp(), LAYERS, (X, [0, 1])),
        (TypeError, "labels: expected an integer dtype, got torch.float32", mlp(), LAYERS, (X, L.float())),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_calls_are_refused_by_name(error, message, model, layers, call):
    criterion = LayerwiseSNNL(model, layers, primary=lambda outputs, target: outputs.mean())
    with pytest.raises(error, match=message):
        criterion(model(X), *call)
    with pytest.raises(RuntimeError, match="no forward pass"):  # nothing of it stays
        criterion(torch.zeros(1), L)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "model: expected a torch.nn.Module, got function", {"model": lambda x: x}),
        (ValueError, "layers: expected names of the model's submodules, 0, 1, 2, 3, 4; got '5'", {"layers": ["0", "5"]}),
        (ValueError, "layers: expected names of the model's submodules, it has none; got 'a'", {"model": nn.Linear(2, 2), "layers": ["a"]}),
        (ValueError, r"layers: expected at least one name and none twice, got \['0', '0'\]", {"layers": ["0", "0"]}),
        (ValueError, r"layers: expected at least one name and none twice, got \[\]", {"layers": []}),
        (TypeError, "layers: expected a sequence of names, got str", {"layers": "0"}),
        (TypeError, "layers: expected a sequence of names, got int", {"layers": 0}),
        (
            ValueError,
            "layers: none found by themselves; name some of the model's submodules: 0",
            {"model": nn.Sequential(nn.ReLU()), "layers": None},
        ),
        (TypeError, "primary: expected a function, got str", {"primary": "mse"}),
        (TypeError, "schedule: expected a function, got float", {"schedule": 0.5}),
        (ValueError, "schedule: it sets the temperature, so it can't go with tau", {"schedule": schedules.annealed, "tau": 1.0}),
        (ValueError, "schedule: .* can't go with learnable", {"schedule": schedules.annealed, "learnable": True}),
        (ValueError, "schedule: expected a finite number > 0, got 0", {"schedule": lambda epoch: 0}),
        (TypeError, "learnable: expected True or False, got 1", {"learnable": 1}),
        (ValueError, "tau: expected a finite number > 0, got 0", {"tau": 0}),
        (ValueError, "factor: expected a finite number, got inf", {"factor": float("inf")}),
        (ValueError, "code_units: expected an integer >= 1, got 0", {"code_units": 0}),
        (ValueError, "code_units: expected names among layers, 1, 3, got '0'", {"code_units": {"0": 3}}),
        (ValueError, "aggregate: expected one of 'sum', 'mean', 'min', got 'max'", {"aggregate": "max"}),
        (ValueError, "metric: expected one of", {"metric": "manhattan"}),
        (ValueError, "eps: expected a finite number >= 0, got -1", {"eps": -1}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_options_are_refused_by_name_and_leave_no_hook(error, message, arguments):
    arguments = {"model": mlp(), "layers": LAYERS} | arguments
    with pytest.raises(error, match=message):
        LayerwiseSNNL(**arguments)
    if isinstance(arguments["model"], nn.Module):
        assert hooks(arguments["model"]) == 0


def test_bad_primary_epoch_and_monitor_are_refused_by_name():
    model = mlp()
    criterion = LayerwiseSNNL(model, LAYERS, primary=nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ValueError, match=r"primary: expected a 0-dim loss, got \[24\]"):
        criterion(model(X), L)
    with (
        pytest.raises(TypeError, match=r"primary: expected a torch.Tensor, got float"),
        LayerwiseSNNL(model, LAYERS, primary=lambda outputs, target: 0.0) as other,
    ):
        other(model(X), L)
    with pytest.raises(ValueError, match="epoch: expected a finite number >= 0, got -1"):
        criterion.set_epoch(-1)
    with pytest.raises(TypeError, match="epoch: expected an integer, got float"):
        criterion.set_epoch(0.5)
    with pytest.raises(ValueError, match="metric: expected one of 'cosine', 'sqeuclidean', got 'dot'"):
        EntanglementMonitor(model, LAYERS, metric="dot")
    with pytest.raises(ValueError, match="tau: expected a finite number > 0, got 0"):
        EntanglementMonitor(model, LAYERS, tau=0)
    model.train()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        EntanglementMonitor(model, LAYERS, tau=1).measure(0, X[:, 1:], L)
    assert model[1].training
    assert hooks(model) == 4  # the criterion's


def test_docstring_examples():
    failed, attempted = doctest.testmod(layerwise)
    assert (failed, attempted > 10) == (0, True)
