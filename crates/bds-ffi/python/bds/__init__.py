"""The block layer of bds from Python: open, read, write, info, convert, check, backup.

>>> import bds
>>> with bds.Context() as context, context.open("driver=mem,size=1M") as disk:
...     disk.write(0, b"hello")
...     disk.read(0, 5)
b'hello'

A pure-Python package on ctypes over libbds. Objects hold one handle each, release it in close() or
at the end of a with block, and raise bds.Error afterwards: a stale handle is an error, never
undefined behaviour. Calls that wait release the interpreter lock.
"""

from bds._errors import Error, Stale
from bds.context import Context
from bds.disk import Disk, Guard
from bds.image import check, convert, create, info, map, measure, probe, resize
from bds.job import Job
from bds.queue import Queue

__all__ = [
    "Context",
    "Disk",
    "Error",
    "Guard",
    "Job",
    "Queue",
    "Stale",
    "check",
    "convert",
    "create",
    "info",
    "map",
    "measure",
    "probe",
    "resize",
    "version",
]


def version() -> str:
    """The version of the library that was loaded."""
    from bds._library import LIBRARY

    return LIBRARY.bds_version_string().decode()
