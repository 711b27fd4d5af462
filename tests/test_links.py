"""Links between Markdown files of the repository lead somewhere; `make docs` checks those between pages of the site."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "recipes").rglob("*.md"), *(ROOT / ".github").rglob("*.md")])
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MkDocs write it for the characters that occur here."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.replace("`", ""))
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", text.strip().lower(), flags=re.ASCII)).strip("-")


def anchors(path: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def broken(path: Path, text: str) -> list[str]:
    """The links of a text that lead nowhere."""
    found = []
    for groups in LINK.findall(CODE.sub("", text)):
        link = groups[0] or groups[1]
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            found.append(f"{path.relative_to(ROOT)}: {link}")
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path):
    assert broken(path, path.read_text(encoding="utf-8")) == []


def test_a_broken_link_is_found():
    text = "[a](docs/missing.md) [b](README.md#missing) [c](README.md#try-it) [d](https://example.org) `[e](f.md)`"
    assert broken(ROOT / "README.md", text) == ["README.md: docs/missing.md", "README.md: README.md#missing"]
