"""Run a folder of tests in two pytest processes side by side, each with servers of its own: tests wait more than they compute.

    python tests/in_two.py FOLDER [ARGUMENT...]

The arguments are pytest's. The first half is shown while it runs, then the second half, then what failed in both. One
process runs if an argument names a file, or if BEACON_TEST_DATABASE_URL names one server for all tests.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from pytest import ExitCode

# By time about half of each folder. What floods or measures is together, so that it has no rival of its own kind.
FIRST_HALF = {
    "tests": ["test_hostile", "test_emergency_stop_job", "test_emergency_stop_jobs", "test_timeout_stuck_jobs"],
    "servers": ["test_wsgi_servers"],
}


def start(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
    """Start pytest, which Ctrl-C ends in good order, also as a job in the background of a shell's, which ignores it."""
    command = [sys.executable, "-m", "pytest", *map(str, arguments)]
    return subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)


def in_two(folder: Path, arguments: list[str]) -> int:
    """Returns pytest's exit status, that of the half which went worse."""
    modules = sorted(folder.glob("test_*.py"))
    first_half = [module for module in modules if module.stem in FIRST_HALF[folder.name]]
    second_half = [module for module in modules if module not in first_half]
    with TemporaryFile("w+") as shown_later:
        capture = {"stderr": subprocess.STDOUT, "text": True}
        first = start("-o", "cache_dir=.pytest_cache/1", *arguments, *first_half, stdout=subprocess.PIPE, **capture)
        second = start("-o", "cache_dir=.pytest_cache/2", *arguments, *second_half, stdout=shown_later, **capture)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches them as well: their output is still to be shown
        signal.signal(signal.SIGTERM, lambda *_: [half.send_signal(signal.SIGINT) for half in (first, second)])
        lines = []
        for line in first.stdout:
            lines.append(line)
            print(line, end="", flush=True)
        statuses = {first.wait(), second.wait()}
        shown_later.seek(0)
        for line in shown_later:
            lines.append(line)
            print(line, end="")
    print("\n======== both halves ========")
    print(*(line for line in lines if re.match("FAILED|ERROR", line) or re.search(r" in [0-9.]+s", line)), sep="", end="")
    if len(statuses) > 1:
        statuses -= {ExitCode.NO_TESTS_COLLECTED}  # where -k has chosen none of one half
    return max(map(abs, statuses))


if __name__ == "__main__":
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    if any(Path(argument.partition("::")[0]).exists() for argument in arguments):
        sys.exit(start(*arguments).wait())
    if "BEACON_TEST_DATABASE_URL" in os.environ:
        sys.exit(start(*arguments, folder).wait())
    sys.exit(in_two(folder, arguments))
