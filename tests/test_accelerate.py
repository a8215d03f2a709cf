"""Swapping modules of other libraries: the same weights, outputs and gradients, and what is left alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import mlfast
from mlfast.torchvision_compat import import_torchvision
from tests import published

pytestmark = pytest.mark.usefixtures("one_thread")


EDGES = torch.tensor([[0, 1, 2, 3, 0, 2, 4], [1, 2, 3, 0, 0, 1, 1]])


def swap(module):
    """The new module, and the entry of the report about it; the original stays intact."""
    original = copy.deepcopy(module)
    new, report = mlfast.accelerate(module)
    assert len(report.swapped) == 1 and not report.left, str(report)
    assert report.swapped[0].old == type(original).__name__ and report.swapped[0].new == type(new).__name__
    return original, new


def reason(module):
    """Why a module was left; it must be the same object, and as it was."""
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    same, report = mlfast.accelerate(module)
    assert same is module and not report.swapped and len(report.left) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    return report.left[0].note


def assert_same(theirs, ours, x, *rest, tolerance=1e-5):
    """Outputs, and gradients for the first input."""
    results = []
    for module in (theirs, ours):
        leaf = x.clone().requires_grad_()
        out = module(leaf, *rest)
        results.append((out, torch.autograd.grad((out * torch.linspace(0.5, 1, out.numel()).view_as(out)).sum(), leaf)))
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance, check_dtype=False)


# -------------------------------------------------------------------------------------------------------------- losses


def labelled(classes=7, soft=False):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(5, classes, generator=generator)
    target = torch.rand(5, classes, generator=generator)
    return logits, target if soft else (target > 0.7).float()


TIMM = [
    {},
    {"disable_torch_grad_focal_loss": True},
    {"gamma_neg": 2, "gamma_pos": 0, "clip": None},
    {"gamma_neg": 0, "gamma_pos": 0, "clip": 0.1},
    {"reduction": "sum"},
    {"reduction": "mean", "weight": torch.linspace(0.5, 2, 7)},
    {"reduction": "none"},
]


def timm_loss(**options):
    import_torchvision()
    from timm.loss import AsymmetricLossMultiLabel

    try:
        return AsymmetricLossMultiLabel(**options)
    except TypeError as error:  # older versions always sum
        pytest.skip(f"this timm has other options: {error}")


@pytest.mark.parametrize("options", TIMM, ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_timm_loss(options, soft):
    assert_same(*swap(timm_loss(**options)), *labelled(soft=soft))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pos_weight": 2.0}, "pos_weight"),
        ({"smoothing": 0.1}, "smooths labels towards 0.5"),
        ({"eps": 1e-4}, "eps=0.0001"),
        ({"weight": torch.ones(5, 1)}, "one number per class"),
        ({"gamma_neg": -1}, "gamma_neg must be >= 0"),
    ],
    ids=str,
)
def test_timm_loss_with_other_options_is_left(options, words):
    assert words in reason(timm_loss(**options))


@pytest.mark.parametrize("detach", [False, True])
def test_alibaba_loss(detach):
    theirs, ours = swap(published.AsymmetricLossOptimized(disable_torch_grad_focal_loss=detach))
    assert (ours.gamma_neg, ours.gamma_pos, ours.clip, ours.reduction) == (4, 1, 0.05, "sum")
    assert ours.detach_focus == detach
    assert_same(theirs, ours, *labelled())


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("weight", [None, torch.linspace(0.5, 2, 7)], ids=["plain", "weighted"])
def test_binary_cross_entropy(reduction, weight):
    for soft in (False, True):
        original, new = swap(nn.BCEWithLogitsLoss(weight, reduction=reduction))
        assert_same(original, new, *labelled(soft=soft))
    assert "pos_weight" in reason(nn.BCEWithLogitsLoss(pos_weight=torch.ones(7)))
    assert "one number for all" in reason(nn.BCEWithLogitsLoss(torch.ones(1)))


def test_binary_cross_entropy_is_called_as_before():
    original, new = swap(nn.BCEWithLogitsLoss())
    logits, target = labelled()
    torch.testing.assert_close(new(input=logits, target=target), original(input=logits, target=target))
    _, report = mlfast.accelerate(nn.BCEWithLogitsLoss(torch.ones(7)))
    assert "its weight is class_weight" in report.swapped[0].note


def test_on_the_meta_device_a_loss_is_left():
    with torch.device("meta"):
        assert "meta device" in reason(nn.BCEWithLogitsLoss())


def test_a_namesake_that_computes_otherwise_is_left():
    class AsymmetricLossOptimized(published.AsymmetricLossOptimized):
        def forward(self, x, y):
            return super().forward(2 * x, y)

    class AsymmetricLoss(AsymmetricLossOptimized):  # with a scale, as in the paper's code
        def __init__(self):
            super().__init__()
            self.scale = 30

    class GATConv(nn.Module):
        pass

    assert "other outputs" in reason(AsymmetricLossOptimized())
    assert "not known: scale" in reason(AsymmetricLoss())
    assert "not the known form" in reason(GATConv())


# --------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("timm", [True, False], ids=["timm", "Alibaba"])
@pytest.mark.parametrize(("num_classes", "groups"), [(13, 5), (4, 4)])
def test_ml_decoder(timm, num_classes, groups):
    theirs, ours = swap(published.MLDecoder(num_classes, groups, timm=timm).eval().double())  # no luck with rounding
    assert isinstance(ours, mlfast.MLDecoder) and not ours.training
    assert_same(theirs, ours, torch.randn(3, 10, 4, 5).double())
    features = torch.randn(2, 10, 3, 3).double()
    weights = theirs.decoder.layers[0].multihead_attn.in_proj_weight
    expected = torch.autograd.grad(theirs(features).square().sum(), weights)[0]
    split = [ours.query_projection.weight, ours.layer.memory_projection.weight]
    torch.testing.assert_close(torch.cat(torch.autograd.grad(ours(features).square().sum(), split)), expected)


def test_timm_ml_decoder_that_crashes_now_runs():
    import_torchvision()
    from timm.layers.ml_decoder import MLDecoder

    theirs = MLDecoder(num_classes=13, num_of_groups=5, decoder_embedding=16, initial_num_features=10).eval()
    stand_in = published.MLDecoder(nhead=8, feedforward=2048, timm=True).eval()  # timm's weights in what runs
    stand_in.load_state_dict(theirs.state_dict())
    features = torch.randn(2, 10, 3, 4)
    ours, report = mlfast.accelerate(theirs)
    assert len(report.swapped) == 1
    assert_same(stand_in, ours, features)
    ours.train()(features).sum().backward()
    assert ours.embed.weight.grad is not None


def test_parameters_stay_the_same_objects():
    head = published.MLDecoder(timm=True)
    head.duplicate_pooling_bias.requires_grad_(False)
    kept = {id(p) for name, p in head.named_parameters() if "in_proj" not in name and "query_embed" not in name}
    ours, _ = mlfast.accelerate(head)
    assert {id(p) for p in ours.parameters()} >= kept
    assert not ours.projection.bias.requires_grad and ours.query_projection.weight.requires_grad
    assert ours.queries.data_ptr() == head.query_embed.weight.data_ptr()
    assert not any(tensor.is_meta for tensor in ours.state_dict().values())


def test_trained_queries_stay_trained():
    head = published.MLDecoder()
    head.decoder.query_embed.requires_grad_(True)
    ours, _ = mlfast.accelerate(head)
    assert ours.queries is head.decoder.query_embed.weight and ours.queries.requires_grad


def head_that_is_left(kind):
    head = published.MLDecoder()
    layer = head.decoder.layers[0]
    if kind == "cosines":
        head.decoder.group_fc = type("GroupASL", (nn.Module,), {})()
    elif kind == "backbone":
        head.backbone = nn.Linear(2, 2)
    elif kind == "zero-shot":
        head.zsl = True
    elif kind == "dropout":
        layer.dropout2.p = 0.3
    elif kind == "eps":
        layer.norm2.eps = 1e-3
    elif kind == "ReLU":
        layer.activation = nn.functional.gelu
    elif kind == "slots":
        head.decoder.duplicate_pooling = nn.Parameter(torch.randn(5, 16, 4))
    elif kind == "not known: llrelu":
        head.llrelu = nn.LeakyReLU(0.2)
    elif kind == "not known: mask":
        head.decoder.register_buffer("mask", torch.ones(2))
    elif kind == "low rank":
        layer.linear1 = type("LowRankLinear", (nn.Linear,), {})(16, 24)
    else:
        head.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 24), num_layers=1)
    return head


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("cosines", "GroupASL"),
        ("backbone", "create_model"),
        ("zero-shot", "zero-shot"),
        ("dropout", "dropout rates"),
        ("eps", "eps"),
        ("ReLU", "ReLU"),
        ("slots", "4 slots a group for 13 classes in 5 groups"),
        ("not known: llrelu", "not known: llrelu"),
        ("not known: mask", "not known: mask"),
        ("low rank", "parts that are not known: LowRankLinear"),
        ("self-attention", "self_attn"),
    ],
)
def test_other_ml_decoders_are_left(kind, words):
    assert words in reason(head_that_is_left(kind))


@pytest.mark.parametrize("groups", [2, 3, 80])
def test_group_fc(groups):
    module = nn.ModuleDict({"group_fc": published.GroupFC(groups)})
    h, weight, out = torch.randn(2, groups, 4), torch.randn(groups, 4, 2), torch.zeros(2, groups, 2)
    module, report = mlfast.accelerate(module)
    assert report.swapped[0].name == "group_fc"
    module["group_fc"](h, weight, out)
    torch.testing.assert_close(out, torch.einsum("bld,ldf->blf", h, weight))
    module["group_fc"](h, weight[0], out)  # the same weight for all groups
    torch.testing.assert_close(out, h @ weight[0])


# ------------------------------------------------------------------------------------------------------------- walking


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 10, 1), nn.ReLU())
        self.head = published.MLDecoder()

    def forward(self, x):
        return self.head(self.body(x))


def test_submodules_are_swapped_in_place_and_once():
    model = Model().eval()
    model.same_head, model.losses = model.head, nn.ModuleList([nn.BCEWithLogitsLoss(), nn.MSELoss()])
    images = torch.randn(2, 3, 4, 4)
    expected, conv = model(images), model.body[0]
    same, report = mlfast.accelerate(model)
    assert same is model and model.body[0] is conv and model.head is model.same_head
    assert [found.name for found in report.swapped] == ["head", "losses.0"] and not report.left
    torch.testing.assert_close(model(images), expected)
    assert "head: MLDecoder -> MLDecoder: new parameters" in str(report) and "swapped 2, left 0" in str(report)
    again, second = mlfast.accelerate(model)
    assert again is model and not second.swapped and not second.left


def test_mode_dtype_and_requires_grad_stay():
    head = published.MLDecoder().to(torch.float64).requires_grad_(False)
    for training in (True, False):
        ours, _ = mlfast.accelerate(copy.deepcopy(head).train(training))
        assert all(part.training == training for part in ours.modules())
        assert {(t.dtype, t.requires_grad) for t in ours.parameters()} == {(torch.float64, False)}
    layer, _ = mlfast.accelerate(published.GATConv(7, 4).bfloat16().train())
    assert layer.training and layer.lin.weight.dtype == torch.bfloat16


def touched(kind):
    head = published.MLDecoder()
    if kind == "hooks":
        head.register_forward_hook(lambda *_: None)
    elif kind == "hooks inside":
        head.decoder.layers[0].linear1.register_full_backward_hook(lambda *_: None)
    elif kind == "parametrizations":
        parametrizations.weight_norm(head.decoder.embed_standart)
    elif kind == "patched":
        head.forward = lambda x: x
    else:
        head.decoder.eval()
    return head


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("hooks", "hooks (forward_hooks of MLDecoder)"),
        ("hooks inside", "hooks (backward_hooks of Linear)"),
        ("parametrizations", "parametrizations"),
        ("patched", "forward of its MLDecoder was patched"),
        ("modes", "different modes"),
    ],
)
def test_what_was_changed_from_outside_is_left(kind, words):
    assert words in reason(touched(kind))


def test_wrapped_models_are_not_entered():
    model = torch.compile(Model(), backend="eager")
    head = model._orig_mod.head
    _, report = mlfast.accelerate(model)
    assert model._orig_mod.head is head and report.left[0].old == "OptimizedModule"
    assert "before it is wrapped" in report.left[0].note


@pytest.mark.parametrize("wrong", ["x", Model])
def test_something_else_than_a_module_is_refused(wrong):
    with pytest.raises(TypeError, match=f"got {type(wrong).__name__}, expected a torch.nn.Module"):
        mlfast.accelerate(wrong)


def test_a_failure_changes_nothing(monkeypatch):
    from mlfast.nn import accelerate

    def fails(module):
        raise RuntimeError("out of memory")

    model = Model()
    model.loss, head = nn.BCEWithLogitsLoss(), model.head
    monkeypatch.setitem(accelerate.KNOWN, "BCEWithLogitsLoss", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        mlfast.accelerate(model)
    assert model.head is head


def test_an_accelerated_head_reads_checkpoints_of_the_original(tmp_path):
    theirs, model = Model().eval(), Model().eval()
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "weights.pth")
    mlfast.accelerate(model)
    assert mlfast.load_checkpoint(model, tmp_path / "weights.pth").share == 1
    images = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model(images), theirs(images))
