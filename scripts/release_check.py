"""Check that the files of a release name one version.

    python scripts/release_check.py           # CITATION.cff and CHANGELOG.md agree with hpo_plugin.__version__
    python scripts/release_check.py v0.2.0    # and the tag is v<version>, and the changelog's section has a date

Exit status 0: they agree; 1: they do not, and each error is one line. Needs only the standard library.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def package_version(root: Path) -> str:
    """Return ``__version__`` of the package without importing it."""
    for node in ast.parse((root / "hpo_plugin" / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise ValueError(f"{root / 'hpo_plugin' / '__init__.py'} does not define __version__")


def release_errors(root: Path, tag: str | None = None) -> list[str]:
    """Return what has to change before a release, one message for each error.

    Args:
        root: The repository.
        tag: The tag of the release; None checks only that the files agree.
    """
    version = package_version(root)
    errors = []
    if tag is not None and tag != f"v{version}":
        errors.append(
            f"the tag is {tag}, but hpo_plugin.__version__ is {version}: "
            f"tag this commit v{version}, or change __version__"
        )
    cited = re.search(r"^version: *(\S+)$", (root / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    if cited is None or cited[1].strip("\"'") != version:
        found = "no version" if cited is None else f"version {cited[1]}"
        errors.append(f"CITATION.cff has {found}: set `version: {version}`")
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {re.escape(version)}(?: - (.+))?$", changes, re.MULTILINE)
    if section is None:
        errors.append(f"CHANGELOG.md has no section {version}: add `## {version} - YYYY-MM-DD`")
    elif tag is not None and not re.fullmatch(r"\d{4}-\d{2}-\d{2}", section[1] or ""):
        errors.append(f"CHANGELOG.md: section {version} has no date: write `## {version} - YYYY-MM-DD`")
    return errors


def main() -> int:
    """Check the repository of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tag", nargs="?", help="the tag of the release, for example v0.2.0; empty: no tag")
    errors = release_errors(ROOT, parser.parse_args().tag or None)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if not errors:
        print(f"version {package_version(ROOT)}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
