"""Runs in processes of their own that start at once: everything is imported here, and each run is a fork.

Reads one JSON object a line: parameters of the run, and `file_limit` (bytes that a file may have). Answers with a line
for the process id, and one when it has ended: its exit status (negative: the signal) and what it had to say.
"""

import json
import os
import resource
import sys
import traceback

from dmlr.config import Config
from dmlr.run import evaluate


def child(given: dict, report: int) -> None:
    """Never returns."""
    if limit := given.pop("file_limit", None):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    status = 1
    try:
        evaluate.run(Config(**given))
        status = 0
    except BaseException as error:
        os.write(report, f"{type(error).__name__}: {error}".encode())
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


for line in sys.stdin:
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        child(json.loads(line), write)
    os.close(write)
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    with open(read) as pipe:  # its workers may still have the other end: what is there, not all that may come
        os.set_blocking(read, False)
        said = pipe.read() or ""
    print(json.dumps([os.waitstatus_to_exitcode(status), said]), flush=True)
