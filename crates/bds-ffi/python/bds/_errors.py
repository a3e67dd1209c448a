"""Errors of the library as exceptions, and texts that it returns."""

import ctypes
import errno
import json
import os

from bds._library import LIBRARY

_STALE = b"BDS_ERR_STALE"


class Error(OSError):
    """A call failed. `status` is its code, `name` the code's name; `errno` is set where the code is one."""

    def __init__(self, status: int, message: str):
        super().__init__(-status if -4096 < status < 0 else errno.EIO, message)
        self.status = status
        self.name = LIBRARY.bds_status_name(status).decode()

    def __str__(self) -> str:
        name = errno.errorcode.get(self.errno, self.name) if self.name == "errno" else self.name
        return f"{self.strerror} ({name})"


class Stale(Error):
    """The object was closed."""


def error_of(status: int, message: str = "") -> Error:
    name = LIBRARY.bds_status_name(status)
    if not message:
        message = os.strerror(-status) if name == b"errno" else name.decode()
    return (Stale if name == _STALE else Error)(status, message)


def check(status: int) -> int:
    """Returns the status, or raises what it and the thread's message say."""
    if status < 0:
        raise error_of(status, LIBRARY.bds_error_message().decode(errors="replace"))
    return status


def json_of(function, *arguments):
    """Calls a function whose last parameter returns JSON."""
    text = ctypes.c_void_p()
    check(function(*arguments, ctypes.byref(text)))
    try:
        return json.loads(ctypes.string_at(text))
    finally:
        LIBRARY.bds_free(text)


def text_of(function, *arguments) -> str:
    """Calls a function whose last parameter returns a text."""
    text = ctypes.c_void_p()
    check(function(*arguments, ctypes.byref(text)))
    try:
        return ctypes.string_at(text).decode()
    finally:
        LIBRARY.bds_free(text)


def options_of(options) -> bytes:
    """Options as the library takes them: a text, or anything that is JSON."""
    if isinstance(options, str):
        return options.encode()
    return json.dumps(options).encode()
