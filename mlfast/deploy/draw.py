"""A picture with what was found written below it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDES = (320, 1024)  # of the drawn picture: the least width, the greatest side
_MOST = 12
_ROW, _FONT = 22, 15


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
