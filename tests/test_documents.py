"""The documents: small enough to be read, current, with links that lead somewhere, and numbers in one place."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hass_core.config import load_config
from hass_core.forecast.forecast import Forecast, forecast
from infra.settings_page import page

ROOT = Path(__file__).parents[1]


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert len(text.encode()) <= 8192


def test_the_page_of_settings_is_current():
    assert (ROOT / "docs/settings.md").read_text() == page(), "python -m infra.settings_page > docs/settings.md"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files(name):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / name).read_text()):
        assert link.startswith("https://") or (ROOT / link).is_file(), link


def test_the_site_builds_and_every_link_in_it_leads_somewhere(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site/settings.html").is_file()


def test_no_sentence_is_said_twice():
    seen: dict[str, str] = {}
    for file in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        prose = re.sub(r"```.*?```|^(    |\|).*?$", "", file.read_text(), flags=re.DOTALL | re.MULTILINE)
        for sentence in re.split(r"(?<=[.:])\s+", " ".join(prose.split())):
            if len(sentence) > 60:
                assert seen.setdefault(sentence, file.name) == file.name, (
                    f"{file.name} and {seen[sentence]}: {sentence}"
                )


def forecasts(document: str) -> list[tuple[list[str], Forecast]]:
    """The cells of a table's rows that name a preset, with its forecast on one to four H100s."""
    rows = [re.split(r" *\| *", line)[1:-1] for line in (ROOT / document).read_text().splitlines() if "|" in line]
    named = [(row, found[1]) for row in rows if (found := re.search(r"`([\w.-]+)`$", row[0]))]
    gpus = ["h100x1", "h100x2", "h100x4"]
    conversations = {"llama-2-7b-paper": 68_000}
    return [(row, forecast(load_config(name), gpus, conversations.get(name))) for row, name in named]


def test_the_readme_tells_todays_forecasts():
    told = forecasts("README.md")
    assert len(told) == 3
    for (_, gpus, hours, memory, disk), found in told:
        total = next(each.total for each in found.hours if each.gpus.startswith(gpus))
        assert total
        assert hours == f"{total:.1f}"
        assert memory == f"{found.memory_bytes['training'] / 1e9:.0f} GB"
        assert disk == f"{found.disk_bytes / 1e9:.0f} GB"


def test_the_page_of_sizes_tells_todays_forecasts():
    told = forecasts("docs/sizes.md")
    assert len(told) == 9
    for (_, _, parameters, features, hours), found in told:
        assert parameters == f"{found.draft_parameters / 1e6:.0f} M"
        assert features == f"{found.feature_bytes['bf16'] / 1e9:.0f} GB"
        first = next(each.total for each in found.hours if each.total)
        assert hours.split()[-1] == f"{first:.1f}"
