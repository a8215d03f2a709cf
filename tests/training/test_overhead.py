"""What the loop costs beside model, loss, optimiser, average and data."""

import time

import torch

from mlfast.training import TrainConfig
from mlfast.training.distributed import ONE_PROCESS
from mlfast.training.fit import create_trainer
from mlfast.training.interrupt import StopRequest
from mlfast.training.step import Step

STEPS = 400


def test_the_loop_takes_less_than_three_percent_of_a_step_of_the_demonstration(tmp_path, monkeypatch):
    """The step is that of ``mlfast train`` without arguments; -s shows the numbers."""
    settings = {"train_images": 64, "val_images": 8, "ema_decay": 0.0, "device": "cpu"}
    trainer = create_trainer(TrainConfig(**settings), tmp_path, ONE_PROCESS, quiet=True)
    batch = next(trainer.train.epoch(0))
    trainer.model.train()
    step = min(_seconds(lambda: trainer.take_step(batch.images, batch.targets)) for _ in range(3))

    trainer.train = OneBatch(batch, STEPS)
    trainer.total_steps = trainer.schedule.total_steps = 10 * STEPS
    result = torch.tensor(1.0), torch.tensor(1.0)
    monkeypatch.setattr(Step, "__call__", lambda self, images, targets: result)
    loop = (_seconds(lambda: trainer._train_epoch(StopRequest())) - trainer.waiting.seconds) / STEPS
    assert trainer.step == STEPS
    print(f"\nloop {1e3 * loop:.3f} ms a step, step {1e3 * step:.1f} ms: {100 * loop / step:.2f} %")
    assert loop < 0.03 * step


class OneBatch:
    """The same batch again and again."""

    mostly_unknown = False

    def __init__(self, batch, steps):
        self.batch, self.steps, self.num_images = batch, steps, len(batch.rows)

    def __len__(self):
        return self.steps

    def epoch(self, number, start=0):
        for _ in range(self.steps):
            yield self.batch


def _seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
