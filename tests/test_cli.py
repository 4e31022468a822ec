"""The command line: what it writes equals what the library says, and every refusal is one line."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxem
from jaxem import Mixture, MixtureParams, Normal, NormalParams, Status, datasets
from jaxem.__main__ import main
from jaxem.command import grid, picture, report
from jaxem.command.read import Sheet, read_csv

FILES = ["fit.json", "fit.png", "responsibilities.csv"]
SMALL = ["--components", "1:2", "--covariance", "tied", "--restarts", "8", "--seed", "3"]
PNG = b"\x89PNG\r\n"


def write_csv(path: Path, header: str, rows: np.ndarray) -> Path:
    lines = [header, *(",".join(map(repr, row)) for row in rows.tolist())]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a small fit of Old Faithful leaves."""
    folder = tmp_path_factory.mktemp("fitted")
    data = write_csv(folder / "geyser.csv", '"eruptions","waiting"', datasets.faithful())
    assert main(["fit", str(data), *SMALL, "--out", str(folder / "made" / "by it")]) == 0
    return folder / "made" / "by it"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused: its one line. Nothing may be written."""

    def run(*arguments: str) -> str:
        before = sorted(here.rglob("*"))
        assert main(arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        assert sorted(here.rglob("*")) == before
        return printed.err

    return run


def entry(params: MixtureParams, covariance: str = "full", **changes: object) -> grid.Entry:
    """A configuration's ending made by hand."""
    count = len(params.weights)
    made = grid.Entry(
        components=count,
        covariance=covariance,
        params=params,
        covariances=np.asarray(Normal(covariance).covariance_matrix(params.components)),
        status=Status.CONVERGED,
        objective=-10.0,
        loglik=-10.0,
        steps=5,
        num_parameters=4,
        aic=28.0,
        bic=30.0,
        icl=31.0,
        hits=3,
        endings={status: 0 for status in Status if status >= 0} | {Status.CONVERGED: 4},
        seconds=0.1,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def normals(count: int, columns: int, spread: float = 1.0) -> MixtureParams:
    return MixtureParams(
        weights=np.full(count, 1 / count),
        components=NormalParams(
            mean=np.arange(count * columns, dtype=float).reshape(count, columns),
            covariance=np.tile(spread * np.eye(columns), (count, 1, 1)),
        ),
    )


# What a fit writes.


def test_fit_writes_its_three_files_and_no_other(fitted: Path) -> None:
    assert sorted(path.name for path in fitted.iterdir()) == FILES
    assert (fitted / "fit.png").read_bytes().startswith(PNG)


def test_fit_json_holds_what_fit_restarts_gives_with_the_same_seed(fitted: Path) -> None:
    x = datasets.faithful().astype(np.float32)
    model = Mixture(Normal("tied"), 2)
    runs = jaxem.fit_restarts(model, jax.random.key(3), x, num_restarts=8)
    params = runs.best.params
    found = json.loads((fitted / "fit.json").read_text())
    assert found["columns"] == ["eruptions", "waiting"]
    assert (found["rows"], found["restarts"], found["seed"], found["dtype"]) == (272, 8, 3, "float32")
    assert [(row["components"], row["covariance"]) for row in found["table"]] == [(1, "tied"), (2, "tied")]

    best = found["best"]
    assert best["weights"] == params.weights.tolist()
    assert best["means"] == params.components.mean.tolist()
    assert best["covariances"] == params.components.covariance.tolist()
    assert best["objective"] == float(runs.best.objective)
    assert best["loglik"] == float(runs.best.loglik)
    assert best["steps"] == int(runs.best.num_steps)
    assert best["status"] == "CONVERGED"
    assert best["parameters"] == model.num_parameters(params)
    assert best["reached_best"] == int(runs.hits())
    assert sum(best["restarts_ended"].values()) == 8
    for criterion in (jaxem.aic, jaxem.bic, jaxem.icl):
        assert best[criterion.__name__] == pytest.approx(float(criterion(model, params, x)), rel=1e-6)
    assert found["table"][1] == {name: best[name] for name in found["table"][1]}


def test_responsibilities_are_the_posterior_and_sum_to_one(fitted: Path) -> None:
    path = fitted / "responsibilities.csv"
    assert path.read_text().splitlines()[0] == "component_1,component_2"
    shares = np.loadtxt(path, delimiter=",", skiprows=1)
    assert shares.shape == (272, 2)
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-6)
    weights = json.loads((fitted / "fit.json").read_text())["best"]["weights"]
    np.testing.assert_allclose(shares.mean(0), weights, atol=1e-3)


def test_float64_is_float64_and_leaves_jax_as_it_was(here: Path) -> None:
    x = datasets.galaxies()[:, None]
    write_csv(here / "galaxies.csv", "velocity", x)
    before = jax.config.jax_enable_x64
    arguments = ["--components", "1", "--covariance", "full", "--restarts", "2", "--dtype", "float64"]
    assert main(["fit", "galaxies.csv", *arguments]) == 0
    assert jax.config.jax_enable_x64 == before
    best = json.loads((here / "fit.json").read_text())["best"]
    assert best["means"][0][0] == pytest.approx(x.mean(), rel=1e-14)
    assert best["covariances"][0][0][0] == pytest.approx(x.var(), rel=1e-12)
    assert (here / "responsibilities.csv").read_text().splitlines() == ["component_1", *["1.0"] * 82]


def test_main_job_fits_old_faithful_and_marks_the_best_bic(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    fit_grid = grid.fit_grid

    def smaller(x: np.ndarray, *job: object) -> list[grid.Entry]:
        asked.append((x.dtype, *job[:-1]))
        return fit_grid(x, [1, 2], ["tied"], 8, 3, lambda: None)

    monkeypatch.setattr(grid, "fit_grid", smaller)
    assert main([]) == 0
    assert asked == [(np.float32, [1, 2, 3, 4, 5, 6], ("full", "tied", "diag", "spherical"), 256, 0)]
    table = capsys.readouterr().out.splitlines()
    (marked,) = [line for line in table if "best BIC" in line]
    assert marked.split()[:2] == ["2", "tied"]
    assert any("lower is better" in line for line in table)
    assert [path.name for path in here.iterdir()] == ["jaxem-fit.png"]


# What counts as best.


def test_a_degenerate_fit_is_never_best() -> None:
    collapsed = entry(normals(2, 1), status=Status.DEGENERATE, bic=-1e6)
    sound = entry(normals(1, 1))
    assert grid.best_entry([collapsed, sound]) is sound
    table = report.format_table([collapsed, sound], sound).splitlines()
    assert "degenerate" in table[1]
    assert "best BIC" not in table[1]
    assert table[2].endswith("<- best BIC")


def test_the_best_is_certified() -> None:
    """From a saddle, both components alike, it goes on to where restarts lead; from there it stays."""
    x = datasets.faithful().astype(np.float32)
    sound, _ = grid.fit_grid(x, [2, 3], ["diag"], 8, 3, lambda: None)
    model = Mixture(Normal("diag"), 2)
    saddle = model.params_from_responsibilities(x, np.full((len(x), 2), 0.5))
    height = float(jnp.sum(model.log_prob(saddle, x)))
    found = grid._certified(dataclasses.replace(sound, params=saddle, objective=height, hits=8), x)
    assert height < sound.objective - 100
    assert found.objective == pytest.approx(sound.objective, abs=1e-2)
    assert found.bic == pytest.approx(sound.bic, abs=2e-2)
    assert (found.status, found.hits) == (Status.CONVERGED, 1)
    again = grid._certified(sound, x)
    assert dataclasses.replace(again, seconds=sound.seconds) == sound


def test_when_all_fits_degenerate_nothing_is_written(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    collapsed = entry(normals(2, 1), status=Status.DEGENERATE)
    monkeypatch.setattr(grid, "fit_grid", lambda *_: [collapsed])
    assert main([]) == 1
    assert "default_prior" in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_numbers_that_are_not_finite_are_null_in_the_json() -> None:
    best = entry(normals(1, 1), icl=float("nan"), aic=float("-inf"))
    found = json.loads(report.fit_json({}, [best], best))["best"]
    assert found["icl"] is None
    assert found["aic"] is None


# The picture.


@pytest.mark.parametrize(("columns", "rows"), [(1, 40), (2, 40), (5, 40), (4, 1), (2, 30_000)])
def test_pictures_are_drawn_for_any_number_of_columns(columns: int, rows: int) -> None:
    x = np.random.default_rng(0).normal(size=(rows, columns))
    sheet = Sheet("data", tuple(f"column {i}" for i in range(columns)), x)
    best = entry(normals(3, columns))
    entries = [best, entry(normals(2, columns, 1e-9), status=Status.DEGENERATE), entry(normals(1, columns), "full")]
    assert picture.draw(sheet, entries, best, np.full((rows, 3), 1 / 3)).startswith(PNG)


# Refusals.


@pytest.mark.parametrize(
    ("text", "arguments", "named"),
    [
        ("a,b\n1,2\nx,4\n", [], ["'a'", "'x'", "row 2", "line 3", "--columns"]),
        ("a,b\n1,NA\n3,\n", [], ["'b'", "no value", "--columns"]),
        ("a,b\n1,2\n3,NaN\n", ["--components", "1"], ["'b'", "constant"]),
        ("a,b\n1,2\n3,inf\n", [], ["'b'", "inf", "row 2"]),
        ("a,b\n1,2\n3,1e39\n", [], ["'b'", "1e39", "--dtype float64"]),
        ("a,b\n1,2\n3\n", [], ["row 2", "1 cells"]),
        ("a,b\n1,2\n3,4\n", [], ["2 rows", "6 components", "--components"]),
        ("a,b\n1,2\n3,2\n", ["--components", "1"], ["'b'", "constant", "--columns"]),
        ("a,b\n1,2\n", ["--columns", "a,c"], ["'c'", "a, b"]),
        ("a,b\n1,2\n", ["--columns", "a,a"], ["'a'", "twice"]),
        ("a,a\n1,2\n", [], ["'a'", "rename"]),
        ("b,,a\n1,1,2\n", [], ["column 2", "no name"]),
        ("1,2\n3,4\n", [], ["header"]),
        (
            "time\n1000000000001\n1000000000002\n1000000000003\n",
            ["--components", "1"],
            ["'time'", "float32", "--dtype float64"],
        ),
        ("a\n16777216.5\n16777217.5\n16777218.5\n", ["--components", "1"], ["'a'", "float32", "--dtype float64"]),
        ("a,b\n1,5,2,5\n", [], ["row 1", "4 cells", "decimal", "semicolons"]),
        ('a,b\n"1,5","2,5"\n', [], ["'a'", "'1,5'", "decimal point", "semicolons"]),
        ("a;b\n1,5;2.5\n", [], ["'1,5'", "'2.5'", "both", "points"]),
        ("a;b\n1.234,5;2\n", [], ["'a'", "'1.234,5'"]),
        (",a\n0,1\n2,3\n", [], ["column 1", "no name", "number the rows"]),
        ("a,b\nfirst,1,2\nsecond,3,4\n", [], ["row 1", "3 cells", "row's name"]),
        ("", [], ["empty"]),
        ("a,b\n", [], ["no rows"]),
        ('a,b\n"1,2\n', [], ["not valid CSV"]),
        ("a\n1\n", ["--covariance", "full,round"], ["--covariance", "'round'", "'spherical'"]),
        ("a\n1\n", ["--components", "0:3"], ["--components", "'0:3'"]),
        ("a\n1\n", ["--components", "3:1"], ["--components", "'3:1'"]),
        ("a\n1\n", ["--components", "1:2:3"], ["--components", "'1:2:3'"]),
        ("a\n1\n", ["--components", "two"], ["--components", "'two'"]),
        ("a\n1\n", ["--restarts", "0"], ["--restarts", "'0'"]),
        ("a\n1\n", ["--seed", "-1"], ["--seed", "-1"]),
        ("a\n1\n", ["--dtype", "float16"], ["--dtype", "float16"]),
        ("a\n1\n", ["--colour", "red"], ["--colour"]),
    ],
)
def test_bad_files_and_options_are_refused_by_name(
    here: Path, refused: Callable[..., str], text: str, arguments: list[str], named: list[str]
) -> None:
    (here / "data.csv").write_text(text)
    line = refused("fit", "data.csv", *arguments)
    for name in named:
        assert name in line


@pytest.mark.parametrize(
    ("text", "columns", "said"),
    [
        ("a;b\n1,5;2\n-3,25;4e1\n", ("a", "b"), ["semicolons", "decimal points"]),
        ("a;b\n1.5;2\n-3.25;40\n", ("a", "b"), ["semicolons"]),
        ("a\tb\n1.5\t2\n-3.25\t40\n", ("a", "b"), ["tabs"]),
        (",a,b\n0,1.5,2\n1,-3.25,40\n", ("a", "b"), ["numbers the rows"]),
        ('"","a","b"\n"1",1.5,2\n"2",-3.25,40\n', ("a", "b"), ["numbers the rows"]),
        ("Unnamed: 0,a,b\n0,1.5,2\n1,-3.25,40\n", ("a", "b"), ["numbers the rows"]),
        ('"a;1","b"\n1.5,2\n-3.25,40\n', ("a;1", "b"), []),
    ],
)
def test_what_can_safely_be_understood_is_read_and_said(
    here: Path, text: str, columns: tuple[str, ...], said: list[str]
) -> None:
    (here / "data.csv").write_text(text)
    sheet = read_csv(here / "data.csv", None, "float32")
    assert sheet.columns == columns
    np.testing.assert_array_equal(sheet.rows, [[1.5, 2], [-3.25, 40]])
    assert len(sheet.notes) == len(said)
    for note, part in zip(sheet.notes, said, strict=True):
        assert part in note


def test_what_was_understood_is_printed(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "data.csv").write_text("a;b\n1,5;2\n-3,25;4\n")
    monkeypatch.setattr(grid, "fit_grid", lambda *_: [entry(normals(1, 2))])
    assert main(["fit", "data.csv", "--components", "1"]) == 0
    printed = capsys.readouterr().out
    assert "data.csv: columns are separated by semicolons" in printed
    assert "data.csv: commas are read as decimal points" in printed


def test_missing_values_are_integrated_out_and_it_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    x[np.random.default_rng(1).random(x.shape) < 0.1] = np.nan
    write_csv(here / "data.csv", "a,b,c", x.astype(float))
    assert main(["fit", "data.csv", "--components", "1", "--restarts", "2"]) == 0
    assert "data.csv: column 'a' has" in capsys.readouterr().out
    found = json.loads((here / "fit.json").read_text())
    assert [row["covariance"] for row in found["table"]] == ["diag", "spherical"]
    # One component of independent columns: what is observed of each has its own mean and variance.
    each = [column[~np.isnan(column)].astype(float) for column in x.T]
    loglik = sum(-0.5 * len(v) * (np.log(2 * np.pi * v.var()) + 1) for v in each)
    assert found["table"][0]["loglik"] == pytest.approx(loglik, rel=1e-5)
    # Correlated columns take them too, where they are asked for, and have no lower likelihood.
    assert main(["fit", "data.csv", "--components", "1", "--restarts", "2", "--covariance", "full"]) == 0
    assert json.loads((here / "fit.json").read_text())["table"][0]["loglik"] > loglik


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_pictures_are_drawn_of_data_with_missing_values(columns: int) -> None:
    x = np.random.default_rng(0).normal(size=(40, columns))
    x[3, 0] = np.nan
    best = entry(normals(2, columns))
    sheet = Sheet("data", tuple("abcd"[:columns]), x)
    assert picture.draw(sheet, [best], best, np.full((40, 2), 0.5)).startswith(PNG)


def test_a_column_that_only_float64_can_tell_apart_is_fitted_there(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_csv(here / "data.csv", "time", 1e12 + np.arange(9.0)[:, None])
    asked = []
    monkeypatch.setattr(grid, "fit_grid", lambda x, *_: asked.append(x) or [entry(normals(1, 1))])
    assert main(["fit", "data.csv", "--components", "1", "--dtype", "float64"]) == 0
    np.testing.assert_array_equal(asked[0][:, 0], 1e12 + np.arange(9.0))


def test_a_file_without_its_command_is_refused_with_the_command(here: Path, refused: Callable[..., str]) -> None:
    write_csv(here / "data.csv", "a", np.arange(9.0)[:, None])
    assert "python -m jaxem fit data.csv" in refused("data.csv")
    assert "python -m jaxem fit data.csv" in refused("--out", "results", "data.csv")


def test_what_the_command_line_writes_in_a_clone_is_ignored_by_git() -> None:
    root = Path(jaxem.__file__).parents[1]
    if not (root / ".git").exists():
        pytest.skip("not a clone")
    made = ["jaxem-fit.png", *FILES]
    found = subprocess.run(["git", "check-ignore", *made], cwd=root, capture_output=True, text=True, timeout=60)
    assert sorted(found.stdout.split()) == sorted(made)


def test_unreadable_files_are_refused(here: Path, refused: Callable[..., str]) -> None:
    (here / "latin.csv").write_bytes("größe\n1\n".encode("latin-1"))
    assert "missing.csv" in refused("fit", "missing.csv")
    assert "latin.csv is not UTF-8" in refused("fit", "latin.csv")
    assert "cannot read ." in refused("fit", ".")
    assert "DATA.csv" in refused("fit")


def test_unwritable_folders_are_refused_before_any_fit(
    here: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "fit_grid", lambda *_: pytest.fail("fitted before it could know where to write"))
    write_csv(here / "data.csv", "a", np.arange(9.0)[:, None])
    assert "data.csv/results" in refused("fit", "data.csv", "--out", "data.csv/results")
    assert "--out" in refused("--out", "data.csv")


def test_the_data_are_never_overwritten(here: Path, refused: Callable[..., str]) -> None:
    write_csv(here / "responsibilities.csv", "a", np.arange(9.0)[:, None])
    assert "overwrite" in refused("fit", "responsibilities.csv")


def test_a_failure_while_writing_leaves_what_was_there(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "a").write_bytes(b"old")
    write_bytes = Path.write_bytes

    def full_disk(path: Path, content: bytes) -> int:
        if content == b"second":
            write_bytes(path, b"sec")
            raise OSError(28, "No space left on device")
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(jaxem.command.Refusal, match="No space left"):
        report.write_files(here, {"a": b"first", "b": b"second"})
    assert [path.name for path in here.iterdir()] == ["a"]
    assert (here / "a").read_bytes() == b"old"


def test_without_matplotlib_nothing_is_fitted(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert 'pip install "jaxem[cli,plot]"' in refused()


def test_without_tqdm_there_is_one_line_and_no_bar(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(grid, "fit_grid", lambda *_: [entry(normals(1, 2))])
    assert main([]) == 0
    error = capsys.readouterr().err
    assert 'pip install "jaxem[cli,plot]"' in error
    assert error.count("\n") == 1


def test_an_interruption_is_one_line_and_exit_130(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(grid, "fit_grid", interrupt)
    assert main([]) == 130
    assert capsys.readouterr().err.count("\n") == 1
    assert list(here.iterdir()) == []


def test_as_a_command_a_refusal_is_exit_code_2_and_one_line(here: Path) -> None:
    command = [sys.executable, "-m", "jaxem", "fit", "missing.csv"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("jaxem: ")
    assert done.stderr.count("\n") == 1
