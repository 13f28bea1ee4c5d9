"""Lines a module and the length of its functions. Fails past 300 lines a file.

    python scripts/lines.py --table
"""
import ast
import re
import sys
from pathlib import Path
from statistics import median

LIMIT = 300
ROOT = Path(__file__).resolve().parent.parent


def measure(path: Path) -> tuple[int, list[int]]:
    """(lines of the file, lines of each function in Python)."""
    text = path.read_text()
    if path.suffix == ".c":
        return len(text.splitlines()), []
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    return len(text.splitlines()), [node.end_lineno - node.lineno + 1 for node in functions]


def count(path: Path) -> int:
    """Lines of a file, or of all files of code in a folder."""
    files = [*path.glob("*.py"), *path.glob("*.c")] if path.is_dir() else [path]
    return sum(len(file.read_text().splitlines()) for file in files)


def update_readme() -> None:
    """Write today's line counts into README's table."""
    readme = ROOT / "README.md"
    text = re.sub(r"(\]\(((?:nanoinfra|kernels)/[^)]+)\) \| )\d+( \|)",
                  lambda row: f"{row[1]}{count(ROOT / row[2])}{row[3]}", readme.read_text())
    readme.write_text(text)


def main() -> int:
    if "--readme" in sys.argv:
        update_readme()
    folders = ROOT / "nanoinfra", ROOT / "kernels", ROOT / "scripts"
    files = sorted(file for folder in folders for kind in ("*.py", "*.c") for file in folder.rglob(kind))
    rows = [(path.relative_to(ROOT), *measure(path)) for path in files if path.stat().st_size]
    if "--table" in sys.argv:
        print(f"{'file':44}{'lines':>6}{'functions':>11}{'median':>8}{'longest':>9}")
        for path, lines, functions in rows:
            middle, longest = median(functions or [0]), max(functions or [0])
            print(f"{path!s:44}{lines:6}{len(functions):11}{middle:8.0f}{longest:9}")
    total, every = sum(lines for _, lines, _ in rows), [n for *_, functions in rows for n in functions]
    print(f"{len(rows)} files, {total} lines, {len(every)} functions: median {median(every):.0f} lines, "
          f"longest {max(every)}")
    long = [f"{path}: {lines} lines (limit {LIMIT})" for path, lines, _ in rows if lines > LIMIT]
    print("\n".join(long), end="\n" if long else "")
    return bool(long)


if __name__ == "__main__":
    sys.exit(main())
