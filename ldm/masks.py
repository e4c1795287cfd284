"""Masks for segmentation: the class that each pixel shows, as a number in a file, and as a colour to diffuse."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ldm.config import UserError
from ldm.data import SceneSource, Source, content_sum
from ldm.palette import coloured
from ldm.pictures import FORMATS, MASK_COLUMNS, BadPicture, Stored, content
from ldm.scenes import SHAPES
from ldm.tasks import Segment

ORIENTATION = 0x0112  # EXIF; from 5 on the picture lies on its side


class Masks:
    """The masks of a source as pictures, one colour a class; in all else the source itself.

    Raises:
        UserError: pictures have no masks, or not all of them have.
    """

    def __init__(self, source: Source, task: Segment) -> None:
        self._source, self.task = source, task
        self.files: Sequence[Stored] = ()
        if not isinstance(source, SceneSource):
            self.files = mask_files(source, task.masks)

    def __len__(self) -> int:
        return len(self._source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    @cached_property
    def fingerprint(self) -> str:
        """Of the pictures, the masks and what their numbers mean; reads all masks once."""
        sums = hashlib.sha256(repr((self._source.fingerprint, self.task.classes)).encode())
        for file in self.files:
            sums.update(content_sum(content(file)))
        return f"masks {sums.hexdigest()[:32]}"

    def picture(
        self, index: int, size: int | tuple[int, int], place: tuple[float, float] = (0.5, 0.5)
    ) -> Image.Image:
        """Mask `index` as a picture, RGB, cropped as `Source.picture` does with the same arguments."""
        return coloured(self.mask(index, size, place), len(self.task.classes))

    def mask(
        self, index: int, size: int | tuple[int, int], place: tuple[float, float] = (0.5, 0.5)
    ) -> np.ndarray:
        """[H,W] uint8 numbers of classes; BadPicture if its file holds no such thing."""
        source, target = self._source, (size, size) if isinstance(size, int) else size
        if isinstance(source, SceneSource):
            whole = source.mask(index)
        else:
            stored = source.pictures[index]
            whole = numbers(
                self.files[index], upright_size(stored), self.task.classes, source.config.max_megapixels
            )
        return np.asarray(ImageOps.fit(whole, target, Image.Resampling.NEAREST, centering=place))


def with_classes(task: Segment, source: Source) -> Segment:
    """The task with the classes of drawn scenes, which no recipe need name."""
    if not isinstance(source, SceneSource):
        return task
    if task != Segment():
        raise UserError("segment is set, but drawn scenes have their own masks and classes: leave it out.")
    return Segment(classes=("background", *SHAPES))


def mask_files(source: Source, masks: str | None) -> Sequence[Stored]:
    """The mask of each picture: in a column of the data, or in a folder, if there is no such column.

    Raises:
        UserError: there is neither, or the folder lacks some, of which it names the first.
    """
    if source.config.streaming:
        raise UserError("data.streaming keeps pictures without their masks; leave it out.")
    for column in [masks] if masks else MASK_COLUMNS:
        if column in source.others:
            return source.others[column]
    return files_beside(source, masks or "masks")


def files_beside(source: Source, masks: str) -> list[Stored]:
    """The mask of each picture in the folder `masks`, under the picture's name."""
    roots = [Path(path).expanduser() for path in source.config.paths]
    named_folder = Path(masks).expanduser()
    files = []
    for stored in source.pictures:
        picture = Path(stored.path or "")
        root = next((root for root in roots if root in picture.parents), None)
        if root is None:
            raise UserError(
                f"The data has no column {masks!r} of pictures (there are: {', '.join(source.others) or 'none'}), and "
                f"{stored.name} lies in no folder, beside which masks are looked for; set segment.masks to the column."
            )
        folder = named_folder if named_folder.is_dir() else root.parent / masks
        file = folder / picture.relative_to(root).with_suffix(".png")
        files.append(Stored(str(file), path=str(file), root=folder.resolve()))
    missing = [file.name for file in files if not Path(file.name).is_file()]
    if missing:
        raise UserError(
            f"There is no {missing[0]}, and {len(missing) - 1} more pictures of {len(files)} have no mask; put each "
            "there as a PNG of class numbers, or set segment.masks to their folder, or their column in the data."
        )
    return files


def upright_size(stored: Stored) -> tuple[int, int]:
    """Width and height of a picture, turned by its EXIF orientation, from its header."""
    with Image.open(io.BytesIO(content(stored)), formats=FORMATS) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(ORIENTATION, 1) >= 5 else (width, height)


def numbers(stored: Stored, size: tuple[int, int], classes: Sequence[str], megapixels: float) -> Image.Image:
    """A mask file as L, each value the number of a class.

    Raises:
        BadPicture: it is no grey or palette picture of 8 bits, has another size than its picture, or a number that
            no class has.
    """
    try:
        with Image.open(io.BytesIO(content(stored)), formats=("PNG",)) as image:
            if image.size != size:
                raise BadPicture(
                    stored.name, f"is {image.size}, but its picture {size}; a mask must be as large"
                )
            if image.width * image.height > megapixels * 1e6:
                raise BadPicture(stored.name, f"is larger than data.max_megapixels {megapixels:g}")
            values = np.array(image)
            if image.mode == "RGB" and (values == values[:, :, :1]).all():  # grey that was saved as colours
                values = values[:, :, 0]
            elif image.mode not in ("1", "L", "P"):
                raise BadPicture(
                    stored.name, f"is {image.mode}; a mask is grey or has a palette (modes 1, L, P)"
                )
            values = values.astype(np.uint8)
    except (UnidentifiedImageError, OSError, SyntaxError):
        raise BadPicture(stored.name, "is no sound PNG, and masks are") from None
    if len(classes) == 2:
        values = (values > 0).astype(np.uint8)
    if values.max() >= len(classes):
        raise BadPicture(
            stored.name,
            f"has the number {values.max()}, but segment.classes names the classes 0 to {len(classes) - 1}",
        )
    return Image.fromarray(values)
