"""Finding and opening image files."""

import os
from functools import cache

from PIL import Image, UnidentifiedImageError

from mcit_lightning.data.records import ImageSource, Sample

OUTSIDE = ("EPS", "WMF")
"""Formats that Pillow has another program read; they are not opened."""

Listings = dict[str, list[frozenset[str]]]


class ImageFolder:
    """Where a task's images are: below `root/folder`, or, if a name is not there, below `root`.

    The published benchmarks use both: names relative to the task's folder and names relative to one common root.
    """

    def __init__(self, root: str, folder: str) -> None:
        self._bases = [os.path.join(root, folder), root] if folder else [root]

    def path(self, name: str) -> str:
        """The file of `name`; the first candidate where there is none."""
        candidates = [os.path.normpath(os.path.join(base, name)) for base in self._bases]
        return next((path for path in candidates if os.path.isfile(path)), candidates[0])

    def missing(self, name: str, listings: Listings) -> str | None:
        """The path at which `name` was expected, if it is nowhere.

        Args:
            name: as in the row.
            listings: the folder part of names to the entries of the folders that it may mean. Filled here, so that many
                images cost one listing per folder.
        """
        split = name.rfind("/") + 1
        folder, base = name[:split], name[split:]
        lists = listings.setdefault(folder, [])
        for number, root in enumerate(self._bases):
            if number == len(lists):
                lists.append(_entries(os.path.normpath(os.path.join(root, folder))))
            if base in lists[number]:
                return None
        return os.path.normpath(os.path.join(self._bases[0], name))


def _entries(folder: str) -> frozenset[str]:
    return frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset()


def open_picture(path: str | os.PathLike[str]) -> Image.Image:
    """`Image.open` for a file from data: no pipe, on which it would wait for ever, and nothing that runs another program.

    Raises:
        OSError: there is no such file, or it is no picture.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError("there is no such file" if not os.path.lexists(path) else "it is not a file")
    return Image.open(path, formats=_formats())


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in Image.ID if name not in OUTSIDE]


def load_image(source: ImageSource, sample: Sample) -> Image.Image:
    """Decode one image of `sample` as RGB.

    Raises:
        ValueError: the image is missing, unreadable, corrupt or truncated; names its path and the row.
    """
    try:
        if not isinstance(source, str):
            return source.open().convert("RGB")
        with open_picture(source) as image:
            return image.convert("RGB")
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, zlib and struct errors
        # PIL names the file, which inside a dataset is an object in memory.
        reason = "not a known picture format" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(
            f"{sample.place}: the image {source} cannot be read: {reason}. Replace the file or remove the row."
        ) from error
