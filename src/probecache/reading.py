"""Bytes of weights from disk to tensors, exactly those that are asked for and each of them once.

Every tensor is hashed as it comes from the disk, whatever device it goes to: what names the weights
(`content.py`) is what was run.

Not by memory map: a mapped tensor lies where the file happens to put it, and matrix products on
memory of another alignment differ in their last bits; it also counts as memory in use or not as the
kernel pleases. Guarantee: tensors on a CPU begin with a page and own their memory.
"""

from __future__ import annotations

import hashlib
import mmap
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from probecache.errors import ModelError, one_line
from probecache.memo import settled, state_of

if TYPE_CHECKING:
    import torch

    from probecache.checkpoint import StoredTensor
    from probecache.memo import FileState

__all__ = ["BlockWeights", "LazyTensor", "WeightReader"]

_THREADS = 4
_PIECE = 4 << 20  # read and hashed while it is in the processor's cache
_DTYPES = {
    **{"BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"},
    **{"U16": "uint16", "U32": "uint32", "U64": "uint64", "F16": "float16", "BF16": "bfloat16"},
    **{"F32": "float32", "F64": "float64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
    **{"F8_E8M0": "float8_e8m0fnu"},
}


@dataclass(frozen=True)
class BlockWeights:
    """What a checkpoint holds of one block, as it is stored.

    Attributes:
        tensors: by their names in the checkpoint.
        ready: a CUDA event that the copy to the device ends with, or None.
    """

    tensors: Mapping[str, torch.Tensor]
    ready: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors hold."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def wait(self) -> None:
        """Let the computing stream of the device wait until the weights have arrived there."""
        if self.ready is None:
            return
        import torch

        device = next(iter(self.tensors.values())).device
        # Dtypes are cast in threads of transformers, which work on the default stream.
        for stream in (torch.cuda.current_stream(device), torch.cuda.default_stream(device)):
            stream.wait_event(self.ready)
            for tensor in self.tensors.values():
                tensor.record_stream(stream)


@dataclass
class WeightReader:
    """Reads stored tensors onto a device.

    Attributes:
        device: where whole tensors go: the CPU, or a CUDA device.
        bytes_read: bytes of weights read so far.
        digests: of every tensor read so far, by its name: the file's state then, or None
            where that may not show a later change, and the SHA-256.
    """

    device: torch.device
    bytes_read: int = 0
    digests: dict[str, tuple[FileState | None, str]] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _streams: list[Any] = field(default_factory=list, repr=False)

    def read(self, stored: StoredTensor) -> torch.Tensor:
        """One tensor, on the device.

        Raises:
            ModelError: the file is shorter than its header says, or of a dtype torch does not have;
                or it was read before and has another content now.
        """
        if self.device.type == "cuda":
            return self._read_to_memory(stored, pinned=True).to(self.device)
        return self._read_to_memory(stored, pinned=False)

    def hash(self, stored: StoredTensor) -> None:
        """Read a tensor for its digest alone, in little memory.

        Raises:
            ModelError: as `read`.
        """
        piece = memoryview(bytearray(min(_PIECE, stored.size)))
        self._read_pieces(stored, lambda done: piece[: stored.size - done])

    def read_block(self, stored: Sequence[StoredTensor]) -> BlockWeights:
        """A block's tensors; may run in a thread of its own while another block computes.

        To a CUDA device they go through pinned memory on a stream of their own: see
        `BlockWeights.wait`.

        Raises:
            ModelError: as `read`, or the device is full.
        """
        on_cuda = self.device.type == "cuda"
        with ThreadPoolExecutor(_THREADS) as pool:
            read = list(pool.map(lambda one: self._read_to_memory(one, pinned=on_cuda), stored))
        tensors = {one.name: tensor for one, tensor in zip(stored, read, strict=True)}
        return self._copied(tensors) if on_cuda and tensors else BlockWeights(tensors)

    def _copied(self, pinned: dict[str, torch.Tensor]) -> BlockWeights:
        import torch

        if not self._streams:
            self._streams.append(torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]
        stream = self._streams[0]
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.stream(stream):
                copies = {n: t.to(self.device, non_blocking=True) for n, t in pinned.items()}
                ready.record(stream)
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"expected room for the weights of two blocks on {self.device}, got: "
                f"{one_line(error)}; use smaller batches"
            ) from error
        return BlockWeights(copies, ready)

    def _read_to_memory(self, stored: StoredTensor, *, pinned: bool) -> torch.Tensor:
        import torch

        dtype = _dtype_of(stored)
        if stored.size == 0:
            self._read_pieces(stored, lambda _: memoryview(b""))
            return torch.empty(stored.shape, dtype=dtype)
        if pinned:
            raw = torch.empty(stored.size, dtype=torch.uint8, pin_memory=True)
        else:
            # Pages of their own go back to the system with the tensor. The C library would keep
            # what is freed, and a streamed model would hold several blocks instead of two.
            raw = torch.frombuffer(mmap.mmap(-1, stored.size), dtype=torch.uint8)
        view = memoryview(raw.numpy())  # type: ignore[arg-type]
        self._read_pieces(stored, lambda done: view[done : done + _PIECE])
        return raw.view(dtype).view(stored.shape)

    def _read_pieces(self, stored: StoredTensor, place: Callable[[int], memoryview[int]]) -> None:
        """Read a tensor's bytes and hash them; `place` gives where those from a number on go."""
        path, digest, done = _place_of(stored), hashlib.sha256(), 0
        with path.open("rb", buffering=0) as file:
            found = state_of(path, file.fileno())
            state = found if settled(found) else None
            file.seek(stored.offset)
            while done < stored.size:
                piece = place(done)
                count = file.readinto(piece)
                if not count:
                    raise _cut_short(stored)
                digest.update(piece[:count])
                done += count
        self._count(stored)
        self._keep_digest(stored, state, digest.hexdigest())

    def _keep_digest(self, stored: StoredTensor, state: FileState | None, digest: str) -> None:
        with self._lock:
            earlier = self.digests.setdefault(stored.name, (state, digest))
        if earlier[1] != digest:
            raise ModelError(
                f"expected {stored.name} as it was read before, got other content in "
                f"{stored.file}: somebody is writing to it; run the command again when that is done"
            )

    def _count(self, stored: StoredTensor) -> None:
        with self._lock:
            self.bytes_read += stored.size


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is indexed, as transformers does when it has a place for it.

    Has the methods of a slice of the safetensors library, which transformers loads from otherwise;
    so at no time are all weights in memory twice, as they were stored and as they are wanted.
    """

    stored: StoredTensor
    reader: WeightReader

    def __getitem__(self, key: Any) -> torch.Tensor:
        """The tensor, or a part of it, freshly read."""
        return self.reader.read(self.stored)[key]

    def get_dtype(self) -> str:
        """The dtype as safetensors calls it."""
        return self.stored.dtype

    def get_shape(self) -> list[int]:
        """The shape."""
        return list(self.stored.shape)


def _place_of(stored: StoredTensor) -> Any:
    if stored.file is None:
        raise ModelError(f"expected {stored.shard} on this machine to read {stored.name} from it")
    return stored.file


def _cut_short(stored: StoredTensor) -> ModelError:
    return ModelError(
        f"expected {stored.size} bytes of {stored.name} in {stored.file}, got fewer; the file has "
        "changed since its header was read: download it again"
    )


def _dtype_of(stored: StoredTensor) -> torch.dtype:
    import torch

    dtype = getattr(torch, _DTYPES.get(stored.dtype, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise ModelError(
            f"expected {stored.name} in a dtype that torch has, got {stored.dtype} in {stored.file}"
        )
    return dtype
