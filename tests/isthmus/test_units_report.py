"""What a correspondence of units writes: tables, matchings, pictures, a page."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from isthmus.align import Correspondence, UnitMatching, correspond
from isthmus.base.errors import OutputError
from isthmus.units_report import summary_table, write_units


@pytest.fixture(scope="module")
def found() -> Correspondence:
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.Tanh()) for _ in range(2))
    with torch.no_grad():
        a[0].bias[2] = -50.0  # pyright: ignore[reportIndexIssue]
    data = list(torch.randn(600, 5).split(100))
    return correspond(a, b, data, pairs=[("1", "1"), ("3", "1")], clusters=2, rotations=3, draws=4)


@pytest.fixture(scope="module")
def folder(found: Correspondence, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("units") / "made"
    sheet = Figure(figsize=(4, 2))
    sheet.subplots().plot([0, 1])
    page = write_units(found, place, sheets={("1", "1"): {"Units <both> have": sheet}}, measured_on="noise & more")
    assert page == place / "report.html"
    return place


def test_every_file_is_there(folder: Path) -> None:
    stems = ("1", "3-1")
    expected = {"report.html", "units.json", "units1-1.png"}
    expected |= {f"units-{stem}.csv" for stem in stems} | {f"matching-{stem}.safetensors" for stem in stems}
    expected |= {f"{name}-{stem}.png" for stem in stems for name in ("curves", "prediction", "clusters", "means")}
    assert {path.name for path in folder.iterdir()} == expected


def test_tables_hold_the_rows(found: Correspondence, folder: Path) -> None:
    with (folder / "units-3-1.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["unit"]) for row in rows] == [row["unit"] for row in found["3"].rows()]
    assert [float(row["held_out"]) for row in rows] == [row["held_out"] for row in found["3"].rows()]
    with (folder / "units-1.csv").open() as file:
        dead = next(row for row in csv.DictReader(file) if row["unit"] == "2")
    assert (dead["partner"], dead["held_out"], dead["sparse_r2"]) == ("-1", "", "")


def test_json_holds_every_number(found: Correspondence, folder: Path) -> None:
    content = json.loads((folder / "units.json").read_text())
    assert content["measured_on"] == "noise & more"
    assert [row["one_to_one"] for row in content["summary"]] == [row["one_to_one"] for row in found.summary()]
    assert len(content["pairs"][0]["units"]) == 6
    assert content["settings"]["folds"] == 10
    assert "torch" in content["versions"]


def test_matchings_load(found: Correspondence, folder: Path) -> None:
    loaded = UnitMatching.load(folder / "matching-3-1.safetensors")
    assert torch.equal(loaded.partner, found["3"].matching.partner)


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained_and_says_what_was_measured(found: Correspondence, folder: Path) -> None:
    text = (folder / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert all(source.startswith(("#", "data:")) for source in page.sources)
    assert "noise & more" in page.text
    assert "Units <both> have" in page.text
    headers, rows = summary_table(found)
    for cell in (*headers, *rows[0], *rows[1]):
        assert cell in page.text
    assert text.count("<figure") == 9


def test_a_folder_that_cannot_be_made_is_refused(found: Correspondence, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_units(found, tmp_path / "file")


def test_a_matching_alone_is_reported_too(tmp_path: Path) -> None:
    torch.manual_seed(1)
    a, b = (nn.Sequential(nn.Linear(5, 6), nn.ReLU()) for _ in range(2))
    found = correspond(a, b, torch.randn(200, 5), layers="1", analyses=())
    write_units(found, tmp_path)
    names = {"report.html", "units.json", "units-1.csv", "matching-1.safetensors", "curves-1.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    headers, rows = summary_table(found)
    assert "R² of few" not in headers
    assert rows[0][0] == "1"
