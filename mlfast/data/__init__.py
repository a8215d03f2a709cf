"""Data sets: those of the paper, the user's own, and the built-in digit scenes."""

from mlfast.data.annotations import AnnotationError, Annotations
from mlfast.data.dataset import BrokenImagesError, ImageDataset
from mlfast.data.digits import DigitScenes, planted_graph
from mlfast.data.loading import KINDS, load_annotations
from mlfast.data.stratify import stratified_split
from mlfast.data.stream import ShardStream

__all__ = [
    "KINDS",
    "AnnotationError",
    "Annotations",
    "BrokenImagesError",
    "DigitScenes",
    "ImageDataset",
    "ShardStream",
    "load_annotations",
    "planted_graph",
    "stratified_split",
]
