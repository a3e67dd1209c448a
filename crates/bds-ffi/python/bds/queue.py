"""Queue: requests in flight, with a descriptor for event loops such as asyncio's."""

import asyncio
import ctypes

from bds import _library
from bds._errors import check, error_of
from bds._handle import Owner
from bds._library import LIBRARY
from bds.context import Context
from bds.disk import Disk

_BATCH = 64


class Queue(Owner):
    """Reads and writes as awaitables of the running event loop. One loop at a time."""

    _unref = LIBRARY.bds_queue_unref

    def __init__(self, context: Context):
        super().__init__(self.make(LIBRARY.bds_queue_create, context._handle, None))
        self._waiting = {}
        self._next = 1
        self._loop = None

    async def read(self, disk: Disk, offset: int, length: int) -> bytes:
        buffer = ctypes.create_string_buffer(length)
        await self._run(_library.OP_READ, disk, offset, buffer, length)
        return buffer.raw

    async def write(self, disk: Disk, offset: int, data: bytes) -> None:
        buffer = ctypes.create_string_buffer(bytes(data), len(data))
        await self._run(_library.OP_WRITE, disk, offset, buffer, len(data))

    async def flush(self, disk: Disk) -> None:
        await self._run(_library.OP_FLUSH, disk, 0, None, 0)

    async def extents(self, disk: Disk, offset: int, length: int, most: int = 256) -> list:
        """As Disk.extents, up to `most` of them."""
        found = (_library.Extent * most)()
        count = await self._run(_library.OP_BLOCK_STATUS, disk, offset, found, length, most)
        return [
            (one.offset, one.bytes, bool(one.flags & _library.EXTENT_DATA), bool(one.flags & _library.EXTENT_ZERO))
            for one in found[:count]
        ]

    def close(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(LIBRARY.bds_queue_fd(self._handle))
            self._loop = None
        super().close()

    async def _run(self, opcode, disk, offset, buffer, length, count=0) -> int:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            loop.add_reader(check(LIBRARY.bds_queue_fd(self._handle)), self._collect)
        request = _library.Request(opcode=opcode, backend=disk._handle, offset=offset, bytes=length)
        request.buffer = ctypes.addressof(buffer) if buffer is not None else None
        request.iovcnt = count
        request.user_data = self._next
        self._next += 1
        done = loop.create_future()
        # The buffer stays until the completion, also if the caller is cancelled meanwhile.
        self._waiting[request.user_data] = (done, buffer)
        try:
            check(LIBRARY.bds_queue_submit(self._handle, ctypes.byref(request), 1))
        except BaseException:
            del self._waiting[request.user_data]
            raise
        return await done

    def _collect(self):
        completions = (_library.Completion * _BATCH)()
        count = check(LIBRARY.bds_queue_poll(self._handle, completions, _BATCH))
        for completion in completions[:count]:
            done, _buffer = self._waiting.pop(completion.user_data)
            if done.done():
                continue
            if completion.status < 0:
                done.set_exception(error_of(completion.status))
            else:
                done.set_result(completion.value)
