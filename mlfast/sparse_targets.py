"""Targets of so many classes that a tensor of every label should not exist."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from mlfast.integers import integer


class SparseTargets:
    """The positives of a batch as compressed sparse rows (CSR); every label that is not listed is a known negative.

    The losses take it wherever they take a target [B, K]. Its values are checked once, here, and rows out of order are
    sorted. That needs the values on the host, so on a GPU nothing is checked (rows are sorted there too): build it on
    the CPU, where a data loader does, and move it with :meth:`to`. Do not change its tensors afterwards.

    Args:
        indptr: [B + 1] int64. The positives of row b are ``indices[indptr[b]:indptr[b + 1]]``; starts at 0, never
            falls, ends at the number of indices (on a GPU it may end before, see the page of aam_loss on CUDA graphs).
        indices: [nnz] int32 or int64: the classes of the positives, in [0, K), in any order within a row, each once.
        num_classes: K, an int or an integer of NumPy.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(self, indptr: Tensor, indices: Tensor, num_classes: int) -> None:
        num_classes = _check_kinds(indptr, indices, num_classes)
        indptr, indices = indptr.contiguous(), indices.contiguous()
        if indptr.device.type == "cpu":
            _check_pointers(indptr, len(indices))
            _check_range(indptr, indices, num_classes)
        self.indptr = indptr
        self.indices = _sorted_in_rows(indptr, indices, num_classes)
        self.num_classes = num_classes

    # ------------------------------------------------------------------------------------------------ other ways in

    @classmethod
    def from_lists(cls, rows: Iterable[Collection[int]], num_classes: int) -> SparseTargets:
        """Of one list of class indices per picture, or an array or tensor of them; on the CPU.

        Raises:
            TypeError, ValueError: the rows are no lists of integers, or the classes are not as in the constructor.
        """
        if not isinstance(rows, Iterable):
            raise TypeError(f"SparseTargets: rows must be a list of lists of classes, got {type(rows).__name__}")
        lists = [_classes(number, row) for number, row in enumerate(rows)]
        with torch.device("cpu"):  # where values are checked, whatever the default device is
            indptr = torch.zeros(len(lists) + 1, dtype=torch.int64)
            indptr[1:] = torch.tensor([len(row) for row in lists], dtype=torch.int64).cumsum(0)
            return cls(indptr, torch.tensor([i for row in lists for i in row], dtype=torch.int64), num_classes)

    @classmethod
    def from_dense(cls, target: Tensor) -> SparseTargets:
        """Of a target [B, K] as the losses take it, without unknown and without soft labels.

        On a GPU it waits for the device, as the number of positives decides a shape.

        Raises:
            TypeError, ValueError: the target is not as above.
        """
        if not isinstance(target, Tensor) or target.is_complex():
            kind = target.dtype if isinstance(target, Tensor) else type(target).__name__
            raise TypeError(
                f"SparseTargets: target must be a bool, integer or float tensor [B, K], got {kind}; pass "
                "torch.as_tensor(target) of a value per label, and lists of classes to from_lists"
            )
        if target.dim() != 2:
            raise ValueError(f"SparseTargets: target must be [B, K], got {list(target.shape)}")
        signed = target.view(torch.int8) if target.dtype == torch.uint8 else target
        positive = signed > 0
        if not bool((positive | (signed == 0)).all()):
            raise ValueError(
                "SparseTargets: target has unknown labels (< 0, in uint8 255) or NaN, which CSR cannot hold; pass the "
                "losses the tensor"
            )
        if target.is_floating_point() and not bool((~positive | (target == 1)).all()):
            raise ValueError(
                "SparseTargets: target has soft labels, other than 0 and 1, which CSR cannot hold; pass the losses the "
                "tensor"
            )
        indptr = torch.zeros(len(target) + 1, dtype=torch.int64, device=target.device)
        indptr[1:] = positive.sum(1).cumsum(0)
        return cls._of(indptr, positive.nonzero()[:, 1].contiguous(), target.shape[1])

    @classmethod
    def _of(cls, indptr: Tensor, indices: Tensor, num_classes: int) -> SparseTargets:
        """Of what is known to be in order."""
        targets = cls.__new__(cls)
        targets.indptr, targets.indices, targets.num_classes = indptr, indices, num_classes
        return targets

    # -------------------------------------------------------------------------------------------------- as a target

    @property
    def shape(self) -> torch.Size:
        """[B, K], as of the dense target."""
        return torch.Size((len(self), self.num_classes))

    @property
    def device(self) -> torch.device:
        """Where both tensors are."""
        return self.indptr.device

    def __len__(self) -> int:
        return self.indptr.shape[0] - 1

    def __getitem__(self, rows: slice) -> SparseTargets:
        """Consecutive rows; shares the memory, copies nothing."""
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise TypeError(f"SparseTargets: rows are taken by a slice of step 1, got {rows!r}")
        start, stop, _ = rows.indices(len(self))
        return self._of(self.indptr[start : max(start, stop) + 1], self.indices, self.num_classes)

    def __repr__(self) -> str:
        if self.device.type != "cpu":  # how many there are is not known without waiting for the device
            return f"SparseTargets({len(self)} x {self.num_classes}, device={str(self.device)!r})"
        return f"SparseTargets({len(self)} x {self.num_classes}, {int(self.indptr[-1] - self.indptr[0])} positives)"

    def to_dense(self) -> Tensor:
        """The target [B, K], bool."""
        size = len(self) * self.num_classes
        flat = torch.zeros(size + 1, dtype=torch.bool, device=self.device)  # the last takes what belongs to no row
        flat[_positions(self.indptr, self.indices, self.num_classes)] = True
        return flat[:size].view(self.shape)

    # ------------------------------------------------------------------------------------------------------- moving

    def to(self, device: Any, non_blocking: bool = False) -> SparseTargets:
        """On another device. What comes from a GPU to the CPU is checked there, as in the constructor.

        Raises:
            TypeError: an argument is not as above, such as a dtype, which ``Tensor.to`` takes.
        """
        if not isinstance(device, (str, int, torch.device)) or not isinstance(non_blocking, bool):
            raise TypeError(
                f"SparseTargets: to() takes a device and non_blocking, a bool, got {device!r} and {non_blocking!r}; "
                "leave out a dtype: classes are integers, whatever the scores are"
            )
        device = torch.device(device)
        if device.type == self.device.type == "cpu":
            return self
        if device.type == "cpu":
            return SparseTargets(*_compact(self.indptr.cpu(), self.indices.cpu()), self.num_classes)
        indptr, indices = self.indptr, self.indices
        if self.device.type == "cpu":
            indptr, indices = _compact(indptr, indices)
        move = {"device": device, "non_blocking": non_blocking}
        return self._of(indptr.to(**move), indices.to(**move), self.num_classes)

    def pin_memory(self) -> SparseTargets:
        """In page-locked memory, from which copies to a GPU need not wait; a DataLoader calls it."""
        indptr, indices = _compact(self.indptr, self.indices)
        return self._of(indptr.pin_memory(), indices.pin_memory(), self.num_classes)


def _classes(number: int, row: Any) -> Collection[int]:
    """A row of `SparseTargets.from_lists`, whose elements are ints."""
    row = row.tolist() if hasattr(row, "tolist") else row  # of NumPy or torch
    if isinstance(row, str) or not isinstance(row, Collection):
        raise TypeError(
            f"SparseTargets: rows must hold a list of classes for each picture, got {type(row).__name__} {row!r} for "
            f"row {number}; pass [[1, 2]] for one picture of the classes 1 and 2"
        )
    if set(map(type, row)) <= {int}:
        return row
    return [integer("SparseTargets", f"each class in row {number}", value) for value in row]


def _check_kinds(indptr: Any, indices: Any, num_classes: Any) -> int:
    """Returns the number of classes as an int."""
    for name, tensor, dtypes in (
        ("indptr", indptr, (torch.int64,)),
        ("indices", indices, (torch.int32, torch.int64)),
    ):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"SparseTargets: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in dtypes:
            raise TypeError(f"SparseTargets: {name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
        if tensor.dim() != 1:
            raise ValueError(f"SparseTargets: {name} must have one dimension, got {list(tensor.shape)}")
    if indptr.shape[0] == 0:
        raise ValueError("SparseTargets: indptr must be [B + 1], one value more than rows, got [0]")
    if indices.device != indptr.device:
        raise ValueError(f"SparseTargets: indices must be on the device of indptr, {indptr.device}: {indices.device}")
    num_classes = integer("SparseTargets", "num_classes", num_classes)
    if num_classes < 0:
        raise ValueError(f"SparseTargets: num_classes must be >= 0, got {num_classes}")
    return num_classes


def _check_pointers(indptr: Tensor, nnz: int) -> None:
    first, last = int(indptr[0]), int(indptr[-1])
    if first != 0 or last != nnz:
        raise ValueError(f"SparseTargets: indptr must go from 0 to the number of indices, {nnz}: got {first} to {last}")
    falls = indptr[1:] < indptr[:-1]
    if bool(falls.any()):
        row = int(falls.nonzero()[0])
        raise ValueError(
            f"SparseTargets: indptr must never fall, but falls in row {row}, "
            f"{int(indptr[row])} to {int(indptr[row + 1])}"
        )


def _check_range(indptr: Tensor, indices: Tensor, num_classes: int) -> None:
    wrong = (indices < 0) | (indices >= num_classes)
    if bool(wrong.any()):
        at = wrong.nonzero()[0]
        raise ValueError(
            f"SparseTargets: indices must be in [0, {num_classes}), got {int(indices[at])} "
            f"in row {int(_rows(indptr, at))}"
        )


def _rows(indptr: Tensor, at: Tensor) -> Tensor:
    """The row to which each entry belongs: -1 or B for entries that belong to none."""
    return torch.searchsorted(indptr, at, right=True) - 1


def _positions(indptr: Tensor, indices: Tensor, num_classes: int) -> Tensor:
    """Where the positives are in the flat target; B * K for entries that belong to no row."""
    row = _rows(indptr, torch.arange(indices.shape[0], device=indices.device))
    num_rows = indptr.shape[0] - 1
    belongs = (row >= 0) & (row < num_rows)
    return torch.where(belongs, row * num_classes + indices, num_rows * num_classes)


def _sorted_in_rows(indptr: Tensor, indices: Tensor, num_classes: int) -> Tensor:
    """The indices in ascending order within each row. On the CPU duplicates raise."""
    position = _positions(indptr, indices, num_classes)
    if indptr.device.type == "cpu" and bool((position[1:] > position[:-1]).all()):
        return indices
    start = position - indices  # of the row; rows stay where they are
    position = position.sort().values
    if indptr.device.type == "cpu":
        same = position[1:] == position[:-1]
        if bool(same.any()):
            row, index = divmod(int(position[1:][same][0]), num_classes)
            raise ValueError(f"SparseTargets: indices must be unique within a row, got {index} twice in row {row}")
    return (position - start).to(indices.dtype)


def _compact(indptr: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Without entries that belong to no row; on the CPU, where reading values costs nothing."""
    first, last = int(indptr[0]), int(indptr[-1])
    return (indptr - first, indices[first:last]) if (first, last) != (0, indices.shape[0]) else (indptr, indices)
