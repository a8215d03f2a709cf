"""A plain training loop with timm and mlfast's loss: nothing of mlfast's trainer is needed.

Run: python examples/timm_loop.py
"""

import argparse

import torch

import mlfast
from mlfast.data import DigitScenes
from mlfast.evaluation import multilabel_metrics
from mlfast.torchvision_compat import import_torchvision

import_torchvision()  # needed only where torch and torchvision are of two builds: README.md, Install
import timm  # noqa: E402


def main(argv=None):
    """Train, print the loss as it goes, and return the metrics on the validation split."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--backbone", default="test_resnet")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args(argv)

    train, val = DigitScenes("train", options.images), DigitScenes("val", options.images // 4)
    torch.manual_seed(0)
    body = timm.create_model(options.backbone, num_classes=0)  # pooled features [B, S]
    model = torch.nn.Sequential(body, mlfast.CosineLinear(body.num_features, len(train.classes)))
    loss = mlfast.AAMLoss(scale=20.0, reduction="batchmean")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    for step in range(options.steps):
        rows = torch.randint(len(train), (options.batch_size,))
        cosines = model(train.images[rows].float() / 127.5 - 1)
        value = loss(cosines, train.targets[rows])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {value.item():.3f}", flush=True)

    with torch.no_grad():
        cosines = torch.cat([model.eval()(images.float() / 127.5 - 1) for images in val.images.split(100)])
    metrics = multilabel_metrics(torch.sigmoid(loss.scale * cosines), val.targets)
    print(f"mAP {100 * metrics.mAP:.1f}")
    return metrics


if __name__ == "__main__":
    main()
