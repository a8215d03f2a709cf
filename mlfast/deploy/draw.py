"""A picture with what was found written below it, and where an ML-Decoder looked for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDES = (320, 1024)  # of the drawn picture: the least width, the greatest side
_MOST = 12
_ROW, _FONT = 22, 15
_TILES_IN_A_ROW, _GAP = 3, 4
_HEAT = ((255, 70, 0), (255, 230, 60))  # where little is looked at, and where most


def draw_labels(image: Image, labels: Mapping[str, float]) -> Image:
    """The RGB image, and below it a line for each label (the first dozen) with a bar as long as it is probable."""
    from PIL import Image as pillow
    from PIL import ImageDraw, ImageFont

    scale = min(_SIDES[1] / max(image.size), max(1.0, _SIDES[0] / image.width))
    picture = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    lines = [f"{name}  {probability:.2f}" for name, probability in labels.items()][:_MOST] or ["no label"]
    if len(labels) > _MOST:
        lines.append(f"and {len(labels) - _MOST} more")
    width = max(picture.width, _SIDES[0])
    sheet = pillow.new("RGB", (width, picture.height + _ROW * len(lines) + 6), "white")
    sheet.paste(picture, ((width - picture.width) // 2, 0))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT)
    for row, (line, probability) in enumerate(zip(lines, [*labels.values(), 0.0], strict=False)):
        top = picture.height + 3 + _ROW * row
        share = probability if row < min(len(labels), _MOST) else 0.0
        pen.rectangle((0, top, share * width, top + _ROW - 3), fill=(190, 215, 240))
        pen.text((6, top), line, fill="black", font=font)
    return sheet


def draw_attention(sheet: Image, image: Image, maps: Mapping[str, np.ndarray]) -> Image:
    """The sheet of `draw_labels`, and below it the image once for each map, coloured where the model looked.

    Args:
        sheet: what to go on with.
        image: what the model saw, RGB, of any size.
        maps: label -> ``[h, w]``, at least 0; the first dozen are drawn. Labels with the same map share a tile. Colour
            begins at an even share of the attention and is full at the map's maximum, or at twice the even share where
            that is more: an even map has no colour.
    """
    from PIL import Image as pillow
    from PIL import ImageDraw, ImageFont

    tiles: dict[bytes, list[str]] = {}
    for name in list(maps)[:_MOST]:
        tiles.setdefault(maps[name].tobytes(), []).append(name)
    if not tiles:
        return sheet
    width = (sheet.width - (_TILES_IN_A_ROW - 1) * _GAP) // _TILES_IN_A_ROW
    height = max(1, min(round(width * image.height / image.width), 3 * width))
    rows = -(-len(tiles) // _TILES_IN_A_ROW)
    result = pillow.new("RGB", (sheet.width, sheet.height + rows * (height + _ROW)), "white")
    result.paste(sheet, (0, 0))
    pen, font = ImageDraw.Draw(result), ImageFont.load_default(_FONT - 3)
    small = image.resize((width, height))
    for place, names in enumerate(tiles.values()):
        row, column = divmod(place, _TILES_IN_A_ROW)
        left, top = column * (width + _GAP), sheet.height + row * (height + _ROW)
        result.paste(_heated(small, maps[names[0]]), (left, top))
        pen.text((left + 2, top + height + 2), _shortened(", ".join(names), font, width), fill="black", font=font)
    return result


def _heated(image: Image, attention: np.ndarray) -> Image:
    """The image in grey, and in colours of heat where the attention is."""
    from PIL import Image as pillow

    even = max(float(attention.mean()), 1e-12)
    share = (attention.astype(np.float32) - even) / (max(float(attention.max()), 2 * even) - even)
    smooth = pillow.fromarray(share).resize(image.size, pillow.Resampling.BICUBIC)
    heat = np.clip(np.asarray(smooth), 0, 1)[..., None]
    grey = np.asarray(image.convert("L"), np.float32)[..., None]
    colour = (1 - heat) * np.array(_HEAT[0], np.float32) + heat * np.array(_HEAT[1], np.float32)
    opacity = 0.75 * heat
    return pillow.fromarray(np.clip((1 - opacity) * grey + opacity * colour, 0, 255).astype(np.uint8))


def _shortened(text: str, font: object, width: int) -> str:
    while text and font.getlength(text) > width:  # type: ignore[attr-defined]
        text = text.rstrip("…")[:-1] + "…" if len(text) > 1 else ""
    return text
