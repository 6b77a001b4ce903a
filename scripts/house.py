"""Figures of the house, from its source: `python scripts/house.py [ROOT] [--list]`.

What counts: Python files of the rooms, without generated stubs. A function's length is its lines without its docstring.
A helper is a private function that its file uses once, with a body of fewer than six lines; its share is of all
functions. `--list` names what there is to mend. `scripts/trace_request.py` counts the files that a request crosses.
"""

from __future__ import annotations

import argparse
import ast
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

TOP = ("tandem", "router", "prefill_worker", "decode_worker", "kv_transfer", "loadtest")
MAX_FILES, MAX_FUNCTION_LINES, HELPER_LINES = 12, 40, 6
DEFINITION = ast.FunctionDef | ast.AsyncFunctionDef
OPENS_WITH_OF = re.compile(r"""(# |^\"{3})Of """)


@dataclass(frozen=True)
class Function:
    where: str
    name: str
    lines: int
    body_lines: int
    uses: int

    @property
    def is_helper(self) -> bool:
        private = self.name.startswith("_") and not self.name.startswith("__")
        return private and self.uses == 1 and self.body_lines < HELPER_LINES

    @property
    def is_long(self) -> bool:
        return self.lines > MAX_FUNCTION_LINES

    def __str__(self) -> str:
        return f"{self.where} {self.name}, {self.lines} lines"


@dataclass(frozen=True)
class Module:
    path: Path
    text: str

    @property
    def room(self) -> str:
        """tandem's folders are rooms of their own."""
        return "/".join(self.path.parts[: 2 if self.path.parts[0] == "tandem" else 1][: len(self.path.parts) - 1])

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(ast.parse(self.text)))

    @cached_property
    def classes(self) -> list[ast.ClassDef]:
        return [node for node in self.nodes if isinstance(node, ast.ClassDef)]

    @cached_property
    def public_methods(self) -> list[str]:
        members = [member for owner in self.classes for member in owner.body]
        return [each.name for each in members if isinstance(each, DEFINITION) and not each.name.startswith("_")]

    @cached_property
    def functions(self) -> list[Function]:
        uses = Counter(node.id for node in self.nodes if isinstance(node, ast.Name))
        uses += Counter(node.attr for node in self.nodes if isinstance(node, ast.Attribute))
        found = []
        for node in self.nodes:
            if isinstance(node, DEFINITION):
                end, start = node.end_lineno or 0, node.body[0]
                docstring_lines = 0 if ast.get_docstring(node) is None else (start.end_lineno or 0) - start.lineno + 1
                body_lines = end - start.lineno + 1 - docstring_lines
                lines = end - node.lineno + 1 - docstring_lines
                found.append(Function(f"{self.path}:{node.lineno}", node.name, lines, body_lines, uses[node.name]))
        return found

    @property
    def lacks_future(self) -> bool:
        annotated = any(getattr(node, "annotation", None) or getattr(node, "returns", None) for node in self.nodes)
        return annotated and "from __future__ import annotations" not in self.text


def read_modules(root: Path) -> list[Module]:
    paths = [path.relative_to(root) for top in TOP for path in sorted((root / top).rglob("*.py"))]
    return [Module(path, (root / path).read_text()) for path in paths if path.parts[:2] != ("tandem", "v1")]


def row(title: str, modules: list[Module]) -> str:
    functions = [function for module in modules for function in module.functions]
    lengths = sorted(function.lines for function in functions) or [0]
    helpers = sum(function.is_helper for function in functions) / max(len(functions), 1)
    figures = (len(modules), sum(len(module.text.splitlines()) for module in modules), len(functions))
    figures = (*figures, round(statistics.median(lengths)), lengths[(len(lengths) - 1) * 9 // 10], lengths[-1])
    return f"{title:<34}" + "".join(f"{figure:>10}" for figure in figures) + f"{helpers:>10.0%}"


def in_rooms(least: int, names: Iterable[tuple[str, str]]) -> list[str]:
    """'name: room room …' for every name that stands in so many rooms; names: (name, room)."""
    rooms = defaultdict(set)
    for name, room in names:
        rooms[name].add(room)
    shared = sorted(rooms.items(), key=lambda item: (-len(item[1]), item[0]))
    return [f"{name}: {' '.join(sorted(where))}" for name, where in shared if len(where) >= least]


def to_mend(modules: list[Module], folders: dict[str, list[Module]]) -> dict[str, list[str]]:
    functions = [function for module in modules for function in module.functions]
    lines = [
        (f"{m.path}:{number}", line.strip()) for m in modules for number, line in enumerate(m.text.splitlines(), 1)
    ]
    return {
        f"folders of more than {MAX_FILES} files": [name for name, files in folders.items() if len(files) > MAX_FILES],
        f"functions of more than {MAX_FUNCTION_LINES} lines": [str(f) for f in functions if f.is_long],
        "helpers": [str(function) for function in functions if function.is_helper],
        "class names in two rooms": in_rooms(2, ((c.name, m.room) for m in modules for c in m.classes)),
        "public methods named alike in three rooms": in_rooms(
            3, ((name, m.room) for m in modules for name in m.public_methods)
        ),
        "comments that open with 'Of'": [f"{where} {line}" for where, line in lines if OPENS_WITH_OF.search(line)],
        "loggers that are not `log`": [f"{where} {line}" for where, line in lines if line.startswith("logger = ")],
        "annotations without the __future__ import": [str(module.path) for module in modules if module.lacks_future],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, nargs="?", default=Path(__file__).resolve().parents[1])
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    modules = read_modules(given.root)
    folders: dict[str, list[Module]] = defaultdict(list)
    for module in modules:
        folders[str(module.path.parent)].append(module)
    columns = ("files", "lines", "functions", "median", "p90", "longest", "helpers")
    print(f"{'folder':<34}" + "".join(f"{column:>10}" for column in columns))
    print("\n".join(row(name, members) for name, members in [*folders.items(), ("all", modules)]))
    for title, found in to_mend(modules, folders).items():
        print(f"{title}: {len(found)}" + "".join(f"\n    {each}" for each in found if given.list))


if __name__ == "__main__":
    main()
