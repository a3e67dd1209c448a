"""Disk: a node and a backend through which it is read and written."""

import ctypes

from bds import _library
from bds._errors import check, error_of, json_of, text_of
from bds._handle import Owner
from bds._library import LIBRARY, Handle


class Guard(Owner):
    """Holds until it is closed."""

    _unref = LIBRARY.bds_guard_unref


class Disk(Owner):
    """An open image or device. May be used by several threads."""

    _unref = LIBRARY.bds_backend_unref

    def __init__(self, node: Handle, writable: bool):
        options = _library.BackendOptions(struct_size=ctypes.sizeof(_library.BackendOptions))
        options.flags = _library.BACKEND_WRITABLE if writable else 0
        self._node = node
        self._is_closed = True
        try:
            handle = self.make(LIBRARY.bds_backend_create_on, node, ctypes.byref(options))
        except BaseException:
            LIBRARY.bds_node_unref(node)
            raise
        super().__init__(handle)

    def close(self) -> None:
        """Flushes and closes the node, unless others (a job) use it too. Raises what fails."""
        if self._is_closed:
            return
        super().close()
        closed = LIBRARY.bds_node_close(self._node, None)
        message = LIBRARY.bds_error_message().decode(errors="replace")
        check(LIBRARY.bds_node_unref(self._node))
        if closed < 0 and LIBRARY.bds_status_name(closed) != b"BDS_ERR_IN_USE":
            raise error_of(closed, message)

    def __len__(self) -> int:
        """Length in bytes."""
        length = ctypes.c_uint64()
        check(LIBRARY.bds_backend_length(self._handle, ctypes.byref(length)))
        return length.value

    def read(self, offset: int, length: int) -> bytes:
        buffer = ctypes.create_string_buffer(length)
        check(LIBRARY.bds_pread(self._handle, buffer, length, offset, 0))
        return buffer.raw

    def write(self, offset: int, data: bytes) -> None:
        data = bytes(data)
        check(LIBRARY.bds_pwrite(self._handle, data, len(data), offset, 0))

    def write_zeroes(self, offset: int, length: int) -> None:
        """Makes the range read as zeros."""
        check(LIBRARY.bds_write_zeroes(self._handle, offset, length, 0))

    def discard(self, offset: int, length: int) -> None:
        """The range is not needed any more; what it reads as is not defined then."""
        check(LIBRARY.bds_discard(self._handle, offset, length, 0))

    def extents(self, offset: int = 0, length: "int | None" = None):
        """Runs of bytes of which the same is known, as (offset, length, is_data, is_zero)."""
        end = len(self) if length is None else offset + length
        found, count = (_library.Extent * 256)(), ctypes.c_size_t()
        while offset < end:
            none = Handle()
            check(
                LIBRARY.bds_block_status(
                    self._handle, none, offset, end - offset, found, len(found), ctypes.byref(count)
                )
            )
            if count.value == 0:
                return
            for one in found[: count.value]:
                is_data = bool(one.flags & _library.EXTENT_DATA)
                yield one.offset, one.bytes, is_data, bool(one.flags & _library.EXTENT_ZERO)
                offset = one.offset + one.bytes

    def block(self, operations, reason: str) -> "Guard":
        """Blocks operations on the node ("resize", "eject", …) until the guard is closed."""
        bits = sum(_library.BLOCK[name] for name in set(operations))
        return Guard(self.make(LIBRARY.bds_node_block, self._node, bits, reason.encode()))

    def flush(self) -> None:
        """Makes completed writes durable."""
        check(LIBRARY.bds_flush(self._handle))

    def resize(self, length: int, shrink: bool = False) -> None:
        """Changes the length; one that is shorter has to be agreed to with `shrink`."""
        check(LIBRARY.bds_resize(self._handle, length, None, _library.RESIZE_SHRINK * shrink))

    def medium(self) -> str:
        """Name of the node that is read and written: another one after a job moved the disk."""
        node = self.make(LIBRARY.bds_backend_node, self._handle)
        try:
            return text_of(LIBRARY.bds_node_name, node)
        finally:
            LIBRARY.bds_node_unref(node)

    def facts(self) -> dict:
        """Facts about the node: id, name, driver, holders, …"""
        return json_of(LIBRARY.bds_node_query, self._node)
