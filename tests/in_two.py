"""Run a folder of tests in two pytest processes side by side, each with servers of its own.

    python tests/in_two.py FOLDER [ARGUMENT...]

Tests wait more than they compute. The arguments are pytest's. The first half is shown while it runs, then the second
half, then what failed in both. One process runs if an argument names a file, or if BEACON_TEST_DATABASE_URL names one
server for all tests.
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
    "tests": [
        "test_hostile",
        "test_server",
        "test_emergency_stop_job",
        "test_emergency_stop_jobs",
        "test_repair_stuck_jobs",
        "test_runaway_jobs",
        "test_timeout_stuck_jobs",
    ],
    "servers": ["test_wsgi_servers", "test_proxies"],
}


def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
    """Start pytest, which Ctrl-C ends in good order, also as a job in the background of a shell's, which ignores it."""
    command = [sys.executable, "-m", "pytest", *map(str, arguments)]
    return subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)


def in_two(folder: Path, arguments: list[str]) -> int:
    """Returns pytest's exit status, that of the half which went worse."""
    modules = sorted(folder.glob("test_*.py"))
    halves = [
        [module for module in modules if (module.stem in FIRST_HALF[folder.name]) == first] for first in (True, False)
    ]
    with TemporaryFile() as later:
        first, second = (
            start("-o", f"cache_dir=.pytest_cache/{number}", *arguments, *half, stdout=output, stderr=subprocess.STDOUT)
            for number, half, output in zip((1, 2), halves, (subprocess.PIPE, later), strict=True)
        )
        # Ctrl-C reaches them as well. What they then say is still to be shown.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: [half.send_signal(signal.SIGINT) for half in (first, second)])
        shown = bytearray()
        while part := os.read(first.stdout.fileno(), 65_536):
            shown += part
            show(part)
        statuses = {first.wait(), second.wait()}
        later.seek(0)
        show(rest := later.read())
    results = re.findall(rb"(?m)^(?:FAILED .*|ERROR .*|.* in \d+\.\d+s.*)\n", shown + rest)
    show(b"\nBoth halves:\n" + b"".join(results))
    if len(statuses) > 1:
        statuses -= {ExitCode.NO_TESTS_COLLECTED}  # where -k has chosen none of one half
    return max(map(abs, statuses))


def show(output: bytes) -> None:
    sys.stdout.buffer.write(output)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    if any(Path(argument.partition("::")[0]).exists() for argument in arguments):
        sys.exit(start(*arguments).wait())
    if "BEACON_TEST_DATABASE_URL" in os.environ:
        sys.exit(start(*arguments, folder).wait())
    sys.exit(in_two(folder, arguments))
