"""Loading weights of other forms: what matches, what is refused, and that a refusal leaves the model as it was."""

import argparse
import os

import pytest
import torch
from torch import nn

import mlfast
from mlfast.models import MultilabelClassifier
from mlfast.models.weights import WeightsMismatchError, load_checkpoint
from tests import published

SMALL = dict(num_groups=5, embed_dim=16, num_heads=4, feedforward_dim=24)


class Backbone(nn.Module):
    """A backbone with timm's method, small."""

    def __init__(self):
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 10, 3, stride=2)
        self.bn1 = nn.BatchNorm2d(10)
        self.blocks = nn.Sequential(nn.Conv2d(10, 10, 1), nn.Conv2d(10, 10, 1, bias=False))

    def forward_features(self, x):
        return self.blocks(torch.relu(self.bn1(self.conv_stem(x))))


def classifier(head):
    return MultilabelClassifier(
        Backbone(), head, pooled=not isinstance(head, mlfast.MLDecoder), scale=1.0, mean=[0.0] * 3, std=[1.0] * 3
    )


def ours(num_classes=13, **options):
    return mlfast.MLDecoder(10, num_classes, **SMALL | dict(cosine=False) | options)


def save(tmp_path, content, name="weights.pth"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def renamed(module, prefix):
    return {prefix + name: tensor for name, tensor in module.state_dict().items()}


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("timm", [True, False], ids=["timm", "Alibaba"])
@pytest.mark.parametrize("prefix", ["", "head.", "module.fc."])
def test_a_published_ml_decoder_gives_its_outputs(tmp_path, timm, prefix):
    theirs, head = published.MLDecoder(timm=timm).eval(), ours().eval()
    report = load_checkpoint(head, save(tmp_path, renamed(theirs, prefix)))
    assert report.share == 1 and not (report.missing or report.unexpected or report.wrong_shape)
    features = torch.randn(3, 10, 4, 5)
    torch.testing.assert_close(head(features), theirs(features))
    assert report.matched["queries"].endswith("query_embed.weight")
    assert report.matched["query_projection.weight"] == report.matched["layer.memory_projection.weight"]


@pytest.mark.parametrize(
    ("body", "head"), [("backbone.model.", ""), ("", "classifier."), ("body.", "head."), ("module.model.", "model.fc.")]
)
@pytest.mark.parametrize("wrap", [(), ("state_dict",), ("model",), ("state_dict", "model")], ids=str)
def test_a_whole_model_under_any_prefix(tmp_path, body, head, wrap):
    backbone, theirs, model = Backbone(), published.MLDecoder(), classifier(ours()).eval()
    nn.init.normal_(backbone.bn1.running_mean)
    content = renamed(backbone, body) | renamed(theirs, head)
    for key in wrap:
        content = {key: content, "epoch": 3}
    report = load_checkpoint(model, save(tmp_path, content), min_match=1.0)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(images), theirs.eval()(backbone.eval().forward_features(images)))
    assert report.source == ".".join(reversed(wrap)) and not report.unexpected
    assert report.matched["backbone.conv_stem.weight"].endswith(f"{body.removeprefix('module.')}conv_stem.weight")


def test_its_own_state_comes_back_from_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = classifier(ours()), classifier(ours())
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    report = mlfast.load_checkpoint(other, tmp_path / "model.safetensors", min_match=1.0)
    assert unchanged(other, model.state_dict()) and report.share == 1
    assert report.matched == {name: name for name in model.state_dict()}


def test_the_wrapper_of_programs_that_call_a_model_net(tmp_path):
    theirs, head = published.MLDecoder(), ours()
    assert load_checkpoint(head, save(tmp_path, {"net": theirs.state_dict(), "acc": 1.0})).source == "net"
    assert torch.equal(head.queries, theirs.decoder.query_embed.weight)


def test_an_average_over_training_comes_first(tmp_path):
    averaged, last, head = published.MLDecoder(), published.MLDecoder(), ours()
    content = {"state_dict": last.state_dict(), "state_dict_ema": renamed(averaged, "module."), "epoch": 1}
    assert load_checkpoint(head, save(tmp_path, content)).source == "state_dict_ema"
    assert torch.equal(head.queries, averaged.decoder.query_embed.weight)


@pytest.mark.parametrize("empty", [{}, {"decay": 0.99, "updates": 3}])
def test_an_average_in_name_alone_is_passed_over(tmp_path, empty):
    theirs, head = published.MLDecoder(), ours()
    content = {"state_dict": theirs.state_dict(), "state_dict_ema": empty}
    assert load_checkpoint(head, save(tmp_path, content)).source == "state_dict"


def test_another_label_graph_is_refused(tmp_path):
    counts = torch.full((5, 5), 2.0) + 3 * torch.eye(5)
    first, second = (
        mlfast.create_model(
            "test_resnet", 5, graph="gat_reweight", label_vectors=torch.randn(5, 8), cooccurrence=matrix
        )
        for matrix in (counts, 4 * torch.eye(5))
    )
    before = {name: tensor.clone() for name, tensor in second.state_dict().items()}
    with pytest.raises(ValueError, match=r"another label graph than the model's: .*edge_index is .*nothing was loaded"):
        load_checkpoint(second, save(tmp_path, first.state_dict()))
    assert unchanged(second, before)


def test_plain_classifiers(tmp_path):
    backbone, linear = Backbone(), nn.Linear(10, 7)
    path = save(tmp_path, renamed(backbone, "") | renamed(linear, "fc."))
    model = classifier(nn.Linear(10, 7))
    assert not load_checkpoint(model, path, min_match=1.0).unexpected
    assert torch.equal(model.classifier.weight, linear.weight)
    # The paper's angular classifier is [S, K].
    path = save(tmp_path, renamed(backbone, "model.") | {"model.classifier.weight": linear.weight.t()})
    model = classifier(mlfast.CosineLinear(10, 7))
    load_checkpoint(model, path, min_match=1.0)
    assert torch.equal(model.classifier.weight, linear.weight)


def test_a_layer_inside_the_backbone_is_no_classifier(tmp_path):
    content = renamed(Backbone(), "") | {"blocks.9.attn.proj.weight": torch.randn(7, 10)}
    model = classifier(nn.Linear(10, 7))
    report = load_checkpoint(model, save(tmp_path, content), min_match=0.5)
    assert set(report.missing) == {"classifier.weight", "classifier.bias"}
    assert report.unexpected == ("blocks.9.attn.proj.weight",)


def test_a_norm_inside_the_backbone_is_not_that_of_the_head(tmp_path):
    model = classifier(ours())
    norm = {"weight": torch.randn(16), "bias": torch.randn(16)}  # as wide as the head
    model.backbone.blocks.add_module("norm1", nn.LayerNorm(16))
    content = renamed(Backbone(), "model.") | {f"model.blocks.norm1.{name}": value for name, value in norm.items()}
    report = load_checkpoint(model, save(tmp_path, content), min_match=0.1)
    assert report.matched == {f"backbone.{name.removeprefix('model.')}": name for name in content}
    assert all(name.startswith("classifier.") for name in report.missing) and not report.unexpected


def test_other_classes_are_reported_and_the_rest_loaded(tmp_path):
    theirs, head = published.MLDecoder(num_classes=12, groups=5), ours(num_classes=20)
    before = head.projection.weight.clone()
    report = load_checkpoint(head, save(tmp_path, theirs.state_dict()), min_match=0.5)
    assert report.wrong_shape == {
        "projection.weight": ("decoder.duplicate_pooling", "[5, 16, 3] float32", "[5, 16, 4] float32"),
        "projection.bias": ("decoder.duplicate_pooling_bias", "[12] float32", "[20] float32"),
    }
    assert torch.equal(head.projection.weight, before)
    assert torch.equal(head.queries, theirs.decoder.query_embed.weight)
    elements = sum(tensor.numel() for tensor in head.state_dict().values())
    assert report.total_elements == elements
    assert report.matched_elements == elements - head.projection.weight.numel() - 20


def test_too_little_raises_and_leaves_the_model_as_it_was(tmp_path):
    model = classifier(ours())
    before = snapshot(model)
    path = save(tmp_path, renamed(Backbone(), "body.") | {"other.thing": torch.ones(2)})
    with pytest.raises(WeightsMismatchError, match=r"less than min_match=0\.9; nothing was loaded") as caught:
        load_checkpoint(model, path)
    assert unchanged(model, before)
    report = caught.value.report
    assert report.unexpected == ("other.thing",) and "classifier.queries" in report.missing
    assert 0 < report.share < 0.9
    for words in ("other.thing", "missing", "classifier.queries", "backbone", f"{report.share:.1%}", "and 9 more"):
        assert words in str(caught.value)
    load_checkpoint(model, path, min_match=report.share)
    assert not unchanged(model, before)


def test_dtype_and_requires_grad_of_the_model_stay(tmp_path):
    head, theirs = ours().to(torch.float64).requires_grad_(False), published.MLDecoder()
    load_checkpoint(head, save(tmp_path, theirs.half().state_dict()))
    assert head.queries.dtype == head.embed.weight.dtype == torch.float64 and not head.embed.weight.requires_grad


def test_wrapped_models(tmp_path):
    theirs = published.MLDecoder()
    for wrap in (nn.DataParallel, lambda head: torch.compile(head, backend="eager")):
        head = ours()
        load_checkpoint(wrap(head), save(tmp_path, theirs.state_dict()), min_match=1.0)
        assert torch.equal(head.queries, theirs.decoder.query_embed.weight)


def test_integers_are_no_weights(tmp_path):
    model = nn.Linear(3, 2)
    with pytest.raises(WeightsMismatchError, match=r"weight: \[2, 3\] int64, model \[2, 3\] float32"):
        load_checkpoint(model, save(tmp_path, {"weight": torch.ones(2, 3, dtype=torch.int64), "bias": torch.ones(2)}))


def test_tresnet_with_inplace_abn(tmp_path):
    class TResNet(nn.Module):
        def __init__(self):
            super().__init__()
            stem = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3, bias=False), "bn": nn.BatchNorm2d(4)})
            self.body = nn.ModuleDict({"conv1": stem})

    content = {f"body.conv1.1.{name}": torch.randn(4) for name in ("weight", "bias", "running_mean", "running_var")}
    content["body.conv1.0.weight"] = torch.randn(4, 3, 3, 3)
    model = TResNet()
    report = load_checkpoint(model, save(tmp_path, {"state_dict": content}))
    assert report.missing == ("body.conv1.bn.num_batches_tracked",) and not report.unexpected
    torch.testing.assert_close(model.body["conv1"]["bn"].weight.data, content["body.conv1.1.weight"].abs() + 1e-5)
    load_checkpoint(model, save(tmp_path, model.state_dict()), min_match=1.0)  # timm's own form is taken as it is
    torch.testing.assert_close(model.body["conv1"]["bn"].weight.data, content["body.conv1.1.weight"].abs() + 1e-5)


class Touch:
    """Unpickling this creates a folder: what a hostile file could do."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_file_that_needs_pickle_is_refused(tmp_path):
    model, trace = nn.Linear(3, 2), tmp_path / "trace"
    path = save(tmp_path, {"state_dict": nn.Linear(3, 2).state_dict(), "extra": Touch(trace)})
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"more than data \(.*mkdir.*\); allow_pickle=True runs"):
        load_checkpoint(model, path)
    assert not trace.exists() and unchanged(model, before)
    load_checkpoint(model, path, allow_pickle=True)
    assert trace.exists() and not unchanged(model, before)


def test_a_pickled_model_and_options_of_argparse(tmp_path):
    model, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    load_checkpoint(model, save(tmp_path, {"args": argparse.Namespace(lr=0.1), "model": theirs.state_dict()}))
    assert torch.equal(model.weight, theirs.weight)
    load_checkpoint(model, save(tmp_path, nn.Linear(3, 2)), allow_pickle=True)
    assert not torch.equal(model.weight, theirs.weight)


@pytest.mark.parametrize("name", ["weights.pth", "legacy.pth", "weights.safetensors"])
@pytest.mark.parametrize("keep", [0, 5, 40, 0.5, 0.95])
def test_truncated_files_are_said_to_be_damaged(tmp_path, name, keep):
    theirs = published.MLDecoder().state_dict()
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors.torch").save_file(theirs, tmp_path / name)
    else:
        torch.save(theirs, tmp_path / name, _use_new_zipfile_serialization=name != "legacy.pth")
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    head = ours()
    before = snapshot(head)
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(head, tmp_path / name)
    assert unchanged(head, before)


def test_files_without_weights(tmp_path):
    with pytest.raises(ValueError, match=r"no state dict; its keys are \['epoch', 'lr'\]"):
        load_checkpoint(nn.Linear(3, 2), save(tmp_path, {"epoch": 1, "lr": 0.1}))
    with pytest.raises(ValueError, match="no state dict but list"):
        load_checkpoint(nn.Linear(3, 2), save(tmp_path, [1, 2]))
    with pytest.raises(FileNotFoundError, match=r"^load_checkpoint: path '.*nothing\.pth' does not exist; pass a file"):
        load_checkpoint(nn.Linear(3, 2), tmp_path / "nothing.pth")
    with pytest.raises(FileNotFoundError, match="is a folder; pass the file in it, of safetensors or of torch"):
        load_checkpoint(nn.Linear(3, 2), tmp_path)
    with pytest.raises(ValueError, match=r"min_match must be in \[0, 1\], got 90"):
        load_checkpoint(nn.Linear(3, 2), tmp_path / "nothing.pth", min_match=90)


@pytest.mark.filterwarnings("ignore:.*no neighbour")
@pytest.mark.parametrize(("head", "graph"), [("gap", "gcn_reweight"), ("gatn", None)])
def test_a_folded_model_takes_no_weights_of_an_unfolded_one(tmp_path, head, graph):
    """In the released code the constants of an exported model are those of random weights."""
    counts = torch.full((3, 3), 2) + 3 * torch.eye(3, dtype=torch.int64)
    options = {"head": head, "graph": graph, "cooccurrence": counts}
    trained, other = (mlfast.create_model("test_resnet", 3, **options) for _ in range(2))
    folded = other.fold()
    before = snapshot(folded)
    path = save(tmp_path, trained.state_dict())
    with pytest.raises(ValueError, match=r"the model is folded: .* Load the weights first, and fold\(\) then"):
        load_checkpoint(folded, path, min_match=0.1)
    assert unchanged(folded, before)
    load_checkpoint(other, path)
    load_checkpoint(folded, save(tmp_path, other.fold().state_dict()), min_match=1.0)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(folded(images), trained.eval()(images), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*no neighbour")
@pytest.mark.parametrize(("head", "graph"), [("ml_decoder", None), ("ml_gcn", None), ("gap", "gat_reweight")])
def test_weights_of_a_folded_model_do_not_fit_another(tmp_path, head, graph):
    counts = mlfast.models.count_labels(torch.ones(8, 5)) if head == "ml_gcn" or graph else None
    model = mlfast.create_model("test_resnet", 5, head=head, graph=graph, cooccurrence=counts)
    torch.save(model.eval().fold().state_dict(), tmp_path / "folded.pth")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"folded\.pth is of a folded model: .*; nothing was loaded"):
        load_checkpoint(model, tmp_path / "folded.pth", min_match=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert load_checkpoint(model.fold(), tmp_path / "folded.pth").share == 1


def test_nothing_is_loaded_into_no_memory(tmp_path):
    model = mlfast.create_model("test_resnet", 5)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="on the meta device"):
        load_checkpoint(model.to("meta"), tmp_path / "w.pth")


def test_an_average_of_a_single_number_is_no_average(tmp_path):
    model = mlfast.create_model("test_resnet", 5)
    torch.save({"ema": {"decay": torch.tensor(0.9)}, "model": model.state_dict()}, tmp_path / "w.pth")
    assert load_checkpoint(model, tmp_path / "w.pth").source == "model"
