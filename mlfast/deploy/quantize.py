"""A trained model as OpenVINO IR in 8-bit integers, by OpenVINO's own tool, and what that costs in accuracy."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlfast.deploy.evaluate import predict_split
from mlfast.deploy.export import export_model, scratch_folder
from mlfast.deploy.runtimes import OpenVinoRuntime, normalised
from mlfast.deploy.splits import LabelledImages
from mlfast.evaluation import MultilabelMetrics

MAX_DROP = 0.01  # of mAP, one point of a hundred
CALIBRATION_IMAGES = 300  # what NNCF itself takes
_ATTENTION = ("Softmax", "ScaledDotProductAttention")


@dataclass(frozen=True)
class QuantizedExport:
    """A written int8 model.

    Attributes:
        path: of the ``.xml``; its weights are beside it.
        before, after: metrics in float32 and int8 on the same images, at the thresholds of the model.
        images: how many they are.
        calibration_images: how many images chose the ranges of the activations.
        bytes_before, bytes_after: of the weights.
    """

    path: Path
    before: MultilabelMetrics
    after: MultilabelMetrics
    images: int
    calibration_images: int
    bytes_before: int
    bytes_after: int


def export_int8(
    folder: str | Path,
    calibration: LabelledImages,
    measured: LabelledImages,
    output: str | Path | None = None,
    *,
    fold_thresholds: bool = False,
    max_drop: float = MAX_DROP,
) -> QuantizedExport:
    """Write a model folder as int8 OpenVINO IR: `export_model`, verified, then quantised by NNCF and measured.

    Weights and activations of convolutions and matrix products become int8. Ranges of the activations are those of
    the calibration images. What NNCF leaves in floating point is computed in float32 by `mlfast.Predictor`.

    Args:
        folder: of the model.
        calibration: images like those that will come; their labels are not used. 300 are taken, evenly spread.
        measured: labelled images, other ones, to measure mAP on before and after.
        output: the ``.xml`` file; by default ``model-int8.xml`` in the folder.
        fold_thresholds: as in `export_model`.
        max_drop: refuse, and write nothing, where mAP falls by more; a fraction.

    Raises:
        ValueError: mAP falls by more than ``max_drop``, or as in `export_model`.
        OSError: as in `export_model`.
        ImportError: openvino or nncf is missing.
    """
    if importlib.util.find_spec("nncf") is None:
        raise ModuleNotFoundError('int8 needs nncf: pip install ".[int8]" in a checkout of mlfast', name="nncf")
    path = Path(folder) / "model-int8.xml" if output is None else Path(output)
    if path.suffix != ".xml":
        raise ValueError(f"output: got {path}, expected a name that ends in .xml")
    with scratch_folder(path) as scratch:
        folder_of_whole = scratch / "whole"  # whatever the output is called
        folder_of_whole.mkdir()
        exported = export_model(folder, "openvino", folder_of_whole / "float32.xml", fold_thresholds=fold_thresholds)
        whole = exported.path
        partial = scratch / path.name
        count = _quantize(whole, partial, calibration)
        before, after = (_metrics(file, measured) for file in (whole, partial))
        drop = before.mAP - after.mAP
        if not drop <= max_drop:
            raise ValueError(
                f"in int8 mAP falls from {100 * before.mAP:.2f} to {100 * after.mAP:.2f} on {len(measured)} images, by "
                f"more than {100 * max_drop:g} points, so {path} was not written; calibrate with other images, "
                "or allow a larger fall: max_drop, on the command line --max-drop"
            )
        sizes = [file.with_suffix(".bin").stat().st_size for file in (whole, partial)]
        for file in (partial.with_suffix(".bin"), partial):
            os.replace(file, path.with_suffix(file.suffix))
    return QuantizedExport(path, before, after, len(measured), count, *sizes)


def _quantize(whole: Path, path: Path, calibration: LabelledImages) -> int:
    """Write the quantised model, and return how many images it was calibrated with."""
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    info = OpenVinoRuntime(whole).info
    count = min(CALIBRATION_IMAGES, len(calibration))
    rows = np.linspace(0, len(calibration) - 1, count).astype(int)
    images = [calibration[row][0].numpy().transpose(1, 2, 0) for row in rows.tolist()]
    dataset = nncf.Dataset(images, lambda image: normalised(image[None], info))  # floats would be 700 MB at 448 pixels
    model = openvino.Core().read_model(whole)
    # NNCF has a scheme of its own for attention, which must be asked for.
    attention = any(node.get_type_name() in _ATTENTION for node in model.get_ops())
    kind: Any = nncf.ModelType.TRANSFORMER if attention else None
    with contextlib.redirect_stdout(sys.stderr):  # its progress bars
        quantized = nncf.quantize(model, dataset, subset_size=count, model_type=kind)
    openvino.save_model(quantized, path, compress_to_fp16=False)
    return count


def _metrics(path: Path, images: LabelledImages) -> MultilabelMetrics:
    model = OpenVinoRuntime(path)
    predictions = predict_split(model, images, title=f"measuring {path.stem}")
    return predictions.metrics(np.array(model.info.thresholds))
