"""Every head on real backbones: shapes, training, precision, folding, and the graph branch before it."""

import pytest
import torch
from torch import nn

import mlfast

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "gap": {},
    "ml_decoder": {"embed_dim": 64, "feedforward_dim": 64, "num_groups": 3},
    "q2l": {"embed_dim": 64, "feedforward_dim": 64},
    "csra": {"num_heads": 2},
}
HEADS = list(SMALL)


def make(head, backbone="test_efficientnet", num_classes=5, **options):
    torch.manual_seed(0)
    return mlfast.create_model(backbone, num_classes, head=head, head_args=SMALL[head], **options)


class Branch(nn.Module):
    """A graph branch: some parameters, and a weight for each channel."""

    def __init__(self, channels):
        super().__init__()
        self.inner = nn.Parameter(torch.linspace(-1, 1, channels))

    def weight(self):
        return torch.sigmoid(3 * self.inner)


@pytest.mark.parametrize("head", HEADS)
def test_any_input_size_and_layout(head):
    model = make(head, "test_resnet").eval()
    for height, width in ((32, 32), (64, 96), (75, 45)):
        images = torch.randn(2, 3, height, width)
        out = model(images)
        assert out.shape == (2, 5) and out.abs().max() <= 1 + 1e-5 and out.std() > 0
        nhwc = make(head, "test_resnet").eval().to(memory_format=torch.channels_last)
        torch.testing.assert_close(nhwc(images.to(memory_format=torch.channels_last)), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_bfloat16_autocast_trains(head):
    model, images = make(head), torch.randn(4, 3, 64, 64)
    model(images)  # batch norm statistics that are not the initial ones
    expected = model.eval()(images)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images)
        loss = mlfast.AAMLoss()(model.train()(images), torch.ones(4, 5))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0, atol=0.1)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("head", HEADS)
def test_exports_with_any_batch_size(head):
    model = make(head, graph=Branch(256)).fold()
    images = torch.randn(6, 3, 32, 32)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images[:4],), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(images), model(images))
    assert not [node.target for node in program.graph.nodes if "mlfast" in str(node.target)]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("with_graph", [True, False])
def test_folded_models_give_the_same_outputs(head, with_graph):
    model, images = make(head, graph=Branch(256) if with_graph else None), torch.randn(4, 3, 64, 64)
    model(images)
    folded = model.fold()
    assert model.training and not folded.training and not any(p.requires_grad for p in folded.parameters())
    expected = model.eval()(images)
    torch.testing.assert_close(folded(images), expected, rtol=1e-5, atol=1e-5)
    assert "graph_branch.inner" not in folded.state_dict()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(folded(images), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(folded.probabilities(expected), torch.sigmoid(23 * expected))


@pytest.mark.parametrize("head", HEADS)
def test_a_graph_branch_weighs_the_channels(head):
    branch, images = Branch(256), torch.randn(2, 3, 64, 64)
    model = make(head, graph=branch).eval()
    features = model.backbone.forward_features(images)
    weighted = features * branch.weight().view(1, -1, 1, 1)
    expected = model.classifier(weighted.mean((2, 3)) + weighted.amax((2, 3)) if head == "gap" else weighted)
    torch.testing.assert_close(model(images), expected)
    model(images).square().sum().backward()
    assert branch.inner.grad.abs().max() > 0


def test_a_graph_branch_weighs_tokens():
    branch, images = Branch(64), torch.randn(2, 3, 160, 160)
    model = make("ml_decoder", "test_vit", graph=branch).eval()
    weighted = model.backbone.forward_features(images) * branch.weight()
    torch.testing.assert_close(model(images), model.classifier(weighted))


def test_a_graph_branch_must_fit():
    with pytest.raises(
        ValueError, match=r"gives \[10\], but backbone 'test_efficientnet' has 256 channels; make the br"
    ):
        make("gap", graph=Branch(10))
    for wrong in (nn.Linear(4, 4), Branch(4).weight):
        with pytest.raises(
            ValueError, match=r"graph must be a module with a method weight\(\) that gives \[256\], got"
        ):
            make("gap", graph=wrong)


def test_ml_decoder_takes_the_tokens_of_a_vision_transformer():
    model = make("ml_decoder", "test_vit", image_size=96).eval()
    images = torch.randn(2, 3, 96, 96)
    tokens = model.backbone.forward_features(images)
    assert tokens.shape == (2, 37, 64)
    torch.testing.assert_close(model(images), model.classifier(tokens))


@pytest.mark.parametrize("head", ["gap", "q2l", "csra"])
def test_other_heads_need_a_feature_map(head):
    with pytest.raises(ValueError, match=rf"gives tokens .*'{head}' needs a feature map .* or head='ml_decoder'"):
        make(head, "test_vit")


@pytest.mark.parametrize("head", HEADS)
def test_maps_with_channels_last_are_turned(head):
    sizes = dict(embed_dim=16, depths=(1, 1), num_heads=(1, 2), window_size=4)
    model = make(head, "swin_tiny_patch4_window7_224", image_size=64, **sizes).eval()
    images = torch.randn(2, 3, 64, 64)
    features = model.backbone.forward_features(images)
    assert features.shape == (2, 8, 8, 32)
    turned = features.permute(0, 3, 1, 2)
    torch.testing.assert_close(model(images), model.classifier(turned.mean((2, 3)) if head == "gap" else turned))


def test_arguments_of_heads_are_checked():
    with pytest.raises(ValueError, match=r"head 'csra' does not take these arguments \['nonsense'\]"):
        mlfast.create_model("test_efficientnet", 5, head="csra", head_args={"nonsense": 1})
    with pytest.raises(ValueError, match="number of classes, 5, got 6; leave it out"):
        mlfast.create_model("test_efficientnet", 5, head="ml_decoder", head_args={"num_groups": 6})
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        mlfast.create_model("test_efficientnet", 0)
    with pytest.raises(TypeError, match=r"create_model: num_classes must be an integer, got float 80\.0; convert it"):
        mlfast.create_model("test_efficientnet", 80.0)
