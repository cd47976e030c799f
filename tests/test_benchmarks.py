"""The seven benchmarks from small files in the hub's own layouts and column names; no network."""

import hashlib
import io
import json
import re
import shutil
import socket
import zipfile
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from dmlr.cli import main
from dmlr.data.benchmarks import BENCHMARKS, choice_fields, inline_options
from dmlr.data.check import check_dataset
from dmlr.data.examples import load_dataset
from dmlr.data.prepare import BenchmarkError, Folder, prepare, raw_rows, row_of, sample_rows
from dmlr.judge import judge
from dmlr.run.verdicts import hints

datasets.disable_progress_bars()


def picture(number=0, format="PNG", mode="RGB"):
    """An encoded image whose pixels tell which one it is."""
    image = Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 12, 3), dtype=np.uint8))
    file = io.BytesIO()
    image.convert(mode).save(file, format)
    return file.getvalue()


def image(number=0, **how):
    return {"bytes": picture(number, **how), "path": f"images/{number}.png"}


def table(path, rows):
    """A parquet file with the columns of the first row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(path)


def card(folder, **configs):
    """The README that tells the library which files are which split, as the hub's repositories have it."""
    lines = [f"- config_name: {name}\n  data_files:\n  - {data}\n" for name, data in configs.items()]
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(lines)}---\n")


def rows_of(names, rows, **every):
    """A dict per row: its values by name, and what every row has."""
    return [every | dict(zip(names, row, strict=True)) for row in rows]


def mathvista(folder):
    names = ("question", "choices", "precision", "unit", "answer", "question_type", "answer_type")
    rows = [
        ("Which is larger?", ["Yes", "No"], None, None, "No", "multi_choice", "text"),
        ("How much?", ["6", "9", "66"], None, None, "6", "multi_choice", "text"),
        ("Which?", ["B", "A", "C"], None, None, "A", "multi_choice", "text"),
        ("How many?", None, None, None, "17", "free_form", "integer"),
        ("What is the price?", None, 1.0, "$", "1.2", "free_form", "float"),
        ("Which years?", None, None, None, "[0, 8]", "free_form", "list"),
    ]
    rows = rows_of(names, rows, metadata={"category": "vqa", "skills": ["scientific reasoning"], "img_height": 8})
    for i, row in enumerate(rows, 1):
        row |= {"pid": str(i), "decoded_image": image(i, format="JPEG"), "image": f"images/{i}.jpg"}
    table(folder / "data/testmini-00000-of-00001-725687bf.parquet", rows)
    # The hub's folder has the large split beside it.
    table(folder / "data/test-00000-of-00001-6b81bd7f.parquet", [rows[4] | {"choices": ["?"], "pid": "other"}])


def mathvision(folder):
    rows = [
        ("Which figure fits? <image1>", ["A", "B", "C", "D", "E"], "C"),
        ("How many?\n<image1>", ["$2$", "$\\frac{1}{2}$", "1,000", "4", "5"], "B"),
        ("Find $x$. <image1>", [], "2\\sqrt{3}"),
        ("<image1> becomes <image2>. Which?", ["<image3>", "<image4>"], "B"),
        ("Name the value.", ["6", "8", "10"], "8"),
    ]
    rows = rows_of(("question", "options", "answer"), rows, level=2, subject="counting")
    for i, row in enumerate(rows):
        row |= {"id": str(4 + i), "decoded_image": image(i), "image": f"images/{4 + i}.jpg"}
    table(folder / "data/testmini-00000-of-00001-f8ff.parquet", rows)


def mmmath(folder):
    both = "(1) \\boxed{30^{\\circ}}; (2) the area is \\boxed{\\frac{9\\sqrt{3}}{2}}."
    rows = [
        ("52977666.png", "thus $AB=\\boxed{5}$.", "As shown, find the length of $AB$."),
        ("52977667.png", both, "(1) ... (2) ..."),
        ("a b.jpg", "first \\boxed{3}, and later on \\boxed{1,200}.", "How many <image> ...?"),
    ]
    names, known = ("file_name", "solution", "question"), {"year": "eight", "difficult": "easy", "knowledge": "circles"}
    lines = map(json.dumps, rows_of(names, rows, **known))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "MM_Math.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    with zipfile.ZipFile(folder / "Image.zip", "w") as archive:
        archive.writestr("Image/", "")
        archive.writestr("__MACOSX/Image/._52977666.png", b"no image")
        for i, (name, *_) in enumerate(rows):
            archive.writestr(f"Image/{name}", picture(i))


def hallusionbench(folder):
    key = {"category": "VS", "subcategory": "chart", "set_id": "0", "question_id": "0", "question": "Is red highest?"}
    key |= {"visual_input": "1", "figure_id": "1", "gt_answer": "1", "gt_answer_details": "Red is."}
    rows = [
        {**key, "image": image(1)},
        {**key, "gt_answer": "0", "question_id": "1", "question": "Is blue the tallest?", "image": image(1)},
        {**key, "visual_input": "2", "figure_id": "2", "gt_answer": "0", "image": image(2)},
        {**key, "category": "VD", "image": image(3)},
    ]
    table(folder / "data/image-00000-of-00001.parquet", rows)
    table(folder / "data/non_image-00000-of-00001.parquet", [{**key, "visual_input": "0", "figure_id": "0"}])


def mmvp(folder):
    asked = {
        1: ("Is it open or closed?", "(a) Open (b) Closed"),
        99: ("Does the elephant have long or short tusks?", "(a) Long (b) Short"),
        279: ("Is the person standing or sitting?", "(a) Standing (b) Sitting"),
    }
    rows = [
        {"Index": first + i, "Question": question, "Options": options, "Correct Answer": answer}
        | {"image": image(first + i)}
        for first, (question, options) in asked.items()
        for i, answer in enumerate(["(a)", "(b)"])
    ]
    described = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    (folder / "data").mkdir(parents=True)
    described.to_parquet(folder / "data/train-00000-of-00001.parquet")


def mmstar(folder):
    rows = [
        ("Which one is shown?\nOptions: A: a cat, small, B: a dog, C: none of them, D: Vitamin C", "A", "image scene"),
        ("<image 1> What?\nA. one\nB. two", "B", "geometry"),
        ("What?\n(A) one (B) two", "A", "geometry"),
        ("Which letter is circled?", "D", "geometry"),
    ]
    rows = rows_of(("question", "answer", "l2_category"), rows, category="math", meta_info={"source": "MMBench"})
    rows = [row | {"index": i, "image": image(i, format="JPEG")} for i, row in enumerate(rows)]
    table(folder / "mmstar.parquet", rows)
    card(folder, default="{split: val, path: mmstar.parquet}")


def scienceqa(folder):
    rows = [
        ("Which is it?", ["copepod", "black crappie"], 0, "", image(0, mode="RGBA")),
        ("What follows?", ["a. b", "A 3", "C"], 2, "Gordon tests it.", image(1, format="WEBP")),
        ("Is it hot?", ["yes", "no"], 1, "", image(2)),
    ]
    rows = rows_of(("question", "choices", "answer", "hint", "image"), rows, grade="grade5", category="Magnets")
    table(folder / "ScienceQA-IMG/test-00000-of-00001.parquet", rows)
    table(folder / "ScienceQA-FULL/test-00000-of-00001.parquet", rows * 2)
    names = ("ScienceQA-FULL", "ScienceQA-IMG")
    card(folder, **{name: f"{{split: test, path: {name}/test-*}}" for name in names})


LAYOUTS = [mathvista, mathvision, mmmath, hallusionbench, mmvp, mmstar, scienceqa]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Every benchmark, prepared once from its small source: {name: (source folder, Prepared, rows)}."""
    root, made = tmp_path_factory.mktemp("hub"), {}
    for layout in LAYOUTS:
        name = layout.__name__
        layout(root / "source" / name)
        result = prepare(name, root / "out", source=root / "source" / name)
        made[name] = (root / "source" / name, result, json.loads(result.path.read_text(encoding="utf-8")))
    return made


@pytest.fixture
def copied(prepared, tmp_path):
    """Copies what was prepared of a benchmark, to be damaged: source, folder of the copy, rows."""

    def copied(name):
        source, result, rows = prepared[name]
        return source, shutil.copytree(result.path.parent, tmp_path / "out" / name), rows

    return copied


def snapshot(folder):
    """Times, inodes and contents: what a file that was not touched keeps."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    kept = [(path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes()) for path in files]
    return {path.relative_to(folder).as_posix(): about for path, about in zip(files, kept, strict=True)}


def contents(folder):
    return {name: content for name, (*_, content) in snapshot(folder).items()}


# --------------------------------------------------------------------------------------- all benchmarks


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_becomes_a_sound_file_whose_solutions_the_judge_accepts(prepared, name):
    _, result, rows = prepared[name]
    assert name == "mmmath" or f"where the benchmark has {BENCHMARKS[name].rows}" in result.remarks[0]
    assert result.rows == len(rows) and [row["idx"] for row in rows] == list(range(len(rows)))
    assert [problem for problem in check_dataset(result.path) if problem.fatal] == []
    for example in load_dataset(result.path)[0]:

        def status(answer, example=example):
            return judge(answer, example.solution, **hints(example)).status

        assert status(example.solution) == "correct" and status("The answer is 123456.") != "correct"
        for i, choice in enumerate(example.meta.get("choices", ())):
            right = "correct" if chr(65 + i) == example.meta.get("letter") else "wrong"
            if example.meta.get("letter") and choice not in "ABC":
                assert status(f"\\boxed{{{chr(65 + i)}}}") == status(f"\\boxed{{{choice}}}") == right


@pytest.mark.parametrize("name", ["hallusionbench", "mmmath"])  # of a table, of an archive
def test_preparing_again_changes_nothing_and_another_folder_gets_the_same_bytes(prepared, name, tmp_path):
    source, result, _ = prepared[name]
    before = snapshot(result.path.parent)
    # The checksums are enough: with everything in place the source is not even opened.
    assert prepare(name, result.path.parents[1], source="no such folder").written == []
    assert snapshot(result.path.parent) == before
    prepare(name, tmp_path, source=source)
    files = contents(tmp_path / name)
    assert files == contents(result.path.parent)
    manifest = json.loads(files.pop("manifest.json"))
    assert manifest["files"] == {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
    assert manifest["source"] == {"repo": BENCHMARKS[name].repo, "revision": None}


# ------------------------------------------------------------------------------------- one by one

PRICE = "What is the price? (Unit: $)\nAnswer with a number, rounded to 1 decimal place."
ORDER = "\n\nSeveral answers are asked for: put all of them, in order and separated by commas, into one box."
FIGURES = "(Image 1) becomes (Image 2). Which?\n\nOptions:\nA. (Image 3)\nB. (Image 4)"


@pytest.mark.parametrize(
    ("name", "field", "values"),
    [
        ("mathvista", "solution", ["B. No", "A. 6", "B. A", "17", "1.2", "[0, 8]"]),
        ("mathvista", "kind", ["choice"] * 3 + ["number", "number", "list"]),
        ("mathvista", "letter", ["B", "A", "B", None, None, None]),  # the answer is a text, also one like a letter
        ("mathvista", "precision", [None] * 4 + [1, None]),
        ("mathvista", "skills", [["scientific reasoning"]] * 6),
        ("mathvista", "id", list("123456")),  # the large split's row is not among them
        ("mathvista", "prompt", [*[...] * 3, "How many?\nAnswer with a whole number.", PRICE, ...]),
        ("mathvision", "solution", ["C", "B. $\\frac{1}{2}$", "2\\sqrt{3}", "B. (Image 4)", "B. 8"]),
        ("mathvision", "choices", [[*"ABCDE"], ["$2$", "$\\frac{1}{2}$", "1,000", "4", "5"], None, ..., ...]),
        ("mathvision", "pictures", [1, 1, 1, 4, 1]),
        ("mathvision", "prompt", ["Which figure fits?\n\nOptions: A, B, C, D, E", ..., "Find $x$.", FIGURES, ...]),
        ("mmmath", "answers", [["5"], ["30^{\\circ}", "\\frac{9\\sqrt{3}}{2}"], ["3", "1,200"]]),
        ("mmmath", "solution", ["\\boxed{5}", ..., "['3', '1,200']"]),
        ("mmmath", "prompt", ["As shown, find the length of $AB$.", "(1) ... (2) ..." + ORDER, ...]),
        ("mmmath", "kind", [None, None, "list"]),
        ("mmmath", "relative_tolerance", [0.01] * 3),
        ("mmmath", "category", ["circles"] * 3),
        ("hallusionbench", "solution", ["Yes", "No", "No", "Yes", "Yes"]),
        ("hallusionbench", "image_path", [*[f"images/0000{i}.png" for i in range(4)], None]),
        ("hallusionbench", "question_group", ["VS/chart/0/0", "VS/chart/0/1", "VS/chart/0/0", ..., "VS/chart/0/0"]),
        ("hallusionbench", "figure_group", ["VS/chart/0/1", "VS/chart/0/1", "VS/chart/0/2", "VD/chart/0/1", None]),
        ("mmvp", "solution", ["A. Open", "B. Closed", "B. Short", "A. Long", "B. Sitting", "A. Standing"]),
        ("mmvp", "pair_id", [0, 0, 49, 49, 139, 139]),
        ("mmstar", "solution", ["A. a cat, small", "B. two", "A. one", "D"]),
        ("mmstar", "choices", [["a cat, small", "a dog", "none of them", "Vitamin C"], ["one", "two"], ..., None]),
        ("mmstar", "prompt", [..., "What?\nA. one\nB. two", ..., ...]),  # the question names its options itself
        ("mmstar", "source", ["MMBench"] * 4),
        ("scienceqa", "solution", ["A. copepod", "C", "B. no"]),  # and not those of ScienceQA-FULL
        ("scienceqa", "prompt", [..., "Gordon tests it.\n\nWhat follows?\n\nOptions:\nA. a. b\nB. A 3\nC. C", ...]),
    ],
)
def test_a_row_says_what_judge_and_metric_need(prepared, name, field, values):
    rows = prepared[name][2]
    assert [... if value is ... else row.get(field) for row, value in zip(rows, values, strict=True)] == values


@pytest.mark.parametrize(("name", "kind"), [("mathvista", "JPEG"), ("mathvision", "PNG"), ("scienceqa", None)])
def test_an_image_keeps_its_bytes_where_every_reader_takes_them(prepared, name, kind):
    _, result, rows = prepared[name]
    content = (result.path.parent / rows[1]["image_path"]).read_bytes()
    assert Image.open(io.BytesIO(content)).format == (kind or "PNG"), "ScienceQA's was WEBP"
    assert kind is None or content == picture(2 if name == "mathvista" else 1, format=kind)


def test_mmvp_answers_that_were_mended_in_a_copy_are_not_damaged_again(prepared):
    source, _, rows = prepared["mmvp"]
    raw = list(raw_rows(BENCHMARKS["mmvp"], source, None))
    for given in raw[2:]:
        given["Correct Answer"] = {"(a)": "(b)", "(b)": "(a)"}[given["Correct Answer"]]
    assert [row_of(BENCHMARKS["mmvp"], given, i)[0] for i, given in enumerate(raw)] == rows


def test_options_in_a_line():
    assert inline_options("Options: A: red, B: blue") == {"A": "red", "B": "blue"}
    assert inline_options("Which?\nOptions: A. 1,000; B. 2 B: x") == {"A": "1,000", "B": "2 B: x"}
    assert inline_options("Options: A: red") == inline_options("A: red, B: blue") == {}
    with pytest.raises(IndexError):
        choice_fields("?", ["one"], 1)


# ----------------------------------------------------------------------------- interrupted and damaged


def test_an_interrupted_preparation_is_completed_without_touching_what_is_done(prepared, tmp_path, monkeypatch):
    source, result, _ = prepared["mmvp"]
    write, done = Folder.write, []

    def killed(self, name, content):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(name)
        write(self, name, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Folder, "write", killed)
        prepare("mmvp", tmp_path, source=source)
    partial = snapshot(tmp_path / "mmvp")
    assert sorted(partial) == sorted(done), "and no manifest"
    (tmp_path / "mmvp" / done[1]).write_bytes(b"half an im")  # as after a power cut
    again = prepare("mmvp", tmp_path, source=source)
    assert done[0] not in again.written and done[1] in again.written
    assert snapshot(tmp_path / "mmvp")[done[0]] == partial[done[0]]
    assert contents(tmp_path / "mmvp") == contents(result.path.parent)


def test_damaged_files_are_made_again_and_named(copied):
    source, folder, rows = copied("mmstar")
    sample = prepare("mmstar", folder.parent, source=source, sample=2).path
    before, image = contents(folder), rows[1]["image_path"]
    (folder / image).write_bytes(b"x")
    sample.unlink()
    again = prepare("mmstar", folder.parent, source=source)
    assert sorted(again.written) == sorted([image, sample.name]) and image in again.remarks[0]
    assert contents(folder) == before


def test_another_source_is_refused_and_overwrites_nothing(copied, tmp_path):
    source, folder, rows = copied("mmstar")
    (folder / rows[0]["image_path"]).unlink()
    before = snapshot(folder)
    table(tmp_path / "other/mmstar.parquet", list(raw_rows(BENCHMARKS["mmstar"], source, None))[::-1])
    shutil.copy(source / "README.md", tmp_path / "other")
    with pytest.raises(BenchmarkError, match=r"another content.*remove"):
        prepare("mmstar", folder.parent, source=tmp_path / "other")
    assert snapshot(folder) == before


def test_a_second_process_is_told_to_wait(tmp_path, prepared):
    (tmp_path / "mmvp").mkdir()
    with FileLock(tmp_path / "mmvp" / ".lock"), pytest.raises(BenchmarkError, match="another process"):
        prepare("mmvp", tmp_path, source=prepared["mmvp"][0])


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"files": 1}'])
def test_a_manifest_that_cannot_be_read_is_made_anew(copied, content):
    source, folder, _ = copied("mmmath")
    before = contents(folder)
    (folder / "manifest.json").write_bytes(content)
    assert prepare("mmmath", folder.parent, source=source).written == [], "the other files are as they should be"
    assert contents(folder) == before


# ---------------------------------------------------------------------------------------------- samples


def test_a_sample_is_drawn_by_its_seed_from_what_is_there(copied):
    _, folder, rows = copied("mathvista")
    for count in (3, 99):  # of six
        made = prepare("mathvista", folder.parent, source="not read", sample=count, seed=1)
        assert made.written == [made.path.name] == [f"mathvista-{count}-seed1.json"]
        assert json.loads(made.path.read_bytes()) == sample_rows(rows, count, 1) and made.rows == min(count, 6)
    with pytest.raises(BenchmarkError, match="at least one"):
        prepare("mathvista", folder.parent, sample=0)


def test_samples_are_nested_and_the_same_everywhere():
    rows = [{"idx": i} for i in range(50)]
    assert [row["idx"] for row in sample_rows(rows, 5, 0)] == [10, 16, 31, 39, 46]
    assert all(row in sample_rows(rows, 20, 0) for row in sample_rows(rows, 10, 0))
    assert sample_rows(rows, 99, 1) == rows


# ------------------------------------------------------------------------------- sources that are no good


def run(*argv):
    return main(["data", *map(str, argv)])


def test_the_command_verifies_and_draws(copied, capsys):
    _, folder, _ = copied("scienceqa")
    for name in ("scienceqa", "Science-QA", "science_qa"):
        assert run(name, "--out", folder.parent, "--source", "unused") == 0
        assert "3 rows (unchanged, checksums verified)" in capsys.readouterr().out
    assert run("ScienceQA-mini", "--out", folder.parent, "--sample", 2, "--seed", 5) == 0
    assert "scienceqa-2-seed5.json: 2 rows (1 files written)" in capsys.readouterr().out


TWO_FILES = "expected one .jsonl file and the .zip of its images, found 0 and 0"
NO_COLUMN = "no row can be used; row 0: has no column 'Index' (columns: Question, image)"


@pytest.mark.parametrize(
    ("argv", "files", "message"),
    [
        (["mathvist"], {}, "unknown benchmark 'mathvist' (did you mean 'mathvista'?)"),
        (["mmvp"], {}, "lmms-lab-eval/MMVP: cannot be read (OfflineModeIsEnabled"),
        (["mmvp", "--source", "nowhere"], {}, "nowhere: no such folder"),
        (["mmvp", "--source", "."], {}, ".: cannot be read"),
        (["mm-math", "--source", "."], {}, TWO_FILES),
        (["mmvp", "--source", "."], {"train.parquet": b"PAR1 and no more"}, ".: cannot be read"),
        (["mmvp", "--source", "."], {"train.parquet": [{"Question": "?", "image": image()}]}, NO_COLUMN),
        (["mmmath", "--source", "."], {"MM_Math.jsonl": b'{"file_name": "5.png"'}, "cannot be read (JSONDecodeError"),
        (["mmmath", "--source", "."], {"MM_Math.jsonl": b'{"file_name": "../../a.png"}'}, "row 0: has no image"),
        (["mmmath", "--source", "."], {"Image.zip": b"PK and no more"}, "cannot be read (BadZipFile"),
    ],
)
def test_what_cannot_work_ends_in_one_sentence(argv, files, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if argv[0] == "mmmath":
        mmmath(tmp_path)
    for name, content in files.items():
        table(tmp_path / name, content) if isinstance(content, list) else (tmp_path / name).write_bytes(content)
    assert run(*argv) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.rglob("manifest.json")) == []


GOOD = {"Index": 1, "Question": "?", "Options": "(a) Yes (b) No", "Correct Answer": "(a)", "image": image()}


def test_a_damaged_row_is_named_and_costs_the_others_nothing(tmp_path):
    damaged = {
        "its image: not an image": {"image": {"bytes": b"no image", "path": "1.jpg"}},
        "its image: cannot be read": {"image": {"bytes": picture()[:60], "path": "1.jpg"}},
        "has no image in column 'image'": {"image": {"bytes": None, "path": "/etc/hostname"}},
        "answer '(c)' is not among the options": {"Correct Answer": "(c)"},
        "'NoneType' object": {"Question": None},
    }
    for message, changes in damaged.items():
        with pytest.raises((ValueError, AttributeError), match=re.escape(message)):
            row_of(BENCHMARKS["mmvp"], GOOD | changes, 0)
    table(tmp_path / "source/train.parquet", [*(GOOD | changes for changes in damaged.values()), GOOD])
    result = prepare("mmvp", tmp_path / "out", source=tmp_path / "source")
    assert result.rows == 1 and json.loads(result.path.read_bytes())[0]["idx"] == 5
    assert "5 rows cannot be used and are left out: row 0: its image: not an image" in result.remarks[0]


def test_a_local_source_is_read_without_calling_out(prepared, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **how: asked.append(address) or [])
    for library in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(library, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    assert prepare("mmvp", tmp_path, source=prepared["mmvp"][0]).rows == 6
    assert asked == []


@pytest.mark.parametrize("name", ["scienceqa", "mmmath"])
def test_the_hub_is_asked_for_one_commit_and_mended_from_the_same(prepared, tmp_path, monkeypatch, name):
    """What the library is asked for; what it answers comes from the small source."""
    source, _, rows = prepared[name]
    load, asked = datasets.load_dataset, []

    def info(api, repo, revision=None):
        asked.append((repo, revision, api.token))
        return SimpleNamespace(sha="ab" * 20)

    def dataset(repo, config, *, revision, token, **how):
        asked.append((repo, config, how["split"], revision, token))
        return load(str(source), config, **how)

    def files(repo, *, revision, token, **how):
        asked.append((repo, how["repo_type"], revision, token))
        return str(source)

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", files)
    monkeypatch.setattr(datasets, "load_dataset", dataset)
    made = prepare(name, tmp_path)
    assert json.loads(made.path.read_bytes()) == rows
    repo, commit = BENCHMARKS[name].repo, "ab" * 20
    what = ("ScienceQA-IMG", "test") if name == "scienceqa" else ("dataset",)
    assert asked == [(repo, None, "hf_secret"), (repo, *what, commit, "hf_secret")]
    assert json.loads((tmp_path / name / "manifest.json").read_bytes())["source"]["revision"] == commit
    assert not any(b"hf_secret" in content for content in contents(tmp_path).values())
    (tmp_path / name / rows[1]["image_path"]).unlink()
    assert prepare(name, tmp_path).written == [rows[1]["image_path"]]
    assert asked[2] == (repo, commit, "hf_secret"), "the commit of the manifest, whatever is newer by now"
