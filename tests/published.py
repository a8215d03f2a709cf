"""Stand-ins for modules of other projects: their class names, attributes and tensors, written from the papers."""

import torch
from torch import nn
from torch.nn import functional as F


class TransformerDecoderLayerOptimal(nn.Module):
    """The decoder layer without self-attention; ``[L, B, D]`` and ``[N, B, D]`` to ``[L, B, D]``."""

    def __init__(self, width, nhead, feedforward, dropout=0.1):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout, self.dropout1, self.dropout2, self.dropout3 = (nn.Dropout(dropout) for _ in range(4))
        self.multihead_attn = nn.MultiheadAttention(width, nhead, dropout=dropout)
        self.linear1, self.linear2 = nn.Linear(width, feedforward), nn.Linear(feedforward, width)
        self.activation = F.relu

    def forward(self, target, memory):
        target = self.norm1(target + self.dropout1(target))
        target = self.norm2(target + self.dropout2(self.multihead_attn(target, memory, memory)[0]))
        return self.norm3(target + self.dropout3(self.linear2(self.dropout(self.activation(self.linear1(target))))))


class MLDecoder(nn.Module):
    """ML-Decoder with the names of Alibaba's code, or timm's. Unlike them it runs, as it steps over the decoder."""

    def __init__(self, num_classes=13, groups=5, features=10, width=16, nhead=4, feedforward=24, timm=False):
        super().__init__()
        self.decoder = nn.TransformerDecoder(TransformerDecoderLayerOptimal(width, nhead, feedforward), num_layers=1)
        owner = self if timm else self.decoder
        owner.embed_standart = nn.Linear(features, width)
        owner.query_embed = nn.Embedding(groups, width).requires_grad_(False)
        owner.num_classes = num_classes
        owner.duplicate_factor = -(-num_classes // groups)
        owner.duplicate_pooling = nn.Parameter(torch.randn(groups, width, owner.duplicate_factor))
        owner.duplicate_pooling_bias = nn.Parameter(torch.randn(num_classes))

    def forward(self, x):
        owner = self if "embed_standart" in self._modules else self.decoder
        memory = torch.relu(owner.embed_standart(x.flatten(2).transpose(1, 2))).transpose(0, 1)
        h = self.decoder.layers[0](owner.query_embed.weight[:, None].expand(-1, len(x), -1), memory).transpose(0, 1)
        out = torch.cat([h[:, i] @ weight for i, weight in enumerate(owner.duplicate_pooling)], dim=1)
        return out[:, : owner.num_classes] + owner.duplicate_pooling_bias


class GroupFC(nn.Module):
    """The loop over the groups as a module."""

    def __init__(self, embed_len_decoder):
        super().__init__()
        self.embed_len_decoder = embed_len_decoder

    def forward(self, h, duplicate_pooling, out_extrap):
        for i in range(self.embed_len_decoder):
            out_extrap[:, i] = h[:, i] @ duplicate_pooling[i]


class GATConv(nn.Module):
    """Graph attention over edges, with the attributes of torch_geometric's layer."""

    def __init__(
        self, in_channels, out_channels, heads=1, concat=True, dropout=0.0, add_self_loops=True, bias=True, **others
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.heads, self.concat = in_channels, out_channels, heads, concat
        self.dropout, self.add_self_loops, self.negative_slope = dropout, add_self_loops, 0.2
        self.__dict__.update(others)
        self.lin = nn.Linear(in_channels, heads * out_channels, bias=False)
        self.att_src, self.att_dst = (nn.Parameter(torch.randn(1, heads, out_channels)) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(heads * out_channels)) if bias else None

    def forward(self, x, edge_index):
        value = self.lin(x).view(len(x), self.heads, self.out_channels)
        src, dst = (value * self.att_src).sum(2), (value * self.att_dst).sum(2)
        times = torch.zeros(len(x), len(x)).index_put_((edge_index[1], edge_index[0]), torch.ones(()), accumulate=True)
        if self.add_self_loops:
            times = times.fill_diagonal_(1)
        weight = F.leaky_relu(dst[:, None] + src, self.negative_slope).exp() * times[:, :, None]
        weight = F.dropout(weight / weight.sum(1, keepdim=True).clamp(min=1e-30), self.dropout, self.training)
        out = torch.einsum("ijh,jhf->ihf", weight, value).flatten(1)
        return out if self.bias is None else out + self.bias


class AsymmetricLossOptimized(nn.Module):
    """The asymmetric loss with the attributes of Alibaba's."""

    def __init__(self, gamma_neg=4, gamma_pos=1, clip=0.05, eps=1e-8, disable_torch_grad_focal_loss=False):
        super().__init__()
        self.gamma_neg, self.gamma_pos, self.clip, self.eps = gamma_neg, gamma_pos, clip, eps
        self.disable_torch_grad_focal_loss = disable_torch_grad_focal_loss
        self.targets = self.loss = None  # what it keeps between calls

    def forward(self, x, y):
        p = torch.sigmoid(x)
        not_p = (1 - p + (self.clip or 0)).clamp(max=1)
        loss = y * p.clamp(min=self.eps).log() + (1 - y) * not_p.clamp(min=self.eps).log()
        focus = (1 - p * y - not_p * (1 - y)) ** (self.gamma_pos * y + self.gamma_neg * (1 - y))
        return -(loss * (focus.detach() if self.disable_torch_grad_focal_loss else focus)).sum()
