r"""Chains of thought: every number is the case's own or follows from it, and the answer in the box earns the reward."""

from __future__ import annotations

import math
import random
import re
from dataclasses import fields, replace
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest

from hpo_plugin.tasks.telelogs.prompts import parse_prompt, render_prompt
from hpo_plugin.tasks.telelogs.reasoning import NoDiagnosisError, chain_of_thought
from hpo_plugin.tasks.telelogs.reward import compute_score, read_answer
from hpo_plugin.tasks.telelogs.rules import diagnose
from hpo_plugin.tasks.telelogs.synthetic import SyntheticRow, generate, relabeled
from hpo_plugin.tasks.telelogs.tables import (
    STANDARD_OPTIONS,
    Case,
    Cause,
    DriveTestRow,
    Neighbor,
    Option,
    RadioCell,
    Value,
)
from hpo_plugin.tasks.telelogs.variants import REDUCTIONS

#: Words by which a rung of the ladder can be told from the others.
WORDS = {
    Cause.C1: ("tilt", "beamwidth", "elevation"),
    Cause.C2: ("served by", "away"),
    Cause.C3: ("another option",),
    Cause.C4: ("stand elsewhere", "dB weaker"),
    Cause.C5: ("changes of", "Changes of", "Serving PCIs"),
    Cause.C6: ("modulo",),
    Cause.C7: ("speed", "Speeds", "km/h"),
    Cause.C8: ("esource blocks",),
}
#: The causes of the rungs in their order.
LADDER = [Cause(f"C{number}") for number in (2, 5, 7, 8, 1, 6, 4, 1, 3)]
NUMBER = re.compile(r"(?<![\w.-])-?\d+(?:\.\d+)?")


def thoughts(case: Case) -> str:
    return chain_of_thought(case, diagnose(case))


def score(text: str, label: str) -> float:
    result = compute_score("telelogs", text, label)
    value: float = result["score"]
    return value


@pytest.fixture(scope="module")
def full() -> list[SyntheticRow]:
    return list(generate(64, seed=21).rows)


@pytest.fixture(scope="module")
def laptop() -> list[SyntheticRow]:
    return list(generate(40, seed=21, reduction=REDUCTIONS["laptop"]).rows)


def row(
    throughput: str = "500", neighbors: tuple[tuple[str | None, str | None], ...] = (), **changes: Any
) -> DriveTestRow:
    values: dict[str, Any] = {"longitude": "0.001", "latitude": "0", "speed": "30", "pci": "100", "rsrp": "-80.00"}
    values |= {"sinr": "10", "rbs": "180.0"} | changes
    return DriveTestRow(
        timestamp=None,
        throughput=Decimal(throughput),
        neighbors=tuple(
            Neighbor(None if pci is None else Decimal(pci), None if brsrp is None else Decimal(brsrp))
            for pci, brsrp in neighbors
        ),
        **{name: None if value is None else Decimal(value) for name, value in values.items()},
    )


def cell(pci: str, station: str | None, **changes: Any) -> RadioCell:
    values = {
        "longitude": "0",
        "latitude": "0",
        "mechanical_downtilt": "2",
        "digital_tilt": "0",
        "height": "0",
    } | changes
    return RadioCell(
        gnodeb_id=station,
        cell_id="1",
        pci=Decimal(pci),
        mechanical_azimuth=None,
        digital_azimuth=None,
        beam_scenario="DEFAULT",
        txrx_mode=None,
        max_transmit_power=None,
        antenna_model=None,
        **{name: None if value is None else Decimal(value) for name, value in values.items()},
    )


CELLS = (cell("100", "0000001"), cell("201", "0000002"), cell("202", "0000003"))


# --- the answer ---


def test_the_box_earns_the_reward_for_every_cause(full: list[SyntheticRow], laptop: list[SyntheticRow]) -> None:
    assert {made.cause for made in full} == set(Cause)
    for made in (*full, *laptop):
        text = thoughts(made.case)
        assert text.endswith(rf"\boxed{{{made.label}}}")
        assert text.count(r"\boxed") == 1
        assert score(text, made.label) == 1.0
        wrong = [option.label for option in made.case.options if option.label != made.label]
        assert [score(text, label) for label in wrong] == [0.0] * len(wrong)


def test_the_box_earns_the_reward_under_any_label(full: list[SyntheticRow], laptop: list[SyntheticRow]) -> None:
    for seed in range(3):
        for made in (*relabeled(full, seed), *relabeled(laptop, seed)):
            text = thoughts(made.case)
            assert read_answer(text) == made.label
            assert score(text, made.label) == 1.0


def test_the_same_case_has_the_same_thoughts_after_a_journey_through_its_prompt(full: list[SyntheticRow]) -> None:
    for made in (*full, *relabeled(full, 3)):
        assert thoughts(parse_prompt(render_prompt(made.case))) == thoughts(made.case)


def test_without_a_diagnosis_there_is_nothing_to_explain() -> None:
    case = Case((row(),), CELLS, (Option("C5", Cause.C5), Option("C7", Cause.C7)))
    assert diagnose(case).label is None
    with pytest.raises(NoDiagnosisError, match="no rule holds for any of the options"):
        thoughts(case)
    assert issubclass(NoDiagnosisError, ValueError)


# --- the climb ---


def rungs(text: str) -> list[tuple[str, str, bool]]:
    """(label, what is said, whether that decided) of the lines between the affected rows and the answer."""
    found = []
    for line in text.split("\n\n")[0].split("\n")[1:]:
        matched = re.fullmatch(r"([A-Z]?\d+): (.+)\. (?:(Not)|So it is) ([A-Z]?\d+)\.", line)
        assert matched is not None, line
        assert matched[1] == matched[4]
        found.append((matched[1], matched[2], matched[3] is None))
    return found


def test_it_climbs_to_the_rung_that_decides_and_says_the_causes_sentence(full: list[SyntheticRow]) -> None:
    for made in (*full, *relabeled(full, 5)):
        text = thoughts(made.case)
        climbed = rungs(text)
        assert [decided for _, _, decided in climbed] == [False] * (len(climbed) - 1) + [True]
        offered = [made.case.label_of(cause) for cause in LADDER]
        labels = [label for label in offered if label is not None]
        assert [label for label, _, _ in climbed] == labels[: len(climbed)]
        assert climbed[-1][0] == made.label
        assert text.split("\n\n")[1] == f"{made.cause.text}\n\\boxed{{{made.label}}}"


def test_nothing_is_said_about_a_cause_that_is_not_on_offer(full: list[SyntheticRow]) -> None:
    for made in full:
        for hidden in Cause:
            if hidden is made.cause:
                continue
            options = tuple(option for option in STANDARD_OPTIONS if option.cause is not hidden)
            text = thoughts(replace(made.case, options=options))
            assert score(text, made.label) == 1.0
            body = text.split("\n\n")[0]
            assert hidden.value not in body
            assert not any(word in body for word in WORDS[hidden])


def test_a_rule_that_holds_without_being_on_offer_is_not_denied() -> None:
    """The climb passes it in silence: "no other rule holds" would be a lie."""
    case = Case((row(speed="50"),) * 4, CELLS, (Option("C3", Cause.C3), Option("C8", Cause.C8)))
    found = diagnose(case)
    assert [finding.cause for finding in found.results if finding.holds] == [Cause.C7, Cause.C3]
    assert rungs(thoughts(case))[-1] == ("C3", "No rule of another option holds", True)


# --- every number ---


def tilt_of(site: RadioCell) -> float:
    assert site.mechanical_downtilt is not None
    assert site.digital_tilt is not None
    return float(site.mechanical_downtilt) + (6 if site.digital_tilt == 255 else float(site.digital_tilt))


def width_of(site: RadioCell) -> float:
    number = 0 if site.beam_scenario == "DEFAULT" else int((site.beam_scenario or "").removeprefix("SCENARIO_"))
    return 6 if number <= 5 else 12 if number <= 11 else 25


def meters_between(here: DriveTestRow, site: RadioCell) -> float:
    """On the tangent plane: independent of the haversine, and as good at these distances."""
    longitude, latitude, east, north = (
        float(value or 0) for value in (here.longitude, here.latitude, site.longitude, site.latitude)
    )
    scale = math.cos(math.radians((latitude + north) / 2))
    return 6_371_000 * math.hypot(math.radians(east - longitude) * scale, math.radians(north - latitude))


class Expected:
    """The numbers of a chain of thought, computed from the case: quoted ones as text, others as floats."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.affected = [(n, here) for n, here in enumerate(case.drive_test) if here.throughput < 600]  # type: ignore[operator]
        self.served = [
            (n, here, min(same, key=lambda site: meters_between(here, site)))
            for n, here in self.affected
            if (same := [site for site in case.cells if site.pci == here.pci])
        ]
        self.deficits = [
            tilt_of(site) - width_of(site) / 2 - self.elevation(here, site) for _, here, site in self.served
        ]

    @staticmethod
    def elevation(here: DriveTestRow, site: RadioCell) -> float:
        return math.degrees(math.atan2(float(site.height or 0), meters_between(here, site)))

    def of(self, cause: Cause, place: int) -> list[str | float]:
        if cause is Cause.C1:
            return self.steep_beam() if place else self.weak_coverage()
        return list(getattr(self, cause.value)())

    def C2(self) -> list[str | float]:
        quoted: list[str | float] = []
        for n, here, site in self.served:
            quoted += [n + 1.0, *map(str, (here.longitude, here.latitude, here.pci, site.longitude, site.latitude))]
        return [*quoted, max(meters_between(here, site) for _, here, site in self.served), 1000.0]

    def C5(self) -> list[str | float]:
        pcis = [str(here.pci) for here in self.case.drive_test]
        return [*pcis, float(sum(a != b for a, b in pairwise(pcis))), 3.0]

    def C7(self) -> list[str | float]:
        speeds = [here.speed for here in self.case.drive_test if here.speed is not None]
        return [*map(str, speeds), float(max(speeds)), 40.0]

    def C8(self) -> list[str | float]:
        counts = [here.rbs for _, here in self.affected if here.rbs is not None]
        return [*map(str, counts), float(sum(counts) / len(counts)), 160.0]

    def weak_coverage(self) -> list[str | float]:
        quoted: list[str | float] = []
        for n, here, site in self.served:
            tilt, width = tilt_of(site), width_of(site)
            quoted += [n + 1.0, tilt, width, tilt - width / 2, self.elevation(here, site), str(here.rsrp)]
        seen = [
            (deficit, float(here.rsrp or 0)) for deficit, (_, here, _) in zip(self.deficits, self.served, strict=True)
        ]
        weak = [entry for entry in seen if entry[0] > 0 and entry[1] <= -90]
        # The first of several that are as far.
        deficit, rsrp = max(weak or seen, key=lambda entry: entry[0])
        return [*quoted, deficit, rsrp, 0.0, -90.0]

    def steep_beam(self) -> list[str | float]:
        return [max(self.deficits), 2.5]

    def C6(self) -> list[str | float]:
        quoted: list[str | float] = [30.0]
        pairs = 0
        for n, here in self.affected:
            residues = [int(neighbor.pci) % 30 for neighbor in here.neighbors if neighbor.pci is not None]
            own = int(here.pci or 0) % 30
            pairs += residues.count(own)
            quoted += [n + 1.0, str(own), *map(str, residues)]
        return [*quoted, 30.0, float(pairs), 2.0]

    def C4(self) -> list[str | float]:
        station = {site.pci: site.gnodeb_id for site in self.case.cells}
        quoted: list[str | float] = []
        pairs = 0
        for n, here, site in self.served:
            quoted += [n + 1.0, str(here.rsrp), str(site.gnodeb_id)]
            for place, neighbor in enumerate(here.neighbors):
                if neighbor.pci is None or neighbor.brsrp is None or here.rsrp is None:
                    continue
                close = neighbor.brsrp >= here.rsrp - 3
                if close or place < 2:
                    quoted.append(str(neighbor.brsrp))
                    quoted += [str(station[neighbor.pci])] if neighbor.pci in station else []
                pairs += close and station.get(neighbor.pci, site.gnodeb_id) != site.gnodeb_id
        return [*quoted, 3.0, float(pairs), 2.0]

    def C3(self) -> list[str | float]:
        return []


def is_written(value: str | float, token: str) -> bool:
    """Whether a token is a quoted number to the digit, or a computed one rounded to the token's digits."""
    if isinstance(value, str):
        return token == value
    unit = 10.0 ** -len(token.partition(".")[2])
    # The tangent plane and the sphere differ by less than a millionth.
    return abs(float(token) - value) <= unit * 0.500001 + abs(value) * 1e-6


def test_every_number_is_quoted_from_the_case_or_follows_from_it(full: list[SyntheticRow]) -> None:
    checked = dict.fromkeys(Cause, 0)
    for made in full:
        expected = Expected(made.case)
        text = thoughts(made.case)
        first = text.split("\n")[0]
        assert NUMBER.findall(first) == ["600", *(str(n + 1) for n, _ in expected.affected)]
        seen: list[Cause] = []
        for label, said, _ in rungs(text):
            cause = Cause(label)
            numbers = expected.of(cause, seen.count(cause))
            tokens = NUMBER.findall(said)
            assert len(tokens) == len(numbers), said
            assert all(is_written(value, token) for value, token in zip(numbers, tokens, strict=True)), (said, numbers)
            seen.append(cause)
            checked[cause] += 1
    assert min(checked.values()) > 5


def test_what_is_shown_is_enough_to_follow_the_conclusion(full: list[SyntheticRow]) -> None:
    """The counts of C6 and C4 are repeated from what the text itself quotes."""
    for made in full:
        for label, said, decided in rungs(thoughts(made.case)):
            if label == "C6":
                counted = sum(
                    others.split(", ").count(own)
                    for own, others in re.findall(r"row \d+: (\d+) with ([\d, ]+\d)", said)
                )
            elif label == "C4":
                counted = 0
                for own, station, others in re.findall(r"serving (\S+) from (\w+), neighbors ([^;]+?)(?:;|\. N)", said):
                    for brsrp, elsewhere in re.findall(r"(-[\d.]+) from (\w+)", others):
                        counted += elsewhere not in (station, "unknown") and Decimal(brsrp) >= Decimal(own) - 3
            else:
                continue
            tail = re.search(r"(\d+); limit 2$", said)
            assert tail is not None
            assert counted == int(tail[1])
            assert decided == (counted > 2)


def test_only_computed_numbers_are_rounded() -> None:
    case = Case((row(rbs="180.125"), row(rbs="180.100")), CELLS)
    said = {label: said for label, said, _ in rungs(thoughts(case))}["C8"]
    assert NUMBER.findall(said) == ["180.125", "180.100", "180.11", "160"]


def test_quoted_numbers_have_the_digits_of_the_prompt_and_no_exponent() -> None:
    case = Case((row(longitude="0.00000001", latitude="-0.0", rsrp="-80.50"),) * 4, CELLS)
    text = thoughts(case)
    assert "row 2 at 0.00000001, -0.0 is served by PCI 100 at 0, 0" in text
    assert "RSRP -80.50" in text
    assert "E-" not in text


# --- words ---


def test_the_whole_text_of_one_case() -> None:
    rows = (row("900"), *[row(neighbors=(("201", "-81.5"), ("130", "-95")), rbs="170.50") for _ in range(3)])
    options = tuple(option for option in STANDARD_OPTIONS if option.cause not in (Cause.C1, Cause.C2))
    case = Case(rows, CELLS, options)
    assert thoughts(case) == (
        "Throughput is below 600 Mbps in rows 2, 3, 4.\n"
        "C5: Serving PCIs are 100, 100, 100, 100. Changes of the serving PCI: 0; limit below 3. Not C5.\n"
        "C7: Speeds are 30, 30, 30, 30. The highest speed is 30 km/h; limit 40 km/h. Not C7.\n"
        "C8: Resource blocks of these rows are 170.50, 170.50, 170.50. The affected rows have 170.50 resource blocks "
        "on average; limit 160. Not C8.\n"
        "C6: PCIs modulo 30 of serving cell and neighbors, row 2: 10 with 21, 10; row 3: 10 with 21, 10; row 4: 10 "
        "with 21, 10. Pairs of an affected row and a neighbor with the serving cell's PCI modulo 30: 3; limit 2. So it "
        "is C6.\n"
        "\n"
        "Neighbor cell and serving cell have the same PCI mod 30, leading to interference.\n"
        "\\boxed{C6}"
    )


def test_one_affected_row_is_a_row_and_none_is_said_to_be_none() -> None:
    assert thoughts(Case((row("900"), row()), CELLS)).startswith("Throughput is below 600 Mbps in row 2.\n")
    nobody = thoughts(Case((row("900"), row("600")), CELLS))
    assert nobody.startswith("No row shows less than 600 Mbps.\n")
    assert "C2: There is no row that this rule can judge. Not C2.\n" in nobody
    # Where throughput is missing nobody knows, and nothing else is claimed.
    assert thoughts(Case((replace(row(), throughput=None),), CELLS)).startswith("No row shows less than 600 Mbps.\n")


def said_of_overlap(rows: tuple[DriveTestRow, ...], cells: tuple[RadioCell, ...]) -> str:
    options = (Option("C3", Cause.C3), Option("C4", Cause.C4))
    return rungs(thoughts(Case(rows, cells, options)))[0][1]


def test_every_neighbor_that_overlaps_is_quoted_not_only_the_two_strongest() -> None:
    neighbors = (("999", "-79"), ("998", "-79.5"), ("201", "-80"), ("202", "-82"), ("203", "-83.01"))
    said = said_of_overlap((row(neighbors=neighbors), row(neighbors=neighbors)), CELLS)
    assert said.startswith(
        "Row 1: serving -80.00 from 0000001, neighbors -79 from unknown, -79.5 from unknown, -80 from 0000002, "
        "-82 from 0000003; row 2: serving"
    )
    assert said.endswith(": 4; limit 2")


def test_a_pci_at_two_stations_is_quoted_with_both() -> None:
    cells = (*CELLS, cell("201", "0000001"))
    said = said_of_overlap((row(neighbors=(("201", "-80"),)),) * 3, cells)
    assert "neighbors -80 from 0000001 or 0000002; row 2" in said
    assert said.endswith(": 0; limit 2")


def test_a_missing_station_or_value_is_written_as_in_the_prompt() -> None:
    lost = (cell("100", None), cell("101", "0000001"))
    rows = (row(rsrp=None, neighbors=(("7", None), (None, "-90"))), row(pci="101", neighbors=(("201", "-90.0"),)))
    said = said_of_overlap(rows, lost)
    assert said.startswith(
        "Row 1: serving - from -, neighbors none; row 2: serving -80.00 from 0000001, neighbors -90.0 from unknown. "
    )


@pytest.mark.parametrize("seed", range(4))
def test_cases_with_holes_are_explained_in_plain_words(
    full: list[SyntheticRow], laptop: list[SyntheticRow], seed: int
) -> None:
    rng = random.Random(seed)

    def holed(entry: Any, columns: set[str], share: float) -> Any:
        dropped: dict[str, Any] = {
            field.name: None
            for field in fields(entry)
            if field.name != "neighbors" and (field.name in columns or rng.random() < share)
        }
        if isinstance(entry, DriveTestRow):
            kept = entry.neighbors[: rng.randint(0, 5)] if rng.random() < share else entry.neighbors
            dropped["neighbors"] = tuple(holed(neighbor, set(), share) for neighbor in kept)
        return replace(entry, **dropped)

    for made in (*full, *laptop):
        share = rng.choice([0.02, 0.1, 0.5, 1.0])
        columns = set(rng.sample([field.name for kind in (RadioCell, DriveTestRow) for field in fields(kind)], 2))
        case = replace(
            made.case,
            drive_test=tuple(holed(entry, columns, share) for entry in made.case.drive_test),
            cells=tuple(holed(entry, columns, share) for entry in made.case.cells),
        )
        text = thoughts(case)
        label = diagnose(case).label
        assert label is not None
        assert score(text, label) == 1.0
        body = text.removesuffix(rf"\boxed{{{label}}}")
        assert not re.search(r"None|nan|inf\b|[{}]|Decimal|\be[+-]|  ", body), body
        if case.layout.wording == "full":
            rungs(text)


# --- the terse wording ---


def test_terse_thoughts_are_one_short_line(laptop: list[SyntheticRow]) -> None:
    for made in (*laptop, *relabeled(laptop, 6)):
        text = thoughts(made.case)
        assert "\n" not in text
        assert text == text.strip()
        assert len(text) < 100
        assert text.split(" ")[-1] == rf"\boxed{{{made.label}}}"


def test_terse_thoughts_say_yes_once_and_last(laptop: list[SyntheticRow]) -> None:
    order = [cause for cause in LADDER[:-1] if cause in REDUCTIONS["laptop"].causes]
    for made in laptop:
        said = thoughts(made.case).rpartition(" ")[0].split(", ")
        answers = [rung.rpartition(" ")[2] for rung in said]
        if made.cause is Cause.C3:
            assert answers == ["no"] * len(order)
        else:
            assert answers == ["no"] * order.index(made.cause) + ["yes"]


def test_terse_numbers_are_quoted_from_the_case(laptop: list[SyntheticRow]) -> None:
    for made in laptop:
        rows = made.case.drive_test
        slow = [here for here in rows if here.throughput is not None and here.throughput < 600]
        for said in thoughts(made.case).rpartition(" ")[0].split(", "):
            name, *shown = said.split(" ")[:-1]
            if name == "PCI":
                pcis = [str(here.pci) for here in rows]
                marks = ["=" if before == after else ">" for before, after in pairwise(pcis)]
                assert shown == [*map("".join, zip(pcis, ["", *marks], strict=True)), str(marks.count(">"))]
            elif name == "v":
                assert shown == [str(max(here.speed for here in rows if here.speed is not None))]
            elif name == "RB":
                assert shown == [str(slow[0].rbs)]
            else:
                assert name == "n1"
                assert shown[0] in {str(here.neighbors[0].pci) for here in slow}


def terse(rows: tuple[DriveTestRow, ...], cause: Cause, cells: tuple[RadioCell, ...] = CELLS) -> str:
    case = Case(rows, cells, (Option("C3", Cause.C3), Option(cause.value, cause)))
    return thoughts(replace(case, layout=replace(case.layout, wording="terse")))


def test_terse_thoughts_name_the_neighbor_that_counts() -> None:
    overlap = (row(neighbors=(("999", "-70"), ("201", "-80"))),) * 3
    assert terse(overlap, Cause.C4) == r"n2 201 yes \boxed{C4}"
    same = (row(neighbors=(("999", "-70"), (None, "-75"), ("130", "-80"))),) * 3
    assert terse(same, Cause.C6) == r"n3 130 yes \boxed{C6}"


def test_terse_thoughts_compare_each_serving_pci_with_the_last_one_known() -> None:
    rows = tuple(row("900", pci=pci) for pci in ("100", None, "100.0", "201", None, "202"))
    assert terse(rows, Cause.C5) == r"PCI 100 - 100.0= 201> - 202> 2 no \boxed{C3}"
    assert terse((*rows, row(pci="100")), Cause.C5) == r"PCI 100 - 100.0= 201> - 202> 100> 3 yes \boxed{C5}"


def test_terse_thoughts_skip_what_is_missing() -> None:
    lost: Value = None
    rows = (replace(row(), rbs=lost), row(rbs="100"), row(rbs="90"))
    assert terse(rows, Cause.C8) == r"RB 100 yes \boxed{C8}"
    assert terse((replace(row(), rbs=lost),), Cause.C8) == r"\boxed{C3}"
    assert terse((row(),) * 3, Cause.C4, ()) == r"\boxed{C3}"
    assert terse((row(),) * 3, Cause.C4) == r"n1 - no \boxed{C3}"


def test_a_terse_case_of_every_cause_is_explained(full: list[SyntheticRow]) -> None:
    for made in full:
        text = thoughts(replace(made.case, layout=replace(made.case.layout, wording="terse")))
        assert "\n" not in text
        assert score(text, made.label) == 1.0
        assert (" yes " in text) == (made.cause is not Cause.C3)
