"""Compare the data of an output with the digest in its own metadata, without its sources."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ckptavg.checkpoints.state_dict import model_tensors
from ckptavg.errors import InputError
from ckptavg.filesystem.digest import Algorithm, algorithm_of, hasher
from ckptavg.output.data_digest import KEY, digest_of, of_files
from ckptavg.output.safetensors_file import file_order
from ckptavg.readers import ITEM_SIZE, Reader, claim, safetensors

_CHUNK: Final = 1 << 18  # elements of a tensor that are read at once


@dataclass(frozen=True, kw_only=True)
class CheckedData:
    """Result of `check_data`.

    Attributes:
        digest: the recorded digest, as `ckptavg.report.result.Output.data_digest`; empty if there is none.
        damaged: names of the files whose data have another one.
    """

    digest: str = ""
    damaged: Sequence[str] = ()


def check_data(output: Reader) -> CheckedData:
    """Compute the digests that the metadata of an output's files have, and compare.

    Raises:
        InputError: if an entry is not a digest, or only some of the files have one.
    """
    if output.format == "dcp":
        return _compared({output.path.name: _recorded(output)}, {output.path.name: output})
    readers: dict[str, Reader] = {}
    for name, file in output.named_files.items():
        if claim(file) is safetensors.READER:
            readers[name] = safetensors.READER.open(file)
    recorded = {name: _recorded(reader) for name, reader in readers.items()}
    if any(recorded.values()) and not all(recorded.values()):
        lacking = next(reader for name, reader in readers.items() if not recorded[name])
        raise InputError(f"has no {KEY} in its metadata, but other files of the model do", path=lacking.path)
    return _compared(recorded, readers)


def _compared(recorded: Mapping[str, str], readers: Mapping[str, Reader]) -> CheckedData:
    algorithms: list[Algorithm] = [algorithm for text in recorded.values() if (algorithm := algorithm_of(text))]
    if not algorithms:
        return CheckedData()
    whole = next(iter(recorded.values())) if len(recorded) == 1 else of_files(recorded, algorithms[0])
    actual = {name: _digest(reader, own) for (name, reader), own in zip(readers.items(), algorithms, strict=True)}
    return CheckedData(digest=whole, damaged=[name for name, text in recorded.items() if actual[name] != text])


def _recorded(reader: Reader) -> str:
    """Return the digest in the metadata of a file; empty if there is none."""
    text = reader.metadata.get(KEY)
    if text is not None and algorithm_of(text) is None:
        raise InputError(f"its metadata are damaged: {KEY} cannot be {text[:80]!r}", path=reader.path)
    return text or ""


def _digest(reader: Reader, algorithm: Algorithm) -> str:
    """Return the digest of the data of a safetensors file; of DCP, that of a safetensors file with the same content."""
    if reader.format != "dcp":
        (file,) = reader.files
        start = 8 + int.from_bytes(file.read(0, 8), "little")
        return digest_of(lambda offset, out: file.fill(start + offset, out), file.size - start, algorithm)
    hashed = hasher(algorithm)
    _, tensors, _ = model_tensors(reader, None)
    for tensor in map(tensors.__getitem__, file_order(tensors)):
        for start in range(0, tensor.numel, _CHUNK):
            data = memoryview(bytearray(min(_CHUNK, tensor.numel - start) * ITEM_SIZE[tensor.dtype]))
            reader.read_into(tensor, start, data)
            hashed.update(data)
    return f"{algorithm}:{hashed.hexdigest()}"
