"""Reports: every question on one page, light, searchable; whatever a model said is text, and one script may run."""

import base64
import hashlib
import json
import os
import re
import shlex
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from browser import opened
from bs4 import BeautifulSoup
from notebook_files import cell_parameters, external_requests
from PIL import Image

from dmlr import index as report_index
from dmlr import notebooks
from dmlr.cli import parser
from dmlr.parameters import check_parameters, read_parameters
from dmlr.show import gallery
from dmlr.show.provenance import in_words, provenance
from dmlr.show.style import gallery_script, policy, table

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ATTACK = """"><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2"> 'quoted'"""
STATES = {"correct": True, "wrong": False, "unparsed": False, "error": None}


def record(idx, state, **more):
    """A record as evaluate.py writes them, with the keys that a gallery reads."""
    stop, verdict = ("error", None) if state == "error" else ("eos_token", state)
    told = {"data_idx": idx, "question": f"question {idx}?", "ground_truth": "7", "is_correct": STATES[state]}
    return {**told, "verdict": verdict, "stop_reason": stop, "model_output": f"answer {idx}", **more}


def results(**states):
    """Results by (dataset, method) of one dataset "suite": by method a state per example, or its records."""
    lines = {
        method: [record(i, state) for i, state in enumerate(line.split())] if isinstance(line, str) else line
        for method, line in states.items()
    }
    return {("suite", method): {"entries": entries} for method, entries in lines.items()}


def sha256(script):
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def html_of(run, **more):
    return gallery.html(gallery.cards(run), **more)


def soup_of(html):
    return BeautifulSoup(html, "html.parser")


# records -> cards


def test_what_a_method_changed_comes_first():
    found = gallery.cards(
        results(
            vanilla="correct correct wrong unparsed error",
            dmlr="correct unparsed unparsed wrong correct",
            ltpo="correct correct wrong correct correct",
        )
    )
    assert [card["idx"] for card in found] == [1, 3, 0, 2, 4]
    changes = [["lost", "both right"], ["both wrong", "gained"], ["both right"] * 2, ["both wrong"] * 2]
    assert [card["changes"] for card in found] == [*changes, ["not judged"] * 2]
    assert [answer["name"] for answer in found[0]["answers"]] == ["vanilla", "dmlr", "ltpo"]


def test_a_card_says_verdict_rule_reward_and_error():
    told = {"rule": "number:boxed", "initial_reward": 0.5, "best_reward": 0.75, "category": "sums"}
    failed = record(3, "error", error="RuntimeError: no memory", model_output="")
    (card,) = soup_of(html_of(results(vanilla=[failed], dmlr=[record(3, "unparsed", **told)])))("article")
    text = " ".join(card.get_text().split())
    assert "vanilla error RuntimeError: no memory" in text
    assert "dmlr ✗ wrong unparsed · number:boxed · reward 0.5000 → 0.7500 answer 3" in text
    assert "not judged · suite · example 3" in text


def test_runs_that_have_not_the_same_examples_still_show_all_of_them():
    """Rows without an index too, a card each."""
    lost = [record(None, "error", row=row, question="", error=f"row {row}: no prompt") for row in (4, 9)]
    run = results(vanilla=[record(0, "correct"), record(1, "wrong"), *lost], dmlr=[record(0, "wrong"), *lost])
    run["other", "dmlr"] = {"entries": [record("x", "correct")]}
    shown = [(card["changes"], [answer["text"] for answer in card["answers"]]) for card in gallery.cards(run)]
    assert shown == [
        (["lost"], ["answer 0"] * 2),
        *((["not judged"], texts) for texts in (["answer 1"], *([f"row {row}: no prompt"] * 2 for row in (4, 9)))),
        (["not judged"], ["answer x"]),
    ]
    assert len(soup_of(html_of(run))("article")) == 5


# cards -> HTML


def test_tables_escape_and_set_numbers_flush_right():
    frame = pd.DataFrame({"name": [ATTACK], "n": [12], "share": ["81.2%"], "said": ["a\x1bb"]})
    cells = soup_of(table(frame))("td")
    assert [cell.get_text() for cell in cells] == [ATTACK, "12", "81.2%", "a␛b"]
    assert [cell.get("class") for cell in cells] == [None, ["number"], ["number"], None]


def test_hostile_text_stays_text_everywhere_and_steers_nothing():
    """ESC and NUL are shown as symbols, and text that turns the direction ends where it stands."""
    hostile = dict.fromkeys(("question", "ground_truth", "model_output", "rule", "category"), f"{ATTACK}\x1b[2J\x00")
    entries = [record(f"{i} {ATTACK}\u202e", "wrong", **hostile) for i in range(3)]
    run = {(ATTACK, method): {"entries": entries} for method in ("vanilla", ATTACK)}
    run["b", "vanilla"] = {"entries": [record(0, "correct", image_path=f"/{ATTACK}.png", category="c")]}
    html, shown = html_of(run), f"{ATTACK}␛[2J␀"
    soup = soup_of(html)
    assert external_requests(html) == [] and not {"\x1b", "\x00"} & set(html)
    assert len(soup("script")) == 1 and not soup("img")
    # Question, truth, where it is from (dataset, category, example); of both methods: rule, answer; the second's name.
    for card in soup("article")[:3]:
        assert card.get_text().count("window.hacked = 1") == 5 + 4 + 1
        assert (card["data-dataset"], card["data-category"]) == (ATTACK, shown)
    assert sum(one.get_text().endswith("\u202e") for one in soup("bdi")) == 3
    assert {option["value"] for option in soup.select('select[name="category"] option')} == {"", shown, "c"}


def test_an_image_is_stored_once_and_its_patches_are_outlined(tmp_path):
    for name, colour in (("a", "red"), ("b", "blue"), ("same", "red")):
        Image.new("RGB", (120, 60), colour).save(tmp_path / f"{name}.png")
    kept = {"patches": [[0, 7], [7, 99]], "patch_grid": [2, 4]}  # cells of 30 × 30; 99 is none of this image
    paths = [str(tmp_path / f"{name}.png") for name in "aaab"]
    records = [record(i, "correct", image_path=path) for i, path in enumerate(paths)]
    records.append(record(4, "correct", image_path=[str(tmp_path / "same.png"), paths[3]], **kept))
    soup = soup_of(html_of(results(dmlr=records)))
    stored = [image["id"] for image in soup.select("defs image")]
    assert len(stored) == len(set(stored)) == 2
    assert {use["href"].removeprefix("#") for use in soup("use")} == set(stored)
    assert [len(card("svg")) for card in soup("article")] == [1, 1, 1, 1, 2]
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in soup.select("article svg"))
    lines = {path["class"][0]: path["d"] for path in soup("article")[4]("path")}
    nested = "M94.5 34.5h21v21h-21z"
    assert lines == {"token0": "M1.5 1.5h27v27h-27zM91.5 31.5h27v27h-27z", "token1": nested}


def test_a_thumbnail_that_cannot_be_made_is_named_and_nothing_is_downloaded(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    paths = [str(tmp_path / "broken.png"), "https://example.com/a.png", None]
    html = html_of(results(dmlr=[record(i, "correct", image_path=path) for i, path in enumerate(paths)]))
    broken, remote, none = (card.get_text() for card in soup_of(html)("article"))
    assert "no image: " in broken and "not downloaded" in remote and "no image" not in none


def test_a_thousand_photographs_stay_below_fifteen_megabytes(tmp_path):
    """Bytes per card, of a picture with at least as much detail as photographs have."""
    Image.effect_noise((48, 36), 60).resize((512, 384)).convert("RGB").save(tmp_path / "a.jpg", quality=92)
    kept = {"patches": [list(range(16))] * 4, "patch_grid": [14, 18], "model_output": "word " * 60}
    entries = [record(0, "correct", image_path=str(tmp_path / "a.jpg"), **kept)]
    assert len(html_of(results(vanilla=entries, dmlr=entries)).encode()) - len(gallery.html([]).encode()) < 15e3


def test_cards_beyond_the_most_are_counted():
    html = html_of(results(vanilla="wrong " * 5, dmlr="wrong wrong wrong wrong correct"), most=3)
    assert [card["data-changes"] for card in soup_of(html)("article")] == ["gained", "both wrong", "both wrong"]
    assert "2 more examples are not shown" in html


# the page


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report with a wide table and two galleries: of six questions and two methods, some of it hostile; and of three
    methods."""
    folder = tmp_path_factory.mktemp("report")
    Image.new("RGB", (90, 90), "white").save(folder / "white.png")
    two = results(vanilla="wrong correct correct correct wrong wrong", dmlr="correct wrong correct correct wrong error")
    for result in two.values():
        for entry in result["entries"]:
            entry["category"] = "even" if entry["data_idx"] % 2 == 0 else "odd"
        result["entries"][2]["model_output"] = ATTACK
    three = results(vanilla="wrong wrong correct", dmlr="correct wrong correct", ltpo="wrong correct wrong")
    for run, at in ((two, 0), (three, 2)):
        run["suite", "vanilla"]["entries"][at]["image_path"] = str(folder / "white.png")
        for method in ("dmlr", "ltpo")[: len(run) - 1]:
            run["suite", method]["entries"][at] |= {"patches": [[0], [3]], "patch_grid": [2, 2]}
    wide = table(pd.DataFrame([{f"a column {n}": ATTACK for n in range(9)}]))
    shown = [nbformat.v4.new_output("display_data", {"text/html": t}) for t in (wide, html_of(two), html_of(three))]
    executed = nbformat.v4.new_notebook()
    executed.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    executed.metadata["papermill"] = {
        "input_path": str(ROOT / "notebooks" / "03_benchmark.ipynb"), "duration": 63.4,
        "start_time": "2026-01-02T03:04:05+00:00",
        "parameters": {"dataset": f"{ROOT}/data/a b.json,c", "resume": True, "seed": 42},
    }  # fmt: skip
    executed.cells = [nbformat.v4.new_markdown_cell("# A title"), nbformat.v4.new_code_cell("1", outputs=shown)]
    executed.cells.append(nbformat.v4.new_code_cell("seed: int = 42", metadata={"tags": ["parameters"]}))
    nbformat.write(executed, folder / "executed.ipynb")
    notebooks.render(folder / "executed.ipynb", folder / "report.html")
    return folder / "report.html"


def test_the_policy_allows_the_pages_script_and_no_other(report):
    soup = soup_of(report.read_text(encoding="utf-8"))
    (script,) = {script.string for script in soup("script")}
    rules = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    rules += f"script-src '{sha256(script)}'; base-uri 'none'; form-action 'none'"
    content = soup.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
    assert content == policy() == rules and "</script" not in gallery_script()


def test_the_header_says_when_how_long_and_by_which_command(report):
    head = soup_of(report.read_text(encoding="utf-8")).select_one(".masthead")
    assert "DMLR · executed · 2026-01-02 03:04 UTC · took 1 min 3 s" in head.get_text()
    command = "python -m dmlr run notebooks/03_benchmark.ipynb -p dataset 'data/a b.json,c' -p resume true"
    assert head.code.get_text() == command


def test_the_command_makes_the_run_again_whatever_its_parameters_hold():
    assert provenance({}, ROOT, {}) == {}
    made = {"input_path": "/elsewhere/n.ipynb", "start_time": "2026-01-02T03:04:05+00:00", "duration": 1.0}
    made["parameters"] = {"label": "a 'b' $(c)", "n": None, "x": 0.5, "flag": False, "same": 1}
    words = shlex.split(provenance({"papermill": made}, ROOT, {"same": 1})["command"])
    assert words[:5] == ["python", "-m", "dmlr", "run", "/elsewhere/n.ipynb"]
    assert words[5:] == "-p|label|a 'b' $(c)|-p|n|none|-p|x|0.5|-p|flag|false".split("|")
    assert [in_words(seconds) for seconds in (0.4, 59.6, 3600, 7860)] == ["0 s", "1 min 0 s", "1 h 0 min", "2 h 11 min"]


def visible(shown):
    """The visible cards' texts, by example."""
    texts = shown.locator(".dmlr-card:visible").all_text_contents()
    return {int(re.search(r"example (\d)", text)[1]): text for text in texts}


def test_the_gallery_filters_in_a_browser(report):
    with opened() as tab:
        tab.goto(report.as_uri())
        shown = tab.locator(".dmlr-gallery").first
        count, outcome = shown.locator("output"), shown.get_by_label("From vanilla to dmlr")
        assert count.inner_text() == "6 of 6 shown"
        assert outcome.locator("option").all_inner_texts() == [
            "all outcomes", "gained (1)", "lost (1)", "both wrong (1)", "both right (2)", "not judged (1)",
        ]  # fmt: skip
        outcome.select_option("both right")
        assert (set(visible(shown)), count.inner_text()) == ({2, 3}, "2 of 6 shown")
        shown.get_by_label("Category").select_option("odd")
        assert set(visible(shown)) == {3}
        shown.get_by_role("button", name="Reset").click()
        assert set(visible(shown)) == {0, 1, 2, 3, 4, 5}
        assert tab.evaluate("() => document.activeElement.name") == "text"  # the search box, ready for the keyboard
        tab.keyboard.type("QUESTION answer 4")
        assert set(visible(shown)) == {4}
        tab.keyboard.type(" nowhere")
        assert (visible(shown), count.inner_text()) == ({}, "0 of 6 shown")
        shown.get_by_role("button", name="Reset").press("Enter")
        path = shown.locator("path").first
        assert path.is_visible()
        shown.get_by_label("kept patches").press("Space")
        assert not path.is_visible()
        outcome.select_option("lost")
        tab.emulate_media(media="print")  # on paper: all cards, no controls
        assert len(visible(shown)) == 6 and not count.is_visible()
        assert tab.left == []
        assert tab.evaluate("() => window.hacked") is None


def test_between_three_methods_the_reader_chooses(report):
    with opened() as tab:
        tab.goto(report.as_uri())
        shown = tab.locator(".dmlr-gallery").last
        for position, method in ((1, "dmlr"), (2, "ltpo")):
            shown.get_by_label("vanilla against").select_option(label=method)
            kept = [shown.locator(f".method{i} path").first.is_visible() for i in (1, 2)]
            assert kept == [position == 1, position == 2]  # of the method chosen
            shown.get_by_label("Outcome").select_option("gained")
            ((example, text),) = visible(shown).items()
            assert example == position - 1 and re.search(rf"{method}\s+✓ right\s+gained", text)
            shown.get_by_label("Outcome").select_option("")


def test_a_script_that_slips_through_does_not_run(report, tmp_path):
    """Were escaping ever forgotten, the policy still stops scripts, handlers and requests; without it they run."""
    html, place, asked = report.read_text(encoding="utf-8"), "http://outside.test", []
    raw = f'<script>window.hacked = 1</script><img src="{place}/x.png"><script src="{place}/x.js"></script>'
    raw += '<img src="data:image/png;base64,AA" onerror="window.handled = 1">'
    guarded, bare = tmp_path / "guarded.html", tmp_path / "bare.html"
    guarded.write_text(html.replace("answer 4", raw), encoding="utf-8")
    bare.write_text(html.replace("answer 4", raw).replace(policy(), ""), encoding="utf-8")
    hacked = "() => [window.hacked, window.handled]"
    with opened() as tab:
        tab.route(f"{place}/**", lambda route: (asked.append(route.request.url), route.abort()))
        tab.goto(guarded.as_uri(), wait_until="networkidle")
        assert (tab.evaluate(hacked), asked) == ([None, None], [])
        assert tab.locator("output").first.inner_text() == "6 of 6 shown"  # our own script did run
        tab.goto(bare.as_uri(), wait_until="networkidle")
        assert (tab.evaluate(hacked), sorted(set(asked))) == ([1, 1], [f"{place}/x.js", f"{place}/x.png"])


def test_a_report_is_readable_on_a_phone_and_without_scripts(report):
    with opened(viewport={"width": 390, "height": 800}, color_scheme="dark") as tab:
        tab.goto(report.as_uri())
        assert tab.evaluate("() => document.documentElement.scrollWidth") == 390
        style = "page => [getComputedStyle(page).backgroundColor, getComputedStyle(page).color]"
        colours = tab.locator("body").evaluate(style)
        paper, ink = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
        assert paper < 150 < 600 < ink
    with opened(java_script_enabled=False) as tab:
        tab.goto(report.as_uri())
        assert len(visible(tab.locator(".dmlr-gallery").first)) == 6
        assert not tab.locator(".dmlr-controls").first.is_visible()


# the index


def test_the_index_is_sorted_has_headline_numbers_and_survives_a_broken_run(tmp_path):
    broken = tmp_path / "runs" / "old" / "suite" / "dmlr" / "results.json"
    for folder, method, states in [("old", "vanilla", "wrong correct"), ("old", "dmlr", "wrong"),
                                   ("new", "vanilla", "wrong wrong"), ("new", "dmlr", "correct correct")]:  # fmt: skip
        (result,) = results(**{method: states}).values()
        target = tmp_path / "runs" / folder / "suite" / method / "results.json"
        target.parent.mkdir(parents=True)
        target.write_text(json.dumps({"model": "a/model", "dataset": "suite.json", "method": method, **result}))
        if folder == "old":
            os.utime(target, (1e9, 1e9))
    broken.write_text("{")
    os.utime(broken, (1e9, 1e9))
    (tmp_path / "runs" / "new" / "a.html").write_text("<title>The &lt;report&gt;</title>")
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "b.html").write_text("<title>Another</title>")
    html = report_index.write_index(tmp_path).read_text(encoding="utf-8")
    soup = soup_of(html)
    runs = soup.select("ul.runs > li")
    assert [run.h3.get_text() for run in runs] == ["new", "old"]
    assert (runs[0].a["href"], runs[0].a.get_text()) == ("runs/new/a.html", "The <report>")
    rows = [[cell.get_text() for cell in row.find_all("td")] for row in runs[0].select("tbody tr")]
    assert [row[:3] + row[4:7] for row in rows] == [
        ["suite", "vanilla", "0.0%", "", "", "2"],
        ["suite", "dmlr", "100.0%", "+100.0 points (2 gained, 0 lost)", "0.5", "2"],
    ]
    assert "not valid JSON" in runs[1].get_text()
    assert str(tmp_path) not in html
    assert [link["href"] for link in soup.find(id="other-reports").find_all_next("a")] == ["examples/b.html"]
    assert external_requests(html) == []


# the cost of reading


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_parameter_has_a_type_and_a_meaning_for_papermills_help(path):
    known = cell_parameters(path)
    assert known
    for name, parameter in known.items():
        assert parameter["inferred_type_name"] in ("str", "int", "float", "bool"), name
        assert len(parameter["help"]) > 5, f"{path.name}: {name} has no help"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_with_what_it_shows_how_long_it_takes_and_what_it_follows(path):
    opening = nbformat.read(path, as_version=4).cells[0].source
    assert opening.startswith("# ")
    assert re.search(r"(second|minute|quarter of an hour)", opening), "how long it takes"
    assert "CPU" in opening or "laptop" in opening, "on what"
    if not path.stem.startswith("00"):  # how the embedded model is made follows no figure
        assert re.search(r"\b([Ff]igures?|Tables?) \d", opening), "which figure or table it follows"
        assert "arxiv.org/abs/2512.12623" in opening


EXAMPLES = sorted((ROOT / "reports" / "examples").glob("*.html"))


def test_example_reports_are_two_light_whole_and_ask_for_nothing():
    assert [path.stem for path in EXAMPLES] == ["benchmark", "table1"]
    assert sum(path.stat().st_size for path in EXAMPLES) < 3e6
    for path in EXAMPLES:
        html = path.read_text(encoding="utf-8")
        (allowed,) = re.findall(r'<meta [^>]*http-equiv="Content-Security-Policy"[^>]*>', html)
        assert "default-src 'none'; img-src data:; " in allowed
        scripts = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
        assert all(f"script-src '{sha256(script)}'" in allowed for script in scripts)
        assert external_requests(re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)) == []
        assert "Traceback (most recent" not in html and "· took " in html
        assert re.search(r'<img [^>]*alt="[^"]', html) and not re.search(r'<img (?![^>]*alt="[^"])', html)


def test_every_run_that_the_readme_shows_would_start():
    """The READMEs' own commands: their notebooks, parameter files and parameters exist and are in range."""
    text = "\n".join((ROOT / folder / "README.md").read_text(encoding="utf-8") for folder in (".", "notebooks"))
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", " ")
    commands = [shlex.split(found, comments=True) for found in re.findall(r"python -m dmlr (run .*)", blocks)]
    assert len(commands) > 8
    for command in commands:
        arguments = parser.parse_args(command)
        given = {}
        for file in arguments.file:
            given |= read_parameters(ROOT / file)
        check_parameters(ROOT / arguments.notebook, given | dict(arguments.parameter))
