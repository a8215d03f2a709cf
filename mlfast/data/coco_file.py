"""What `mlfast.data.coco` needs of COCO's instances files; the decoder skips the rest, polygons above all."""

# No `from __future__ import annotations`: msgspec reads the types.
import msgspec


class Image(msgspec.Struct, gc=False):
    """An entry of `images`."""

    id: int
    file_name: str


class Annotation(msgspec.Struct, gc=False):
    """An object on an image."""

    image_id: int
    category_id: int


class Category(msgspec.Struct, gc=False):
    """A class; the ids have gaps."""

    id: int
    name: str


class Instances(msgspec.Struct):
    """A whole file."""

    images: list[Image]
    annotations: list[Annotation]
    categories: list[Category]
