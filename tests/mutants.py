"""Break the product on purpose, one thing at a time, and print what no test has noticed.

    make mutants                                        # every mutant of sql/ and beacon_stop.py: many hours
    make mutants ARGS='sql/20_guard.sql'                # those of one file
    make mutants ARGS='--sample 50 --seed 3'            # fifty of them, the same ones for the same seed
    make mutants ARGS='beacon_stop.py --only Server.'   # those whose line in the output contains this
    make mutants ARGS='sql/20_guard.sql --list'         # only show them

A mutant is a copy of the project with one change. The tests that concern the changed file (TESTS) run on it until one
fails: then the mutant is killed. It also counts as killed if it cannot be installed or imported ("did not load"), or if
the tests do not end in time ("hung"). A survivor needs a test; or it shows that the code is not needed; or no test can
tell it from the original, and then it is listed with its reason in mutants_accepted.txt. The exit status is 1 if others
survive.

SQL is changed by regular expressions, on a copy in which comments and strings are blanked; Python by its syntax tree.
Two well-kept tools for Python were looked at. mutmut 3 changes code in functions only, and forks the process that runs
the tests, which does not suit tests with threads, pools and servers of their own. cosmic-ray leaves out no statement
and negates no condition. Neither would share the servers, the table of tests and the list of accepted ones with SQL.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import beacon_stop
import psycopg

from conftest import SERVER_SETTINGS, new_folder

ROOT = Path(__file__).parent.parent
ACCEPTED = ROOT / "tests" / "mutants_accepted.txt"
KINDS = ("killed", "did not load", "hung", "accepted", "survived")
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider"]

# The test modules that concern a file, or a class of it, the likely killers first. A file that is not named here has a
# module of its name. For SQL, the rights are tested first of all, in a second.
BATCHES = "timeout_stuck_jobs repair_stuck_jobs release_job install"
STOPS = "emergency_stop_job emergency_stop_blockers application_triggers hostile"
TESTS = {
    "Client": "server http",
    "Server": "server http command",
    "Pool": "http server emergency_stop_jobs application_triggers hostile",
    "beacon_stop": "http command server emergency_stop_jobs application_triggers readme",
    "00_begin": "install tables",
    "05_changes": "install tables emergency_stop_faults hostile",
    "10_tables": "tables install",
    "15_helpers": f"questions_with_other_ids tables {STOPS} {BATCHES}",
    "20_guard": f"emergency_stop_job release_job application_triggers worker tables hostile {BATCHES}",
    "30_emergency_stop_job": f"{STOPS} emergency_stop_dry_run emergency_stop_jobs release_job tables install",
    "31_emergency_stop_blockers": f"{STOPS} emergency_stop_status questions_with_other_ids",
    "32_emergency_stop_jobs": "emergency_stop_jobs http hostile",
    "36_release_job": "release_job application_triggers emergency_stop_status repair_stuck_jobs timeout_stuck_jobs",
    "38_emergency_stop_faults": "emergency_stop_faults install tables",
    "40_get_job": "get_job tables",
    "50_list_executions": "list_executions tables",
    "60_timeout_stuck_jobs": "timeout_stuck_jobs application_triggers release_job hostile",
    "70_repair_stuck_jobs": "repair_stuck_jobs application_triggers release_job hostile",
    "98_manifest": "install tables emergency_stop_faults",
    "99_end": "install tables emergency_stop_faults",
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    where: str  # the function
    change: str
    text: str  # the whole file, changed

    @property
    def name(self) -> str:
        """What it is called in mutants_accepted.txt: without the number of the line, which moves."""
        return f"{self.file} {self.where}: {self.change}".rstrip()

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.where}: {self.change}"


Change = tuple[int, int, str]  # from, to, what stands there instead


# --- SQL --------------------------------------------------------------------------------------------------------------

STRING = r"'(?:[^']|'')*'|\$q\$.*?\$q\$"
# After WHEN: the name of an error, or a value.
NO_CONDITION = r"SQLSTATE|[a-z_]+ (?:OR|THEN)|'_*'(?:::\w+)? THEN"
COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
SQL_CHANGES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    # A condition negated; what is NULL counts as false.
    (r"\b(IF|ELSIF|EXIT WHEN|CONTINUE WHEN) (?!NOT EXISTS \()([^;]+?)(?=\s+THEN\b|;)", r"\1 (\2) IS NOT TRUE"),
    (rf"(?<!EXIT )(?<!CONTINUE )\bWHEN (?!{NO_CONDITION})([^;]+?)(?=\s+THEN\b)", r"WHEN (\1) IS NOT TRUE"),
    # NULL forgotten.
    (r"\bIS NOT TRUE\b", "IS FALSE"),
    (r"\bIS NOT FALSE\b", "IS TRUE"),
    (r"\bIS DISTINCT FROM\b", "<>"),
    (r"\bIS NOT DISTINCT FROM\b", "="),
    (r"\bLEFT JOIN\b", "JOIN"),
    # A lock left out, shared instead of alone, waited for.
    (r"\s+FOR (?:NO KEY UPDATE|UPDATE|KEY SHARE|SHARE)(?: SKIP LOCKED| NOWAIT)?\b", ""),
    (r"\bFOR NO KEY UPDATE\b", "FOR SHARE"),
    (r" (?:SKIP LOCKED|NOWAIT)\b", ""),
    (r"\bpg_try_advisory(?:_xact)?_lock(?:_shared)?\(\w+\)", "true"),
    (r"\b(pg(?:_try)?_advisory_xact_lock)\(", r"\1_shared("),
    (r"\b(pg(?:_try)?_advisory_xact_lock)_shared\(", r"\1("),
    # A bound moved.
    (r"(?<= )(?:<=|>=|<|>)(?= )", lambda found: COMPARISONS[found[0]]),
    (r"(?<![\w$.])(?<!ORDER BY )\d+(?!\w|\.\d)|(?<=\.\.)\d+", lambda found: str(int(found[0]) + 1)),
    (r"\b(?:true|false)\b", lambda found: "false" if found[0] == "true" else "true"),
    # Rights and settings of a function.
    (r"\bSECURITY DEFINER\b", "SECURITY INVOKER"),
    (r"(?m)^SET (?:search_path|timezone|row_security)\b.*$", ""),
]
# On the text with its strings: a duration moved, a row left out of a list, a column left out of an UPDATE.
SQL_STRING_CHANGES: list[tuple[str, str]] = [
    (r"'(\d+)( ?(?:ms|s|min|minutes|hours))'", r"'\10\2'"),
    (r"(?m)^ +\('[^\n]*\),\n", ""),
    (r"(?m)^( +(?:SET )?)[a-z_]+ = [^\n]*,\n\s+(?=[a-z_]+ = )", r"\1"),
]
STATEMENT = (
    r"(?m)^ *((?:PERFORM|RAISE|EXECUTE(?! FUNCTION)|REVOKE|GRANT|INSERT INTO|UPDATE|DELETE|LOCK TABLE|SET CONSTRAINTS|"
    r"RETURN|EXIT|CONTINUE)\b[^;]*;|[\w.]+ :=[^;]*;)"
)
# What ends an operand of AND or OR.
BOUNDARY = (
    r"[();,]|:=|\b(?:AND|OR(?! REPLACE)|BETWEEN|CASE|END(?! IF| LOOP)|WHERE|ON|WHEN|IF|ELSIF|THEN|ELSE|ORDER|GROUP|"
    r"LIMIT|OFFSET|UNION|EXCEPT|FOR|HAVING|RETURNING|LOOP|SELECT|RETURN|JOIN|LEFT|CROSS|INTO|AS|SET|"
    r"(?<!DISTINCT )FROM)\b"
)


def blank(text: str, pattern: str, keep: int = 0) -> str:
    """The text with all that the pattern finds blanked, but for so many characters at either end."""

    def blanked(found: re.Match[str]) -> str:
        whole = found[0]
        inside = whole[keep : len(whole) - keep]
        return whole[:keep] + re.sub(r"[^\n]", "_" if keep else " ", inside) + whole[len(whole) - keep :]

    return re.sub(pattern, blanked, text, flags=re.DOTALL)


def sql_mutants(source: str) -> Iterator[Change]:
    text = re.sub(rf"({STRING})|--[^\n]*", lambda found: found[1] or " " * len(found[0]), source, flags=re.DOTALL)
    text = blank(text, rf"(?:^|(?<=\n))COMMENT ON (?:{STRING}|[^';])*;")
    text = re.sub(rf"\bRAISE\b(?:{STRING}|[^';])*;", lambda found: blank(found[0], STRING, 1), text)  # messages
    code = blank(text, STRING, 1)
    for view, changes in ((code, SQL_CHANGES), (text, SQL_STRING_CHANGES)):
        for pattern, replacement in changes:
            for found in re.finditer(pattern, view):
                new = replacement(found) if callable(replacement) else replacement
                for group, (start, end) in enumerate(found.regs):
                    new = new.replace(f"\\{group}", source[start:end])  # what it is in the source
                yield *found.span(), new
    for found in re.finditer(r"\bIN \(('[^']*'(?:,\s*'[^']*')+)\)|'\{(\w+(?:,\w+)+)\}'", text):
        first = 1 if found[1] else 2
        items = found[first].split(",")
        for left_out in range(len(items)):
            yield *found.span(first), ",".join(items[:left_out] + items[left_out + 1 :]).strip()
    for found in re.finditer(r"\bCOALESCE\(", re.sub(r"\bRAISE\b[^;]*;", lambda found: "_" * len(found[0]), code)):
        yield found.start(), ending(code, found.end()) + 1, source[found.end() : ending(code, found.end(), ",")]
    for found in re.finditer(r"\bORDER BY ", code):
        end = ending(code, found.end(), r"\b(?:LIMIT|LOOP|OFFSET|INTO|FOR)\b")
        first = ending(code[:end], found.end(), ",")
        key = source[found.end() : first].rstrip()
        yield found.start(), end, ""
        yield found.end(), first, f"{key.removesuffix(' DESC') if key.endswith(' DESC') else key + ' DESC'} "
        if first < end:
            yield found.end(), first + 1, ""
    for found in re.finditer(STATEMENT, code):
        yield *found.span(1), "NULL;" if code[: found.start()].count("$$") % 2 else ""
    yield from operands_left_out(code)


def ending(code: str, start: int, stop: str = r"(?!)") -> int:
    """Where the parenthesis that stands open at start is closed, or `stop` or a semicolon found in it before."""
    depth = 0
    for found in re.compile(rf"[();]|{stop}").finditer(code, start):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if depth < 0 or (depth == 0 and found[0] not in "()"):
            return found.start()
    return len(code)


def operands_left_out(code: str) -> Iterator[Change]:
    """Each operand of AND and OR left out, which is more than one put for the other would do."""
    open_lists: list[list[tuple[int, int]]] = [[(0, 0)]]  # of each level of parentheses: where its operators stand
    is_between = False
    for found in re.finditer(BOUNDARY, code):
        word = found[0]
        if word == "AND" and is_between:
            is_between = False
        elif word in ("AND", "OR"):
            open_lists[-1].append(found.span())
        elif word == "BETWEEN":
            is_between = True
        elif word in ("(", "CASE"):
            open_lists.append([found.span()])
        else:
            (_, start), *operators = open_lists[-1]
            if operators:
                yield start, operators[0][1], " "
            for (operator, _), (following, _) in pairwise([*operators, found.span()]):
                yield operator, following, " "
            if word in (")", "END") and len(open_lists) > 1:
                open_lists.pop()
            else:
                open_lists[-1] = [found.span()]


# --- Python -----------------------------------------------------------------------------------------------------------

PYTHON_COMPARISONS = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: (r"is\s+not", "is"), ast.In: ("in", "not in"),
    ast.NotIn: (r"not\s+in", "in"),
}  # fmt: skip
SIMPLE = (ast.Raise, ast.Return, ast.Delete, ast.Break, ast.Continue, ast.AugAssign)


def python_mutants(source: str) -> Iterator[Change]:
    data = source.encode()
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def begin(node: ast.expr | ast.stmt | ast.keyword) -> int:
        return len(data[: starts[node.lineno - 1] + node.col_offset].decode())

    def end(node: ast.expr | ast.stmt | ast.keyword) -> int:
        return len(data[: starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)].decode())

    for node in nodes(ast.parse(source)):
        if isinstance(node, ast.Compare):
            for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
                gap = source[end(left) : begin(right)]
                yield end(left), begin(right), re.sub(*PYTHON_COMPARISONS[type(operator)], gap, count=1)
        elif isinstance(node, ast.BoolOp):
            for value in node.values:
                yield begin(value), end(value), "True" if isinstance(node.op, ast.And) else "False"
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield begin(node), begin(node) + len("not"), ""
        elif isinstance(node, ast.If | ast.While | ast.IfExp) and not is_reversed_otherwise(node.test):
            yield begin(node.test), end(node.test), f"not ({source[begin(node.test) : end(node.test)]})"
        elif isinstance(node, ast.Constant) and type(node.value) in (bool, int):
            yield begin(node), end(node), str(not node.value if isinstance(node.value, bool) else node.value + 1)
        elif isinstance(node, ast.Call):
            for before, argument in pairwise([*node.args, *node.keywords]):
                if isinstance(argument, ast.keyword) and argument.arg:
                    yield end(before), end(argument), ""
            if isinstance(node.func, ast.Name) and node.func.id in ("min", "max"):
                yield begin(node.func), end(node.func), {"min": "max", "max": "min"}[node.func.id]
        elif isinstance(node, SIMPLE) or is_effect(node):
            yield begin(node), end(node), "pass"


def is_reversed_otherwise(test: ast.expr) -> bool:
    if isinstance(test, ast.Compare):
        return len(test.ops) == 1 and not isinstance(test.ops[0], ast.Lt | ast.LtE | ast.Gt | ast.GtE)
    return isinstance(test, ast.UnaryOp)


def is_effect(node: ast.AST) -> bool:
    """Whether it is a call whose result nobody takes, or sets something that others see."""
    if isinstance(node, ast.Assign):
        return isinstance(node.targets[0], ast.Attribute | ast.Subscript)
    return isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those of types and of formatted strings, whose places older versions of Python do not know."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns"):
            continue
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, ast.AST) and not isinstance(node, ast.JoinedStr):
                yield node
                yield from nodes(node)


# --- Running ----------------------------------------------------------------------------------------------------------


def mutants(file: str) -> Iterator[Mutant]:
    source = (ROOT / file).read_text()
    is_sql = file.endswith(".sql")
    seen = {source}
    for start, end, new in sorted(set(sql_mutants(source) if is_sql else python_mutants(source))):
        text = source[:start] + new + source[end:]
        if text in seen or not source[start:end].strip():
            continue
        seen.add(text)
        # The words around what was changed tell which one of several it is.
        line_start = source.rfind("\n", 0, start) + 1
        before, after = source[max(line_start, start - 30) : start].lstrip(), source[end : end + 20].split("\n")[0]
        old, new = " ".join(source[start:end].split()), " ".join(new.split())
        if len(old) > 90:
            old = f"{old[:60]} ... {old[-20:]}"
        change = f"{before}[{old} → {new[:90]}]{after}"
        start += len(source[start:end]) - len(source[start:end].lstrip())
        yield Mutant(file, source.count("\n", 0, start) + 1, where(source, start, is_sql), change, text)


def where(source: str, place: int, is_sql: bool) -> str:
    if is_sql:
        names = re.findall(r"(?m)^CREATE OR REPLACE FUNCTION (\w+)|^(DO) ", source[:place])
        return names[-1][0] or names[-1][1] if names else "top"
    before = source[: source.find("\n", place)]
    outer = re.findall(r"(?m)^(?:class|def) (\w+)|^(?=[^\s)])", before)[-1:]
    inner = re.findall(r"(?m)^(?:    def (\w+)|(?=[^\s)]))", before)[-1:]
    return ".".join(name for name in outer + inner if name) or "top"


def test_modules(mutant: Mutant) -> list[str]:
    stem = Path(mutant.file).stem
    names = TESTS.get(mutant.where.split(".")[0]) or TESTS.get(stem) or stem.split("_", 1)[1]
    first = ["privileges"] if mutant.file.endswith(".sql") else []
    return [f"tests/test_{name}.py" for name in [*first, *names.split()]]


class Worker:
    """A copy of the project, and a PostgreSQL for all the mutants that are tried in it."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.closing = ExitStack()
        self.copy = Path(self.closing.enter_context(TemporaryDirectory(prefix="mutants-"))) / "copy"
        ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "bench", "servers")
        shutil.copytree(ROOT, self.copy, ignore=ignored)
        for folder in ("tests/bench", "tests/servers"):  # tests read their README
            (self.copy / folder).mkdir()
            shutil.copy(ROOT / folder / "README.md", self.copy / folder)
        self.server = self.closing.enter_context(ExitStack())
        self.url = ""

    def start_server(self) -> None:
        folder = Path(self.server.enter_context(new_folder()))
        with beacon_stop.embedded_postgres(folder) as url, psycopg.connect(url, autocommit=True) as db:
            for name, value in SERVER_SETTINGS.items():
                db.execute(f"ALTER SYSTEM SET {name} = {value}")
        self.url = self.server.enter_context(beacon_stop.embedded_postgres(folder))  # some need a start

    def fate(self, mutant: Mutant) -> str:
        """Try a mutant: "survived", or what has killed it."""
        original = (ROOT / mutant.file).read_text()
        (self.copy / mutant.file).write_text(mutant.text)
        try:
            status, output = self.run(test_modules(mutant))
        finally:
            (self.copy / mutant.file).write_text(original)
        if status == 0:
            return "survived"
        if status is None:
            self.server.close()  # whatever the tests have left behind in it
            self.url = ""
            return "hung"
        if status in (2, 4) or re.search(r"conftest\.py:\d+: in install\b", output):
            return "did not load"
        failed = re.search(r"(?m)^(?:FAILED|ERROR) tests/(\S+)", output)
        return f"killed by {failed[1] if failed else output[-200:]}"

    def run(self, modules: list[str]) -> tuple[int | None, str]:
        """Run test modules in the copy: the exit status, None if they took too long, and what they said."""
        if not self.url:
            self.start_server()
        environment = {
            "PYTHONPATH": str(self.copy),
            "PYTHONDONTWRITEBYTECODE": "1",
            "BEACON_TEST_DATABASE_URL": self.url,
        }
        with (self.copy.parent / "output").open("w+") as output:
            process = subprocess.Popen(
                [*PYTEST, *modules], cwd=self.copy, env={**os.environ, **environment},
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                status: int | None = process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                status = None
            if status is None:
                process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(20)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it and what it has left behind
            process.wait()
            output.seek(0)
            return status, output.read()


def accepted() -> dict[str, str]:
    """The survivors that need no test, each with its reason, which stands indented below it."""
    reasons: dict[str, str] = {}
    for names, reason in re.findall(r"(?m)((?:^[^\s#].*\n)+)((?:^ +\S.*\n)+)", ACCEPTED.read_text()):
        reasons |= dict.fromkeys(names.splitlines(), " ".join(reason.split()))
    return reasons


def main() -> int:
    parser = argparse.ArgumentParser(description="Break the product on purpose; print what no test has noticed.")
    parser.add_argument("files", nargs="*", help="of sql/*.sql and beacon_stop.py (all)")
    parser.add_argument("--only", default="", help="only mutants in whose line this text occurs")
    parser.add_argument("--sample", type=int, help="only so many, taken at random")
    parser.add_argument("--seed", type=int, default=1, help="of the sample (1)")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time (2)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for the tests of a mutant (600)")
    parser.add_argument("--unchecked", action="store_true", help="do not see first that the tests pass unchanged")
    parser.add_argument("--list", action="store_true", help="show the mutants, and run nothing")
    parser.add_argument("--verbose", action="store_true", help="show the fate of each, not only of survivors")
    options = parser.parse_args()
    files = options.files or [*(f"sql/{file.name}" for file in beacon_stop.sql_files()), "beacon_stop.py"]
    found = [mutant for file in files for mutant in mutants(file) if options.only in str(mutant)]
    if options.sample is not None:
        found = random.Random(options.seed).sample(found, min(options.sample, len(found)))
    if options.list:
        print(*found, f"{len(found)} mutants", sep="\n")
        return 0

    reasons = accepted()
    fates: dict[Mutant, str] = {}
    local = threading.local()
    workers: list[Worker] = []

    def try_one(mutant: Mutant) -> None:
        if not hasattr(local, "worker"):
            local.worker = Worker(options.timeout)
            workers.append(local.worker)
        began = time.monotonic()
        fate = fates[mutant] = local.worker.fate(mutant)
        if fate == "survived" and mutant.name in reasons:
            fate = fates[mutant] = "accepted"
        if options.verbose or fate == "survived":
            print(f"{fate} ({time.monotonic() - began:.0f} s): {mutant}", flush=True)

    try:
        if not options.unchecked:
            workers.append(Worker(options.timeout * 2))
            modules = dict.fromkeys(module for mutant in found for module in test_modules(mutant))
            status, output = workers[0].run([*modules])
            if status != 0:
                print(f"{output[-3_000:]}\nThe tests fail without any change: then they tell nothing of the mutants.")
                return 2
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(try_one, found))
    finally:
        for worker in workers:
            worker.closing.close()
    print(f"{'file':34} mutants  killed  did not load  hung  accepted  survived")
    for file in files:
        mine = [fate for mutant, fate in fates.items() if mutant.file == file]
        counts = [sum(fate.startswith(kind) for fate in mine) for kind in KINDS]
        print("{:34} {:7} {:7} {:13} {:5} {:9} {:9}".format(file, len(mine), *counts))
    return int("survived" in fates.values())


if __name__ == "__main__":
    sys.exit(main())
