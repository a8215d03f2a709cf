"""Fused modules into code that was written with other libraries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from mlfast.nn.replacements import KNOWN, NotSwappedError, require

# What a namesake of another form, or with other options, makes of being looked at.
_OTHER_FORM = (AttributeError, IndexError, TypeError, ValueError)
# Wrappers that looked at the parameters, or the code, of what they wrap.
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule", "RecursiveScriptModule")


class Finding(NamedTuple):
    """A module that `accelerate` knows, or could not enter.

    Attributes:
        name: where it is in the model, as in ``named_modules``; "" for the model itself.
        old: its class.
        new: the class it was swapped for; "" where it was left.
        note: what to know about the swap, or why it was left.
    """

    name: str
    old: str
    new: str
    note: str


@dataclass(frozen=True)
class AccelerateReport:
    """What `accelerate` did; as a string, a table.

    Attributes:
        swapped, left: one entry per module, under the first of its names.
    """

    swapped: tuple[Finding, ...]
    left: tuple[Finding, ...]

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)}, left {len(self.left)}"]
        for found in (*self.swapped, *self.left):
            change = f"{found.old} -> {found.new}" if found.new else f"{found.old} left"
            lines.append(f"  {found.name or '(the model)'}: {change}: {found.note}")
        return "\n".join(lines)


def accelerate(model: nn.Module) -> tuple[nn.Module, AccelerateReport]:
    """Swap modules of other libraries for fused ones with the same weights and the same outputs.

    Known are the asymmetric losses of timm and Alibaba and ``nn.BCEWithLogitsLoss`` (`mlfast.AsymmetricLoss`),
    ML-Decoders of timm and Alibaba, also on versions of PyTorch where they fail (`mlfast.MLDecoder`), ``GroupFC``
    modules, and torch_geometric's ``GATConv`` (`mlfast.GraphAttention` behind the same call). All else stays, such as
    linear layers on normalised features, which cannot be recognised. ``docs/models.md`` says what differs.

    Submodules are swapped in place. Parameters stay the same objects, except that an ML-Decoder's input projection
    becomes two: make optimizers and wrappers (DDP, ``torch.compile``) afterwards. Mode, device, dtype and
    requires_grad stay. A module that comes several times is swapped once. Nothing is swapped where an exception is
    raised.

    A module is left, with the reason, where an option has no counterpart, where it or a part of it has hooks,
    parametrizations or a patched ``forward``, or where its parts are in different modes.

    Args:
        model: a model or a loss. It is known by its class's name and attributes, and where it runs, by its outputs and
            gradients on a small input.

    Returns:
        The model, a new object where the model itself was swapped, and the report. Print it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"accelerate: got {type(model).__name__}, expected a torch.nn.Module, such as a model or a loss"
        )
    walk = _Walk()
    root = walk.visit(model, "")
    for parent, name, new in walk.changes:
        setattr(parent, name, new)
    return root, AccelerateReport(
        tuple(found for found in walk.findings if found.new), tuple(found for found in walk.findings if not found.new)
    )


class _Walk:
    """Looks through a model and notes what to change, so that nothing is changed if something fails."""

    def __init__(self) -> None:
        self.changes: list[tuple[nn.Module, str, nn.Module]] = []
        self.findings: list[Finding] = []
        self.seen: dict[nn.Module, nn.Module] = {}

    def visit(self, module: nn.Module, name: str) -> nn.Module:
        """The module that shall stand in for this one: itself, or a new one."""
        if module in self.seen:
            return self.seen[module]
        kind = type(module).__name__
        new = self.seen[module] = self.convert(module, name, kind)
        if new is not module:
            return new
        if kind in _WRAPPERS:
            self.findings.append(Finding(name, kind, "", "call accelerate on the module before it is wrapped"))
            return module
        for child_name, child in module._modules.items():
            if child is not None:
                swapped = self.visit(child, f"{name}.{child_name}" if name else child_name)
                if swapped is not child:
                    self.changes.append((module, child_name, swapped))
        return module

    def convert(self, module: nn.Module, name: str, kind: str) -> nn.Module:
        """A new module, or this one where it is not known or must stay."""
        if kind not in KNOWN or type(module).__module__.startswith("mlfast."):
            return module
        try:
            _require_untouched(module)
            new, note = KNOWN[kind](module)
        except NotSwappedError as reason:
            self.findings.append(Finding(name, kind, "", str(reason)))
            return module
        except _OTHER_FORM as error:
            self.findings.append(Finding(name, kind, "", f"it has not the known form: {error}"))
            return module
        self.findings.append(Finding(name, kind, type(new).__name__, note))
        return new.train(module.training)


def _require_untouched(module: nn.Module) -> None:
    """Leave a module whose behaviour was changed from outside, which a new one would not have."""
    for part in module.modules():
        require("parametrizations" not in part._modules, f"its {type(part).__name__} has parametrizations")
        attributes: dict[str, Any] = vars(part)
        hooks = [key.strip("_") for key, value in attributes.items() if key.endswith("_hooks") and value]
        require(not hooks, f"it has hooks ({', '.join(hooks)} of {type(part).__name__}), which would be lost")
        require("forward" not in attributes, f"forward of its {type(part).__name__} was patched")
        require(part.training == module.training, "its parts are in different modes (train, eval)")
