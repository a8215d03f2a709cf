"""mlfast's model and loss in a Lightning module.

Run: pip install lightning
     python examples/lightning_module.py
"""

import argparse

import torch
from torch.utils.data import DataLoader

import mlfast
from mlfast.data import DigitScenes
from mlfast.evaluation import Predictions
from mlfast.torchvision_compat import import_torchvision

import_torchvision()  # needed only where torch and torchvision are of two builds: README.md, Install
import lightning  # noqa: E402


class Multilabel(lightning.LightningModule):
    """A model of `mlfast.create_model`, trained with the AAM loss; logs the exact mAP of the validation split."""

    def __init__(self, backbone, classes, head="gap", lr=2e-3):
        super().__init__()
        self.save_hyperparameters()
        self.model = mlfast.create_model(backbone, len(classes), head=head, scale=20.0)
        self.loss = mlfast.AAMLoss(scale=20.0, reduction="batchmean")

    def training_step(self, batch):
        """The loss of a batch of uint8 images."""
        images, targets = batch
        value = self.loss(self.model(self.model.prepare(images)), targets)
        self.log("loss", value, prog_bar=True)
        return value

    def on_validation_epoch_start(self):
        """Begin to collect."""
        self.predictions = Predictions(len(self.hparams.classes))

    def validation_step(self, batch):
        """Collect a batch."""
        images, targets = batch
        self.predictions.add(self.model.probabilities(self.model(self.model.prepare(images))), targets)

    def on_validation_epoch_end(self):
        """Log the mAP of the whole split.

        With several processes, Lightning's sampler repeats images to make their shares equal: give the validation
        loader one of your own.
        """
        self.log("mAP", self.predictions.gather().metrics().mAP, prog_bar=True)

    def configure_optimizers(self):
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def main(argv=None, callbacks=None):
    """Train, and return the trainer, whose ``callback_metrics`` hold the loss and the mAP."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--backbone", default="test_resnet")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args(argv)

    train, val = DigitScenes("train", options.images), DigitScenes("val", options.images // 4)
    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        max_epochs=options.epochs, callbacks=callbacks, logger=False, enable_checkpointing=False, log_every_n_steps=1
    )
    trainer.fit(
        Multilabel(options.backbone, train.classes),
        DataLoader(train, batch_size=64, shuffle=True, drop_last=True),
        DataLoader(val, batch_size=128),
    )
    print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()})
    return trainer


if __name__ == "__main__":
    main()
