"""MkDocs hook: draws the figures of the documentation when it is built, so that none is kept in the repository.

A page names a figure in a comment, ``<!-- figure: telelogs-fields | caption -->``, which other readers of the Markdown
do not see.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

#: Name -> the script that draws it and its arguments; the path of the picture comes last.
FIGURES = {
    "telelogs-fields": ("telelogs_report.py", "--figure-only", "--figure"),
    "trl-and-verl": ("trl_and_verl.py", "--figure"),
    "gradients": ("gradients.py", "--figure"),
}
_COMMENT = re.compile(r"<!-- figure: ([\w-]+) \| (.+?) -->")


def on_files(files: Files, config: Any) -> Files:
    """Draw every figure and add it to the site."""
    for name, (script, *arguments) in FIGURES.items():
        with tempfile.TemporaryDirectory() as folder:
            picture = Path(folder) / f"{name}.svg"
            command = [sys.executable, str(Path(__file__).with_name(script)), *arguments, str(picture)]
            subprocess.run(command, check=True)
            files.append(File.generated(config, f"images/{name}.svg", content=picture.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Put the figures where the page names them; an unknown name stops the build."""
    images = "../" * page.file.src_uri.count("/") + "images"
    return _COMMENT.sub(lambda found: f"![{found[2]}]({images}/{_known(found[1])}.svg)\n\n*{found[2]}*", markdown)


def _known(name: str) -> str:
    if name not in FIGURES:
        raise ValueError(f"figure {name!r} is not one of {', '.join(FIGURES)} (scripts/mkdocs_figures.py)")
    return name
