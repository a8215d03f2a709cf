import math

import pytest
import torch
from torch import nn

from mlfast.nn.query2label import DecoderLayer, EncoderLayer, Query2Label, sine_positions


def make(num_classes=5, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return Query2Label(8, num_classes, **{"num_heads": 2, **options}).to(dtype).eval()


def test_positions_by_the_formula():
    encoding = sine_positions(3, 5, 12, torch.device("cpu"))
    assert encoding.shape == (15, 12)
    for row in range(3):
        for column in range(5):
            for half, (place, length) in enumerate(((row, 3), (column, 5))):
                for i in range(3):
                    angle = 2 * math.pi * (place + 1) / length / 10000 ** (2 * i / 6)
                    cell = encoding[row * 5 + column, 6 * half + 2 * i :][:2]
                    torch.testing.assert_close(cell, torch.tensor([math.sin(angle), math.cos(angle)]))


def test_layers_are_those_of_pytorch_where_nothing_is_added_to_keys():
    """With positions of zero, encoder and decoder layers are PyTorch's post-norm layers."""
    torch.manual_seed(0)
    nothing, tokens, target = torch.zeros(6, 8).double(), torch.randn(2, 6, 8).double(), torch.randn(2, 4, 8).double()
    ours = EncoderLayer(8, 2, 16, 0.1).double().eval()
    theirs = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double()
    load(theirs, self_attn=ours.self_attention, feed_forward=ours.feed_forward, norms=["norm1", "norm2"])
    torch.testing.assert_close(ours(tokens, nothing), theirs(tokens))
    ours = DecoderLayer(8, 2, 16, 0.1, self_attention=True).double().eval()
    theirs = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True).double()
    parts = dict(self_attn=ours.self_attention, multihead_attn=ours.cross_attention)
    load(theirs, **parts, feed_forward=ours.feed_forward, norms=["norm1", "norm2", "norm3"])
    torch.testing.assert_close(ours(target, tokens, nothing), theirs(target, tokens))


def load(theirs, *, feed_forward, norms, **attentions):
    for name, attention in attentions.items():
        projections = attention.query_projection, attention.key_projection, attention.value_projection
        getattr(theirs, name).load_state_dict(
            {
                "in_proj_weight": torch.cat([linear.weight for linear in projections]),
                "in_proj_bias": torch.cat([linear.bias for linear in projections]),
                "out_proj.weight": attention.out_projection.weight,
                "out_proj.bias": attention.out_projection.bias,
            }
        )
    for name, part in zip(norms, [*attentions.values(), feed_forward], strict=True):
        getattr(theirs, name).load_state_dict(part.norm.state_dict())
    theirs.linear1.load_state_dict(feed_forward.linear1.state_dict())
    theirs.linear2.load_state_dict(feed_forward.linear2.state_dict())
    theirs.eval()


def test_positions_are_added_to_queries_and_keys_but_not_to_values():
    torch.manual_seed(0)
    tokens, positions = torch.randn(1, 6, 8).double(), torch.randn(6, 8).double()
    layer = DecoderLayer(8, 2, 16, 0.0, self_attention=False).double()
    target = torch.randn(1, 4, 8).double()
    expected = layer.feed_forward(layer.cross_attention(target, target, tokens + positions, tokens))
    torch.testing.assert_close(layer(target, tokens, positions), expected)
    assert (layer(target, tokens, 0 * positions) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("cosine", [True, False])
def test_each_class_has_a_query_and_a_weight_vector_of_its_own(cosine):
    head = make(cosine=cosine, self_attention=False)
    features = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    out = head(features)
    assert out.shape == (2, 5)
    with torch.no_grad():
        head.queries[3] += 1
        head.projection.weight[1] *= -1
    changed = (head(features) - out).abs().amax(0) > 1e-6
    assert changed.tolist() == [False, True, False, True, False]


def test_with_self_attention_classes_see_each_other():
    head, features = make(), torch.randn(2, 8, 3, 4, dtype=torch.float64)
    out = head(features)
    with torch.no_grad():
        head.queries[3] += 1
    assert ((head(features) - out).abs().amax(0) > 1e-6).all()


def test_the_place_on_the_map_matters():
    head, features = make(), torch.randn(2, 8, 3, 4, dtype=torch.float64)
    assert (head(features.flip(3)) - head(features)).abs().max() > 1e-6


def test_sizes_as_published():
    with torch.device("meta"):
        head = Query2Label(2048, 80, cosine=False, self_attention=False)
    assert isinstance(head.embed, nn.Identity)
    assert head.queries.shape == (80, 2048) and head.decoder[0].feed_forward.linear1.out_features == 8192
    assert (len(head.encoder), len(head.decoder), head.encoder[0].self_attention.num_heads) == (1, 2, 4)


@pytest.mark.parametrize("options", [{}, {"embed_dim": 16, "feedforward_dim": 8, "encoder_layers": 0}])
def test_any_size_any_layout_and_the_empty_batch(options):
    head = make(dtype=torch.float32, **options)
    for height, width in ((1, 1), (3, 4), (7, 2)):
        features = torch.randn(2, 8, height, width)
        torch.testing.assert_close(head(features.to(memory_format=torch.channels_last)), head(features))
        assert head(features[:0]).shape == (0, 5)


def test_half_precision():
    head, features = make(dtype=torch.float32), torch.randn(2, 8, 3, 5)
    expected = head(features)
    with torch.autocast("cpu", torch.bfloat16):
        inside = head(features)
    for out in (inside, head.bfloat16()(features.bfloat16())):
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, expected, rtol=0, atol=0.05)


def test_compiles_whole():
    head = make(dtype=torch.float32, dropout=0.0, decoder_layers=1).train()
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    features = torch.randn(2, 8, 3, 5)
    torch.testing.assert_close(compiled(features), head(features))
    compiled(features).sum().backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []


def test_wrong_sizes_name_the_remedy():
    with pytest.raises(ValueError, match=r"multiple of 4 and of num_heads=4, got 10; pass embed_dim or num_heads"):
        Query2Label(10, 5)
    with pytest.raises(ValueError, match="sizes of at least 1, got in_features=8, num_classes=0, num_heads=4, "):
        Query2Label(8, 0)
    for name, value in (("feedforward_dim", 0), ("embed_dim", -4), ("encoder_layers", -1)):
        with pytest.raises(ValueError, match=f"{name}.*{value}"):
            Query2Label(8, 3, **{name: value})
    with pytest.raises(ValueError, match="num_heads=0"):
        Query2Label(8, 5, num_heads=0)
    with pytest.raises(ValueError, match=r"Query2Label: dropout must be in \[0, 1\), got nan"):
        Query2Label(8, 5, dropout=float("nan"))
    with pytest.raises(ValueError, match=r"expects features \[B, 8, h, w\], got \[2, 3, 8\]"):
        make()(torch.randn(2, 3, 8, dtype=torch.float64))
