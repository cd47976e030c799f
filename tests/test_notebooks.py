"""Notebooks as commands: every notebook to its end, errors that say where, reports that fetch nothing."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from notebook_files import external_requests, filled, nbval, notebook

from dmlr import demo, notebooks
from dmlr import index as report_index
from dmlr.cli import main
from dmlr.judge import judge
from dmlr.run.records import find_runs, read_results

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
BENCHMARK, WALKTHROUGH, COMPARE = (FOLDER / f"{n}.ipynb" for n in ("03_benchmark", "01_walkthrough", "04_compare"))
ATTACK = '<script>alert("x")</script>'
STORED = sorted(FOLDER.glob("0[1-9]*.ipynb"))
SMALL = {"end_data_idx": 24, "max_num_steps": 3, "batch_size": 8, "max_new_tokens": 64}


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_outputs_are_those_of_the_stored_code_light_and_with_figures(path):
    stored = nbformat.read(path, as_version=4)
    nbformat.validate(stored)
    assert stored.metadata["dmlr"]["code"] == notebooks.code_hash(stored), "`make notebooks` makes the outputs again"
    assert path.stat().st_size < 1_000_000
    assert not {"papermill", "widgets"} & set(stored.metadata)
    outputs = [output for cell in stored.cells if cell.cell_type == "code" for output in cell.outputs]
    text = json.dumps(outputs)
    assert str(ROOT) not in text and "<script" not in text and "widget-view" not in text
    assert all(output.output_type != "error" for output in outputs)
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(figures) >= {"01": 4}.get(path.stem[:2], 2)
    assert all(len(figure.data["image/png"]) * 3 / 4 < 150_000 for figure in figures)
    assert all(figure.metadata["image/png"]["alt"] for figure in figures)
    assert notebooks.RESULT in stored.cells[0].source


@pytest.mark.slow
def test_what_is_kept_of_a_run(tmp_path):
    source = "import os, sys\nprint(os.getcwd())\nprint('log', file=sys.stderr)\nprint('rounds', rounds)"
    path = notebook(tmp_path / "n.ipynb", source, "1 + 1", "2 + 2")
    stored = nbformat.read(path, as_version=4)
    stored.cells[3].metadata["tags"], stored.cells[4].metadata["tags"] = ["result"], ["report"]
    nbformat.write(stored, path)
    notebooks.run(path, {}, tmp_path / "out.ipynb")
    for _ in range(2):  # again: the sentence of before makes room
        notebooks.keep(tmp_path / "out.ipynb", path)
    kept = nbformat.read(path, as_version=4)
    assert kept.cells[0].source == f"# A title\n\n{notebooks.RESULT} 2"
    assert [output.name for output in kept.cells[2].outputs] == ["stdout"]
    assert "rounds 1" in kept.cells[2].outputs[0].text and kept.cells[4].outputs == []
    assert kept.metadata["dmlr"]["code"] == notebooks.code_hash(kept)
    kept.cells[3].source = "1 + 2"
    assert kept.metadata["dmlr"]["code"] != notebooks.code_hash(kept)
    nbformat.write(kept, path)
    with pytest.raises(notebooks.RunError, match="its code differs"):
        notebooks.keep(tmp_path / "out.ipynb", path)


# the runner


def test_a_failed_run_keeps_its_notebook_and_says_where(tmp_path, capsys):
    """By the line of the cell, not by the cause further down."""
    body = [" try:", "  int('x')", " except ValueError as error:", "  raise RuntimeError('told so') from error"]
    (tmp_path / "reader.py").write_text("\n".join(["def read():", *body]))
    path = notebook(tmp_path / "bad.ipynb", "print('so far')", "from reader import read\nread()  # here")
    (tmp_path / "out.html").write_text("a report of an earlier run")
    assert main(["run", str(path), "--output", str(tmp_path / "out.ipynb")]) == 1
    said = capsys.readouterr().err
    assert "so far" in said and "failed in cell [3]: RuntimeError: told so" in said
    assert "> 2 read()  # here" in said and "int('x')" not in said
    assert str(tmp_path / "out.ipynb") in said
    assert "so far" in (tmp_path / "out.ipynb").read_text()
    assert not (tmp_path / "out.html").exists()


def test_a_kernel_that_dies_is_an_error(tmp_path):
    path = notebook(tmp_path / "dies.ipynb", "import os\nos._exit(3)")
    with pytest.raises(notebooks.RunError, match="the kernel died"):
        notebooks.run(path, output=tmp_path / "out.ipynb")
    assert not (tmp_path / "out.html").exists()


def test_the_kernel_is_this_interpreter_whatever_is_registered(tmp_path, monkeypatch):
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "another", "language": "python"}
    (tmp_path / "kernels" / "python3").mkdir(parents=True)
    (tmp_path / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    path = notebook(tmp_path / "which.ipynb", "import os, sys\nprint(sys.executable, os.getcwd(), rounds)")
    report = notebooks.run(path, {"rounds": "4"}, tmp_path / "elsewhere" / "out.ipynb")
    executed = nbformat.read(report.with_suffix(".ipynb"), as_version=4)  # the report leaves out where the project lies
    assert f"{sys.executable} {tmp_path} 4" in executed.cells[-1].outputs[0].text


# reports


def test_reports_escape_output_and_run_nothing(tmp_path):
    source = f"print({ATTACK!r})\nimport sys\nprint('one\\rtwo\\rthree', file=sys.stderr)\n{ATTACK!r}"
    javascript = f"from IPython.display import Javascript\nJavascript({ATTACK!r})"
    report = notebooks.run(notebook(tmp_path / "n.ipynb", source, javascript), output=tmp_path / "o.ipynb")
    page = report.read_text(encoding="utf-8")
    soup = BeautifulSoup(page, "html.parser")
    assert external_requests(page) == [] and "default-src 'none'" in page
    assert soup.get_text().count(ATTACK) >= 2
    log = soup.find("details", class_="log").get_text()
    assert "three" in log and "two" not in log
    assert soup.title.get_text() == "A title"


def test_headings_become_the_table_of_contents(tmp_path):
    path = notebook(tmp_path / "n.ipynb")
    stored = nbformat.read(path, as_version=4)
    stored.cells.append(nbformat.v4.new_markdown_cell("## Part one & <b>two</b>\n\n### Deeper"))
    nbformat.write(stored, path)
    notebooks.render(path, tmp_path / "n.html")
    soup = BeautifulSoup((tmp_path / "n.html").read_text(encoding="utf-8"), "html.parser")
    links = soup.find("nav").find_all("a")
    assert [link.get_text() for link in links] == ["Part one & two", "Deeper"]
    assert all(soup.find(id=link["href"][1:]) for link in links)


# every notebook to its end, on the embedded model


@pytest.fixture(scope="session")
def benchmark(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "runs" / "small"
    report = notebooks.run(BENCHMARK, {**SMALL, "output_dir": str(folder)})
    return folder, report


def test_benchmark_end_to_end(benchmark):
    """What else records hold, test_evaluate.py says, and how good the model is, test_embedded.py."""
    folder, report = benchmark
    results = {path.name: read_results(path) for path in find_runs(folder)}
    assert list(results) == ["dmlr", "vanilla"]
    truths = [row["solution"] for row in json.loads((ROOT / "data/shapes/mathematics.json").read_text())][:24]
    for result in results.values():
        assert [entry["ground_truth"] for entry in result["entries"]] == truths
        for entry in result["entries"]:
            verdict = judge(entry["model_output"], entry["ground_truth"], question=entry["question"])
            assert entry["is_correct"] == (verdict.status == "correct")
        assert sum("\\boxed" in entry["model_output"] for entry in result["entries"]) >= 20
    assert {(len(entry["rewards"]), *entry["patch_grid"]) for entry in results["dmlr"]["entries"]} == {(3, 6, 6)}
    assert report.name == "03_benchmark_shapes-vl_mathematics_vanilla+dmlr.html"
    soup = BeautifulSoup(report.read_text(encoding="utf-8"), "html.parser")
    text = soup.get_text()
    assert all(f"{result['accuracy']:.1%}" in text for result in results.values())
    right = [[entry["is_correct"] for entry in results[method]["entries"]] for method in ("vanilla", "dmlr")]
    assert f"{sum(after and not before for before, after in zip(*right, strict=True))} gained with dmlr" in text
    assert not soup("caption", string=re.compile("LLM"))  # nobody asked one
    assert re.search(r"mathematics dmlr: (AUROC \d|\d+ right and \d+ wrong answers with a reward)", text)
    assert external_requests(str(soup)) == []
    assert len(soup.find_all("img")) >= 3 and all(image["alt"] for image in soup.find_all("img"))
    assert len(soup.select("article.dmlr-card")) == 24


@pytest.mark.slow
def test_benchmark_runs_through_plain_papermill(tmp_path):
    given = "-p num_thought_tokens 2 -p max_num_steps 5 -p end_data_idx 4".split()
    command = [sys.executable, "-m", "papermill", "notebooks/03_benchmark.ipynb", str(tmp_path / "out.ipynb"), *given]
    subprocess.run([*command, "-p", "output_dir", str(tmp_path / "run")], cwd=ROOT, check=True, capture_output=True)
    (result,) = (read_results(path) for path in find_runs(tmp_path / "run") if path.name == "dmlr")
    assert result["config"]["num_thought_tokens"] == 2
    assert [len(entry["rewards"]) for entry in result["entries"]] == [5] * 4
    assert [len(entry["patches"]) for entry in result["entries"]] == [2] * 4


def test_compare_end_to_end(benchmark, tmp_path):
    """What its tables hold, test_comparison.py says of written runs."""
    folder, _ = benchmark
    report = notebooks.run(COMPARE, {"runs_folder": str(folder.parent)}, tmp_path / "compare.ipynb")
    soup = BeautifulSoup(report.read_text(encoding="utf-8"), "html.parser")
    vanilla, dmlr = (100 * read_results(folder / "mathematics" / name)["accuracy"] for name in ("vanilla", "dmlr"))

    def rows(section):
        head, *rest = soup.find(id=section).find_next("table").find_all("tr")
        names = [cell.get_text() for cell in head.find_all("th")]
        return [dict(zip(names, (cell.get_text() for cell in row.find_all("td")), strict=True)) for row in rest]

    table = rows("Accuracy,-in-the-form-of-Table-1")
    assert [(row["method"], row["mathematics"].split(" [")[0]) for row in table] == [
        ("vanilla", f"{vanilla:.1f}"),
        ("dmlr", f"{dmlr:.1f}"),
    ]
    assert "paper" not in soup.find("table").get_text().lower()  # it never measured this model
    (paired,) = rows("The-difference,-paired")
    assert (paired["run"], paired["dataset"], paired["method"]) == ("small", "mathematics", "dmlr")
    assert paired["difference"] == f"{dmlr - vanilla:+.1f} points"
    assert {"parameter": "T", "A": "3"} in rows("Settings")
    assert "No two runs differ in nothing but the seed." in soup.get_text()
    assert len(soup.find(id="The-figure").find_all_next("img")) == 2
    assert external_requests(str(soup)) == []


def test_compare_without_runs_says_so(tmp_path):
    report = notebooks.run(COMPARE, {"runs_folder": str(tmp_path)}, tmp_path / "compare.ipynb")
    assert "No run under" in report.read_text(encoding="utf-8")


# nbval: stored outputs of the cells marked for it are compared with fresh ones


@pytest.mark.slow
@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_nbval(path, tmp_path):
    small = {"max_num_steps": 1, "end_data_idx": 4, "max_new_tokens": 32, "output_dir": str(tmp_path / "run")}
    small |= {"runs_folder": str(tmp_path), "samples": "1,2", "iterations": "0", "device": "cpu"}
    path, cells = filled(path, small, tmp_path)
    result = nbval(path)
    assert result.returncode == 0, result.stdout[-3000:]
    assert f"{cells} passed" in result.stdout


@pytest.mark.slow
def test_nbval_compares(tmp_path):
    stored = COMPARE.read_text(encoding="utf-8")
    assert stored.count("p = 0.754") == 1, "of the cell whose output is compared"
    (tmp_path / "compare.ipynb").write_text(stored.replace("p = 0.754", "p = 0.755"), encoding="utf-8")
    result = nbval(tmp_path / "compare.ipynb")
    assert result.returncode == 1
    assert "1 failed" in result.stdout and "p = 0.755" in result.stdout


# index and tables


def test_an_index_without_runs_is_a_page(tmp_path):
    assert "No run yet" in report_index.write_index(tmp_path).read_text(encoding="utf-8")


def test_the_demos_table_has_a_row_for_each_models_battery(benchmark, tmp_path):
    shutil.copytree(benchmark[0], tmp_path / "shapes-vl" / "battery")
    saved = {path.name: f"{read_results(path)['accuracy']:.1%}" for path in find_runs(tmp_path)}
    assert demo.latents_table(tmp_path).to_dict("records") == [{"model": "shapes-vl"} | saved]


def test_a_report_does_not_say_where_the_project_lies_nor_what_another_run_found(tmp_path):
    path, report = notebook(tmp_path / "loud.ipynb", "print('a file')"), tmp_path / "loud.html"
    executed = nbformat.read(path, as_version=4)
    place = str(ROOT / "dmlr" / "config.py")
    executed.cells[-1].outputs = [nbformat.v4.new_output("stream", name="stdout", text=place)]
    executed.cells[0].source += f"\n\n{notebooks.RESULT} of another run"
    nbformat.write(executed, path)
    notebooks.render(path, report)
    page = report.read_text()
    assert "of another run" not in page
    assert "dmlr/config.py" in page and str(ROOT) not in page
