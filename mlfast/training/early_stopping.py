"""When training no longer helps: the rule of the paper's released code."""

from __future__ import annotations

from typing import Any


class EarlyStopping:
    """Stops when the score has not risen above its own smoothed sequence for some epochs.

    The smoothed score starts at 0 and moves to ``0.8 score + 0.2 smoothed`` in every good epoch, one whose score
    (rounded to four digits) is above it; it is not the best score so far. A bad epoch counts only once the warm-up
    of the learning rate is over, and a good one ends the count. A perfect score stops at once. (Section 3.5 of the
    paper, which names early stopping; the rule is its code's.)

    Args:
        patience: bad epochs in a row that stop the training; the paper's recipes use 5.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.smoothed = 0.0
        self.bad_epochs = 0

    def should_stop(self, score: float, warmed_up: bool) -> bool:
        """Take in the score of an epoch, a fraction in [0, 1], and say whether it was the last one."""
        rounded = round(score, 4)
        if abs(rounded - 1) < 1e-4:
            return True
        if rounded > self.smoothed:
            self.smoothed = 0.8 * score + 0.2 * self.smoothed
            self.bad_epochs = 0
        elif warmed_up:
            self.bad_epochs += 1
        return self.bad_epochs >= self.patience

    def reason(self, score: str) -> str:
        """Why it stopped, in words; ``score`` is the name of what was watched."""
        if self.bad_epochs < self.patience:
            return f"stopped early: the {score} is perfect"
        epochs = "epoch" if self.bad_epochs == 1 else "epochs"
        return f"stopped early: no better {score} for {self.bad_epochs} {epochs} (patience {self.patience})"

    def state_dict(self) -> dict[str, Any]:
        """For `load_state_dict`."""
        return {"smoothed": self.smoothed, "bad_epochs": self.bad_epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.smoothed, self.bad_epochs = state["smoothed"], state["bad_epochs"]
