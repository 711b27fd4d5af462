"""Base scenarios: ten seconds of a drive past a handover, from a small radio simulation.

A car drives through the border between two sectors, A and B, of one site; other sites stand around. In the middle of
the drive A hands over to B, and around the handover throughput is low: the *dip*, rows h-2 to h+1 with the handover at
row h. Nothing else is wrong. :mod:`hpo_plugin.tasks.telelogs.counterfactuals` then gives the dip its cause.

The model, in the order of the code: a road at an angle to the border; sites at a few hundred meters with one to three
sectors; an antenna pattern with azimuth, electrical and mechanical downtilt and the vertical beamwidth of the beam
scenario (3GPP TR 38.901, table 7.3-1); distance-dependent path loss with shadowing that belongs to a site and changes
slowly along the road (38.901, UMa); SINR from the load of the neighbors; scheduled resource blocks and throughput. PCIs
are planned so that no two cells around share one modulo 30. Candidates in which A and B are not each other's strongest
neighbor around the handover, or in which some rule of the ladder could hold already, are drawn again.

What is calibrated rather than simulated, so that the fields look like the published data's: the ranges and quantiles in
:data:`THROUGHPUT_IN_DIP`, :data:`THROUGHPUT_OUTSIDE`, :data:`RSRP_RANGE`, :data:`SINR_RANGE`, :data:`RB_RANGE`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from hpo_plugin.tasks.telelogs.rules import (
    COVERAGE_DISTANCE,
    DEFAULT_TILT,
    DEFAULT_TILT_CODE,
    EARTH_RADIUS,
    LOBE_DEFICIT,
    OVERLAP,
    OVERLAP_PAIRS,
    WEAK_RSRP,
)
from hpo_plugin.tasks.telelogs.tables import MAX_NEIGHBORS, DriveTestRow, Neighbor, RadioCell

Array = npt.NDArray[Any]

#: Rows of a drive test, one a second.
ROWS: Final = 10
#: First and last row at which B may take over.
HANDOVER_ROWS: Final = (3, 7)
#: Rows of the dip, counted from the handover: h-2 to h+1.
DIP: Final = (-2, -1, 0, 1)
#: Fewest and most cells in the engineering parameters.
CELLS: Final = (4, 13)

#: (share, Mbps): quantiles, with straight lines between. Those at 10, 50 and 90 % of the dip, and range and median
#: outside of it, are the published data's; the others make them smooth.
THROUGHPUT_IN_DIP: Final = (
    (0.0, 110.0),
    (0.03, 160.0),
    (0.1, 204.0),
    (0.5, 358.0),
    (0.9, 483.0),
    (0.97, 520.0),
    (1.0, 560.0),
)
THROUGHPUT_OUTSIDE: Final = (
    (0.0, 600.0),
    (0.1, 690.0),
    (0.5, 1003.0),
    (0.75, 1190.0),
    (0.9, 1360.0),
    (0.97, 1500.0),
    (1.0, 1648.0),
)
#: km/h.
SPEED_RANGE: Final = (0, 39)
#: dBm, of the serving cell.
RSRP_RANGE: Final = (-90.0, -46.0)
#: dB.
SINR_RANGE: Final = (-9.0, 39.0)
#: Scheduled resource blocks.
RB_RANGE: Final = (160.0, 211.0)

#: GHz; Hz between subcarriers; resource blocks of a carrier of 100 MHz; dB of the receiver.
_CARRIER, _SUBCARRIER, _BLOCKS, _NOISE_FIGURE = 3.5, 30_000.0, 273, 7.0
#: dBm of a cell over its whole carrier; dBi of its antenna with beamforming; dB of walls, bodies and cables.
_CELL_POWER, _ANTENNA_GAIN, _LOSSES = 49.0, 24.0, 4.5
#: Degrees, and most attenuation in dB, of the antenna pattern: horizontal; vertical.
_BEAMWIDTH, _FRONT_TO_BACK, _SIDE_LOBES = 65.0, 30.0, 20.0
#: dB by which a neighbor's beams, which seldom point at the car, are weaker than its reference signal.
_BEAM_MISS = 3.0
#: dB: mean SINR of base scenarios in the dip and outside of it, and a spread that ranks are taken with.
_MEAN_SINR, _SINR_SPREAD = (9.9, 12.4), 6.0
#: Neighbors are reported down to so many dB below the serving cell, and not below so many dBm.
_REPORT_WINDOW, _REPORT_FLOOR = 24.0, -112.0
#: B may be so many dB weaker than its strongest neighbor: hysteresis and time to trigger of the handover.
_HYSTERESIS = 3.0
_SITES, _SECTORS = 5, 3
#: Meters from the serving site to the handover; the median.
_SERVING_DISTANCE = 210.0
_MODES, _MODELS = ("32T32R", "64T64R"), ("AAU 1", "AAU 2", "AAU 3")
_MAX_TRANSMIT_POWER = Decimal("34.9")
_NO_NEIGHBOR = Neighbor(None, None)
#: Degrees east and north of an area that exists on no map of ours; a degree of longitude there is 88.6 km.
_ORIGIN, _AREA = (128.19, 37.2), 0.02
_METERS_PER_DEGREE = math.pi / 180 * EARTH_RADIUS
#: dB and degrees by which a candidate stays clear of a rule: what it writes is rounded, and rules read what is written.
_ROUNDING = 0.01
#: Candidates drawn together.
_BLOCK = 512


@dataclass(frozen=True, slots=True)
class BaseScenario:
    """A drive test and its surroundings before a cause is added.

    Attributes:
        number: Position in the stream of its seed.
        handover: Row at which B takes over from A, 3 to 7.
        first: Index of A in ``cells``.
        second: Index of B.
        far: Index of the second strongest neighbor in the dip, which stands at another site.
        drive_test: Ten rows.
        cells: Four to thirteen.
    """

    number: int
    handover: int
    first: int
    second: int
    far: int
    drive_test: tuple[DriveTestRow, ...]
    cells: tuple[RadioCell, ...]

    @property
    def dip(self) -> range:
        """The rows of low throughput."""
        return range(self.handover + DIP[0], self.handover + DIP[-1] + 1)


class BaseScenarios(Iterator[BaseScenario]):
    """The endless stream of base scenarios of a seed.

    Attributes:
        drawn: Candidates drawn so far.
        accepted: Scenarios among them, returned or waiting to be.
    """

    def __init__(self, seed: int) -> None:
        """Begin at the first scenario.

        Args:
            seed: 0 to 2**32 - 1. The same seed gives the same stream under one version of numpy.
        """
        self.drawn = 0
        self.accepted = 0
        self._seed = seed
        self._block = 0
        self._number = 0
        self._ready: list[BaseScenario] = []

    def __next__(self) -> BaseScenario:
        """Return the next scenario."""
        while not self._ready:
            random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, self._block])))
            self._block += 1
            found = _simulate(random, self._number)
            self._number += len(found)
            self.drawn += _BLOCK
            self.accepted += len(found)
            # The next one is taken from the end.
            self._ready = found[::-1]
        return self._ready.pop()


def inverse_cdf(quantiles: tuple[tuple[float, float], ...], share: Array) -> Array:
    """Return the values at shares of a distribution that is given by some of its quantiles.

    Args:
        quantiles: (share, value), ascending, from share 0 to share 1; straight lines between.
        share: In [0, 1], any shape.
    """
    shares, values = zip(*quantiles, strict=True)
    return np.asarray(np.interp(share, shares, values))


@dataclass(frozen=True)
class _Drive:
    """Where the car is; arrays [candidate, row], in meters east and north of the handover, and km/h."""

    handover: Array
    border: Array
    side: Array
    speed: Array
    x: Array
    y: Array


@dataclass(frozen=True)
class _Network:
    """Sites [candidate, site] in meters, and their sectors [candidate, site, sector] in degrees; site 0 serves."""

    x: Array
    y: Array
    height: Array
    exists: Array
    azimuth: Array
    mechanical: Array
    digital: Array
    tilt: Array
    scenario: Array
    beamwidth: Array


@dataclass(frozen=True)
class _Measurements:
    """What the car reports; arrays [candidate, row], and [candidate, row, neighbor] with the strongest first."""

    in_dip: Array
    serving: Array
    rsrp: Array
    sinr: Array
    throughput: Array
    rbs: Array
    order: Array
    brsrp: Array
    reported: Array
    site_distance: Array
    elevation: Array


def _simulate(random: np.random.Generator, number: int) -> list[BaseScenario]:
    """Draw a block of candidates; return those that qualify, numbered from ``number``."""
    drive = _draw_drive(random)
    network = _draw_network(random, drive)
    measured = _measure(random, drive, network)
    write = _Writer(random, drive, network, measured)
    qualified = np.flatnonzero(_qualifies(drive, network, measured)).tolist()
    return [write(number + place, candidate) for place, candidate in enumerate(qualified)]


def _draw_drive(random: np.random.Generator) -> _Drive:
    n = _BLOCK
    handover = random.integers(HANDOVER_ROWS[0], HANDOVER_ROWS[1] + 1, n)
    # Whole km/h that change by little from second to second.
    walk = np.cumsum(random.normal(0, 1.2, (n, ROWS)), axis=1)
    speed = np.clip(np.rint(random.uniform(*SPEED_RANGE, (n, 1)) + walk), *SPEED_RANGE)
    driven = np.cumsum(speed / 3.6, axis=1)
    along = driven - np.take_along_axis(driven, handover[:, None], axis=1)
    # Across the border between the sectors, from one side or the other, up to 45 degrees off the perpendicular.
    border = random.uniform(0, 360, n)
    side = random.choice([-1.0, 1.0], n)
    heading = np.radians(border + side * (90 + random.uniform(-45, 45, n)))[:, None]
    return _Drive(handover, border, side, speed, along * np.sin(heading), along * np.cos(heading))


def _draw_network(random: np.random.Generator, drive: _Drive) -> _Network:
    n = _BLOCK
    distance = random.uniform(230, 780, (n, _SITES))
    distance[:, 0] = np.exp(random.normal(np.log(_SERVING_DISTANCE), 0.7, n))
    bearing = random.uniform(0, 360, (n, _SITES))
    bearing[:, 0] = drive.border + 180
    sites = random.integers(2, _SITES + 1, n)
    sectors = random.integers(1, _SECTORS + 1, (n, _SITES))
    sectors[:, 0] = random.integers(2, _SECTORS + 1, n)
    exists = (np.arange(_SITES) < sites[:, None])[..., None] & (np.arange(_SECTORS) < sectors[..., None])
    # Some sector of each site looks roughly at the car. Those of the serving site look to both sides of the border: A
    # to where the car comes from, B to where it goes, a third one back.
    azimuth = (bearing + 180)[..., None] + random.uniform(-60, 60, (n, _SITES, 1)) + np.array([0.0, 120.0, 240.0])
    spread = drive.side * random.uniform(45, 65, n)
    azimuth[:, 0] = drive.border[:, None] + np.stack([-spread, spread, np.full(n, 180.0)], axis=1)
    shape = (n, _SITES, _SECTORS)
    scenario = random.integers(0, 16, shape)
    mechanical = np.rint(random.triangular(0, 2, 9, shape))
    # Up to the 9 degrees of C1, for that value alone must not give the cause away.
    digital = np.where(random.random(shape) < 0.4, DEFAULT_TILT_CODE, random.integers(2, 10, shape))
    return _Network(
        x=distance * np.sin(np.radians(bearing)),
        y=distance * np.cos(np.radians(bearing)),
        height=np.rint(random.uniform(15, 42, (n, _SITES)) * 2) / 2,
        exists=exists,
        azimuth=np.rint(azimuth) % 360,
        mechanical=mechanical,
        digital=digital,
        tilt=mechanical + np.where(digital == DEFAULT_TILT_CODE, DEFAULT_TILT, digital),
        scenario=scenario,
        beamwidth=np.where(scenario <= 5, 6.0, np.where(scenario <= 11, 12.0, 25.0)),
    )


def _measure(random: np.random.Generator, drive: _Drive, network: _Network) -> _Measurements:
    n, cells = _BLOCK, _SITES * _SECTORS
    rows = np.arange(ROWS)
    east = drive.x[..., None] - network.x[:, None]
    north = drive.y[..., None] - network.y[:, None]
    meters = np.hypot(east, north)
    elevation = np.degrees(np.arctan2(network.height[:, None], meters))

    # Reference signal received power: [candidate, row, site, sector], then [candidate, row, cell].
    off_axis = (np.degrees(np.arctan2(east, north))[..., None] - network.azimuth[:, None] + 180) % 360 - 180
    horizontal = np.minimum(12 * (off_axis / _BEAMWIDTH) ** 2, _FRONT_TO_BACK)
    # The beams of a narrow scenario are swept, so coverage falls off no faster than with ten degrees.
    width = np.maximum(network.beamwidth, 10)[:, None]
    vertical = np.minimum(12 * ((elevation[..., None] - network.tilt[:, None]) / width) ** 2, _SIDE_LOBES)
    shadowing = random.normal(0, 0.8, (n, ROWS, _SITES))
    shadowing[:, 0] = random.normal(0, 4.0, (n, _SITES))
    loss = 13.54 + 39.08 * np.log10(np.hypot(meters, network.height[:, None])) + 20 * np.log10(_CARRIER)
    power = _CELL_POWER - 10 * np.log10(12 * _BLOCKS) + _ANTENNA_GAIN - _LOSSES
    received = (
        power - np.minimum(horizontal + vertical, _FRONT_TO_BACK) - (loss + np.cumsum(shadowing, axis=1))[..., None]
    )
    received += random.normal(0, 0.6, received.shape)
    received = np.where(network.exists[:, None], received, -np.inf).reshape(n, ROWS, cells)

    # A, cell 0, serves before the handover; B, cell 1, from then on.
    serving = np.where(rows < drive.handover[:, None], 0, 1)
    rsrp = np.take_along_axis(received, serving[..., None], axis=2)[..., 0]
    np.put_along_axis(received, serving[..., None], -np.inf, axis=2)
    order = np.argsort(-received, axis=2, kind="stable")[..., :MAX_NEIGHBORS]
    brsrp = np.take_along_axis(received, order, axis=2)

    # Every other cell radiates in a share of the time, its load.
    load = random.beta(0.5, 0.9, (n, 1, cells))
    noise = -174 + 10 * np.log10(_SUBCARRIER) + _NOISE_FIGURE
    interference = 10 * np.log10(np.sum(load * 10 ** (received / 10), axis=2) + 10 ** (noise / 10))
    sinr = np.clip(rsrp - interference + _BEAM_MISS + random.normal(0, 2.5, (n, ROWS)), *SINR_RANGE)

    # More bits where the channel is better: throughput takes its rank from SINR and chance.
    in_dip = (rows >= drive.handover[:, None] + DIP[0]) & (rows <= drive.handover[:, None] + DIP[-1])
    better = (sinr - np.where(in_dip, *_MEAN_SINR)) / _SINR_SPREAD
    rank = _normal_cdf(0.4 * better + 0.917 * random.normal(0, 1, (n, ROWS)))
    return _Measurements(
        in_dip=in_dip,
        serving=serving,
        rsrp=rsrp,
        sinr=sinr,
        throughput=np.where(in_dip, inverse_cdf(THROUGHPUT_IN_DIP, rank), inverse_cdf(THROUGHPUT_OUTSIDE, rank)),
        rbs=RB_RANGE[0] + (RB_RANGE[1] - RB_RANGE[0]) * random.beta(2.2, 1.3, (n, ROWS)),
        order=order,
        brsrp=brsrp,
        reported=brsrp >= np.maximum(rsrp[..., None] - _REPORT_WINDOW, _REPORT_FLOOR),
        site_distance=meters[..., 0],
        elevation=elevation[..., 0],
    )


def _normal_cdf(z: Array) -> Array:
    """The logistic approximation, which differs by less than 0.01."""
    return np.asarray(1 / (1 + np.exp(-1.702 * z)))


def _qualifies(drive: _Drive, network: _Network, measured: _Measurements) -> Array:
    """Say which candidates are base scenarios: a clean handover, and no rule of the ladder that could hold."""
    outside = ~measured.in_dip
    strongest, second = measured.order[..., 0], measured.order[..., 1]
    far = np.take_along_axis(second, drive.handover[:, None], axis=1)
    near = measured.brsrp >= measured.rsrp[..., None] - OVERLAP - _ROUNDING
    overlap = measured.reported & (measured.order >= _SECTORS) & near
    reach = np.take_along_axis((network.tilt - network.beamwidth / 2)[:, 0], measured.serving, axis=1)
    cells = network.exists.sum(axis=(1, 2))
    conditions = (
        np.all((measured.rsrp > RSRP_RANGE[0]) & (measured.rsrp < RSRP_RANGE[1]), axis=1),
        np.all((measured.rsrp > WEAK_RSRP + _ROUNDING) | outside, axis=1),
        np.all(measured.brsrp[..., 0] <= measured.rsrp + _HYSTERESIS, axis=1),
        np.all(measured.reported[..., 1], axis=1),
        # In the dip, A and B are each other's strongest neighbor, and one cell of another site is the next.
        np.all((strongest == 1 - measured.serving) | outside, axis=1),
        np.all((second == far) & (far >= _SECTORS) | outside, axis=1),
        np.any((drive.speed > 0) & measured.in_dip, axis=1),
        (overlap & measured.in_dip[..., None]).sum(axis=(1, 2)) <= OVERLAP_PAIRS,
        np.all(reach - measured.elevation <= LOBE_DEFICIT - _ROUNDING, axis=1),
        np.all(measured.site_distance < COVERAGE_DISTANCE, axis=1),
        (cells >= CELLS[0]) & (cells <= CELLS[1]),
    )
    return np.asarray(np.logical_and.reduce(conditions))


class _Writer:
    """Writes candidates as typed tables, with identities, in the digits of the published data."""

    def __init__(self, random: np.random.Generator, drive: _Drive, network: _Network, measured: _Measurements) -> None:
        # For every candidate of the block, so that the fate of one does not change the numbers of another.
        n = _BLOCK
        self._drive, self._network, self._measured = drive, network, measured
        # Ten residues modulo 10 in random order: times 3 plus the sector, no two PCIs around are equal modulo 30.
        residue = np.argsort(random.random((n, 10)), axis=1)[:, :_SITES]
        group = 10 * random.integers(0, 33, (n, _SITES)) + residue
        self._pci = (3 * group[..., None] + np.arange(_SECTORS)).reshape(n, -1)
        self._station = random.integers(100, 900, (n, 1)) + np.argsort(random.random((n, 60)), axis=1)[:, :_SITES]
        self._order = np.argsort(random.random((n, _SITES * _SECTORS)), axis=1)
        self._start = random.integers(0, 365 * 86_400, n)
        self._digital_azimuth = 5 * np.where(
            random.random(n * _SITES * _SECTORS) < 0.8, 0, random.integers(-2, 3, n * _SITES * _SECTORS)
        ).reshape(n, -1)
        self._mode = random.integers(0, len(_MODES), (n, _SITES))
        self._model = random.integers(0, len(_MODELS), (n, _SITES))
        origin = np.array(_ORIGIN) + random.uniform(-_AREA, _AREA, (n, 2))
        self._origin = origin
        self._scale = _METERS_PER_DEGREE * np.stack([np.cos(np.radians(origin[:, 1])), np.ones(n)], axis=1)

    def __call__(self, number: int, candidate: int) -> BaseScenario:
        """Write one candidate.

        Args:
            number: Of the scenario.
            candidate: Index in the block.
        """
        network = self._network
        exists = network.exists[candidate].reshape(-1)
        listed = [cell for cell in self._order[candidate].tolist() if exists[cell]]
        place = {cell: index for index, cell in enumerate(listed)}
        far = int(self._measured.order[candidate, self._drive.handover[candidate], 1])
        return BaseScenario(
            number=number,
            handover=int(self._drive.handover[candidate]),
            first=place[0],
            second=place[1],
            far=place[far],
            drive_test=self._drive_test(candidate),
            cells=tuple(self._cells(candidate, listed)),
        )

    def _drive_test(self, candidate: int) -> tuple[DriveTestRow, ...]:
        measured, (east, north) = self._measured, self._scale[candidate]
        pci = [Decimal(value) for value in self._pci[candidate].tolist()]
        start = datetime(2025, 1, 1) + timedelta(seconds=int(self._start[candidate]))
        longitude = _decimals(self._origin[candidate, 0] + self._drive.x[candidate] / east, 6)
        latitude = _decimals(self._origin[candidate, 1] + self._drive.y[candidate] / north, 6)
        speed = _decimals(self._drive.speed[candidate], 0)
        rsrp, sinr = _decimals(measured.rsrp[candidate], 2), _decimals(measured.sinr[candidate], 2)
        throughput, rbs = _decimals(measured.throughput[candidate], 2), _decimals(measured.rbs[candidate], 2)
        rows = []
        for row in range(ROWS):
            count = int(measured.reported[candidate, row].sum())
            order = measured.order[candidate, row, :count].tolist()
            brsrp = _decimals(measured.brsrp[candidate, row, :count], 2)
            neighbors = [Neighbor(pci[cell], value) for cell, value in zip(order, brsrp, strict=True)]
            neighbors += [_NO_NEIGHBOR] * (MAX_NEIGHBORS - count)
            rows.append(
                DriveTestRow(
                    timestamp=f"{start + timedelta(seconds=row)}.000000",
                    longitude=longitude[row],
                    latitude=latitude[row],
                    speed=speed[row],
                    pci=pci[int(measured.serving[candidate, row])],
                    rsrp=rsrp[row],
                    sinr=sinr[row],
                    throughput=throughput[row],
                    neighbors=tuple(neighbors),
                    rbs=rbs[row],
                )
            )
        return tuple(rows)

    def _cells(self, candidate: int, listed: list[int]) -> Iterator[RadioCell]:
        network, (east, north) = self._network, self._scale[candidate]
        longitude = _decimals(self._origin[candidate, 0] + network.x[candidate] / east, 6)
        latitude = _decimals(self._origin[candidate, 1] + network.y[candidate] / north, 6)
        height = _decimals(network.height[candidate], 1)
        azimuth = network.azimuth[candidate].reshape(-1).astype(int).tolist()
        mechanical = network.mechanical[candidate].reshape(-1).astype(int).tolist()
        digital = network.digital[candidate].reshape(-1).astype(int).tolist()
        scenario = network.scenario[candidate].reshape(-1).tolist()
        for cell in listed:
            site, sector = divmod(cell, _SECTORS)
            yield RadioCell(
                gnodeb_id=f"{int(self._station[candidate, site]):07d}",
                cell_id=str(sector + 1),
                longitude=longitude[site],
                latitude=latitude[site],
                mechanical_azimuth=Decimal(azimuth[cell]),
                mechanical_downtilt=Decimal(mechanical[cell]),
                digital_tilt=Decimal(digital[cell]),
                digital_azimuth=Decimal(int(self._digital_azimuth[candidate, cell])),
                beam_scenario=f"SCENARIO_{scenario[cell]}" if scenario[cell] else "DEFAULT",
                height=height[site],
                pci=Decimal(int(self._pci[candidate, cell])),
                txrx_mode=_MODES[self._mode[candidate, site]],
                max_transmit_power=_MAX_TRANSMIT_POWER,
                antenna_model=_MODELS[self._model[candidate, site]],
            )


def _decimals(values: Array, digits: int) -> list[Decimal]:
    """Return values with so many digits after the point."""
    # Plus zero, for a small negative number is written -0.00.
    return [Decimal(f"{value:.{digits}f}") + 0 for value in values.tolist()]
