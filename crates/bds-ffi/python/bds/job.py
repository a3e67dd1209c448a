"""Job: a long operation on the graph."""

import errno

from bds._errors import Error, check, json_of
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

    def cancel(self, force: bool = True) -> None:
        check(LIBRARY.bds_job_cancel(self._handle, int(force)))

    def query(self) -> dict:
        """Id, type, status, progress."""
        return json_of(LIBRARY.bds_job_query, self._handle)
