"""What can stop a run."""

from __future__ import annotations

from pathlib import Path


class ConfigError(ValueError):
    """A configuration that cannot be run; the message lists every problem, one a line."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{count} in the configuration:\n" + "\n".join(f"  {problem}" for problem in problems))


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change."""


class Diverged(TrainingError):
    """The loss or its gradient became NaN or infinite."""


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C, and everything needed to continue is in ``run_dir``."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        super().__init__(f"interrupted; continue with: mlfast train --resume {run_dir}")
