"""mlfast's model and loss in the Trainer of Hugging Face transformers.

Run: pip install transformers accelerate
     python examples/huggingface_trainer.py
"""

import argparse

import torch

import mlfast
from mlfast.data import DigitScenes
from mlfast.evaluation import multilabel_metrics
from mlfast.torchvision_compat import import_torchvision

import_torchvision()  # needed only where torch and torchvision are of two builds: README.md, Install
from transformers import Trainer, TrainingArguments, set_seed  # noqa: E402


class WithLoss(torch.nn.Module):
    """What the Trainer expects: a dictionary with ``loss`` and, last, what `metrics` is given as predictions."""

    def __init__(self, backbone, num_classes, scale=20.0):
        super().__init__()
        self.model = mlfast.create_model(backbone, num_classes, scale=scale)
        self.loss = mlfast.AAMLoss(scale=scale, reduction="batchmean")

    def forward(self, pixel_values, labels=None):
        """Map uint8 images and, in training, their targets to the loss and probabilities."""
        output = self.model(self.model.prepare(pixel_values))
        found = {} if labels is None else {"loss": self.loss(output, labels)}
        return {**found, "probabilities": self.model.probabilities(output)}


def collate(items):
    """Images stay uint8; labels may be any type, -1 is unknown."""
    images, targets = zip(*items, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(targets)}


def metrics(evaluation):
    """Exact, of the whole split."""
    found = multilabel_metrics(evaluation.predictions, evaluation.label_ids)
    return {name: getattr(found, name) for name in ("mAP", "OF1", "CF1")}


def main(argv=None):
    """Train, and return the losses that were logged and the metrics on the validation split."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--backbone", default="test_resnet")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--output", default="runs/huggingface")
    options = parser.parse_args(argv)

    train, val = DigitScenes("train", options.images), DigitScenes("val", options.images // 4)
    set_seed(0)
    settings = TrainingArguments(
        options.output,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,  # items are tuples, not rows with names
        label_names=["labels"],
    )
    model = WithLoss(options.backbone, len(train.classes))
    trainer = Trainer(
        model, settings, data_collator=collate, train_dataset=train, eval_dataset=val, compute_metrics=metrics
    )
    trainer.train()
    found = trainer.evaluate()
    print({name: round(value, 4) for name, value in found.items()})
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], found


if __name__ == "__main__":
    main()
