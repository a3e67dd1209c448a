"""Tests of the package, with the library that BDS_LIBRARY names."""

import asyncio
import os
import tempfile
import threading
import unittest

import bds


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


class Images(unittest.TestCase):
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
