"""aam_loss as a citizen of PyTorch: autograd, torch.compile, export, autocast, modules, errors."""

from fractions import Fraction

import numpy as np
import pytest
import torch

import mlfast
from mlfast.functional import aam_loss
from mlfast.ops.aam_loss import Options

on_cpu = pytest.mark.parametrize("device", [torch.device("cpu")])


@pytest.fixture
def cos(device):
    g = torch.Generator().manual_seed(0)
    return (torch.rand(6, 20, generator=g) * 2 - 1).to(device).requires_grad_()


@pytest.fixture
def target(device):
    g = torch.Generator().manual_seed(1)
    return (torch.rand(6, 20, generator=g) < 0.2).to(device)


def grad_of(loss, cos, *args, **options):
    return torch.autograd.grad(loss, cos, *args, **options)[0].clone()


# ----------------------------------------------------------------------------------------------------------- autograd


def test_backward_twice_through_a_retained_graph(backend, cos, target):
    for reduction in ("sum", "mean", "none"):
        loss = aam_loss(cos, target, reduction=reduction)
        incoming = torch.full_like(loss, 3.0)
        first = grad_of(loss, cos, incoming, retain_graph=True)
        second = grad_of(loss, cos, incoming, retain_graph=True)
        third = grad_of(loss, cos, torch.ones_like(loss))
        assert torch.equal(first, second)
        torch.testing.assert_close(third * 3, first)


def test_backward_twice_without_retaining_raises(backend, cos, target):
    loss = aam_loss(cos, target)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_accumulate(backend, cos, target):
    (aam_loss(cos, target) + aam_loss(cos, target)).backward()
    once = grad_of(aam_loss(cos, target), cos)
    torch.testing.assert_close(cos.grad, 2 * once)


def test_input_changed_after_forward(backend, cos, target):
    if backend == "reference":
        pytest.skip("autograd's own version counter guards plain PyTorch")
    expected = grad_of(aam_loss(cos, target), cos)
    leaf = cos.detach().clone().requires_grad_()
    middle = leaf * 1
    loss = aam_loss(middle, target)
    with torch.no_grad():
        middle.zero_()
    torch.testing.assert_close(grad_of(loss, leaf), expected)


def test_strided_and_expanded_incoming_gradients(backend, cos, target):
    loss = aam_loss(cos, target, reduction="none")
    expected = grad_of(loss, cos, torch.ones_like(loss), retain_graph=True)
    torch.testing.assert_close(grad_of(loss.sum(), cos, retain_graph=True), expected)
    torch.testing.assert_close(grad_of(torch.cat([loss, loss]).sum(), cos, retain_graph=True), 2 * expected)
    uneven = torch.linspace(0, 1, loss.numel(), device=cos.device).view(20, 6).t()
    torch.testing.assert_close(grad_of(loss, cos, uneven), expected * uneven)


def test_inputs_stay_as_they_are(backend, cos, target):
    before, labels = cos.detach().clone(), target.clone()
    (aam_loss(cos, target) * 5).backward()
    assert torch.equal(cos.detach(), before)
    assert torch.equal(target, labels)


def test_without_gradient(backend, cos, target):
    expected = aam_loss(cos, target)
    for loss in (aam_loss(cos.detach(), target), torch.no_grad()(aam_loss)(cos, target)):
        assert torch.equal(loss, expected.detach())
        assert not loss.requires_grad


@on_cpu
def test_second_derivative_says_what_is_missing(cos, target):
    with mlfast.use_backend("cpu"):
        loss = aam_loss(cos, target)
        (grad,) = torch.autograd.grad(loss, cos, create_graph=True)
        with pytest.raises(RuntimeError, match='use_backend\\("reference"\\)'):
            grad.sum().backward()
    with mlfast.use_backend("reference"):
        (grad,) = torch.autograd.grad(aam_loss(cos, target), cos, create_graph=True)
        grad.sum().backward()


# ------------------------------------------------------------------------------------------------ compile and export


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_whole(reduction, compiler):
    torch._dynamo.reset()

    def step(cos, target, weight):
        return aam_loss(cos * 0.9, target, reduction=reduction, class_weight=weight).sum() * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
    weight = torch.rand(20)
    for rows in (6, 9):
        cos = (torch.rand(rows, 20) * 2 - 1).requires_grad_()
        target = (torch.rand(rows, 20) < 0.2).float()
        torch.testing.assert_close(compiled(cos, target, weight), step(cos, target, weight))
        torch.testing.assert_close(grad_of(compiled(cos, target, weight), cos), grad_of(step(cos, target, weight), cos))
    torch.testing.assert_close(compiled(cos.detach(), target, weight), step(cos.detach(), target, weight))


def test_opcheck(backend, cos, target):
    if backend == "reference":
        pytest.skip("has no custom op")
    for reduction in ("mean", "none"):
        numbers = Options(23.0, 0.1, 0.7, 1.0, 0.0, 0.05, 0.0, reduction)
        torch.library.opcheck(torch.ops.mlfast.aam_loss, (cos.detach(), target, None, None, *numbers, True))


def test_no_exporter_meets_a_custom_op():
    class Model(torch.nn.Module):
        def forward(self, cos, target):
            return aam_loss(cos, target.float())

    args = torch.rand(3, 5), torch.ones(3, 5)
    graph = torch.export.export(Model(), args).graph
    assert not [node for node in graph.nodes if "mlfast" in str(node.target)]
    traced = torch.jit.trace(Model(), args)
    assert "mlfast::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(*args), Model()(*args))


def test_autocast(backend, cos, target, device):
    weight = torch.rand(20, 20, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        low = torch.nn.functional.linear(cos, weight)
        loss = aam_loss(low, target)
    assert low.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, aam_loss(low.float(), target))


# ------------------------------------------------------------------------------------------------------------- module


@on_cpu
def test_module_is_the_function(cos, target):
    weight = torch.rand(20)
    options = dict(scale=17.0, margin=0.1, k=0.6, gamma_neg=2.0, gamma_pos=1.0, prob_shift=0.02, label_smoothing=0.05)
    module = mlfast.AAMLoss(**options, class_weight=weight, reduction="mean")
    assert torch.equal(module(cos, target), aam_loss(cos, target, **options, class_weight=weight, reduction="mean"))
    assert "scale=17.0" in repr(module)
    assert module.double().class_weight.dtype == torch.float64
    with pytest.raises(ValueError, match="k must be"):
        mlfast.AAMLoss(k=2.0)


def test_released_shifts_only_when_it_focuses():
    assert mlfast.AAMLoss.released().prob_shift == 0
    assert mlfast.AAMLoss.released(gamma_neg=1.0).prob_shift == 0.05
    assert mlfast.AAMLoss.released(scale=17.0).k == 0.7


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("number", [np.float64, np.float32, np.int64, Fraction, int])
def test_numbers_of_any_library(number):
    cos, target = torch.linspace(-1, 1, 6).view(2, 3), torch.ones(2, 3)
    assert aam_loss(cos, target, scale=number(23)) == aam_loss(cos, target, scale=23.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(cos=torch.ones(2, 3, dtype=torch.int64)), TypeError, "cos must be .* got torch.int64"),
        (dict(cos=[[0.1]]), TypeError, "cos must be a tensor, got list"),
        (dict(cos=torch.tensor(0.5), target=torch.tensor(1)), ValueError, "dimension of classes"),
        (dict(target=torch.ones(2)), ValueError, r"target must have the shape of cos, \(2, 3\), got \(2,\)"),
        (dict(target=torch.ones(2, 3, dtype=torch.complex64)), TypeError, "target must be .* got torch.complex64"),
        (
            dict(target=torch.ones(2, 3, device="meta")),
            ValueError,
            "target must be on the device of cos, cpu, got meta",
        ),
        (dict(target=torch.ones(2, 3, requires_grad=True)), ValueError, "target.detach"),
        (dict(target=torch.ones(2, 3).to_sparse()), TypeError, "target must be a dense tensor.*SparseTargets"),
        (dict(class_weight=[1.0, 1.0, 1.0]), TypeError, "class_weight must be a tensor, got list"),
        (dict(class_weight=torch.ones(3).to_sparse()), TypeError, "class_weight must be a dense tensor, .*to_dense"),
        (dict(class_weight=torch.ones(4)), ValueError, r"one value per class, \[3\], got \[4\]"),
        (
            dict(class_weight=torch.ones(3, dtype=torch.int64)),
            TypeError,
            r"class_weight must be .* got torch.int64; pass class_weight.float",
        ),
        (dict(class_weight=torch.ones(3, device="meta")), ValueError, "class_weight must be on the device"),
        (dict(class_weight=torch.ones(3, requires_grad=True)), ValueError, "class_weight must not require grad"),
        (dict(scale=0.0), ValueError, "scale must be > 0"),
        (dict(scale=float("nan")), ValueError, "scale must be > 0"),
        (dict(scale="23"), TypeError, "scale must be a number, got str"),
        (dict(scale=[23.0]), TypeError, "scale must be a number, got list"),
        (dict(scale=torch.tensor(23.0)), TypeError, r"scale must be a number, got Tensor .*; pass scale.item\(\)"),
        (dict(reduction=["sum"]), ValueError, "reduction must be one of .*, got"),
        (dict(cos=torch.zeros(2, 3).to_sparse()), TypeError, "cos must be a dense tensor, .*; pass cos.to_dense"),
        (dict(margin=float("inf")), ValueError, r"margin must be in \[-1, 1\], a difference of cosines, got inf"),
        (dict(margin=1.5), ValueError, r"margin must be in \[-1, 1\], .* got 1.5"),
        (dict(margin=-20), ValueError, r"margin must be in \[-1, 1\], .* got -20"),
        (dict(k=1.5), ValueError, r"k must be in \[0, 1\], got 1.5"),
        (dict(gamma_neg=-1.0), ValueError, "gamma_neg must be >= 0, got -1.0"),
        (dict(gamma_pos=-0.1), ValueError, "gamma_pos must be >= 0"),
        (dict(prob_shift=1.0), ValueError, r"prob_shift must be in \[0, 1\)"),
        (dict(label_smoothing=1.0), ValueError, r"label_smoothing must be in \[0, 1\)"),
        (dict(reduction="avg"), ValueError, "reduction must be one of 'sum', 'mean', 'batchmean', 'none', got 'avg'"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = dict(cos=torch.zeros(2, 3), target=torch.ones(2, 3)) | change
    with pytest.raises(error, match=message):
        aam_loss(arguments.pop("cos"), arguments.pop("target"), **arguments)
