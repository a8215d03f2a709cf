import re

import pytest
import torch
from safetensors.torch import save_file

from mlfast.models import MultilabelClassifier, create_model
from mlfast.nn.cosine_linear import CosineLinear

BACKBONES = ["test_resnet", "test_efficientnet"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_output_is_a_cosine_per_class(backbone):
    torch.manual_seed(0)
    model = create_model(backbone, 7).eval()
    out = model(model.prepare(torch.randint(0, 256, (3, 3, 48, 64), dtype=torch.uint8)))
    assert isinstance(model, MultilabelClassifier)
    assert out.shape == (3, 7) and out.dtype == torch.float32
    assert out.abs().max() <= 1 + 1e-6 and out.std() > 0


def test_the_head_sees_the_mean_over_positions():
    torch.manual_seed(0)
    model = create_model("test_resnet", 4).eval()
    x = torch.randn(2, 3, 64, 64)
    pooled = model.backbone.forward_features(x).flatten(2).mean(2)
    torch.testing.assert_close(model(x), model.classifier(pooled))


def test_logits_without_cosine():
    model = create_model("test_resnet", 4, cosine=False).eval()
    assert isinstance(model.classifier, torch.nn.Linear)
    x = torch.tensor([[-2.0, 0.0, 3.0]])
    torch.testing.assert_close(model.probabilities(x), torch.sigmoid(x))


def test_probabilities_apply_the_scale():
    model = create_model("test_resnet", 3, scale=20)
    cosines = torch.tensor([[-0.5, 0.0, 0.1]])
    torch.testing.assert_close(model.probabilities(cosines), torch.sigmoid(20 * cosines))
    assert model.probabilities(cosines.bfloat16()).dtype == torch.float32
    assert create_model("test_resnet", 3).scale == 23.0


def test_prepare_normalises_uint8_on_the_models_statistics():
    model = create_model("test_resnet", 3)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = (torch.tensor(model.backbone.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(model.prepare(images), (images / 255 - mean) / std)
    with pytest.raises(TypeError, match="uint8"):
        model.prepare(images.float())
    for shape, remedy in (
        ((2, 8, 9, 3), r"channels come last there: pass images\.movedim\(-1, -3\)"),
        ((8, 9, 3), r"channels come last there"),
        ((3, 8, 9), r"pass images\[None\]"),
        ((2, 1, 8, 9), "convert them to 3 channels"),
    ):
        got = re.escape(str(list(shape)))
        with pytest.raises(ValueError, match=rf"takes images \[B, 3, H, W\], got {got}; {remedy}"):
            model.prepare(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"got torch\.uint8; pass model\.prepare\(images\)"):
        model(images)


def test_weights_in_the_state_are_all_trainable_parts():
    model = create_model("test_resnet", 3)
    assert isinstance(model.classifier, CosineLinear)
    assert "classifier.weight" in model.state_dict()
    assert not {"mean", "std"} & set(model.state_dict())


def test_every_parameter_gets_a_gradient():
    model = create_model("test_resnet", 3)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("backbone", "behind"),
    [("test_convnext", {"head.norm.weight", "head.norm.bias"}), ("test_vit", set()),
     ("mobilenetv3_small_050", {"conv_head.weight", "conv_head.bias"})],
)  # fmt: skip
def test_what_stands_behind_the_features_is_frozen_and_nothing_else(backbone, behind):
    model = create_model(backbone, 3, head="ml_decoder", image_size=160)
    weights = dict(model.named_parameters())
    model(torch.randn(2, 3, 160, 160)).sum().backward()
    assert {name for name, weight in weights.items() if weight.grad is None} == {f"backbone.{name}" for name in behind}
    assert all(weight.requires_grad == (weight.grad is not None) for weight in weights.values())
    with torch.inference_mode():
        assert next(create_model("test_resnet", 3).parameters()).requires_grad


def test_backbone_arguments_reach_timm():
    assert create_model("resnet10t", 3, channels=(8, 16, 24, 32), stem_width=8).classifier.in_features == 32
    with pytest.raises(ValueError, match=r"'test_resnet' does not take these arguments \['nonsense'\]"):
        create_model("test_resnet", 3, nonsense=1)


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_turns_scores_round_is_refused(scale):
    with pytest.raises(ValueError, match="scale must be above 0 and finite, got"):
        create_model("test_resnet", 3, scale=scale)


def test_a_backbone_whose_pooling_cannot_be_left_out():
    with torch.device("meta"):
        assert create_model("efficientvit_b0", 3, cosine=False).classifier.in_features == 128


def test_tresnets_take_sizes_that_are_no_multiple_of_their_blocks():
    torch.manual_seed(0)
    model = create_model("tresnet_m", 3).eval()
    images = torch.randn(1, 3, 65, 67)
    with torch.no_grad():
        padded = torch.nn.functional.pad(images, (0, 1, 0, 3))
        torch.testing.assert_close(model(images), model(padded))


def test_a_backbone_that_needs_more_than_64_pixels():
    with torch.device("meta"):
        assert create_model("inception_v4", 3, image_size=96)(torch.zeros(2, 3, 96, 96)).shape == (2, 3)
        with pytest.raises(ValueError, match=r"'inception_v4' does not take an image \[1, 3, 32, 32\].* image_size"):
            create_model("inception_v4", 3, image_size=32)
        with pytest.raises(ValueError, match="'test_resnet' does not take an image"):
            create_model("test_resnet", 3, in_chans=1)


def test_a_backbone_without_one_feature_map_is_refused():
    message = r"'coat_tiny' gives features list, but the heads need a feature map .* choose a convolutional backbone"
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        create_model("coat_tiny", 3)


def test_unknown_backbone_names_near_ones():
    with pytest.raises(ValueError, match=r"unknown backbone 'resnet51'; did you mean .*'resnet50'"):
        create_model("resnet51", 3)


def test_unknown_tag_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown pretrained tag in backbone 'resnet10t.foo'; available: 'resnet10t"):
        create_model("resnet10t.foo", 3)


def test_pretrained_without_a_network_names_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = (
        r"published weights of backbone 'test_resnet.r160_in1k' could not be read: .*\n.*HF_HOME.*--backbone_args .*"
        r"pretrained=False, in mlfast train --pretrained false"
    )
    with pytest.raises(OSError, match=message):
        create_model("test_resnet.r160_in1k", 3, pretrained=True)


def test_pretrained_weights_that_fail_without_a_word_name_the_kind_of_failure(monkeypatch):
    def no_answer(*_args, **_kwargs):
        raise TimeoutError

    monkeypatch.setattr("timm.create_model", no_answer)
    with pytest.raises(OSError, match="could not be read: TimeoutError\n"):
        create_model("test_resnet.r160_in1k", 3, pretrained=True)


def test_pretrained_weights_from_a_file(tmp_path):
    torch.manual_seed(0)
    published = create_model("test_resnet", 3).backbone.state_dict()
    classifier = {"fc.weight": torch.zeros(1000, 96), "fc.bias": torch.zeros(1000)}
    save_file(published | classifier, tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors")}
    read = create_model("test_resnet", 3, pretrained=True, pretrained_cfg_overlay=overlay).backbone.state_dict()
    assert read.keys() == published.keys() and all(torch.equal(read[name], published[name]) for name in read)


def test_pretrained_weights_that_nobody_published():
    with torch.device("meta"), pytest.raises(ValueError, match="no published weights of backbone 'nf_ecaresnet26'"):
        create_model("nf_ecaresnet26", 3, pretrained=True)


def test_unknown_head():
    known = "'gap', 'ml_decoder', 'q2l', 'csra', 'ml_gcn', 'gatn'"
    with pytest.raises(ValueError, match=f"unknown head 'gat'; available: {known}"):
        create_model("test_resnet", 3, head="gat")
