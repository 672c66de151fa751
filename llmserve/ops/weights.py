"""Gets the packed weights of a program: mapped from an image, packed into one, or packed into memory.

Invariant: whatever happens to an image, the program gets the weights of its checkpoint; an image that cannot be had or
kept costs one line in the log and the time of packing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from llmserve import _C
from llmserve.config import ImageConfig
from llmserve.ops.image import DATA_OFFSET, DamagedImage, ImageHeader, PackedImage, image_key, open_image, write_header
from llmserve.ops.image_folder import ImageFolder
from llmserve.ops.nodes import Matrix
from llmserve.ops.sources import MatrixSources
from llmserve.types import WeightsOrigin

Progress = Callable[[str, int, int], None]

PACKING: Final = "packing weights"
MAPPING: Final = "mapping packed weights"
WAITING: Final = "waiting for packed weights"

_log = logging.getLogger("llmserve.weights")


@dataclass(slots=True)
class LoadedWeights:
    """Where the weights are. Keep it as long as the program: it holds the image's lock."""

    origin: WeightsOrigin
    image: PackedImage | None = None


@dataclass(slots=True)
class WeightLoader:
    """Loads the weights of one program whose matrices are added, in order, and not packed yet."""

    program: _C.Program
    matrices: Sequence[_C.PackedMatrix]
    sources: Sequence[MatrixSources]
    """Of each matrix."""
    progress: Progress

    @property
    def num_bytes(self) -> int:
        return sum(matrix.num_bytes for matrix in self.matrices)

    def load(self, images: ImageConfig | None, plan: Sequence[Matrix]) -> LoadedWeights:
        """Make the matrices ready. `plan` is what they were made from."""
        if images is None or not images.min_bytes <= self.num_bytes <= images.max_bytes:
            return self._pack()
        folder = ImageFolder(images.folder, images.max_bytes)
        try:
            image, origin = self._from_folder(folder, self._key(images.checkpoint_id, plan))
            self.program.map_weights(image.descriptor, DATA_OFFSET)
        except OSError as error:
            _log.warning("%s: packed weights are not kept: %s", folder.path, error.strerror or error)
            return self._pack()
        return LoadedWeights(origin, image)

    def _pack(self) -> LoadedWeights:
        """Into the program's own memory."""
        self.program.reserve_weights(self.num_bytes)
        self._pack_each(self.program.pack)
        return LoadedWeights("memory")

    def _pack_each(self, pack: Callable[[_C.PackedMatrix], None]) -> None:
        """The file is read one matrix ahead: faults alone would read it in small pieces, one at a time."""
        ahead, sources = iter([*self.matrices[1:], None]), iter(self.sources)
        self.program.prefetch(self.matrices[0], sample=False)

        def work(matrix: _C.PackedMatrix) -> None:
            following = next(ahead)
            if following is not None:
                self.program.prefetch(following, sample=False)
            with next(sources).filled(sample=False):
                pack(matrix)

        self._each(PACKING, work)

    def _each(self, phase: str, work: Callable[[_C.PackedMatrix], None]) -> None:
        done, total = 0, self.num_bytes
        self.progress(phase, 0, total)
        for matrix in self.matrices:
            work(matrix)
            done += matrix.num_bytes
            self.progress(phase, done, total)

    def _key(self, checkpoint_id: str, plan: Sequence[Matrix]) -> str:
        """Name of the image. Samples, packed anew, tie it to content, layout and kernels whatever versions say."""
        for packed in self.matrices:
            self.program.prefetch(packed, sample=True)
        samples = []
        for matrix, packed, sources in zip(plan, self.matrices, self.sources, strict=True):
            with sources.filled(sample=True):
                samples.append((describe(matrix), packed.num_bytes, self.program.checksum_sample(packed)))
        return image_key([checkpoint_id, _C.LAYOUT_VERSION, samples])

    def _from_folder(self, folder: ImageFolder, key: str) -> tuple[PackedImage, WeightsOrigin]:
        """An image that was there and is whole, or a new one. Raises `OSError`."""
        if image := self._open(folder, key, log=False):
            return image, "mapped"
        with folder.writing(key, on_wait=lambda: self.progress(WAITING, 0, 0)):
            if image := self._open(folder, key, log=True):  # whoever held the lock has written it
                return image, "mapped"
            self._write(folder, key)
        if image := self._open(folder, key, log=True):
            return image, "written"
        raise OSError("the image was gone or damaged as soon as it was written")

    def _open(self, folder: ImageFolder, key: str, *, log: bool) -> PackedImage | None:
        path = folder.place_of(key)
        try:
            image = open_image(path, key=key, layout_version=_C.LAYOUT_VERSION, num_bytes=self.num_bytes)
            if image is not None:
                self._verify(image)
                folder.note_use(key)
        except DamagedImage as damage:
            if log:
                _log.warning("%s: ignored and written anew: %s", path, damage)
            return None
        return image

    def _verify(self, image: PackedImage) -> None:
        """Map it and read all of it: the first step would, and damage must not become an answer."""
        self.program.map_weights(image.descriptor, DATA_OFFSET)
        if len(image.header.checksums) != len(self.matrices):
            raise DamagedImage("it has other matrices")
        expected = iter(image.header.checksums)

        def check(matrix: _C.PackedMatrix) -> None:
            if self.program.checksum(matrix) != next(expected):
                raise DamagedImage("its weights are damaged")

        self._each(MAPPING, check)

    def _write(self, folder: ImageFolder, key: str) -> None:
        offset, checksums = DATA_OFFSET, list[int]()
        with folder.new_file(key, DATA_OFFSET + self.num_bytes) as descriptor:

            def write(matrix: _C.PackedMatrix) -> None:
                nonlocal offset
                checksums.append(self.program.write(matrix, descriptor, offset))
                offset += matrix.num_bytes

            self._pack_each(write)
            header = ImageHeader(
                layout_version=_C.LAYOUT_VERSION,
                key=key,
                num_bytes=self.num_bytes,
                checksums=tuple(checksums),
            )
            write_header(descriptor, header)


def describe(matrix: Matrix) -> str:
    """All of the plan that decides a matrix's bytes, but for the content of its tensors."""
    tensors = [(tensor.name, tensor.dtype, tensor.shape) for tensor in matrix.tensors]
    return msgspec.json.encode([matrix.type, tensors, matrix.sources]).decode()
