"""The text of the pull request, with the results of the gates and of a study filled in."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

__all__ = ["pull_request", "study_results"]

HERE = Path(__file__).parent

GATES = HERE / "gates.md"
"""Written by scripts/upstream_gates.py: what verl's tests and gates said before and after."""

PICTURES = ("-reward", "-alpha")
"""Of a report's pictures, those that a reader of a pull request looks at: the curves, and α."""

NO_STUDY = (
    "**Curves and final scores of the study belong here.** They are filled in by `hpo-plugin upstream --study "
    "STUDY.yaml`, from the data that `hpo-plugin study collect` has gathered."
)


def pull_request(study_file: Path | None, output: Path) -> str:
    """The whole text.

    Args:
        study_file: STUDY.yaml, with its collected data beside it; None leaves a marked place.
        output: the file that the text is meant for; the study's pictures go beside it.

    Returns:
        Markdown.

    Raises:
        StudyError: if the study or its data are not what they should be.
    """
    text = (HERE / "pull_request.md.in").read_text(encoding="utf-8")
    study = NO_STUDY if study_file is None else study_results(study_file, output.parent, heading="####")
    return text.replace("@GATES@", GATES.read_text(encoding="utf-8").strip()).replace("@STUDY@", study)


def study_results(study_file: Path, directory: Path, *, heading: str) -> str:
    """The report of a study as a part of another page: all of its tables, and a few of its pictures.

    Args:
        study_file: STUDY.yaml, with its collected data beside it.
        directory: where the pictures go, in a directory of the study's name.
        heading: Markdown's mark of the report's sections; its title has one level less.

    Returns:
        Markdown.

    Raises:
        StudyError: if there are no data of the study, or they are not its own.
    """
    from hpo_plugin.study.data import read_data
    from hpo_plugin.study.figures import save
    from hpo_plugin.study.report import build_report, to_markdown
    from hpo_plugin.study.spec import load_study

    report = build_report(load_study(study_file), read_data(study_file.with_suffix(".parquet")))
    sections = [
        replace(section, pictures=[picture for picture in section.pictures if picture.name.endswith(PICTURES)])
        for section in report.sections
    ]
    report = replace(report, sections=sections)
    folder = directory / report.name
    folder.mkdir(parents=True, exist_ok=True)
    for section in sections:
        for picture in section.pictures:
            save(picture.figure, folder / picture.name, png=True)
    text = re.sub(r"^## ", f"{heading} ", to_markdown(report), flags=re.MULTILINE)
    return re.sub(r"^# ", f"{heading.removesuffix('#')} ", text, count=1, flags=re.MULTILINE).strip()
