"""Reader of one file in which every tensor lies in C order without gaps, such as safetensors."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ckptavg.filesystem.regular_file import RegularFile
from ckptavg.readers import ITEM_SIZE, Node, StoredTensor


class FlatFile:
    """An open file whose tensors are contiguous; see `ckptavg.readers.Reader`.

    Args:
        file: closed with the reader.
        tree: its tensors and other contents; each tensor's ``offset`` counts from ``data``.
        metadata: key-value pairs of the header, if the format has them.
        data: the byte of the file at which offset 0 lies.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        file: RegularFile,
        format: str,
        tree: Mapping[str, Node],
        *,
        metadata: Mapping[str, str] | None = None,
        data: int = 0,
    ) -> None:
        self._file = file
        self._data = data
        self.path: Path = file.path
        self.format = format
        self.tree: Mapping[str, Node] = tree
        self.metadata: Mapping[str, str] = metadata or {}
        self.files: Sequence[RegularFile] = (file,)

    def read_into(self, tensor: StoredTensor, start: int, out: memoryview) -> None:
        """See `ckptavg.readers.Reader`."""
        self._file.read_into(self._data + tensor.offset + start * ITEM_SIZE[tensor.dtype], out)

    def close(self) -> None:
        """See `ckptavg.readers.Reader`."""
        self._file.close()
