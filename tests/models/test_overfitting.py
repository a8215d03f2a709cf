"""Every head, behind every graph branch, learns 32 images by heart, with each loss."""

import pytest
import torch

import mlfast
from mlfast.evaluation.metrics import multilabel_metrics
from mlfast.models import count_labels

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = {
    "gap": {},
    "ml_decoder": {"embed_dim": 64, "feedforward_dim": 64, "num_groups": 3},
    "q2l": {"embed_dim": 64, "feedforward_dim": 64},
    "csra": {"num_heads": 2},
    "ml_gcn": {"hidden_features": 64},
    "gatn": {"hidden_features": 64},
}
# Of cosines, then of logits.
LOSSES = {
    "aam": lambda: mlfast.AAMLoss(reduction="batchmean"),
    "am": lambda: mlfast.AAMLoss(gamma_neg=0.0, reduction="batchmean"),
    "asl": lambda: mlfast.AsymmetricLoss(reduction="batchmean"),
    "bce": lambda: mlfast.AsymmetricLoss(0.0, 0.0, 0.0, reduction="batchmean"),
}


def linked_targets():
    """Targets of 32 images with 5 labels, where 0 brings 1, and 2 brings 3."""
    targets = (torch.rand(32, 5) < 0.3).to(torch.uint8)
    targets[:, 1] |= targets[:, 0]
    targets[:, 3] |= targets[:, 2]
    return targets


@pytest.mark.filterwarnings("ignore:.*no neighbour")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("head", "graph"), [*((head, graph) for head in HEADS for graph in (None, "gat_reweight")), ("gap", "gcn_reweight")]
)
def test_overfits_32_images(head, graph, loss):
    torch.manual_seed(0)
    images, targets = torch.randn(32, 3, 32, 32), linked_targets()
    model = mlfast.create_model(
        "test_efficientnet",
        5,
        head=head,
        head_args=HEADS[head],
        graph=graph,
        cooccurrence=count_labels(targets),
        cosine="am" in loss,
    )
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.4  # averages that follow within a few steps
    criterion = LOSSES[loss]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(80):
        value = criterion(model(images), targets)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if step == 0:
            first = value.detach()
            assert [name for name, p in model.named_parameters() if p.grad is None] == []
        if step >= 8 and value < first / 6:
            break
    assert step < 79
    with torch.no_grad():
        probabilities = model.eval().probabilities(model(images))
    assert multilabel_metrics(probabilities, targets).mAP > 0.95
