"""The documents: small enough to be read, current, with links that lead somewhere, and numbers in one place."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
