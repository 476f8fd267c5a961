"""Every figure of README and docs is the one in the file of benchmarks/results that it comes from."""

import importlib
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
tables, sentences, results, history = (
    importlib.import_module(name) for name in ("tables", "sentences", "results", "history")
)
sys.path.pop(0)


@pytest.mark.parametrize("page", sorted({page for page, _ in tables.TABLES}))
def test_tables_are_those_of_the_files(page):
    """``python docs/tables.py`` writes them."""
    text = (ROOT / page).read_text()
    assert text == tables.written(page, text)


@pytest.mark.parametrize(("page", "sentence"), list(sentences.sentences()))
def test_sentences_state_the_figures_of_the_files(page, sentence):
    assert sentence in " ".join((ROOT / page).read_text().split())


def test_a_peer_is_the_best_of_its_table():
    """Against a slower peer than the best one a ratio would say too much."""
    fastest = results.best("masked_conv.csv", shape="16x128->256 32x32 5x5", case="forward+backward")
    assert fastest["provider"] == "cropped channels-last"
    for row in results.rows("masked_conv.csv"):
        if (row["shape"], row["case"]) == (fastest["shape"], fastest["case"]) and "fastvq" not in row["provider"]:
            assert float(row["p50_ms"]) >= float(fastest["p50_ms"])


def test_the_plot_of_the_readme_is_drawn_from_the_present_file():
    """``python docs/figures.py`` draws it."""
    with Image.open(ROOT / "docs" / "images" / "lookup.png") as picture:
        assert picture.info["Description"].endswith(results.digest("quantize.csv"))


@pytest.mark.parametrize("file", history.FILES)
def test_the_history_has_the_present_measurement_of_every_file(file):
    """``python docs/history.py`` adds it."""
    assert history.headline(file, results.rows(file)) in results.rows(history.HISTORY)


def test_every_file_of_times_has_a_subject():
    other = {"prior.csv", "history.csv", "ceilings.csv", "rounding.csv"}  # bits, and what no peer is timed against
    found = {p.relative_to(results.RESULTS).as_posix() for p in results.RESULTS.rglob("*.csv") if p.name not in other}
    assert found == set(history.FILES)


def test_the_page_over_time_has_every_row_by_subject_and_date(tmp_path):
    history.write(tmp_path)
    parts = (tmp_path / "history.md").read_text().split("## ")[1:]
    assert len(parts) == len(set(history.FILES.values()))
    shown = 0
    for part in parts:
        lines = [
            [cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("| 2")
        ]
        assert lines and lines == sorted(lines, key=lambda line: line[0])
        for line in lines:
            assert any(
                (line[1], line[2], line[3], line[4]) == (r["commit"], r["machine"], r["measured"], results.ms(r))
                for r in results.rows(history.HISTORY)
                if r["subject"] == part.splitlines()[0] and r["date"].startswith(line[0])
            )
        shown += len(lines)
    assert shown == len(results.rows(history.HISTORY))
