"""Every experiment runs whole in small; its pages say what was measured; its command line answers mistakes."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import _common, _figures, _search, report
from tests._scripts import run_script

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments"


def _expected(home: Path) -> dict:
    return json.loads((home / "expected.json").read_text())


EXPERIMENTS = sorted(p.parent for p in FOLDER.glob("*/expected.json") if "smoke" in json.loads(p.read_text()))
each = pytest.mark.parametrize("home", EXPERIMENTS, ids=lambda home: home.name)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The runs go one after the other, and share what they compile: a hundred small programs each, mostly the same."""
    name = "JAX_COMPILATION_CACHE_DIR"
    return {name: os.environ.get(name) or str(tmp_path_factory.mktemp("compiled"))}


@pytest.mark.experiment
@each
def test_smoke_run_gives_every_number_in_its_range_and_is_lowered_for_cuda_and_tpu(home, tmp_path, cache):
    pictures = {path: path.read_bytes() for path in home.glob("*.png")}
    done = run_script(home / "run.py", "--smoke", "--json", cwd=tmp_path, environment=cache, elsewhere=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = report.flat(json.loads(done.stdout.splitlines()[-1]))
    expected = _expected(home)
    missing = sorted(set(expected["smoke"]) - set(found))
    assert not missing, f"not in the numbers: {missing}"
    for key, (low, high) in expected["smoke"].items():
        value = found[key]
        assert isinstance(value, (int, float)) and math.isfinite(value), f"{key} is {value!r}"
        assert low <= value <= high, f"{key} = {value} is outside [{low}, {high}]"
    assert pictures == {path: path.read_bytes() for path in home.glob("*.png")}, "a smoke run drew over the picture"


DRAWN = [script.parent for script in report.drawn(FOLDER)]


@each
def test_page_holds_what_a_reader_needs(home):
    text = (home / "README.md").read_text()
    for part in ("**Claim.**", "**Source.**", "**Command.**", f"python experiments/{home.name}/run.py", "did not hold"):
        assert part in text, f"{home.name}/README.md has no {part}"
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert pictures and all((home / name).exists() for name in pictures)
    assert all((home / name).stat().st_size < 150_000 for name in pictures)
    runs = json.loads((home / "results.json").read_text())
    assert len(runs) >= 3, "measured over three seeds at least"
    if home not in DRAWN:
        assert re.search(r"picture (shows|is of) seed 0|one seed", text), "of which seed it is"
    expected = _expected(home)
    assert set(expected["smoke"]) <= set(report.flat(next(iter(runs.values())))), (
        "a key of the smoke ranges that the real run has not"
    )
    assert set(expected.get("bars", {})) <= set(expected["table"]), "a bar on a key that is not shown"


@pytest.mark.parametrize("home", DRAWN, ids=lambda home: home.name)
def test_picture_is_made_from_the_committed_numbers_and_nothing_is_cut_off(home, tmp_path):
    run = importlib.import_module(f"experiments.{home.name}.run")
    canvas = run.drawing(json.loads((home / "results.json").read_text()))
    _figures.save(canvas, tmp_path, colours=128)
    assert 0 < (tmp_path / "figure.png").stat().st_size < 150_000
    assert _faults_of(canvas) == []


def _faults_of(canvas) -> list[str]:
    """What of a figure is cut off, covered by another part of it, or too small to be read at half the size."""
    width, height = canvas.get_size_inches()
    box, faults = canvas.get_tightbbox(), []
    if box.x0 < -0.01 or box.y0 < -0.01 or box.x1 > width + 0.01 or box.y1 > height + 0.01:
        faults.append(f"something reaches to {box.extents}, out of {width} × {height} inches")
    parts = [*canvas.axes, *canvas.legends]
    boxes = [part.get_tightbbox().padded(-1.0) for part in parts]
    for i, j in itertools.combinations(range(len(parts)), 2):
        if boxes[i].overlaps(boxes[j]):
            faults.append(f"part {i} covers part {j}")
    for axes in canvas.axes:
        letters = [axes.xaxis.label, axes.yaxis.label, axes.title, *axes.get_xticklabels(), *axes.get_yticklabels()]
        faults += [
            f"{text.get_text()!r} is small" for text in letters if text.get_text() and text.get_fontsize() < 10.5
        ]
    return faults


def test_faults_of_a_figure_are_seen():
    canvas = _figures.figure(6, 3)
    left, right = canvas.subplots(1, 2)
    for axes in (left, right):
        _figures.titled(axes, "Title", xlabel="x", ylabel="y")
    canvas.draw_without_rendering()
    assert _faults_of(canvas) == []
    right.tick_params(labelsize=7)
    left.annotate("covers what is beside it", (1.0, 0.5), xycoords="axes fraction")
    left.text(-3, 0.5, "is outside", transform=left.transAxes)
    canvas.set_layout_engine("none")
    assert len({fault.split()[-1] for fault in _faults_of(canvas)}) == 3


def test_pages_are_what_the_numbers_say(capsys):
    assert report.main(["--check"]) == 0, "run python experiments/report.py\n" + "".join(capsys.readouterr())


# What follows tests the tools, on an experiment that is made up.

README = "# Title\n\n**Claim.** It\nworks.\n\n<!-- measured -->\n<!-- /measured -->\nend\n"


@pytest.fixture
def made_up(tmp_path):
    home = tmp_path / "experiments" / "made_up"
    home.mkdir(parents=True)
    (home / "run.py").write_text("")
    (home / "README.md").write_text(README)
    expected = {"table": {"a.b": "the number"}, "bars": {"a.b": ">= 0.5"}, "headline": "{a.b} of 1", "smoke": {}}
    (home / "expected.json").write_text(json.dumps(expected))
    runs = {seed: {"a": {"b": value}, "seconds": 60.0} for seed, value in (("0", 0.4), ("1", 0.8))}
    (home / "results.json").write_text(json.dumps(runs))
    return home


def test_report_writes_rows_by_seed_with_their_mean_and_bar(made_up):
    assert report.main([], made_up.parent) == 0
    assert "| the number `a.b` | 0.400 | 0.800 | 0.600 | ≥ 0.5: **met in 1 of 2** |" in (
        (made_up / "README.md").read_text()
    )
    row = "| [Title](made_up/README.md) | It works. | `python experiments/made_up/run.py --seed 0` | 1.0 | 0.600 of 1 |"
    assert row in (made_up.parent / "README.md").read_text()
    assert report.main(["--check"], made_up.parent) == 0


def test_report_check_writes_nothing_and_names_what_is_out_of_date(made_up, capsys):
    assert report.main(["--check"], made_up.parent) == 1
    assert "out of date: experiments/made_up/README.md" in capsys.readouterr().out
    assert (made_up / "README.md").read_text() == README


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("README.md", "<!-- measured -->\n", "", "the table goes between"),
        ("README.md", "**Claim.**", "Claim:", "no paragraph begins with"),
        ("README.md", "# Title", "Title", "not a title"),
        ("results.json", '"b"', '"c"', "seed 0 has no 'a.b'"),
    ],
)
def test_report_says_what_is_missing(made_up, capsys, file, old, new, says):
    path = made_up / file
    path.write_text(path.read_text().replace(old, new))
    assert report.main([], made_up.parent) == 1
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.95, "0.950"), (12.345, "12.35"), (123.45, "123.5"), (1234.5, "1,234"), (7, "7"), (0.00123, "0.0012")]
    + [(0.0, "0.000"), (None, "–"), (True, "True"), (-12.0, "-12.00")],
)
def test_numbers_are_shown_as_a_person_reads_them(value, text):
    assert report.shown(value) == text


def test_expected_best_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(0)
    runs = list(zip(rng.normal(size=6).tolist(), rng.normal(size=6).tolist(), strict=True))
    for count in (1, 2, 4, 6):
        means = [min(subset)[1] for subset in itertools.combinations(runs, count)]
        assert _search.expected_best(runs, count) == pytest.approx(np.mean(means), abs=1e-12)


def _run(monkeypatch, tmp_path, measure, *arguments):
    monkeypatch.setattr(_common, "_keep_compiled_code", lambda: "")
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    home = tmp_path / "made_up"
    home.mkdir(exist_ok=True)
    return _common.experiment(str(home / "run.py"), "About.", measure), home


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--seed", "-1"], "must be a whole number between 0 and"),
        (["--seed", "one"], "must be a whole number between 0 and"),
        (["--smok"], "unrecognized arguments: --smok"),
        (["--smoke", "--keep"], "mean nothing"),
        (["--out", "no/such/folder"], "there is no folder no/such/folder"),
    ],
)
def test_bad_arguments_give_a_usage_message(monkeypatch, tmp_path, capsys, arguments, says):
    with pytest.raises(SystemExit) as stopped:
        _run(monkeypatch, tmp_path, lambda options, numbers: pytest.fail("measured all the same"), *arguments)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("usage: python experiments/made_up/run.py") and says in err


def test_every_experiment_takes_the_shared_command_line():
    for home in EXPERIMENTS:
        assert re.search(r"^    experiment\(__file__, __doc__, ", (home / "run.py").read_text(), re.M), home.name


def test_keep_adds_the_numbers_of_a_seed_to_those_of_others(monkeypatch, tmp_path, capsys):
    def measure(options, numbers):
        numbers |= {"value": options.seed + 1 / 3, "bad": math.nan}

    for seed in ("3", "0"):
        _, home = _run(monkeypatch, tmp_path, measure, "--seed", seed, "--keep", "--json")
    kept = json.loads((home / "results.json").read_text())
    assert list(kept) == ["0", "3"]
    assert kept["3"]["value"] == 3.333 and kept["3"]["bad"] is None
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == kept["0"]


def test_a_kept_run_draws_from_the_numbers_of_all_seeds_and_draw_measures_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(_common, "_keep_compiled_code", lambda: "")
    home, seen = tmp_path / "made_up", []
    home.mkdir()

    def drawing(results):
        seen.append(list(results))
        return _figures.figure(2, 1)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        measure = lambda options, numbers: numbers.update(curve=[1, 2], value=options.seed)
        return _common.experiment(str(home / "run.py"), "About.", measure, draw=drawing)

    run("--seed", "3", "--keep")
    run("--seed", "0", "--keep")
    kept = (home / "results.json").read_text()
    assert '"curve": [1, 2]' in kept, "a curve takes a line"
    run("--seed", "5")
    (home / "figure.png").unlink()
    assert run("--draw") == {}
    assert seen == [["3"], ["0", "3"], ["0", "3"]]
    assert (home / "figure.png").exists() and (home / "results.json").read_text() == kept


def test_interrupted_experiment_prints_what_it_had(monkeypatch, tmp_path, capsys):
    def measure(options, numbers):
        numbers["first"] = 1
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        _run(monkeypatch, tmp_path, measure, "--keep")
    assert stopped.value.code == 130
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["first"] == 1
    assert not (tmp_path / "made_up" / "results.json").exists()


@pytest.mark.parametrize(("arguments", "beside"), [([], True), (["--seed", "1"], False), (["--smoke"], False)])
def test_pictures_are_kept_beside_the_script_for_seed_0_alone(monkeypatch, tmp_path, arguments, beside):
    _, home = _run(monkeypatch, tmp_path, lambda o, numbers: (o.out / "a.png").write_text(""), *arguments)
    assert (home / "a.png").exists() == beside
    shutil.rmtree(home)
