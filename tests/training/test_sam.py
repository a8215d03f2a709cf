import copy

import pytest
import torch
from torch import nn

from mlfast.training.sam import SAM, frozen_batch_norm_statistics


def reference_climb(weights, grads, rho, adaptive):
    """Where the definition leads, in plain PyTorch."""
    if adaptive:
        norm = torch.cat([(w.abs() * g).flatten() for w, g in zip(weights, grads, strict=True)]).norm()
        return [w + w**2 * g * rho / (norm + 1e-12) for w, g in zip(weights, grads, strict=True)]
    norm = torch.cat([g.flatten() for g in grads]).norm()
    return [w + rho * g / (norm + 1e-12) for w, g in zip(weights, grads, strict=True)]


def make_net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def groups_of(net):
    weights, biases = ([p for p in net.parameters() if p.ndim == ndim] for ndim in (2, 1))
    return [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 0.02}]


OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
}
forms = pytest.mark.parametrize("adaptive", [False, True])
optimizers = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def weights_of(net):
    return [p.detach().clone() for p in net.parameters()]


def put(net, weights):
    with torch.no_grad():
        for parameter, weight in zip(net.parameters(), weights, strict=True):
            parameter.copy_(weight)


@forms
def test_on_a_quadratic(adaptive):
    curvature = torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)
    p = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    expected = p.detach().clone()
    sam = SAM(torch.optim.SGD([p], lr=0.05), rho=0.5, adaptive=adaptive)
    for _ in range(20):
        (curvature * p**2 / 2).sum().backward()
        sam.climb()
        (curvature * p**2 / 2).sum().backward()
        sam.descend()
        p.grad = None
        (climbed,) = reference_climb([expected], [curvature * expected], 0.5, adaptive)
        expected = expected - 0.05 * curvature * climbed
    torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)


@forms
@optimizers
def test_on_a_net_with_groups(optimizer, adaptive):
    net, plain = make_net(), make_net()
    sam = SAM(OPTIMIZERS[optimizer](groups_of(net)), rho=0.3, adaptive=adaptive)
    base = OPTIMIZERS[optimizer](groups_of(plain))
    start = weights_of(net)
    for seed in range(5):
        x = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        net(x).square().sum().backward()
        sam.climb()
        net(x).square().sum().backward()
        sam.descend()
        sam.optimizer.zero_grad()

        grads = torch.autograd.grad(plain(x).square().sum(), list(plain.parameters()))
        before = weights_of(plain)
        put(plain, reference_climb(before, grads, 0.3, adaptive))
        plain(x).square().sum().backward()
        put(plain, before)
        base.step()
        base.zero_grad()
    torch.testing.assert_close(weights_of(net), weights_of(plain), rtol=1e-10, atol=1e-12)
    assert not any(map(torch.equal, weights_of(net), start))


@forms
def test_weights_return_bit_for_bit_and_the_copy_is_freed(adaptive):
    net = make_net(torch.float32)
    sam = SAM(torch.optim.SGD(net.parameters(), lr=0.1), adaptive=adaptive)
    before = weights_of(net)
    net(torch.randn(4, 5)).sum().backward()
    sam.climb()
    assert not any(map(torch.equal, weights_of(net), before))
    assert all(p.grad is None for p in net.parameters())
    sam.restore()
    assert all(map(torch.equal, weights_of(net), before))
    assert not sam._saved


def test_the_step_has_length_rho():
    net = make_net()
    before = torch.cat([p.flatten() for p in weights_of(net)])
    net(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
    SAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.05).climb()
    assert torch.cat([p.flatten() for p in weights_of(net)]).sub(before).norm().item() == pytest.approx(0.05)


def test_parameters_without_a_gradient_stay():
    net = make_net()
    net[0].requires_grad_(False)
    sam = SAM(torch.optim.AdamW(net.parameters(), lr=0.1))
    before = weights_of(net)
    for end in (sam.climb, sam.descend):
        net(torch.ones(2, 5, dtype=torch.float64)).square().sum().backward()
        end()
        assert [torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True)] == [True] * 2 + [
            False
        ] * 2


@forms
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_norm_that_is_not_finite_leaves_the_weights_where_they_are(value, adaptive):
    net = make_net(torch.float32)
    sam = SAM(torch.optim.SGD(net.parameters(), lr=0.1), adaptive=adaptive)
    before = weights_of(net)
    net(torch.ones(2, 5)).sum().backward()
    net[2].weight.grad[1, 3] = value
    sam.climb()
    assert all(map(torch.equal, weights_of(net), before))
    net(torch.ones(2, 5)).sum().backward()
    sam.descend()
    assert not any(map(torch.equal, weights_of(net), before))  # a step of the optimiser alone


def test_a_gradient_of_zero_climbs_nowhere():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.zeros(3)
    SAM(torch.optim.SGD([p], lr=0.1)).climb()
    assert torch.equal(p.detach(), torch.ones(3))


def test_accumulated_gradients_are_those_of_the_whole_batch():
    x = torch.randn(6, 5, dtype=torch.float64)
    results = []
    for parts in (1, 3):
        net = make_net()
        sam = SAM(torch.optim.SGD(net.parameters(), lr=0.1))
        for end in (sam.climb, sam.descend):
            for part in x.chunk(parts):
                net(part).square().sum().backward()
            end()
        results.append(weights_of(net))
    torch.testing.assert_close(*results)


def test_clipping_counts_for_the_second_gradient_only():
    net = make_net()
    sam = SAM(torch.optim.SGD(net.parameters(), lr=1.0))
    before = torch.cat([p.flatten() for p in weights_of(net)])
    x = torch.ones(2, 5, dtype=torch.float64)
    net(x).square().sum().backward()
    sam.climb()
    net(x).square().sum().backward()
    nn.utils.clip_grad_norm_(net.parameters(), 0.01)
    sam.descend()
    moved = torch.cat([p.flatten() for p in weights_of(net)]) - before
    assert moved.norm().item() == pytest.approx(0.01)


@forms
@pytest.mark.parametrize("overflow", [False, True])
def test_grad_scaler(overflow, adaptive):
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    net, plain = make_net(torch.float32), make_net(torch.float32)
    sam, expected = (SAM(torch.optim.SGD(n.parameters(), lr=0.1), 0.5, adaptive) for n in (net, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    scaler.scale(net(x).square().sum()).backward()
    sam.climb()
    scaler.scale(net(x).square().sum()).backward()
    if overflow:
        net[0].weight.grad[0, 0] = torch.inf
    scaler.unscale_(sam.optimizer)
    sam.restore()
    scaler.step(sam.optimizer)
    scaler.update()

    if not overflow:
        for end in (expected.climb, expected.descend):
            plain(x).square().sum().backward()
            end()
    torch.testing.assert_close(weights_of(net), weights_of(plain))
    assert scaler.get_scale() == (2.0**9 if overflow else 2.0**10)


def test_batch_norm_statistics_move_in_the_first_pass_only():
    torch.manual_seed(0)
    cumulative = nn.BatchNorm1d(4, momentum=None)
    frozen = nn.BatchNorm1d(4).eval()
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), cumulative, frozen)
    x = 5 + torch.randn(6, 3)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=1.0)

    model(x).square().sum().backward()
    after_first = copy.deepcopy(list(model.buffers()))
    sam.climb()
    with frozen_batch_norm_statistics(model):
        inside = model(x)
        inside.square().sum().backward()
        twin = copy.deepcopy(model)
    assert all(map(torch.equal, model.buffers(), after_first))
    sam.descend()
    assert [m.track_running_stats for m in model[1:]] == [True] * 3
    model(x)
    assert [int(m.num_batches_tracked) for m in model[1:]] == [2, 2, 0]

    for module in twin[1:3]:
        module.track_running_stats = True
    torch.testing.assert_close(twin(x), inside)  # normalised by the batch, as outside


def test_batch_norm_is_as_before_after_an_error():
    model = nn.BatchNorm1d(4)
    with pytest.raises(ValueError, match="expected 2D or 3D input"), frozen_batch_norm_statistics(model):
        model(torch.ones(4))
    assert model.track_running_stats


@optimizers
def test_state_is_that_of_the_optimizer(optimizer):
    nets = [make_net(), make_net()]
    sam, other = (SAM(OPTIMIZERS[optimizer](groups_of(net))) for net in nets)

    def step(sam, net):
        for end in (sam.climb, sam.descend):
            sam.optimizer.zero_grad()
            net(torch.ones(2, 5, dtype=torch.float64)).square().sum().backward()
            end()

    step(sam, nets[0])
    put(nets[1], weights_of(nets[0]))
    other.load_state_dict(copy.deepcopy(sam.state_dict()))
    assert sam.state_dict().keys() == sam.optimizer.state_dict().keys()
    for s, net in zip((sam, other), nets, strict=True):
        step(s, net)
    assert all(map(torch.equal, *map(weights_of, nets)))


def test_errors_say_what_to_do():
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="rho must be finite and at least 0, got -1"):
        SAM(torch.optim.SGD([p], lr=0.1), rho=-1)
    sam = SAM(torch.optim.SGD([p], lr=0.1))
    with pytest.raises(RuntimeError, match="no gradient; call backward"):
        sam.climb()
    with pytest.raises(RuntimeError, match="call climb before descend"):
        sam.descend()
    p.grad = torch.ones(3)
    sam.climb()
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="called twice"):
        sam.climb()
