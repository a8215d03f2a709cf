"""torch.compile takes every head, behind every graph branch, whole: outputs and gradients are those of eager mode."""

import pytest
import torch

import mlfast
from mlfast.models import count_labels
from tests.models.test_overfitting import HEADS, linked_targets

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = [*((head, None) for head in HEADS), ("gap", "gcn_reweight"), ("gap", "gat_reweight"), ("csra", "gat_reweight")]


@pytest.mark.filterwarnings("ignore:.*no neighbour")
@pytest.mark.parametrize(("head", "graph"), MODELS)
def test_whole_models_compile(head, graph):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = mlfast.create_model(
        "test_resnet",
        5,
        head=head,
        head_args=HEADS[head],
        graph=graph,
        cooccurrence=count_labels(linked_targets()),
    )
    images = torch.randn(4, 3, 32, 32)
    model.eval()  # without dropout, whose masks differ
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def step(run):
        model.zero_grad()
        out = run(images)
        out.square().sum().backward()
        return [out, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    for ours, theirs in zip(step(compiled), step(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
