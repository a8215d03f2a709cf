"""The ML-Decoder head against a straightforward version of it, and what it does beyond."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mlfast.nn.ml_decoder import MLDecoder

SMALL = dict(embed_dim=16, num_heads=4, feedforward_dim=24)


def make(num_classes=13, dtype=torch.float64, **options):
    """A small head on 10 channels whose weights are all away from their initial zeros and ones."""
    torch.manual_seed(0)
    head = MLDecoder(10, num_classes, **SMALL | options).to(dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head.eval()


class Straightforward(nn.Module):
    """ML-Decoder as published: nn.MultiheadAttention, and a loop over the groups. Weights are those of a MLDecoder."""

    def __init__(self, head, num_classes, cosine):
        super().__init__()
        self.head, self.num_classes, self.cosine = head, num_classes, cosine
        width = head.embed.out_features
        self.attention = nn.MultiheadAttention(width, SMALL["num_heads"], dropout=0.1, batch_first=True).double()
        self.attention.load_state_dict(
            {
                "in_proj_weight": torch.cat([head.query_projection.weight, head.layer.memory_projection.weight]),
                "in_proj_bias": torch.cat([head.query_projection.bias, head.layer.memory_projection.bias]),
                "out_proj.weight": head.layer.out_projection.weight,
                "out_proj.bias": head.layer.out_projection.bias,
            }
        )
        self.eval()

    def forward(self, features):
        head, layer = self.head, self.head.layer
        tokens = features.flatten(2).transpose(1, 2) if features.dim() == 4 else features
        memory = tokens @ head.embed.weight.T + head.embed.bias
        memory = torch.where(memory > 0, memory, (0.2 if self.cosine else 0.0) * memory)
        target = torch.stack([head.queries] * len(features))
        target = head.norm1(target + target)
        target = layer.norm2(target + self.attention(target, memory, memory)[0])
        target = layer.norm3(target + layer.linear2(torch.relu(layer.linear1(target))))
        weight, outputs = head.projection.weight, []
        for group in range(weight.shape[0]):
            h, w = target[:, group], weight[group]
            outputs.append(F.normalize(h, dim=1) @ F.normalize(w, dim=0) if self.cosine else h @ w)
        outputs = torch.cat(outputs, dim=1)[:, : self.num_classes]
        return outputs if head.projection.bias is None else outputs + head.projection.bias


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("num_classes", "num_groups"), [(13, 5), (13, 13), (4, 3), (7, 1)])
def test_equals_a_straightforward_version(num_classes, num_groups, cosine, bias):
    head = make(num_classes, num_groups=num_groups, cosine=cosine, bias=bias, queries="learned")
    plain = Straightforward(head, num_classes, cosine)
    features = torch.randn(3, 10, 4, 5, dtype=torch.float64, requires_grad=True)
    assert head(features).shape == (3, num_classes)
    torch.testing.assert_close(head(features), plain(features))
    watched = [features, head.queries, head.embed.weight, head.layer.linear1.weight, head.projection.weight]
    incoming = torch.randn(3, num_classes, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(head(features), watched, incoming),
        torch.autograd.grad(plain(features), watched, incoming),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_tokens_are_a_map_laid_out_in_a_row():
    head, features = make(), torch.randn(2, 10, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(head(features.flatten(2).transpose(1, 2)), head(features))


def test_the_order_of_positions_does_not_matter():
    head, features = make(), torch.randn(2, 12, 10, dtype=torch.float64)
    torch.testing.assert_close(head(features[:, torch.randperm(12)]), head(features))


def test_sizes_and_initial_values_as_published():
    head = MLDecoder(1280, 500, cosine=False)
    assert head.queries.shape == (100, 768) and head.layer.linear1.weight.shape == (2048, 768)
    assert MLDecoder(64, 20, **SMALL).queries.shape[0] == 20
    assert head.queries.std() == pytest.approx(1, abs=0.02)
    # The three input projections are one Xavier uniform matrix [3 * 768, 768].
    published = nn.MultiheadAttention(768, 8).in_proj_weight
    for weight in (head.query_projection.weight, head.layer.memory_projection.weight):
        assert weight.abs().max().item() == pytest.approx(published.abs().max().item(), rel=1e-3)
        assert weight.std().item() == pytest.approx(published.std().item(), rel=0.01)


def test_random_queries_are_kept_and_never_trained():
    head = make()
    assert "queries" in head.state_dict() and "queries" not in dict(head.named_parameters())
    assert dict(make(queries="learned").named_parameters())["queries"].requires_grad


def test_defaults_follow_cosine():
    with_cosine, with_logits = MLDecoder(10, 4, **SMALL), MLDecoder(10, 4, cosine=False, **SMALL)
    assert (with_cosine.projection.bias, with_cosine.embed.negative_slope) == (None, 0.2)
    assert with_logits.projection.bias.shape == (4,) and with_logits.embed.negative_slope == 0
    assert MLDecoder(10, 4, negative_slope=0.0, **SMALL).embed.negative_slope == 0


def test_the_released_head_adds_a_bias_to_the_cosine():
    head = MLDecoder.released(10, 4, **SMALL).eval()
    features = torch.randn(2, 10, 3, 3)
    before = head(features)
    assert before.abs().max() <= 1 + 1e-6
    with torch.no_grad():
        head.projection.bias.add_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    torch.testing.assert_close(head(features) - before, torch.arange(4.0).expand(2, -1))


def test_dropout_drops_for_every_image_its_own():
    head = make(dtype=torch.float32, dropout=0.5).train()
    target, query = head.query_side(2)
    assert target.shape == query.shape == (2, 13, 16)
    assert not torch.equal(target[0], target[1])
    same = torch.randn(1, 10, 3, 3).expand(2, -1, -1, -1)
    out = head(same)
    assert (out[0] - out[1]).abs().max() > 1e-3
    head.eval()
    torch.testing.assert_close(head(same)[0], head(same)[1])


def test_dropout_of_zero_trains_like_evaluation():
    head, features = make(dropout=0.0), torch.randn(2, 10, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(head.train()(features), head.eval()(features))


@pytest.mark.parametrize("cosine", [True, False])
def test_word_vectors_ask_for_classes(cosine):
    words = torch.randn(6, 7, dtype=torch.float64)
    head = make(6, queries=words, cosine=cosine)
    features = torch.randn(2, 10, 3, 3, dtype=torch.float64)
    out = head(features)
    assert out.shape == (2, 6)
    head.set_word_vectors(words[[4, 1, 1]])
    torch.testing.assert_close(head(features), out[:, [4, 1, 1]])
    head(features).sum().backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []


def test_word_vectors_must_fit():
    words = torch.randn(6, 7)
    with pytest.raises(ValueError, match="one per class, 5, got 6"):
        make(5, queries=words)
    with pytest.raises(ValueError, match=r"\[K, V\], floating point, got \[6\]"):
        make(6, queries=words[:, 0])
    with pytest.raises(ValueError, match="num_groups=3; leave it out"):
        make(6, queries=words, num_groups=3)
    with pytest.raises(ValueError, match="share one bias; leave bias out"):
        make(6, queries=words, bias=True)
    with pytest.raises(ValueError, match=r"must be \[K, 7\], got \[6, 6\]"):
        make(6, queries=words).set_word_vectors(words[:, 1:])
    with pytest.raises(ValueError, match="has no word vectors"):
        make(6).set_word_vectors(words)


@pytest.mark.parametrize("options", [{}, {"cosine": False}, {"queries": torch.ones(13, 3)}], ids=str)
def test_folded_head_gives_the_same_outputs(options):
    head = make(dtype=torch.float32, **options).train()
    folded = head.fold()
    assert head.training and not folded.training
    features = torch.randn(2, 10, 3, 5)
    torch.testing.assert_close(folded(features), head.eval()(features), rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in folded.parameters())
    assert {"queries", "query_projection.weight", "norm1.weight"}.isdisjoint(folded.state_dict())
    before = folded(features)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    torch.testing.assert_close(folded(features), before, rtol=0, atol=0)


@pytest.mark.parametrize("mode", [torch.bfloat16, "autocast"])
def test_half_precision(mode):
    head, features = make(dtype=torch.float32), torch.randn(2, 10, 3, 5)
    expected = head(features)
    if mode == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [head(features), head.fold()(features)]
    else:
        outputs = [head.to(mode)(features.to(mode))]
    for out in outputs:
        assert out.dtype == torch.float32  # cosines
        torch.testing.assert_close(out, expected, rtol=0, atol=0.05)
        assert not torch.equal(out, expected)


def test_compiles_whole():
    head = make(dtype=torch.float32, dropout=0.0).train()
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((2, 10, 3, 5), (3, 10, 4, 4)):
        features = torch.randn(shape)
        torch.testing.assert_close(compiled(features), head(features))
    compiled(features).sum().backward()
    assert head.embed.weight.grad.isfinite().all()


def test_layouts_and_empty_batches():
    head, features = make(dtype=torch.float32), torch.randn(2, 10, 4, 5)
    torch.testing.assert_close(head(features.to(memory_format=torch.channels_last)), head(features))
    torch.testing.assert_close(head(features[:, :, ::2]), head(features[:, :, ::2].contiguous()))
    assert head(features[:0]).shape == (0, 13)


def test_names_of_the_state_are_fixed():
    names = set(make(bias=True).state_dict())
    expected = {"queries", "projection.weight", "projection.bias"}
    for layer in ("embed", "norm1", "query_projection", "layer.memory_projection", "layer.out_projection"):
        expected |= {f"{layer}.weight", f"{layer}.bias"}
    for layer in ("norm2", "linear1", "linear2", "norm3"):
        expected |= {f"layer.{layer}.weight", f"layer.{layer}.bias"}
    assert names == expected


def test_wrong_sizes_name_the_remedy():
    with pytest.raises(ValueError, match="from 1 to the number of classes, 20, got 21; leave it out for 20"):
        MLDecoder(10, 20, num_groups=21)
    with pytest.raises(ValueError, match="from 1 to the number of classes, 500, got 0; leave it out for 100"):
        MLDecoder(10, 500, num_groups=0)
    with pytest.raises(ValueError, match="multiple of num_heads, got embed_dim=100 and num_heads=8"):
        MLDecoder(10, 20, embed_dim=100)
    with pytest.raises(ValueError, match="sizes of at least 1, got in_features=10 and num_classes=0"):
        MLDecoder(10, 0)
    with pytest.raises(ValueError, match=r"queries must be 'random', 'learned' or word vectors \[K, V\], got 'words'"):
        MLDecoder(10, 20, queries="words")
    with pytest.raises(
        ValueError, match=r"expects features \[B, 10, h, w\] or tokens \[B, N, 10\], got \[2, 11, 3, 3\]"
    ):
        make()(torch.randn(2, 11, 3, 3))


def test_word_vectors_may_be_an_array():
    words = torch.randn(3, 7)
    torch.manual_seed(0)
    head = MLDecoder(8, 3, queries=words.double().numpy(), embed_dim=8, num_heads=2).eval()
    features = torch.randn(2, 8, 2, 2)
    expected = head(features)
    head.set_word_vectors(words)
    torch.testing.assert_close(head(features), expected)
    head.set_word_vectors(words.flip(0).numpy())
    torch.testing.assert_close(head(features), expected.flip(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative_slope": float("nan")}, "negative_slope must be a finite"),
        ({"feedforward_dim": 0}, "feedforward_dim=0"),
    ],
)
def test_numbers_that_make_no_head(options, message):
    with pytest.raises(ValueError, match=message):
        MLDecoder(8, 3, **options)
