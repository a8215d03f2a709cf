import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mlfast import cli
from mlfast.deploy import Predictor
from mlfast.deploy.draw import draw_attention
from mlfast.models import create_model
from mlfast.nn.attention import attention_weights


def test_weights_are_those_of_multihead_attention():
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    query, tokens = torch.randn(2, 5, 16), torch.randn(2, 9, 16)
    _, expected = module(query, tokens, tokens, need_weights=True)
    (to_query, to_key, _), (query_bias, key_bias, _) = (
        x.chunk(3) for x in (module.in_proj_weight, module.in_proj_bias)
    )
    found = attention_weights(query @ to_query.T + query_bias, tokens @ to_key.T + key_bias, num_heads=4)
    torch.testing.assert_close(found, expected)


def test_the_head_looks_where_its_output_comes_from():
    """Attention times values, through the rest of the layer, is the head's output; folded or not."""
    torch.manual_seed(0)
    arguments = {"embed_dim": 16, "feedforward_dim": 16, "num_heads": 1, "num_groups": 3}
    model = create_model("test_resnet", 7, head="ml_decoder", head_args=arguments).eval()
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        maps, folded = model.attention(images), model.fold().attention(images)
        features = model.features(images)
        head, memory = model.classifier, model.classifier.embed(features)
        target, _ = head.query_side(2)
        value = head.layer.memory_projection(memory).chunk(2, dim=2)[1]
        found = maps.flatten(2)[:, [0, 3, 6]] @ value  # classes 0-2, 3-5 and 6 share a query
        target = head.layer.norm2(target + head.layer.out_projection(found))
        target = head.layer.norm3(target + head.layer.linear2(torch.relu(head.layer.linear1(target))))
        torch.testing.assert_close(head.projection(target), model(images))
    assert maps.shape == (2, 7, *features.shape[2:]) and features.shape[2] != features.shape[3]
    torch.testing.assert_close(folded, maps)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 7))
    assert torch.equal(maps[:, 0], maps[:, 2]) and not torch.equal(maps[:, 2], maps[:, 3])


def test_tokens_of_a_transformer_make_a_grid():
    model = create_model("test_vit", 4, head="ml_decoder", head_args={"embed_dim": 16, "num_heads": 2}, image_size=64)
    maps = model.eval().attention(torch.randn(1, 3, 64, 64))
    assert maps.shape[:2] == (1, 4) and maps.shape[2] == maps.shape[3] > 1
    assert (maps.sum((2, 3)) < 1).all()  # the class token has its share


def test_who_has_none_says_so(model_folder, exported, arrays):
    with pytest.raises(ValueError, match="the head is CosineLinear"):
        create_model("test_resnet", 4).attention(torch.randn(1, 3, 32, 32))
    predictor = Predictor(exported("onnx").path)
    assert not predictor.shows_attention
    with pytest.raises(ValueError, match="exported files hold none"):
        predictor.attention(arrays[0])


def test_the_predictor_tells_it_per_label(model_folder, arrays):
    predictor = Predictor(model_folder[0])
    maps = predictor.attention(arrays[3])
    assert predictor.shows_attention and maps.dtype == np.float32
    np.testing.assert_allclose(maps.sum((1, 2)), 1, rtol=1e-5)
    image = torch.from_numpy(arrays[3]).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = model_folder[1].attention(model_folder[1].prepare(image))[0]
    np.testing.assert_allclose(maps, expected, atol=1e-6)


def test_colour_is_where_the_attention_is():
    image, sheet = Image.new("RGB", (60, 60), (100, 100, 100)), Image.new("RGB", (320, 50), "white")
    corner = np.array([[0, 0], [0, 1]], np.float32)
    even = np.full((2, 2), 0.25, np.float32)
    result = draw_attention(sheet, image, {"a": corner, "b": even, "c": corner})
    assert result.size[0] == 320 and result.size[1] > 150
    pixels = np.asarray(result).astype(int)
    tile = pixels[50:154, :104]
    saturation = tile.max(2) - tile.min(2)
    assert saturation[-10:, -10:].min() > 100 and saturation[:10, :10].max() == 0
    assert np.ptp(pixels[50:154, 108:212], axis=2).max() == 0  # an even map has no colour
    assert (pixels[50:154, 216:] == 255).all()  # "a" and "c" share a tile


def test_predict_draws_it(model_folder, tmp_path, arrays, capsys):
    Image.fromarray(arrays[0]).save(tmp_path / "a.png")
    heights = {}
    for name, threshold in (("all", "0"), ("none", "1")):
        arguments = [str(tmp_path / "a.png"), "--draw", str(tmp_path / name), "--threshold", threshold]
        assert cli.main(["predict", str(model_folder[0]), *arguments]) == 0
        with Image.open(tmp_path / name / "a.png") as drawn:
            heights[name] = drawn.height
    # 12 lines and one for the rest instead of 1. The feature map of 32 pixels has one position: one tile for all.
    assert heights["all"] == heights["none"] + 12 * 22 + (104 + 22)
