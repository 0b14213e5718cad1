"""Run a folder of tests in several pytest processes side by side, each with servers of its own.

    python tests/side_by_side.py FOLDER [ARGUMENT...]

Tests wait more than they compute. The arguments are pytest's. The first part is shown while it runs, then the others,
then what failed in any. One process runs if an argument names a file, or if BEACON_TEST_DATABASE_URL names one server
for all tests.
"""

import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from pytest import ExitCode

# The modules of each part but the last, which has the rest: parts that take about as long. What floods or measures is
# together, so that it has no rival of its own kind.
PARTS = {
    "tests": [
        [
            "test_hostile",
            "test_emergency_stop_jobs",
            "test_emergency_stop_job",
        ],
        [
            "test_server",
            "test_command",
            "test_timeout_stuck_jobs",
        ],
        [
            "test_http",
            "test_install",
            "test_tables",
            "test_emergency_stop_faults",
        ],
    ],
    "servers": [["test_wsgi_servers", "test_proxies"]],
}


def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
    """Start pytest, which Ctrl-C ends in good order, also as a job in the background of a shell's, which ignores it."""
    command = [sys.executable, "-m", "pytest", *map(str, arguments)]
    return subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)


def side_by_side(folder: Path, arguments: list[str]) -> int:
    """Returns pytest's exit status, that of the part which went worst."""
    parts = [[folder / f"{name}.py" for name in part] for part in PARTS[folder.name]]
    parts.append(sorted(set(folder.glob("test_*.py")).difference(*parts)))
    with ExitStack() as stack:
        outputs = [subprocess.PIPE, *(stack.enter_context(TemporaryFile()) for _ in parts[1:])]
        running = [
            start("-o", f"cache_dir=.pytest_cache/{number}", *arguments, *part, stdout=output, stderr=subprocess.STDOUT)
            for number, (part, output) in enumerate(zip(parts, outputs, strict=True))
        ]
        # Ctrl-C reaches them as well. What they then say is still to be shown.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: [part.send_signal(signal.SIGINT) for part in running])
        shown = bytearray()
        while said := os.read(running[0].stdout.fileno(), 65_536):
            shown += said
            show(said)
        statuses = {part.wait() for part in running}
        for output in outputs[1:]:
            output.seek(0)
            show(said := output.read())
            shown += said
    results = re.findall(rb"(?m)^(?:FAILED .*|ERROR .*|.* in \d+\.\d+s.*)\n", shown)
    show(b"\nAll parts:\n" + b"".join(results))
    if len(statuses) > 1:
        statuses -= {ExitCode.NO_TESTS_COLLECTED}  # where -k has chosen none of one part
    return max(map(abs, statuses))


def show(output: bytes) -> None:
    sys.stdout.buffer.write(output)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    if any(Path(argument.partition("::")[0]).is_file() for argument in arguments):
        sys.exit(start(*arguments).wait())
    if "BEACON_TEST_DATABASE_URL" in os.environ:
        sys.exit(start(*arguments, folder).wait())
    sys.exit(side_by_side(folder, arguments))
