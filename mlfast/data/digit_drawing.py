"""Draws digit scenes: a muted, textured ground, clutter, and handwritten digits in four colours.

Everything is vectorised over the images of a chunk: layer by layer, the patches of all images that have something in
that layer are computed at once and blended into the canvases. Lengths are in pixels of a 64 x 64 image and are scaled
to the image size; positions are (x, y), and all random numbers but the grain are drawn before anything that depends on
the image size, so that a scene is the same at every size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlfast.data.digit_labels import MAX_LABELS

REFERENCE_SIZE = 64
PALETTE = np.array([[0.93, 0.22, 0.20], [0.20, 0.78, 0.32], [0.22, 0.45, 0.98], [0.99, 0.82, 0.14]], np.float32)

_PATCH = 40
_CELLS_AROUND = 2
_PIXELS_PER_CELL = 6
_FIELD = (8 + 2 * _CELLS_AROUND) * _PIXELS_PER_CELL
_CANDIDATES = 24
_BLOBS, _STROKES, _FRAGMENTS = 3, 3, 2


@dataclass(frozen=True)
class Layer:
    """At most one object per image; row r of every array belongs to image `image[r]`."""

    image: np.ndarray
    centre: np.ndarray
    colour: np.ndarray
    angle: np.ndarray
    size: np.ndarray
    shape: np.ndarray  # what else the kind of object needs, [n, ...]

    def where(self, keep: np.ndarray) -> Layer:
        """The rows of `keep`, a bool array."""
        return Layer(*(getattr(self, name)[keep] for name in self.__dataclass_fields__))


def smooth_fields(drawings: np.ndarray) -> np.ndarray:
    """Drawings [N, 8, 8] in 0..16 as smooth fields [N, 72, 72] in about 0..1, with an empty border.

    The contour of such a field at a level is a pen stroke, and the level its thickness.
    """
    position = (np.arange(_FIELD) + 0.5) / _PIXELS_PER_CELL - _CELLS_AROUND - 0.5
    weight = _mitchell(np.abs(position[:, None] - np.arange(8)))
    fields = weight @ (drawings.reshape(-1, 8, 8) / 16.0) @ weight.T
    return fields.astype(np.float32)


def draw_scenes(
    rng: np.random.Generator, labels: np.ndarray, pools: list[np.ndarray], fields: np.ndarray, image_size: int
) -> np.ndarray:
    """Images for label sets: bool [B, 40] -> uint8 [B, 3, image_size, image_size].

    `pools[d]` holds the rows of `fields` that draw the digit d.
    """
    count = len(labels)
    ground = _ground_plan(rng, count)
    digits = _digit_layers(rng, labels, pools)
    below = _clutter_layers(rng, count, len(fields))
    above = _stroke_layer(rng, count, chance=0.3)
    light = rng.uniform(0.88, 1.1, count).astype(np.float32)

    canvas = _Canvas(_paint_ground(ground, image_size), image_size)
    for kind, layer in below:
        canvas.blend(layer, _ALPHA[kind](canvas, layer, fields))
    for layer in digits:
        canvas.blend_digit(layer, fields)
    canvas.blend(above, _stroke_alpha(canvas, above, fields))
    return canvas.finish(rng, light)


# ---------------------------------------------------------------------------------------------------- what stands where


def _digit_layers(rng: np.random.Generator, labels: np.ndarray, pools: list[np.ndarray]) -> list[Layer]:
    """One layer per digit slot. Sparse images sometimes repeat a label, so that counting is not knowing."""
    count = len(labels)
    order = np.where(labels, rng.random(labels.shape), 2.0).argsort(axis=1)[:, :MAX_LABELS]
    number = labels.sum(axis=1)
    repeat = (rng.random(count) < 0.25) & (number > 0) & (number <= 3)
    order[repeat, number[repeat]] = order[repeat, 0]
    number = number + repeat

    crowd = np.clip((number - 2) / (MAX_LABELS - 2), 0, 1)
    layers, taken = [], np.full((count, 0, 2), np.inf)
    for slot in range(MAX_LABELS):
        size = rng.uniform(22, 28, count) - 5 * crowd
        centre = _free_place(rng, taken, size)
        taken = np.concatenate([taken, centre[:, None]], axis=1)
        digit, colour = order[:, slot] % 10, order[:, slot] // 10
        pick = rng.random(count)
        drawing = np.array([pools[d][int(p * len(pools[d]))] for d, p in zip(digit, pick, strict=True)])
        # columns: the drawing, the pen's level, horizontal stretch, slant
        shape = np.stack(
            [drawing, rng.uniform(0.32, 0.5, count), rng.uniform(0.85, 1.1, count), rng.normal(0, 0.1, count)], axis=1
        )
        layer = Layer(np.arange(count), centre, _vary(rng, PALETTE[colour]), rng.normal(0, 0.16, count), size, shape)
        layers.append(layer.where(slot < number))
    return layers


def _free_place(rng: np.random.Generator, taken: np.ndarray, size: np.ndarray) -> np.ndarray:
    """For every image the first of some random places that is far enough from the digits there, else the farthest."""
    margin = size[:, None, None] * 0.53
    places = margin + rng.random((len(size), _CANDIDATES, 2)) * (REFERENCE_SIZE - 2 * margin)
    if taken.shape[1] == 0:
        return places[:, 0]
    gap = np.linalg.norm(places[:, :, None] - taken[:, None], axis=-1).min(axis=-1)
    best = np.minimum(gap, 0.95 * size[:, None]).argmax(axis=1)
    return places[np.arange(len(size)), best]


def _clutter_layers(rng: np.random.Generator, count: int, num_fields: int) -> list[tuple[str, Layer]]:
    layers: list[tuple[str, Layer]] = []
    for _ in range(_BLOBS):
        shape = rng.uniform(0.5, 1.0, (count, 1))
        layers.append(("blob", _scatter(rng, count, 0.5, rng.uniform(2.5, 8, count), shape, muted=0.75)))
    layers += [("stroke", _stroke_layer(rng, count, chance=0.5)) for _ in range(_STROKES)]
    for _ in range(_FRAGMENTS):
        # columns: the drawing, the pen's level, the cut's direction and distance from the centre
        shape = np.stack(
            [
                rng.integers(0, num_fields, count),
                rng.uniform(0.3, 0.45, count),
                rng.uniform(0, 2 * np.pi, count),
                rng.uniform(0.02, 0.14, count),
            ],
            axis=1,
        )
        layers.append(("fragment", _scatter(rng, count, 0.5, rng.uniform(16, 24, count), shape, muted=0.3)))
    return layers


def _stroke_layer(rng: np.random.Generator, count: int, chance: float) -> Layer:
    # columns: half the width, the bend. Thinner than any pen of a digit: a straight stroke must not be a "1".
    shape = np.stack([rng.uniform(0.5, 1.1, count), rng.normal(0, 0.02, count)], axis=1)
    return _scatter(rng, count, chance, rng.uniform(8, 17, count), shape, muted=0.5)


def _scatter(
    rng: np.random.Generator, count: int, chance: float, size: np.ndarray, shape: np.ndarray, muted: float
) -> Layer:
    """Clutter anywhere, on `chance` of the images; `muted` of it in dull colours, the rest in those of the digits."""
    vivid = PALETTE[rng.integers(0, len(PALETTE), count)]
    dull = 0.3 * vivid + 0.7 * rng.uniform(0.15, 0.85, (count, 1))
    colour = np.where(rng.random((count, 1)) < muted, dull, vivid)
    layer = Layer(
        np.arange(count),
        rng.uniform(2, REFERENCE_SIZE - 2, (count, 2)),
        _vary(rng, colour),
        rng.uniform(0, 2 * np.pi, count),
        size,
        shape,
    )
    return layer.where(rng.random(count) < chance)


def _vary(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    brightness = rng.uniform(0.85, 1.05, (len(colour), 1))
    return np.clip(colour * brightness + rng.normal(0, 0.03, colour.shape), 0, 1).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------- the ground


def _ground_plan(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    value = rng.uniform(0.18, 0.62, (count, 1))
    return {
        "tint": (value * (1 + rng.normal(0, 0.09, (count, 3)))).astype(np.float32),
        "slope": rng.normal(0, 0.05, (count, 2)).astype(np.float32),
        "coarse": rng.normal(0, 0.05, (count, 5, 5)).astype(np.float32),
        "fine": rng.normal(0, 0.03, (count, 17, 17)).astype(np.float32),
        "wave": np.stack(
            [
                rng.uniform(6, 30, count),
                rng.uniform(0, np.pi, count),
                rng.uniform(0, 2 * np.pi, count),
                rng.uniform(0, 0.035, count),
            ],
            axis=1,
        ).astype(np.float32),
    }


def _paint_ground(plan: dict[str, np.ndarray], image_size: int) -> np.ndarray:
    """[B, 3, image_size, image_size]: a tint times gradient, two octaves of value noise and a faint wave."""
    axis = ((np.arange(image_size) + 0.5) / image_size - 0.5).astype(np.float32)
    frequency, direction, phase, depth = plan["wave"].T[:, :, None, None]
    along = np.cos(direction) * axis + np.sin(direction) * axis[:, None]
    light = 1 + 2 * depth * np.sin(frequency * along + phase)
    light += 2 * (plan["slope"][:, 0, None, None] * axis + plan["slope"][:, 1, None, None] * axis[:, None])
    for octave in ("coarse", "fine"):
        weight = _linear_weights(image_size, plan[octave].shape[1])
        light += 2 * (weight @ plan[octave] @ weight.T)
    return light[:, None] * plan["tint"][:, :, None, None]


def _linear_weights(size: int, knots: int) -> np.ndarray:
    position = np.linspace(0, knots - 1, size)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(knots))).astype(np.float32)


# -------------------------------------------------------------------------------------------------------------- patches


class _Canvas:
    """Images [B, 3, H, W] with a border that takes what hangs over the edge."""

    def __init__(self, ground: np.ndarray, image_size: int) -> None:
        self.scale = image_size / REFERENCE_SIZE
        self.patch = round(_PATCH * self.scale)
        self.border = self.patch // 2 + 1
        self.image_size = image_size
        full = image_size + 2 * self.border
        self.pixels = np.zeros((len(ground), 3, full, full), np.float32)
        self._inner()[:] = ground

    def blend(self, layer: Layer, alpha: np.ndarray) -> None:
        """Blends the layer's colour in with `alpha` [n, patch, patch]."""
        self._mix(layer, alpha, layer.colour[:, :, None, None])

    def blend_digit(self, layer: Layer, fields: np.ndarray) -> None:
        """A digit and the dark halo that keeps it readable on any ground."""
        x, y = self.local(layer)
        field = _look_up(fields, layer, x, y)
        level = layer.shape[:, 1, None, None].astype(np.float32)
        halo = 0.55 * _ramp((field - level + 0.2) / 0.3)
        self._mix(layer, halo, np.full((len(halo), 3, 1, 1), 0.06, np.float32))
        edge = np.float32(0.2) * (24 / layer.size[:, None, None]).astype(np.float32) / min(self.scale, 2)
        shade = 1 - np.float32(0.22) * y
        self._mix(layer, _ramp((field - level) / edge + 0.5), layer.colour[:, :, None, None] * shade[:, None])

    def local(self, layer: Layer) -> tuple[np.ndarray, np.ndarray]:
        """Pixel centres x, y [n, patch, patch] in the object's own frame: turned by its angle, its size is 1."""
        _, rest = self._corner(layer)
        axis = np.arange(self.patch, dtype=np.float32) + 0.5
        unit = (layer.size * self.scale)[:, None].astype(np.float32)
        dx, dy = (axis - rest[:, :1]) / unit, (axis - rest[:, 1:]) / unit
        cos, sin = (f(layer.angle).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
        return cos * dx[:, None, :] + sin * dy[:, :, None], cos * dy[:, :, None] - sin * dx[:, None, :]

    def finish(self, rng: np.random.Generator, light: np.ndarray) -> np.ndarray:
        """Crops the border, adds light and grain: uint8 [B, 3, H, W]."""
        pixels = self._inner() * light[:, None, None, None]
        grain = rng.random((len(pixels), 1, self.image_size, self.image_size), dtype=np.float32) - np.float32(0.5)
        pixels += np.float32(0.06) * grain
        pixels *= 255
        return np.clip(pixels + np.float32(0.5), 0, 255).astype(np.uint8)

    def _inner(self) -> np.ndarray:
        inner = slice(self.border, self.border + self.image_size)
        return self.pixels[:, :, inner, inner]

    def _corner(self, layer: Layer) -> tuple[np.ndarray, np.ndarray]:
        """The patch's first pixel on the bordered canvas (x, y), and the object's centre seen from there."""
        centre = layer.centre * self.scale
        corner = np.floor(centre - self.patch / 2)
        return corner.astype(np.int64) + self.border, (centre - corner).astype(np.float32)

    def _mix(self, layer: Layer, alpha: np.ndarray, paint: np.ndarray) -> None:
        """Blends `paint` [n, 3, patch or 1, patch or 1] in with `alpha` [n, patch, patch]."""
        corner, _ = self._corner(layer)
        # A loop over slices: six times faster than one fancy index over the whole chunk.
        for row, image in enumerate(layer.image):
            x, y = corner[row]
            under = self.pixels[image, :, y : y + self.patch, x : x + self.patch]
            under += alpha[row] * (paint[row] - under)


def _blob_alpha(canvas: _Canvas, layer: Layer, fields: np.ndarray) -> np.ndarray:
    x, y = canvas.local(layer)
    radius = np.hypot(x, y / layer.shape[:, 0, None, None].astype(np.float32))
    return 0.85 * _ramp((1 - radius) * np.float32(3) + np.float32(0.5))


def _stroke_alpha(canvas: _Canvas, layer: Layer, fields: np.ndarray) -> np.ndarray:
    x, y = canvas.local(layer)
    size, width, bend = (v.astype(np.float32)[:, None, None] for v in (layer.size, *layer.shape.T))
    y = y - bend * size * x * x
    distance = np.hypot(np.maximum(np.abs(x) - 1, 0), y) * size
    return _ramp((width - distance) * np.float32(canvas.scale) + np.float32(0.5))


def _fragment_alpha(canvas: _Canvas, layer: Layer, fields: np.ndarray) -> np.ndarray:
    """Less than half of a drawing, cut off along a line."""
    x, y = canvas.local(layer)
    level, direction, distance = (v.astype(np.float32)[:, None, None] for v in layer.shape[:, 1:].T)
    beyond = np.cos(direction) * x + np.sin(direction) * y - distance
    return _ramp((_look_up(fields, layer, x, y) - level) / np.float32(0.22) + 0.5) * _ramp(beyond * 20)


_ALPHA = {"blob": _blob_alpha, "stroke": _stroke_alpha, "fragment": _fragment_alpha}


def _look_up(fields: np.ndarray, layer: Layer, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear values of each row's field at x, y; one unit is the height of the drawing."""
    step = np.float32(8 * _PIXELS_PER_CELL)
    last = np.float32(_FIELD - 1.001)
    column = np.clip(x * step + np.float32(_FIELD / 2 - 0.5), 0, last)
    row = np.clip(y * step + np.float32(_FIELD / 2 - 0.5), 0, last)
    left, top = column.astype(np.int32), row.astype(np.int32)
    column -= left
    row -= top
    flat = fields.reshape(-1)
    at = layer.shape[:, 0].astype(np.int64)[:, None, None] * (_FIELD * _FIELD) + top * _FIELD + left
    upper = flat[at] * (1 - column) + flat[at + 1] * column
    lower = flat[at + _FIELD] * (1 - column) + flat[at + _FIELD + 1] * column
    return upper + row * (lower - upper)


def _ramp(value: np.ndarray) -> np.ndarray:
    return np.clip(value, np.float32(0), np.float32(1)).astype(np.float32, copy=False)


def _mitchell(distance: np.ndarray) -> np.ndarray:
    """The Mitchell-Netravali kernel: smooth enough not to show the 8 x 8 grid, sharp enough to keep loops open."""
    near = (7 * distance**3 - 12 * distance**2 + 16 / 3) / 6
    far = (-7 / 3 * distance**3 + 12 * distance**2 - 20 * distance + 32 / 3) / 6
    return np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
