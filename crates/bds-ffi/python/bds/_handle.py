"""Owns one handle: released once, in close() or at the end of a with block."""

import ctypes

from bds._errors import check
from bds._library import Handle


class Owner:
    """Base of the classes that hold a handle. `_unref` is the function of its kind."""

    _unref = None

    def __init__(self, handle: Handle):
        self._handle = handle
        self._is_closed = False

    @staticmethod
    def make(function, *arguments) -> Handle:
        """The handle that a function returns through its last parameter."""
        handle = Handle()
        check(function(*arguments, ctypes.byref(handle)))
        return handle

    def close(self) -> None:
        """Releases the handle. Closing twice does nothing; later calls raise Stale."""
        if not self._is_closed:
            self._is_closed = True
            check(type(self)._unref(self._handle))

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._is_closed

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        # Not set if __init__ failed.
        if not getattr(self, "_is_closed", True):
            self.close()
