"""Loads libbds and declares the functions that the package uses."""

import ctypes
import ctypes.util
import os
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p


class Handle(ctypes.Structure):
    """Any handle: a 64-bit number in a struct."""

    _fields_ = [("raw", c_uint64)]


class BackendOptions(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("name", c_char_p),
        ("permissions", c_uint64),
        ("shared_permissions", c_uint64),
        ("on_read_error", c_uint32),
        ("on_write_error", c_uint32),
        ("flags", c_uint32),
        ("reserved", c_uint32),
    ]


# user_data, level, target, message
LogFunction = ctypes.CFUNCTYPE(None, c_uint64, c_int32, c_char_p, c_char_p)


class ContextOptions(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("flags", c_uint32),
        ("log_level", c_uint32),
        ("log", LogFunction),
        ("log_user_data", c_uint64),
    ]


class Request(ctypes.Structure):
    _fields_ = [
        ("opcode", c_uint32),
        ("flags", c_uint32),
        ("backend", Handle),
        ("offset", c_uint64),
        ("bytes", c_uint64),
        ("user_data", c_uint64),
        ("buffer", c_void_p),
        ("iov", c_void_p),
        ("iovcnt", c_uint64),
        ("target", Handle),
        ("target_offset", c_uint64),
        ("memory", Handle),
        ("request_id", c_uint64),
        ("base", Handle),
        ("reserved", c_uint64 * 3),
    ]


class Completion(ctypes.Structure):
    _fields_ = [
        ("user_data", c_uint64),
        ("request_id", c_uint64),
        ("status", c_int32),
        ("flags", c_uint32),
        ("value", c_uint64),
        ("reserved", c_uint64 * 4),
    ]


class Event(ctypes.Structure):
    _fields_ = [
        ("sequence", c_uint64),
        ("value", c_uint64),
        ("type", c_uint32),
        ("status", c_int32),
        ("reserved", c_uint64 * 5),
    ]


class Extent(ctypes.Structure):
    """A run of bytes of which the same is known."""

    _fields_ = [
        ("offset", c_uint64),
        ("bytes", c_uint64),
        ("map_offset", c_uint64),
        ("node_id", c_uint64),
        ("flags", c_uint32),
        ("depth", c_uint32),
    ]


CONTEXT_SAME_DIRECTORY = 1
CONTEXT_TRUST_REFERENCES = 2
CONTEXT_PROBE_REFERENCES = 4
OPEN_READ_ONLY = 1
OPEN_PROBE = 32
BACKEND_WRITABLE = 2
RESIZE_SHRINK = 1
OP_READ, OP_WRITE, OP_FLUSH, OP_BLOCK_STATUS = 1, 2, 3, 6
EXTENT_DATA, EXTENT_ZERO = 1, 2
BLOCK = {
    "backup-source": 1,
    "backup-target": 2,
    "commit-source": 4,
    "commit-target": 8,
    "delete": 16,
    "eject": 32,
    "external-snapshot": 64,
    "internal-snapshot": 128,
    "mirror-source": 256,
    "mirror-target": 512,
    "resize": 1024,
    "stream": 2048,
    "replace": 4096,
}

_TEXT_OUT = POINTER(c_void_p)
_OUT = POINTER(Handle)
_DECLARATIONS = {
    "bds_context_create": [POINTER(ContextOptions), _OUT],
    "bds_context_unref": [Handle],
    "bds_context_event_fd": [Handle],
    "bds_context_next_event": [Handle, POINTER(Event), _TEXT_OUT],
    "bds_query": [Handle, c_char_p, _TEXT_OUT],
    "bds_node_open": [Handle, c_char_p, _OUT],
    "bds_node_open_path": [Handle, c_char_p, c_char_p, c_uint32, _OUT],
    "bds_node_close": [Handle, _TEXT_OUT],
    "bds_node_unref": [Handle],
    "bds_node_block": [Handle, c_uint32, c_char_p, _OUT],
    "bds_guard_unref": [Handle],
    "bds_node_query": [Handle, _TEXT_OUT],
    "bds_backend_create_on": [Handle, POINTER(BackendOptions), _OUT],
    "bds_backend_unref": [Handle],
    "bds_backend_node": [Handle, _OUT],
    "bds_node_name": [Handle, _TEXT_OUT],
    "bds_backend_length": [Handle, POINTER(c_uint64)],
    "bds_pread": [Handle, c_void_p, c_size_t, c_uint64, c_uint32],
    "bds_pwrite": [Handle, c_void_p, c_size_t, c_uint64, c_uint32],
    "bds_flush": [Handle],
    "bds_discard": [Handle, c_uint64, c_uint64, c_uint32],
    "bds_write_zeroes": [Handle, c_uint64, c_uint64, c_uint32],
    "bds_block_status": [Handle, Handle, c_uint64, c_uint64, POINTER(Extent), c_size_t, POINTER(c_size_t)],
    "bds_resize": [Handle, c_uint64, c_char_p, c_uint32],
    "bds_queue_create": [Handle, c_void_p, _OUT],
    "bds_queue_unref": [Handle],
    "bds_queue_fd": [Handle],
    "bds_queue_submit": [Handle, POINTER(Request), c_size_t],
    "bds_queue_poll": [Handle, POINTER(Completion), c_size_t],
    "bds_image_create": [Handle, c_char_p, c_char_p, c_char_p],
    "bds_image_info": [Handle, c_char_p, c_char_p, c_uint32, _TEXT_OUT],
    "bds_image_probe": [Handle, c_char_p, _TEXT_OUT],
    "bds_image_check": [Handle, _TEXT_OUT],
    "bds_image_map": [Handle, c_uint64, c_uint64, _TEXT_OUT],
    "bds_image_measure": [Handle, c_char_p, c_char_p, Handle, _TEXT_OUT],
    "bds_image_convert": [Handle, Handle, c_char_p, _TEXT_OUT],
    "bds_job_start": [Handle, c_char_p, c_char_p, _OUT],
    "bds_job_start_group": [Handle, c_char_p, Handle, _OUT, c_size_t],
    "bds_job_unref": [Handle],
    "bds_job_pause": [Handle],
    "bds_job_resume": [Handle],
    "bds_job_complete": [Handle],
    "bds_job_finalize": [Handle],
    "bds_job_dismiss": [Handle],
    "bds_job_set_speed": [Handle, c_uint64],
    "bds_job_change": [Handle, c_char_p],
    "bds_job_query": [Handle, _TEXT_OUT],
    "bds_job_cancel": [Handle, c_int32],
    "bds_job_wait": [Handle, c_char_p, c_int64],
    "bds_error_status": [],
}


def _load():
    name = os.environ.get("BDS_LIBRARY") or ctypes.util.find_library("bds") or "libbds.so"
    library = ctypes.CDLL(name)
    for function, arguments in _DECLARATIONS.items():
        getattr(library, function).argtypes = arguments
        getattr(library, function).restype = c_int
    library.bds_error_message.restype = c_char_p
    library.bds_status_name.restype = c_char_p
    library.bds_status_name.argtypes = [c_int32]
    library.bds_version_string.restype = c_char_p
    library.bds_free.argtypes = [c_void_p]
    library.bds_free.restype = None
    return library


LIBRARY = _load()
