"""README tells the truth of today: links lead somewhere, line counts and sizes are those of the code."""
import re
from pathlib import Path

from nanoinfra.config import SIZES
from nanoinfra.formulas.parameters import parameters

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_links_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("http")]
    assert len(links) > 10
    for link in links:
        assert (ROOT / link).exists(), link


def test_line_counts_are_those_of_the_files():
    rows = re.findall(r"\]\(((?:nanoinfra|kernels)/[^)]+)\) \| (\d+) \|", TEXT)
    assert len(rows) >= 7
    for path, lines in rows:
        files = sorted((ROOT / path).glob("*.py")) if (ROOT / path).is_dir() else [ROOT / path]
        assert sum(len(file.read_text().splitlines()) for file in files) == int(lines), path


def test_the_table_of_sizes_is_the_codes():
    rows = re.findall(r"^\| (\w+) \| (llama|gpt2) \| (.+) \|$", TEXT, re.M)
    assert [row[0] for row in rows] == list(SIZES)
    for name, family, rest in rows:
        m, lr = SIZES[name].model, SIZES[name].lr
        *numbers, tied, rate, count = (cell.strip() for cell in rest.split("|"))
        assert [int(n) for n in numbers] == [m.layers, m.width, m.heads, m.kv_heads, m.context, m.vocab]
        assert family == m.family and (tied == "yes") == m.tied and float(rate) == lr
        psi = parameters(m)
        said = float(count.replace(",", "").removesuffix(" M")) * (1e6 if count.endswith("M") else 1)
        assert abs(said - psi) <= (0.01 * psi if count.endswith("M") else 0), (name, psi)
