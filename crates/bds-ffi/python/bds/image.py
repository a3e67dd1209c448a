"""Images as files: create, info, convert."""

import ctypes
import os

from bds import _library
from bds._errors import check, json_of, options_of
from bds._library import LIBRARY
from bds.context import Context


def create(path, driver: str, options) -> None:
    """Creates an image: `create("a.qcow2", "qcow2", {"size": "1G"})`."""
    with Context(trust_references=True) as context:
        name = os.fsencode(path)
        check(LIBRARY.bds_image_create(context._handle, name, driver.encode(), options_of(options)))


def info(path, driver: "str | None" = None) -> dict:
    """What `bds info --output=json` prints."""
    with Context(trust_references=True, probe_references=True) as context:
        flags = 0 if driver else _library.OPEN_PROBE
        name = driver.encode() if driver else None
        return json_of(LIBRARY.bds_image_info, context._handle, os.fsencode(path), name, flags)


def convert(source, target, driver: str, source_driver: "str | None" = None, options=None) -> dict:
    """Makes a new image with the content of another one; returns what was copied."""
    with Context(trust_references=True, probe_references=True) as context:
        with context.open_path(source, source_driver) as read:
            wanted = {"size": len(read), **(options or {})}
            name = os.fsencode(target)
            check(LIBRARY.bds_image_create(context._handle, name, driver.encode(), options_of(wanted)))
            with context.open_path(target, driver, writable=True) as write:
                return json_of(
                    LIBRARY.bds_image_convert,
                    read._handle,
                    write._handle,
                    b"target-is-zero=on",
                )
