"""Prints the size table and fails past the limits: functions 60 lines, Python files 400, C++ and CUDA files 700.

An exception is named in EXCEPTIONS with its reason; an exception that is no longer needed fails as well.
"""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = {"Python": 400, "C++": 700}
LANGUAGES = {".py": "Python", ".cpp": "C++", ".h": "C++", ".inl": "C++", ".cu": "C++", ".cuh": "C++"}

# "path" or "path:function" -> why it may be longer.
EXCEPTIONS: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Item:
    """A file or a function and its length in lines."""

    name: str
    num_lines: int


def source_files() -> list[Path]:
    """Tracked and new files that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = {ROOT / line for line in listed.splitlines() if Path(line).suffix in LANGUAGES}
    return sorted(path for path in paths if path.is_file())


def python_functions(source: str) -> Iterator[Item]:
    """Functions of a module; the lines of a nested function count for its parent too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield Item(node.name, node.end_lineno - node.lineno + 1)


def blank(match: re.Match[str]) -> str:
    """Keeps the newlines of a comment or literal, and nothing else."""
    return "\n" * match.group().count("\n")


HIDDEN = re.compile(
    r'R"(?P<tag>[^(]*)\(.*?\)(?P=tag)"|//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|(?<![0-9a-fA-F])\'(?:\\.|[^\'\\\n])+\'',
    re.DOTALL,
)
PREPROCESSOR = re.compile(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", re.MULTILINE)
FUNCTION = re.compile(r"(?P<name>~?\w+|operator\W+)\s*\((?:[^;]*)\)[^;=]*$", re.DOTALL)
SCOPE = re.compile(r"\b(?:namespace|class|struct|union|enum)\b[^()]*$|extern\s*$")


def cpp_functions(source: str) -> Iterator[Item]:
    """Function bodies at namespace or class level, by matching braces: lambdas count for the function around them."""
    text = PREPROCESSOR.sub(blank, HIDDEN.sub(blank, source))
    start, depth_of_body, kinds = 0, 0, list[str]()
    name, first_line = "", 0
    for match in re.finditer(r"[{};]", text):
        head, start = text[start : match.start()], match.end()
        if match.group() == "{":
            found = FUNCTION.search(head) if not SCOPE.search(head) else None
            opens_body = depth_of_body == 0 and found is not None
            kinds.append("body" if opens_body else "scope")
            if opens_body and found is not None:
                depth_of_body = len(kinds)
                name, first_line = found["name"].strip(), text.count("\n", 0, match.start() - len(head.lstrip()))
        elif match.group() == "}" and kinds:
            if len(kinds) == depth_of_body:
                yield Item(name, text.count("\n", 0, match.start()) - first_line + 1)
                depth_of_body = 0
            kinds.pop()


def measure(paths: list[Path]) -> dict[str, tuple[list[Item], list[Item]]]:
    """Per language: the files, and the functions named `path:function`."""
    table: dict[str, tuple[list[Item], list[Item]]] = {name: ([], []) for name in MAX_FILE_LINES}
    for path in paths:
        language = LANGUAGES[path.suffix]
        source = path.read_text(encoding="utf-8")
        where = path.relative_to(ROOT).as_posix()
        files, functions = table[language]
        files.append(Item(where, len(source.splitlines())))
        found = python_functions(source) if language == "Python" else cpp_functions(source)
        functions.extend(Item(f"{where}:{item.name}", item.num_lines) for item in found)
    return table


def summary(items: list[Item]) -> str:
    """Count, total, median, 90th percentile and longest."""
    lines = sorted(item.num_lines for item in items)
    if not lines:
        return "none"
    p90 = lines[min(len(lines) - 1, int(0.9 * len(lines)))]
    longest = max(items, key=lambda item: item.num_lines).name
    return f"{len(lines):6} {sum(lines):8} {statistics.median(lines):8.0f} {p90:6} {lines[-1]:6}  {longest}"


def main() -> int:
    """Prints the table and what breaks a limit; 1 if anything does."""
    too_long = dict[str, str]()
    print(f"{'':18} {'number':>6} {'lines':>8} {'median':>8} {'p90':>6} {'max':>6}  longest")
    for language, (files, functions) in measure(source_files()).items():
        print(f"{language + ' files':18} {summary(files)}\n{language + ' functions':18} {summary(functions)}")
        limits = ((files, MAX_FILE_LINES[language]), (functions, MAX_FUNCTION_LINES))
        for items, limit in limits:
            too_long |= {i.name: f"{i.num_lines} lines, limit {limit}" for i in items if i.num_lines > limit}
    for name, reason in EXCEPTIONS.items():
        print(f"exception: {name}: {reason}")
    failures = [f"{name}: {why}" for name, why in too_long.items() if name not in EXCEPTIONS]
    failures += [f"{name}: the exception is no longer needed" for name in EXCEPTIONS if name not in too_long]
    for failure in failures:
        print(f"error: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
