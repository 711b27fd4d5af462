"""The folder ``hpo`` of verl's recipe collection, made from this project's recipes."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import hpo_plugin
from contrib.upstream.edits import AfterLine, AnchorError
from contrib.upstream.tree import UnknownTreeError, changed, read, refuse_others

__all__ = ["TITLE", "changes", "study_results"]

TITLE = "[recipe] feat: add HPO and A-HPO (Hysteretic Policy Optimization)"

HERE = Path(__file__).parent
#: Config groups of a recipe.
GROUPS = ("task", "model", "engine", "cluster")
TEMPLATES = HERE / "recipe_files"
CONFIGS = HERE.parents[1] / "hpo_plugin" / "configs"
FOLDER = "hpo"
#: Of a report's pictures, those that the README shows: the curves, and α.
PICTURES = ("-reward", "-alpha")

PAGE_OF_PROJECT = (
    "What follows is a page of the project hpo_plugin. The commands, configs and files that it names are there, not "
    "here."
)
CONFIG = "hpo_recipe"

ROW = f"| {FOLDER} | [`recipe/{FOLDER}/REQUIRED_VERL.txt`]({FOLDER}/REQUIRED_VERL.txt) |\n"

NOT_RUN = "**None was run on GPUs by the authors of this recipe**, hence the dashes."

RUN = (
    "What was run is the study below, on the machine that it names. Its final scores stand beside the numbers of the "
    "paper that it names: interquartile mean over seeds, with its 95 % interval. A dash: not run."
)


def changes(collection: Path, study_file: Path | None) -> dict[str, str]:
    """What is added to the recipe collection; the collection itself is left as it is.

    Args:
        collection: a checkout of verl-recipe.
        study_file: STUDY.yaml whose report goes into the README, with its collected data beside it; None: no report.

    Returns:
        Path in the collection (posix) -> the whole new text; empty if all of it is there already.

    Raises:
        UnknownTreeError: if it is not the recipe collection.
        StudyError: if the study or its data are not what they should be.
    """
    readme = collection / "README.md"
    try:
        index = read(readme) or ""
        if ROW not in index:
            index = AfterLine("| gvpo |").insert(index, ROW)
    except AnchorError as error:
        raise UnknownTreeError(f"{collection} is not a checkout of verl's recipe collection: {error}") from error
    folder = {f"{FOLDER}/{name}": text for name, text in _folder(study_file)}
    refuse_others(collection, folder)
    return changed(collection, {"README.md": index} | folder)


def _folder(study_file: Path | None) -> Iterator[tuple[str, str]]:
    for path in [CONFIGS / "hpo.yaml", CONFIGS / f"{CONFIG}.yaml", *_groups()]:
        yield f"config/{path.relative_to(CONFIGS).as_posix()}", path.read_text(encoding="utf-8")
    study, said, scores = "", NOT_RUN, {}
    if study_file is not None:
        from hpo_plugin.study.data import read_data
        from hpo_plugin.study.report import beside_paper
        from hpo_plugin.study.spec import load_study

        declared = load_study(study_file)
        if declared.config_name == CONFIG:
            said, scores = RUN, beside_paper(declared, read_data(study_file.with_suffix(".parquet")))
        else:
            said += f" The study below was run with the config `{declared.config_name}`, not with this recipe's."
        with tempfile.TemporaryDirectory() as directory:
            study = study_results(study_file, Path(directory), heading="###")
            for path in sorted(Path(directory).glob("*/*.svg")):
                yield f"{path.parent.name}/{path.name}", path.read_text(encoding="utf-8")
    filled = {
        "@VERSION@": hpo_plugin.__version__,
        "@CHOICES@": "\n".join(_choices()),
        "@RUN@": said,
        "@RESULTS@": "\n".join(_results(scores)),
        "@STUDY@": study,
    }
    for path in sorted(TEMPLATES.glob("*.in")):
        text = path.read_text(encoding="utf-8")
        for mark, value in filled.items():
            text = text.replace(mark, value)
        yield path.name.removesuffix(".in"), text.rstrip() + "\n"


def _groups() -> Iterator[Path]:
    yield CONFIGS / "hpo" / "countdown.yaml"
    for group in GROUPS:
        yield from sorted((CONFIGS / "hpo" / group).glob("*.yaml"))


def _choices() -> Iterator[str]:
    for group in GROUPS:
        names = [path.stem for path in (CONFIGS / "hpo" / group).glob("*.yaml")]
        # 64x8 comes after 8x8.
        names.sort(key=lambda name: (int(name.partition("x")[0]) if group == "cluster" else 0, name))
        yield f"| `{group.upper()}` | {', '.join(f'`{name}`' for name in names)} |"


def _results(scores: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    from hpo_plugin.study.spec import paper_numbers

    yield "| | algorithm | paper | this recipe |"
    yield "|---|---|---|---|"
    for name, numbers in paper_numbers().items():
        for algorithm, value in numbers.values.items():
            yield f"| {numbers.title} | `{algorithm}` | {value:.2f} | {scores.get(name, {}).get(algorithm, '–')} |"
    yield ""
    for numbers in paper_numbers().values():
        yield f"- {numbers.title}: {numbers.source}"


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
