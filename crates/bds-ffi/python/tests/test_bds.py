"""Tests of the package, with the library that BDS_LIBRARY names."""

import asyncio
import contextlib
import ctypes
import os
import tempfile
import threading
import unittest

import bds
from bds import _library


class Layouts(unittest.TestCase):
    """The structs of the package are those of the header, whose layout is committed in abi/."""

    def test_structs_and_constants_are_the_headers(self):
        path = os.path.join(os.path.dirname(__file__), "..", "..", "abi", "layout.txt")
        if not os.path.exists(path):
            self.skipTest("abi/layout.txt is not part of an installed package")
        with open(path) as file:
            layout = {name: tuple(map(int, rest)) for name, *rest in map(str.split, file)}
        names = {
            "bds_node": _library.Handle,
            "bds_backend_options": _library.BackendOptions,
            "bds_context_options": _library.ContextOptions,
            "bds_request": _library.Request,
            "bds_completion": _library.Completion,
            "bds_event": _library.Event,
            "bds_extent": _library.Extent,
        }
        for name, struct in names.items():
            self.assertEqual(layout[name], (ctypes.sizeof(struct),), name)
            for field, *_ in struct._fields_:
                found = getattr(struct, field)
                self.assertEqual(layout[f"{name}.{field}"], (found.offset, found.size), field)
        for name in ("CONTEXT_SAME_DIRECTORY", "CONTEXT_TRUST_REFERENCES", "CONTEXT_PROBE_REFERENCES",
                     "OPEN_READ_ONLY", "OPEN_PROBE", "BACKEND_WRITABLE", "RESIZE_SHRINK", "OP_READ",
                     "OP_WRITE", "OP_FLUSH", "OP_BLOCK_STATUS", "EXTENT_DATA", "EXTENT_ZERO"):
            self.assertEqual(layout[f"BDS_{name}"], (getattr(_library, name),), name)
        for name, bit in _library.BLOCK.items():
            self.assertEqual(layout["BDS_BLOCK_" + name.upper().replace("-", "_")], (bit,), name)


class Blocking(unittest.TestCase):
    def test_what_is_written_is_read(self):
        with bds.Context() as context, context.open("driver=mem,node-name=disk,size=1M") as disk:
            disk.write(4096, b"hello")
            disk.flush()
            self.assertEqual(disk.read(4095, 7), b"\0hello\0")
            self.assertEqual(len(disk), 1 << 20)
            self.assertEqual(disk.facts()["name"], "disk")
            disk.resize(2 << 20)
            self.assertEqual(len(disk), 2 << 20)

    def test_a_closed_disk_is_stale_and_closing_twice_does_nothing(self):
        with bds.Context() as context:
            disk = context.open({"driver": "mem", "size": 65536})
            disk.close()
            disk.close()
            with self.assertRaises(bds.Stale):
                disk.read(0, 1)
            self.assertEqual(context.query("nodes"), [])

    def test_errors_carry_errno_and_name(self):
        with bds.Context() as context:
            with self.assertRaises(bds.Error) as caught:
                context.open_path("/nonexistent/disk.qcow2", "qcow2")
            self.assertEqual(caught.exception.errno, 2)
            with self.assertRaises(bds.Error) as caught:
                context.open("driver=mem,colour=red")
            self.assertEqual(caught.exception.name, "BDS_ERR_OPTION")
            self.assertIn("colour", str(caught.exception))

    def test_threads_share_a_disk(self):
        with bds.Context() as context, context.open("driver=mem,size=1M") as disk:
            def work(number):
                for at in range(number * 4096, 1 << 20, 4 * 4096):
                    disk.write(at, bytes([number + 1]) * 4096)

            threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.assertEqual(disk.read(4096 * 5, 1), b"\2")


    def test_zeros_discards_and_extents(self):
        with tempfile.TemporaryDirectory() as place:
            path = os.path.join(place, "a.qcow2")
            bds.create(path, "qcow2", {"size": "1M"})
            with bds.Context() as context, context.open_path(path, "qcow2", writable=True) as disk:
                disk.write(65536, b"x" * 131072)
                disk.write_zeroes(65536, 65536)
                disk.discard(524288, 65536)
                self.assertEqual(disk.read(65536, 65536), bytes(65536))
                found = list(disk.extents())
                self.assertEqual(sum(length for _, length, _, _ in found), 1 << 20)
                data = [(at, length) for at, length, is_data, is_zero in found if is_data and not is_zero]
                self.assertEqual(data, [(131072, 65536)])
                self.assertEqual(list(disk.extents(1 << 20)), [])

    def test_a_guard_blocks_until_it_is_closed(self):
        with bds.Context() as context, context.open("driver=mem,size=1M") as disk:
            with disk.block(["resize"], "a copy is made") as guard:
                with self.assertRaises(bds.Error) as caught:
                    disk.resize(2 << 20)
                self.assertIn("a copy is made", str(caught.exception))
                self.assertFalse(guard.closed)
            disk.resize(2 << 20)
            with self.assertRaises(bds.Error):
                disk.resize(1 << 20)
            disk.resize(1 << 20, shrink=True)

    def test_messages_and_events_reach_the_program(self):
        logged, arrived = [], threading.Event()

        def log(level, target, message):
            logged.append((level, target, message))
            arrived.set()

        with tempfile.TemporaryDirectory() as place:
            path = os.path.join(place, "a.qcow2")
            bds.create(path, "qcow2", {"size": "1M"})
            with open(path, "r+b") as file:
                file.seek(79)
                file.write(b"\2")  # marked corrupt
            with bds.Context(log=log) as context:
                context.open({"driver": "qcow2", "read-only": True,
                              "file": {"driver": "file", "filename": path}}, writable=False).close()
                self.assertTrue(arrived.wait(60))
                self.assertGreaterEqual(context.event_fd(), 0)
                self.assertIsInstance(context.events(), list)
            self.assertEqual((logged[0][0], logged[0][1].split("::")[0]), (2, "bds_drivers"))
            self.assertIn("corrupt", logged[0][2])


class Images(unittest.TestCase):
    def test_check_map_measure_probe_resize(self):
        with tempfile.TemporaryDirectory() as place:
            path = os.path.join(place, "a.qcow2")
            bds.create(path, "qcow2", {"size": "1M"})
            with bds.Context() as context, context.open_path(path, "qcow2", writable=True) as disk:
                disk.write(0, b"data")
            self.assertEqual(bds.probe(path), "qcow2")
            self.assertEqual(bds.check(path)["check-errors"], 0)
            runs = bds.map(path)
            self.assertEqual((runs[0]["start"], runs[0]["data"], runs[-1]["data"]), (0, True, False))
            self.assertEqual(sum(run["length"] for run in runs), 1 << 20)
            self.assertEqual(bds.measure("raw", path)["fully-allocated"], 1 << 20)
            self.assertGreater(bds.measure("qcow2", options={"size": "1G"})["required"], 65536)
            bds.resize(path, 2 << 20)
            self.assertEqual(bds.info(path)["virtual-size"], 2 << 20)

    def test_create_info_convert(self):
        with tempfile.TemporaryDirectory() as place:
            raw, qcow2 = os.path.join(place, "a.raw"), os.path.join(place, "a.qcow2")
            bds.create(raw, "raw", {"size": "1M"})
            with bds.Context() as context, context.open_path(raw, "raw", writable=True) as disk:
                disk.write(65536, b"data")
            report = bds.convert(raw, qcow2, "qcow2", "raw")
            self.assertEqual(report["total"], 1 << 20)
            self.assertEqual(bds.info(qcow2)["virtual-size"], 1 << 20)
            with bds.Context() as context, context.open_path(qcow2) as disk:
                self.assertEqual(disk.read(65536, 4), b"data")


class Jobs(unittest.TestCase):
    def test_a_backup_holds_the_disk_as_it_was(self):
        with bds.Context() as context:
            with context.open("driver=mem,node-name=disk,size=1M") as disk:
                with context.open("driver=mem,node-name=copy,size=1M", writable=False) as copy:
                    disk.write(0, b"before")
                    with context.backup("disk", "copy") as job:
                        self.assertTrue(job.wait())
                    disk.write(0, b"after!")
                    self.assertEqual(copy.read(0, 6), b"before")

    def test_backups_of_a_group_are_of_one_moment_and_end_together(self):
        with bds.Context() as context:
            with contextlib.ExitStack() as stack:
                disks = [
                    stack.enter_context(context.open(f"driver=mem,node-name=d{at},size=1M")) for at in (0, 1)
                ]
                copies = [
                    stack.enter_context(context.open(f"driver=mem,node-name=c{at},size=1M", writable=False))
                    for at in (0, 1)
                ]
                for disk in disks:
                    disk.write(0, b"before")
                backup = lambda at: {"type": "backup", "job-id": f"b{at}", "device": f"d{at}",
                                     "target": f"c{at}", "sync": "full"}
                jobs = context.start_jobs([backup(0), backup(1)])
                for disk in disks:
                    disk.write(0, b"after!")
                for job in jobs:
                    self.assertTrue(job.wait())
                    job.close()
                self.assertEqual([copy.read(0, 6) for copy in copies], [b"before"] * 2)
                missing = {**backup(1), "target": "nothing"}
                with self.assertRaises(bds.Error):
                    context.start_jobs([backup(0), missing])
                self.assertEqual(context.query("jobs"), [])

    def test_a_mirror_is_changed_paused_and_completed(self):
        with bds.Context() as context:
            with context.open("driver=mem,node-name=from,size=1M") as disk:
                with context.open("driver=mem,node-name=to,size=1M", writable=False):
                    disk.write(0, b"data")
                    options = {"job-id": "m", "device": "from", "target": "to"}
                    with context.start_job("mirror", options) as job:
                        self.assertTrue(job.wait("ready"))
                        job.change({"copy-mode": "write-blocking"})
                        job.set_speed(1 << 30)
                        job.pause()
                        job.wait("standby")
                        job.resume()
                        job.wait("ready")
                        job.complete()
                        self.assertTrue(job.wait())
                    self.assertEqual(disk.read(0, 4), b"data")
                    self.assertEqual(disk.medium(), "to")

    def test_a_job_that_cannot_start_says_why(self):
        with bds.Context() as context, context.open("driver=mem,node-name=disk,size=1M"):
            with self.assertRaises(bds.Error) as caught:
                context.backup("disk", "nothing")
            self.assertEqual(caught.exception.name, "BDS_ERR_NOT_FOUND")


class Async(unittest.TestCase):
    def test_many_requests_on_asyncio_lose_no_wake_up(self):
        async def run():
            with bds.Context() as context, context.open("driver=mem,size=4M") as disk:
                with bds.Queue(context) as queue:
                    for _ in range(20):
                        await asyncio.gather(
                            *(queue.write(disk, at * 4096, bytes([at % 251]) * 4096) for at in range(100))
                        )
                        await queue.flush(disk)
                        read = await asyncio.gather(
                            *(queue.read(disk, at * 4096, 1) for at in range(100))
                        )
                        self.assertEqual(read, [bytes([at % 251]) for at in range(100)])
                    with self.assertRaises(bds.Error):
                        await queue.read(disk, 4 << 20, 512)
                    found = await queue.extents(disk, 0, 4 << 20)
                    self.assertEqual(sum(length for _, length, _, _ in found), 4 << 20)
                    self.assertTrue(found[0][2])

        asyncio.run(asyncio.wait_for(run(), 60))

    def test_a_cancelled_read_keeps_its_buffer_until_the_completion(self):
        async def run():
            with bds.Context() as context, context.open("driver=null-aio,size=4M,latency-ns=50000000") as disk:
                with bds.Queue(context) as queue:
                    reads = [asyncio.ensure_future(queue.read(disk, 0, 4096)) for _ in range(4)]
                    await asyncio.sleep(0)
                    reads[1].cancel()
                    done = await asyncio.gather(*reads, return_exceptions=True)
                    self.assertIsInstance(done[1], asyncio.CancelledError)
                    self.assertEqual([len(done[at]) for at in (0, 2, 3)], [4096] * 3)
                    while queue._waiting:
                        await asyncio.sleep(0.01)

        asyncio.run(asyncio.wait_for(run(), 60))


if __name__ == "__main__":
    unittest.main()
