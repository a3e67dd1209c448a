"""Context: a graph of nodes and the threads that serve it."""

import ctypes
import json
import os

from bds import _library
from bds._errors import check, json_of, options_of
from bds._handle import Owner
from bds._library import LIBRARY
from bds.disk import Disk
from bds.job import Job


class Context(Owner):
    """A graph of nodes. Close what was opened in it first."""

    _unref = LIBRARY.bds_context_unref

    def __init__(self, trust_references: bool = False, probe_references: bool = False, log=None):
        """`trust_references`: open files that images name. `probe_references`: guess their formats.

        `log(level, target, message)` gets what drivers and jobs log, on a thread of the library; it
        must not call the package. Levels are 1 (errors) and 2 (warnings).
        """
        options = _library.ContextOptions(struct_size=ctypes.sizeof(_library.ContextOptions))
        options.flags = trust_references * _library.CONTEXT_TRUST_REFERENCES
        options.flags |= probe_references * _library.CONTEXT_PROBE_REFERENCES
        if log is not None:
            # Kept for as long as the library may call it: the handle is released first.
            self._log = _library.LogFunction(
                lambda _, level, target, message: log(level, target.decode(), message.decode())
            )
            options.log = self._log
        super().__init__(self.make(LIBRARY.bds_context_create, ctypes.byref(options)))

    def open(self, options, writable: bool = True) -> Disk:
        """Opens a node from options as of QEMU's blockdev-add: a text, or a dict."""
        node = self.make(LIBRARY.bds_node_open, self._handle, options_of(options))
        return Disk(node, writable)

    def open_path(self, path, driver: "str | None" = None, writable: bool = False) -> Disk:
        """Opens an image file. Without a driver its format is guessed, which needs writable=False."""
        flags = 0 if writable else _library.OPEN_READ_ONLY
        flags |= 0 if driver else _library.OPEN_PROBE
        name = driver.encode() if driver else None
        node = self.make(LIBRARY.bds_node_open_path, self._handle, os.fsencode(path), name, flags)
        return Disk(node, writable)

    def start_job(self, job_type: str, options) -> Job:
        """Starts a block job: "backup", "mirror", "commit", "stream", "create"."""
        return Job(self.make(LIBRARY.bds_job_start, self._handle, job_type.encode(), options_of(options)))

    def backup(self, device: str, target: str, sync: str = "full", **options) -> Job:
        """Starts a backup of one node to another; both by name. `job_id` and so on as keywords."""
        named = {key.replace("_", "-"): value for key, value in options.items()}
        named.setdefault("job-id", f"backup-{device}")
        return self.start_job("backup", {"device": device, "target": target, "sync": sync, **named})

    def start_jobs(self, jobs) -> "list[Job]":
        """Starts jobs as one transaction; the copies of all backups among them are of one moment.

        Each is a dict with a "type" and the job's options. Either all take effect, or none.
        """
        handles = (_library.Handle * len(jobs))()
        none = _library.Handle()
        check(
            LIBRARY.bds_job_start_group(self._handle, options_of(jobs), none, handles, len(jobs))
        )
        return [Job(_library.Handle(handle.raw)) for handle in handles]

    def events(self) -> list:
        """Events that have happened and were not fetched, as dicts with QEMU's names."""
        found = []
        event, text = _library.Event(), ctypes.c_void_p()
        while check(
            LIBRARY.bds_context_next_event(self._handle, ctypes.byref(event), ctypes.byref(text))
        ):
            try:
                found.append(json.loads(ctypes.string_at(text)))
            finally:
                LIBRARY.bds_free(text)
        return found

    def event_fd(self) -> int:
        """A descriptor that is readable while events wait: for event loops."""
        return check(LIBRARY.bds_context_event_fd(self._handle))

    def query(self, what: str):
        """Facts as Python values: "nodes", "graph", "backends", "jobs", …"""
        return json_of(LIBRARY.bds_query, self._handle, what.encode())
