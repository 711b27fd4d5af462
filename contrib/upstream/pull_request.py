"""The text of the pull request, with the results of the gates and of a study filled in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

__all__ = ["pull_request", "study_results", "with_outcomes"]

HERE = Path(__file__).parent

#: Written by scripts/upstream_gates.py: what verl's tests and gates said before and after, and how to read it.
GATES = HERE / "gates.md"

#: Written by the same script: verl's tree -> contributed test -> outcome -> how many of its cases had it.
OUTCOMES = HERE / "contributed_tests.json"

#: Of a report's pictures, those that a reader of a pull request looks at: the curves, and α.
PICTURES = ("-reward", "-alpha")

NO_STUDY = (
    "**Curves and final scores of the study belong here.** They are filled in by `python -m contrib.upstream "
    "--verl PATH --pull-request FILE --study STUDY.yaml`, from the data that `hpo-plugin study collect` has gathered."
)

NOT_THIS_BRANCH = (
    "**The runs below were made with the plugin hpo_plugin on verl {versions}, not with the code of this branch.**"
)

PAGE_OF_PROJECT = (
    "What follows is a page of the project hpo_plugin. The commands, configs and files that it names are there, not "
    "here."
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
    template = (HERE / "pull_request.md.in").read_text(encoding="utf-8")
    text = with_outcomes(template, json.loads(OUTCOMES.read_text(encoding="utf-8")))
    study = NO_STUDY
    if study_file is not None:
        said = NOT_THIS_BRANCH.format(versions=_versions_of_verl(study_file))
        study = f"{said} {study_results(study_file, output.parent, heading='####')}"
    return text.replace("@GATES@", GATES.read_text(encoding="utf-8").strip()).replace("@STUDY@", study)


def _versions_of_verl(study_file: Path) -> str:
    from hpo_plugin.study.data import read_data

    noted = [run.info["result"].get("versions", {}) for run in read_data(study_file.with_suffix(".parquet")).values()]
    return " and ".join(sorted({versions.get("verl", "of a version that is not noted") for versions in noted}))


def with_outcomes(text: str, outcomes: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    """Fill in what the contributed tests said.

    Args:
        text: Markdown; the last cell of each row of a table that names tests is replaced. A name may end in ``…``.
        outcomes: verl's tree -> test -> outcome -> how many of its cases had it.

    Returns:
        The text with ``passes`` where all cases of a row's tests passed on all trees, else with what did not.
    """

    def fill(row: re.Match[str]) -> str:
        remarks = []
        for name, abbreviated in re.findall(r"`(test_\w+)(…?)`", row[0]):
            for tree, tests in outcomes.items():
                named = {test: tests[test] for test in tests if test == name or (abbreviated and test.startswith(name))}
                if not named:
                    remarks.append(f"`{name}{abbreviated}` was not run on {tree}")
                for test, counts in named.items():
                    if set(counts) != {"passed"}:
                        said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
                        remarks.append(f"`{test}` on {tree}: {said}")
        return f"{row['cells']} {'; '.join(remarks) or 'passes'} |"

    return re.sub(r"^(?P<cells>\|.*`test_\w+…?`.*\|)[^|]*\|$", fill, text, flags=re.MULTILINE)


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
    text = re.sub(r"^# ", f"{heading.removesuffix('#')} ", text, count=1, flags=re.MULTILINE).strip()
    return f"{PAGE_OF_PROJECT}\n\n{text}"
