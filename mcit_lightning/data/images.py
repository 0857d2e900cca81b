"""Finding and opening image files."""

import os

from PIL import Image, UnidentifiedImageError

from mcit_lightning.data.records import ImageSource, Sample


class ImageFolder:
    """Where a task's images are: below `root/folder`, or, if a name is not there, below `root`.

    The published benchmarks use both: names relative to the task's folder and names relative to one common root.
    """

    def __init__(self, root: str, folder: str) -> None:
        self._bases = [os.path.join(root, folder), root] if folder else [root]

    def path(self, name: str) -> str:
        """The file of `name`; the first candidate where there is none."""
        candidates = self._candidates(name)
        return next((path for path in candidates if os.path.isfile(path)), candidates[0])

    def missing(self, name: str, listings: dict[str, frozenset[str]]) -> str | None:
        """The path at which `name` was expected, if it is nowhere.

        Args:
            name: as in the row.
            listings: folder to the names in it. Filled here, so that many images cost one listing per folder.
        """
        candidates = self._candidates(name)
        for path in candidates:
            folder, base = os.path.split(path)
            if folder not in listings:
                listings[folder] = frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset()
            if base in listings[folder]:
                return None
        return candidates[0]

    def _candidates(self, name: str) -> list[str]:
        return [os.path.normpath(os.path.join(base, name)) for base in self._bases]


def load_image(source: ImageSource, sample: Sample) -> Image.Image:
    """Decode one image of `sample` as RGB.

    Raises:
        ValueError: the image is missing, unreadable, corrupt or truncated; names its path and the row.
    """
    try:
        if not isinstance(source, str):
            return source.open().convert("RGB")
        with Image.open(source) as image:
            return image.convert("RGB")
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, zlib and struct errors
        # PIL names the file, which inside a dataset is an object in memory.
        reason = "not a known picture format" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(
            f"{sample.place}: the image {source} cannot be read: {reason}. Replace the file or remove the row."
        ) from error
