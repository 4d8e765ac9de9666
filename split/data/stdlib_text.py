"""Text that every machine with Python has: what the default model learns, and what the demo's devices keep private.

The training text is prose about Python: the standard library's docstrings under the signatures they
belong to, its longer comments and the language reference of `pydoc_data.topics`. The private texts are the source
code of three packages that the training text leaves out, so each differs from it and from the others.
Sources are read and parsed, never imported (`pydoc_data.topics` too).
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PRIVATE_MODULES: tuple[str, ...] = ("email", "unittest", "_pydecimal")
"""Mail parsing, testing, decimal arithmetic: 230 to 380 KB of source each, on Debian's minimal Python as well."""

_EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__", "pgen2"}
)
_EXCLUDED_MODULES = ("_sysconfigdata", "sitecustomize", "usercustomize", "lib2to3", "encodings", "pydoc_data")
_RELATED_TO_PRIVATE = ("decimal",)
_SHORTEST_COMMENT_LINES = 3

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class StdlibDocument:
    """The docstrings and comments of one module, or one topic of the language reference."""

    name: str
    text: str


def stdlib_folder() -> Path:
    """The folder where this Python's standard library has its sources."""
    return Path(sysconfig.get_paths()["stdlib"])


def training_documents() -> list[StdlibDocument]:
    """The training text, in an order that depends on names only; repeated passages are kept once."""
    seen: set[str] = set()
    documents = [*_module_documents(stdlib_folder(), seen), *_topic_documents(stdlib_folder())]
    return [document for document in documents if document.text.strip()]


def training_text() -> str:
    """All training documents as one text."""
    return "\n\n".join(document.text for document in training_documents())


def text_digest(documents: Iterable[StdlibDocument]) -> str:
    """sha256 over names and texts: says whether another machine has the very same training text."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.name.encode() + b"\0" + document.text.encode() + b"\0")
    return digest.hexdigest()


def private_text(module_names: str | Iterable[str]) -> str:
    """Source text of the given standard library modules or packages, tests left out.

    Raises ValueError for a name that this standard library has no source for.
    """
    names = [module_names] if isinstance(module_names, str) else list(module_names)
    return "\n\n".join(_read(path) for name in names for path in _sources_of(name))


def private_docstrings(module_names: Iterable[str]) -> list[str]:
    """The docstrings of the given modules: to show that the training text does not have them."""
    return [
        text for name in module_names for path in _sources_of(name) for _, text in _docstrings(ast.parse(_read(path)))
    ]


def _sources_of(name: str) -> list[Path]:
    root = stdlib_folder()
    path = root.joinpath(*name.split("."))
    if path.is_dir():
        return [source for source in sorted(path.rglob("*.py")) if not _is_excluded(source.relative_to(root))]
    source = path.with_name(path.name + ".py")
    if not source.is_file():
        raise ValueError(f"no source of the module {name} in {root}")
    return [source]


def _module_documents(root: Path, seen: set[str]) -> Iterator[StdlibDocument]:
    for relative in _all_sources(root):
        module = ".".join(relative.with_suffix("").parts)
        if _starts_with_module(module, (*PRIVATE_MODULES, *_RELATED_TO_PRIVATE)):
            continue
        try:
            source = _read(root / relative)
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):  # the library keeps a few broken files on purpose
            continue
        passages = [heading + text for heading, text in _docstrings(tree)] + list(_comments(source))
        new = [passage for passage in dict.fromkeys(passages) if passage not in seen]
        seen.update(new)
        if new:
            yield StdlibDocument(module, f"# {module}\n\n" + "\n\n".join(new) + "\n")


def _all_sources(root: Path) -> list[Path]:
    """Relative paths of the sources, in the order of the modules' names; site-packages is not walked."""
    found: list[Path] = []
    for entry in root.iterdir():
        if not _is_excluded(entry.relative_to(root)):
            found += [entry] if entry.suffix == ".py" else entry.rglob("*.py")
    relative = [path.relative_to(root) for path in found]
    return sorted((path for path in relative if not _is_excluded(path)), key=lambda path: path.parts)


def _topic_documents(root: Path) -> Iterator[StdlibDocument]:
    """The language reference behind `help("for")`: a dict literal, read without importing it."""
    path = root / "pydoc_data" / "topics.py"
    if not path.is_file():
        return
    for node in ast.parse(_read(path)).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            for name in sorted(topics):
                yield StdlibDocument(f"topics/{name}", topics[name])


def _is_excluded(relative: Path) -> bool:
    module = relative.parts[0].removesuffix(".py")
    return (
        bool(_EXCLUDED_FOLDERS & set(relative.parts))
        or relative.name.startswith("test_")
        or module.startswith(_EXCLUDED_MODULES)
        or module.startswith("config-")
    )


def _starts_with_module(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


def _docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(heading, docstring) of the module, its classes and its functions, in the order of the source."""
    pending: list[tuple[_Documented, int]] = [(tree, 0)]
    while pending:
        node, depth = pending.pop()
        text = ast.get_docstring(node)
        if text:
            indent = " " * 4 * depth
            body = "\n".join((indent + line).rstrip() for line in text.splitlines())
            yield _heading(node, max(depth - 1, 0)), body
        children = [child for child in node.body if isinstance(child, _Documented)]
        pending.extend((child, depth + 1) for child in reversed(children))


def _heading(node: _Documented, depth: int) -> str:
    indent = " " * 4 * depth
    if isinstance(node, ast.Module):
        return ""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"{indent}class {node.name}({bases}):\n" if bases else f"{indent}class {node.name}:\n"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{indent}{keyword} {node.name}({ast.unparse(node.args)}):\n"


def _comments(source: str) -> Iterator[str]:
    """Comment blocks of several lines that read like sentences (not rulers, tables or commented-out code)."""
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        stripped = line.strip()
        if stripped.startswith("#"):
            block.append(stripped.lstrip("#").strip())
            continue
        if len(block) >= _SHORTEST_COMMENT_LINES and _reads_like_prose(block):
            yield "\n".join(f"# {line}".rstrip() for line in "\n".join(block).strip().splitlines())
        block = []


def _reads_like_prose(lines: list[str]) -> bool:
    text = " ".join(lines)
    prose = sum(character.isalpha() or character in " ,." for character in text)
    common = {"the", "a", "is", "to", "of", "and", "in", "it", "this", "that", "for", "be"} & set(text.lower().split())
    return len(common) >= 3 and prose >= 0.9 * len(text)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
