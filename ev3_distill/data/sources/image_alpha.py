"""Transparent pixels: composited on a background before anything else, as a viewer shows them."""

from typing import TYPE_CHECKING

import numpy as np

from ev3_distill.data.sources.image_depth import WidePixels

if TYPE_CHECKING:
    from PIL import Image

_OPAQUE = 255


def alpha_of(image: "Image.Image", wide: WidePixels | None) -> np.ndarray | None:
    """The opacity [H, W] of the pixels, uint8; None if all are opaque.

    Args:
      image: as opened.
      wide: its pixels, if they have more than 8 bits.
    """
    if not image.has_transparency_data:
        return None
    key = image.info.get("transparency")
    if wide is not None and key is not None:  # one value or color is transparent
        same = wide.values == np.asarray(key)
        alpha = np.where(same.all(axis=-1) if same.ndim == 3 else same, 0, _OPAQUE).astype(np.uint8)
    else:
        alpha = np.asarray(_with_alpha(image))[..., 3]
    return None if (alpha == _OPAQUE).all() else alpha


def flatten(
    image: "Image.Image", alpha: np.ndarray, background: tuple[int, int, int], *, is_gray: bool
) -> "Image.Image":
    """Composites an image on a background.

    Args:
      image: of 8 bits.
      alpha: [H, W] uint8, its opacity.
      background: red, green and blue.
      is_gray: whether its pixels have no color.

    Returns:
      A gray image if the image and the background are gray, else RGB.
    """
    from PIL import Image

    gray = is_gray and len(set(background)) == 1
    colors = np.asarray(_with_alpha(image))[..., : 1 if gray else 3].astype(np.uint32)
    opacity = alpha[..., None].astype(np.uint32)
    behind = np.array(background[: colors.shape[-1]], np.uint32)
    mixed = ((colors * opacity + behind * (_OPAQUE - opacity) + _OPAQUE // 2) // _OPAQUE).astype(np.uint8)
    return Image.fromarray(mixed[..., 0] if gray else mixed)


def _with_alpha(image: "Image.Image") -> "Image.Image":
    if image.mode == "La":
        image = image.convert("LA")
    return image if image.mode == "RGBA" else image.convert("RGBA")
