"""What the processes of a test share: importing it makes their start a matter of milliseconds."""

from mlfast.torchvision_compat import import_torchvision

import_torchvision()

import timm  # noqa: E402, F401

import mlfast.training.fit  # noqa: E402
import mlfast.training.trainer  # noqa: E402, F401
