"""Images as files: create, info, check, map, measure, probe, resize, convert."""

import contextlib
import os

from bds import _library
from bds._errors import check as must
from bds._errors import json_of, options_of, text_of
from bds._library import LIBRARY
from bds.context import Context


def create(path, driver: str, options) -> None:
    """Creates an image: `create("a.qcow2", "qcow2", {"size": "1G"})`."""
    with Context(trust_references=True) as context:
        name = os.fsencode(path)
        must(LIBRARY.bds_image_create(context._handle, name, driver.encode(), options_of(options)))


def info(path, driver: "str | None" = None) -> dict:
    """What `bds info --output=json` prints."""
    with Context(trust_references=True, probe_references=True) as context:
        flags = 0 if driver else _library.OPEN_PROBE
        name = driver.encode() if driver else None
        return json_of(LIBRARY.bds_image_info, context._handle, os.fsencode(path), name, flags)


def probe(path) -> str:
    """The format that the file seems to have. Not for images that a guest could write raw."""
    with Context() as context:
        return text_of(LIBRARY.bds_image_probe, context._handle, os.fsencode(path))


def check(path, driver: "str | None" = None) -> dict:
    """What `bds check --output=json` prints; nothing is repaired."""
    with _opened(path, driver) as disk:
        return json_of(LIBRARY.bds_image_check, disk._handle)


def map(path, driver: "str | None" = None) -> list:
    """What `bds map --output=json` prints."""
    with _opened(path, driver) as disk:
        return json_of(LIBRARY.bds_image_map, disk._handle, 0, 0)


def measure(driver: str, source=None, source_driver: "str | None" = None, options=None) -> dict:
    """How much room a new image needs: of a size among the options, or with a source's content."""
    options = options_of(options) if options else None
    if source is None:
        with Context() as context:
            none = _library.Handle()
            name = driver.encode()
            return json_of(LIBRARY.bds_image_measure, context._handle, name, options, none)
    with _opened(source, source_driver) as disk:
        context = disk._context._handle
        return json_of(LIBRARY.bds_image_measure, context, driver.encode(), options, disk._handle)


def resize(path, length: int, driver: "str | None" = None, shrink: bool = False) -> None:
    """Changes an image's length. What a shorter one loses has to be agreed to with `shrink`."""
    with _opened(path, driver or probe(path), writable=True) as disk:
        disk.resize(length, shrink=shrink)


@contextlib.contextmanager
def _opened(path, driver, writable=False):
    with Context(trust_references=True, probe_references=True) as context:
        with context.open_path(path, driver, writable) as disk:
            disk._context = context
            yield disk


def convert(source, target, driver: str, source_driver: "str | None" = None, options=None) -> dict:
    """Makes a new image with the content of another one; returns what was copied."""
    with Context(trust_references=True, probe_references=True) as context:
        with context.open_path(source, source_driver) as read:
            wanted = {"size": len(read), **(options or {})}
            name = os.fsencode(target)
            must(LIBRARY.bds_image_create(context._handle, name, driver.encode(), options_of(wanted)))
            with context.open_path(target, driver, writable=True) as write:
                return json_of(
                    LIBRARY.bds_image_convert,
                    read._handle,
                    write._handle,
                    b"target-is-zero=on",
                )
