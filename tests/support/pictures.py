"""What a picture file says of itself."""

from __future__ import annotations

from pathlib import Path

__all__ = ["read_metadata"]


def read_metadata(path: Path) -> dict[str, str]:
    """The text chunks of a PNG file."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()  # text chunks may follow the pixels
        return {str(key): str(value) for key, value in getattr(image, "text", {}).items()}
