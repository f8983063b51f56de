"""The generated documentation is up to date, and links lead somewhere."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["methods", "results"])
def test_generated_pages_are_up_to_date(name: str):
    assert (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") == script(name).page(), (
        f"run: python docs/{name}.py"
    )


def test_the_numbers_in_readme_are_those_of_the_results():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == script("results").readme()
    assert "| rankwise default | 0.8 |" in script("results").readme()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_readme_has_two_set_up_commands():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    set_up = [block.strip() for block in blocks if "python -m venv" in block]
    assert len(set_up) == 2
    assert all("\n" not in block for block in set_up)
