"""Job: a long operation on the graph."""

import errno

from bds._errors import Error, check, json_of, options_of
from bds._handle import Owner
from bds._library import LIBRARY


class Job(Owner):
    """A block job. It goes on when the object is closed."""

    _unref = LIBRARY.bds_job_unref

    def wait(self, state: "str | None" = None, timeout: "float | None" = None) -> bool:
        """Waits for a state, or the end. False: the time is over. Raises the job's error."""
        nanoseconds = -1 if timeout is None else int(timeout * 1e9)
        try:
            check(LIBRARY.bds_job_wait(self._handle, state.encode() if state else None, nanoseconds))
        except Error as error:
            if error.errno == errno.ETIME and timeout is not None:
                return False
            raise
        return True

    def pause(self) -> None:
        check(LIBRARY.bds_job_pause(self._handle))

    def resume(self) -> None:
        check(LIBRARY.bds_job_resume(self._handle))

    def complete(self) -> None:
        """Ends a job that is ready, as intended."""
        check(LIBRARY.bds_job_complete(self._handle))

    def finalize(self) -> None:
        """Lets a group of jobs take effect that are pending."""
        check(LIBRARY.bds_job_finalize(self._handle))

    def dismiss(self) -> None:
        """Forgets a job that is over and was started with auto-dismiss off."""
        check(LIBRARY.bds_job_dismiss(self._handle))

    def set_speed(self, bytes_per_second: int) -> None:
        check(LIBRARY.bds_job_set_speed(self._handle, bytes_per_second))

    def change(self, options) -> None:
        """Changes options of the running job: `{"copy-mode": "write-blocking"}` of a mirror."""
        check(LIBRARY.bds_job_change(self._handle, options_of(options)))

    def cancel(self, force: bool = True) -> None:
        check(LIBRARY.bds_job_cancel(self._handle, int(force)))

    def query(self) -> dict:
        """Id, type, status, progress."""
        return json_of(LIBRARY.bds_job_query, self._handle)
