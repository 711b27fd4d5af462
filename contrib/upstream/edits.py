"""Inserting text into source files at named places: by syntax tree, key path or line, never by line number."""

from __future__ import annotations

import ast
import builtins
import textwrap
from dataclasses import dataclass
from typing import Protocol

import yaml

__all__ = ["AfterDefinition", "AfterField", "AfterKey", "AfterLine", "AfterSection", "Anchor", "AnchorError", "unbound"]


class AnchorError(ValueError):
    """The place where a text belongs is not in the file; the message names it."""


class Anchor(Protocol):
    """A place in a file."""

    def insert(self, source: str, text: str) -> str:
        """Put ``text`` there.

        Args:
            source: the whole file.
            text: without base indentation, ends with a line break.

        Returns:
            The whole file.

        Raises:
            AnchorError: if the place is missing.
        """


def _after_line(source: str, number: int, indentation: int, text: str) -> str:
    """Insert below line ``number`` (from 1), indented by ``indentation`` spaces."""
    lines = source.splitlines(keepends=True)
    return "".join(lines[:number]) + textwrap.indent(text, " " * indentation) + "".join(lines[number:])


def _definition(source: str, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef:
    """The function or class of this name, at the top of the file or in a class."""
    found = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name
    ]
    if len(found) != 1:
        raise AnchorError(f"{len(found)} definitions of {name}, where there should be one")
    return found[0]


def _end(node: ast.stmt) -> int:
    assert node.end_lineno is not None  # ast.parse sets it
    return node.end_lineno


@dataclass(frozen=True)
class AfterDefinition:
    """Below a function or class, two blank lines apart."""

    name: str

    def insert(self, source: str, text: str) -> str:
        """See :class:`Anchor`."""
        node = _definition(source, self.name)
        return _after_line(source, _end(node), node.col_offset, "\n\n" + text)


@dataclass(frozen=True)
class AfterField:
    """Below an assignment in the body of a class: that of a name, or the last one."""

    owner: str
    name: str | None = None

    def insert(self, source: str, text: str) -> str:
        """See :class:`Anchor`."""
        fields = [
            node
            for node in _definition(source, self.owner).body
            if isinstance(node, ast.Assign | ast.AnnAssign)
            and (self.name is None or ast.unparse(node).split("=")[0].split(":")[0].strip() == self.name)
        ]
        if not fields:
            raise AnchorError(f"class {self.owner} has no field {self.name or 'at all'}")
        return _after_line(source, _end(fields[-1]), fields[-1].col_offset, text)


@dataclass(frozen=True)
class AfterKey:
    """Below a key of a yaml file and its value, in the same mapping."""

    path: str

    def insert(self, source: str, text: str) -> str:
        """See :class:`Anchor`."""
        node = yaml.compose(source, Loader=yaml.SafeLoader)
        indentation = 0
        for part in self.path.split("."):
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            pair = next(((key, value) for key, value in pairs if key.value == part), None)
            if pair is None:
                raise AnchorError(f"no key {self.path}")
            indentation, node = pair[0].start_mark.column, pair[1]
        while isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
            # The end of a block is where the next token begins; that of its last scalar is exact.
            last = node.value[-1]
            node = last[1] if isinstance(last, tuple) else last
        assert node is not None  # the path was found in it
        return _after_line(source, node.end_mark.line + 1, indentation, text)


@dataclass(frozen=True)
class AfterLine:
    """Below the last line that begins like this, for files without a syntax."""

    begins: str

    def insert(self, source: str, text: str) -> str:
        """See :class:`Anchor`."""
        numbers = [n for n, line in enumerate(source.splitlines(), 1) if line.startswith(self.begins)]
        if not numbers:
            raise AnchorError(f"no line that begins with {self.begins!r}")
        return _after_line(source, numbers[-1], 0, text)


@dataclass(frozen=True)
class AfterSection:
    """At the end of a section of a Markdown file, one blank line apart."""

    heading: str

    def insert(self, source: str, text: str) -> str:
        """See :class:`Anchor`."""
        lines = source.splitlines()
        if lines.count(self.heading) != 1:
            raise AnchorError(f"{lines.count(self.heading)} headings {self.heading!r}, where there should be one")
        start = lines.index(self.heading) + 1
        marks = self.heading.partition(" ")[0]
        end = next((n for n in range(start, len(lines)) if lines[n].startswith(f"{marks} ")), len(lines))
        while not lines[end - 1].strip():
            end -= 1
        return _after_line(source, end, 0, "\n" + text)


def unbound(source: str) -> set[str]:
    """Names that a Python file reads and binds nowhere, in whatever scope; ``Class.member`` for those of its classes.

    Args:
        source: the file.

    Raises:
        SyntaxError: if it is not Python.
    """
    nodes = list(ast.walk(ast.parse(source)))
    bound = set(dir(builtins)) | {"__file__", "__name__"}
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    for node in nodes:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                bound.add(name)
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) | ast.ExceptHandler(name=str(name)):
                bound.add(name)
            case ast.alias(name=name, asname=asname):
                bound.add(asname or name.partition(".")[0])
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    members = {
        f"{node.value.id}.{node.attr}"
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in classes
        if node.attr not in {child.id for child in ast.walk(classes[node.value.id]) if isinstance(child, ast.Name)}
    }
    return (read - bound) | members
