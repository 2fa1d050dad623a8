"""Tests stand where the name leads: `hypergrad/linear/cg.py` is tested in `tests/linear/test_cg.py`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Private parts with nothing to promise on their own, and the file that tests the whole which they belong to.
PARTS = {
    "__main__.py": "_demo/test_demo.py",
    "_demo": "_demo/test_demo.py",  # the folder: one command, tested as a user runs it
    "_jaxpr/dataflow.py": "_jaxpr/test_labels.py",
    "adapters/_hyper.py": "adapters/test_sklearn.py",
    "diagnostics/_causes.py": "diagnostics/test_check.py",
    "diagnostics/_left_out.py": "diagnostics/test_attribution.py",
    "diagnostics/_probes.py": "diagnostics/test_check.py",
    "diagnostics/_report.py": "diagnostics/test_check.py",
    "diagnostics/_where.py": "diagnostics/test_check.py",
    "domains/_maps.py": "domains/test_domain.py",
    "inner/_inner.py": "inner/test_fixed_point.py",
    "objectives/_found.py": "objectives/test_risk.py",
    "objectives/_kernel.py": "objectives/test_evidence.py",
    "objectives/_likelihoods.py": "objectives/test_evidence.py",
    "objectives/_process.py": "objectives/test_gp.py",
    "outer/_config.py": "reliability/test_resume.py",
    "outer/_ended.py": "reliability/test_resume.py",
    "outer/_feed.py": "outer/test_tune.py",
    "outer/_keeper.py": "reliability/test_resume.py",
    "outer/_loop.py": "outer/test_steps_per_call.py",
    "outer/_run.py": "reliability/test_resume.py",
    "outer/_step.py": "outer/test_tune.py",
    "solvers/_call.py": "test_contract.py",
    "solvers/_error.py": "solvers/test_error_estimate.py",
    "solvers/_directions.py": "solvers/test_single_loop.py",
}
# Folders of tests that mirror no room: promises, seeded bugs, and what stands beside the package.
BESIDE = {"reliability", "mutations", "experiments", "notebooks"}


def untested(root: Path, parts: dict[str, str]) -> list[str]:
    """Modules of `root/hypergrad` without the file in `root/tests` that their name leads to, or that `parts` names."""
    missing = []
    for module in sorted((root / "hypergrad").rglob("*.py")):
        path = module.relative_to(root / "hypergrad")
        own = path.parent / f"test_{path.stem.removeprefix('_')}.py"
        found = [parts[str(at)] for at in (path, *path.parents) if str(at) in parts]
        expected = found[0] if found else str(own)
        if module.name != "__init__.py" and not (root / "tests" / expected).exists():
            missing.append(f"hypergrad/{path}: tests/{expected}")
    return missing


def test_every_module_has_its_file_of_tests():
    assert untested(ROOT, PARTS) == [], "write the file that is named; the list above is for private helpers"


def test_the_list_of_parts_holds_private_modules_and_what_it_names_exists():
    for path, covered in PARTS.items():
        at = ROOT / "hypergrad" / path
        assert at.exists() and (at.name.startswith("_") or at.parent.name.startswith("_")), path
        assert (ROOT / "tests" / covered).exists(), covered


def test_every_folder_of_tests_is_a_room_of_the_package():
    folders = {path.name for path in (ROOT / "tests").iterdir() if (path / "__init__.py").exists()}
    assert sorted(folder for folder in folders - BESIDE if not (ROOT / "hypergrad" / folder).is_dir()) == []


def test_a_module_without_tests_is_found(tmp_path):
    for name in ("hypergrad/a.py", "hypergrad/__init__.py", "hypergrad/room/_b.py", "hypergrad/room/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "tests" / "room").mkdir(parents=True)
    (tmp_path / "tests" / "test_a.py").touch()
    (tmp_path / "tests" / "room" / "test_b.py").touch()
    assert untested(tmp_path, {}) == ["hypergrad/room/c.py: tests/room/test_c.py"]
    assert untested(tmp_path, {"room/c.py": "room/test_b.py"}) == []
    assert untested(tmp_path, {"room": "room/test_gone.py"}) == [
        "hypergrad/room/_b.py: tests/room/test_gone.py",
        "hypergrad/room/c.py: tests/room/test_gone.py",
    ]


def test_a_methods_hypergrad_fits_on_a_page():
    """What a method shares with the others is in `solvers/_call.py`; what is left reads like the paper."""
    found = {}
    for file in sorted((ROOT / "hypergrad" / "solvers").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name in ("hypergrad", "evaluate"):
                found[f"{file.stem}.{node.name}"] = (node.body[-1].end_lineno or 0) - node.body[0].lineno + 1
    assert len(found) >= 10
    assert {name: lines for name, lines in found.items() if lines > 60} == {}


def test_what_contributing_says_that_a_new_member_touches_exists():
    table = [row for row in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if row.startswith(("| a ", "| an "))]
    assert len(table) >= 10
    for row in (row for row in table if "makes the room" not in row):
        for path in re.findall(r"`((?:hypergrad|tests|experiments)/[\w/.]+)`", row):
            room = Path(path.split("NAME")[0])
            assert (ROOT / (room if path.startswith(f"{room}/") or "NAME" not in path else room.parent)).exists(), path
        for names, path in re.findall(r"((?:`\w+`(?:, | and )?)+) in `([\w/.]+)`", row):
            for name in re.findall(r"`(\w+)`", names):
                assert re.search(rf"^ *(def )?{name}\b *[=:(]", (ROOT / path).read_text(), re.MULTILINE), (name, path)
