"""The seven benchmarks from small files in the hub's own layouts, column names and types; no network."""

from __future__ import annotations

import collections
import hashlib
import http.server
import io
import json
import socket
import threading
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import close_session, constants
from PIL import Image

from dmlr.cli import main
from dmlr.config import ConfigError
from dmlr.data.benchmarks import BENCHMARKS, choice_fields, inline_options
from dmlr.data.check import check_dataset
from dmlr.data.examples import load_dataset
from dmlr.data.hub import SourceError, leaves_folder, open_folder, shards
from dmlr.data.images import open_image
from dmlr.data.manifest import ManifestError, ManifestFolder
from dmlr.data.prepare import BenchmarkError, prepare, sample_rows
from dmlr.judge import judge
from dmlr.run.verdicts import hints
from dmlr.stats.metrics import category_mean, group_accuracy, pair_accuracy

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXTS = pa.list_(pa.string())


def picture(number=0, format="PNG", size=(12, 8), mode="RGB"):
    """An encoded image whose pixels tell which one it is."""
    image = Image.fromarray(np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    file = io.BytesIO()
    image.convert(mode).save(file, format)
    return file.getvalue()


def image(number=0, **how):
    return {"bytes": picture(number, **how), "path": f"images/{number}.png"}


def table(path, rows, **types):
    """Parquet file with the given column types; columns are those of `types`, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [pa.array([row.get(name) for row in rows], kind) for name, kind in types.items()]
    pq.write_table(pa.table(columns, names=list(types)), path)


def mathvista(folder):
    text = {"category": "math-targeted-vqa", "task": "textbook question answering", "context": "scientific figure"}
    metadata = {**text, "grade": "high school", "img_height": 8, "img_width": 12, "language": "english"}
    metadata |= {"skills": ["scientific reasoning"], "source": "TQA", "split": "testmini"}
    base = {"choices": None, "unit": None, "precision": None, "metadata": metadata}
    rows = [
        {"question": "Which is larger?", "choices": ["Yes", "No"], "answer": "No", "kind": ("multi_choice", "text")},
        {"question": "How much?", "choices": ["6", "9", "66"], "answer": "6", "kind": ("multi_choice", "integer")},
        {"question": "Which?", "choices": ["B", "A", "C"], "answer": "A", "kind": ("multi_choice", "text")},
        {"question": "How many?", "answer": "17", "kind": ("free_form", "integer")},
        {
            "question": "What is the price?",
            "answer": "1.2",
            "precision": 1.0,
            "unit": "$",
            "kind": ("free_form", "float"),
        },
        {"question": "Which years?", "answer": "[0, 8]", "kind": ("free_form", "list")},
    ]
    rows = [
        {**base, **row, "pid": str(i + 1), "image": f"images/{i + 1}.jpg", "decoded_image": image(i, format="JPEG")}
        | {"question_type": row["kind"][0], "answer_type": row["kind"][1], "query": "Hint: ... Question: ..."}
        for i, row in enumerate(rows)
    ]
    string, number = pa.string(), pa.int64()
    types = {
        "pid": string,
        "question": string,
        "image": string,
        "decoded_image": IMAGE,
        "choices": TEXTS,
        "unit": string,
    }
    types |= {
        "precision": pa.float64(),
        "answer": string,
        "question_type": string,
        "answer_type": string,
        "query": string,
    }
    types["metadata"] = pa.struct(
        [(key, {str: string, int: number, list: TEXTS}[type(value)]) for key, value in metadata.items()]
    )
    table(folder / "data" / "testmini-00000-of-00001-725687bf.parquet", rows, **types)
    # The hub's folder has the large split beside it.
    table(folder / "data" / "test-00000-of-00001-6b81bd7f.parquet", [{**rows[0], "pid": "other"}], **types)


def mathvision(folder):
    rows = [
        {"question": "Which figure fits? <image1>", "options": ["A", "B", "C", "D", "E"], "answer": "C"},
        {"question": "How many?\n<image1>", "options": ["$2$", "$\\frac{1}{2}$", "1,000", "4", "5"], "answer": "B"},
        {"question": "Find $x$. <image1>", "options": [], "answer": "2\\sqrt{3}"},
        {"question": "Find $n$.", "options": [], "answer": "42"},
        {"question": "<image1> becomes <image2>. Which?", "options": ["<image3>", "<image4>"], "answer": "B"},
        {"question": "Name the value.", "options": ["6", "8", "10"], "answer": "8"},
    ]
    string = pa.string()
    rows = [
        {**row, "id": str(4 + i), "image": f"images/{4 + i}.jpg", "decoded_image": image(i), "level": 2}
        | {"subject": "counting", "solution": None}
        for i, row in enumerate(rows)
    ]
    types = {
        "id": string,
        "question": string,
        "options": TEXTS,
        "image": string,
        "decoded_image": IMAGE,
        "answer": string,
    }
    types |= {"solution": string, "level": pa.int64(), "subject": string}
    table(folder / "data" / "testmini-00000-of-00001-f8ff.parquet", rows, **types)


def mmmath(folder, **members):
    rows = [
        ("52977666.png", "thus $AB=\\boxed{5}$.", "As shown, find the length of $AB$."),
        (
            "52977667.png",
            "(1) \\boxed{30^{\\circ}}; (2) the area is \\boxed{\\frac{9\\sqrt{3}}{2}}.",
            "(1) ... (2) ...",
        ),
        ("a b.jpg", "first \\boxed{3}, and later on \\boxed{1,200}.", "How many <image> ...?"),
    ]
    lines = [
        {"question": question, "file_name": name, "solution": solution, "year": "eight", "difficult": "easy"}
        | {"knowledge": "circles"}
        for name, solution, question in rows
    ]
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    (folder / "MM_Math.jsonl").write_text(text, encoding="utf-8")
    with zipfile.ZipFile(folder / "Image.zip", "w") as archive:
        archive.writestr("Image/", "")
        archive.writestr("__MACOSX/Image/._52977666.png", b"no image")
        for i, (name, *_) in enumerate(rows):
            archive.writestr(f"Image/{name}", picture(i))
        for name, content in members.items():
            archive.writestr(name, content)


def hallusionbench(folder):
    key = {"category": "VS", "subcategory": "chart", "set_id": "0", "question_id": "0", "question": "Is red highest?"}
    rows = [
        {**key, "visual_input": "1", "figure_id": "1", "gt_answer": "1", "filename": "./1.png", "image": image(1)},
        {**key, "visual_input": "1", "figure_id": "1", "gt_answer": "0", "filename": "./1.png", "image": image(1)}
        | {"question_id": "1", "question": "Is blue the tallest?"},
        {**key, "visual_input": "2", "figure_id": "2", "gt_answer": "0", "filename": "./2.png", "image": image(2)},
        {**key, "category": "VD", "visual_input": "1", "figure_id": "1", "gt_answer": "1", "image": image(3)},
    ]
    types = {name: pa.string() for name in (*key, "visual_input", "figure_id", "gt_answer", "gt_answer_details")}
    types["filename"] = pa.string()
    table(folder / "data" / "image-00000-of-00001.parquet", rows, **types, image=IMAGE)
    bare = [{**key, "visual_input": "0", "figure_id": "0", "gt_answer": "1", "gt_answer_details": "Red is."}]
    table(folder / "data" / "non_image-00000-of-00001.parquet", bare, **types)


def mmvp(folder):
    numbers = [1, 2, 99, 100, 279, 280]
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("Question", "Options", "Correct Answer")}
        | {"Index": datasets.Value("int64"), "image": datasets.Image()}
    )
    rows = {
        "Question": ["Is it open or closed?"] * 2 + ["Does the elephant have long or short tusks?"] * 2
        + ["Is the person standing or sitting?"] * 2,
        "Options": ["(a) Open (b) Closed"] * 2 + ["(a) Long (b) Short"] * 2 + ["(a) Standing (b) Sitting"] * 2,
        "Correct Answer": ["(a)", "(b)"] * 3,
        "Index": numbers,
        "image": [image(number) for number in numbers],
    }  # fmt: skip
    (folder / "data").mkdir(parents=True)
    # With the library's own description of the columns in the file, as most files on the hub have it.
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / "train-00000-of-00001.parquet")


def mmstar(folder):
    info = {"source": "MMBench", "split": "val", "image_path": "images/0.jpg"}
    question = "Which one is shown?\nOptions: A: a cat, small, B: a dog, C: none of them, D: Vitamin C"
    rows = [
        {"question": question, "answer": "A", "category": "coarse perception", "l2_category": "image scene"},
        {"question": "<image 1> What?\nA. one\nB. two", "answer": "B", "category": "math", "l2_category": "geometry"},
        {"question": "What?\n(A) one (B) two", "answer": "A", "category": "math", "l2_category": "geometry"},
        {"question": "Which letter is circled?", "answer": "D", "category": "math", "l2_category": "geometry"},
    ]
    rows = [{**row, "index": i, "meta_info": info, "image": image(i, format="JPEG")} for i, row in enumerate(rows)]
    string = pa.string()
    types = {
        "index": pa.int64(),
        "question": string,
        "image": IMAGE,
        "answer": string,
        "category": string,
        "l2_category": string,
    }
    types["meta_info"] = pa.struct([(key, string) for key in info])
    table(folder / "mmstar.parquet", rows, **types)


def scienceqa(folder):
    base = {"task": "closed choice", "grade": "grade5", "subject": "natural science", "topic": "physics"}
    base |= {"category": "Magnets", "skill": "Compare magnets", "lecture": "...", "solution": "...", "hint": ""}
    rows = [
        {"question": "Which is it?", "choices": ["copepod", "black crappie"], "answer": 0},
        {"question": "What follows?", "choices": ["a. b", "A 3", "C"], "answer": 2, "hint": "Gordon tests it."},
        {"question": "Is it hot?", "choices": ["yes", "no"], "answer": 1},
    ]
    formats = [{"mode": "RGBA"}, {"format": "WEBP"}, {}]
    rows = [{**base, **row, "image": image(i, **how)} for i, (row, how) in enumerate(zip(rows, formats, strict=True))]
    types = {name: pa.string() for name in ("question", *base)} | {"image": IMAGE, "choices": TEXTS}
    types["answer"] = pa.int8()
    table(folder / "ScienceQA-IMG" / "test-00000-of-00001.parquet", rows, **types)
    table(folder / "ScienceQA-FULL" / "test-00000-of-00001.parquet", rows * 2, **types)


LAYOUTS = {
    f.__name__: f for f in (mathvista, mathvision, mmmath, hallusionbench, mmvp, mmstar, scienceqa)
}  # fmt: skip
COUNTS = {
    "mathvista": 6, "mathvision": 6, "mmmath": 3, "hallusionbench": 5, "mmvp": 6, "mmstar": 4, "scienceqa": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Every benchmark, prepared once from its small source: {name: (source folder, Prepared, rows)}."""
    root, made = tmp_path_factory.mktemp("hub"), {}
    for name, layout in LAYOUTS.items():
        layout(root / "source" / name)
        result = prepare(name, root / "out", source=root / "source" / name)
        made[name] = (root / "source" / name, result, json.loads(result.path.read_text(encoding="utf-8")))
    return made


def snapshot(folder):
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


# --------------------------------------------------------------------------------------- all benchmarks


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_becomes_a_dataset_file_that_is_sound(prepared, name):
    _, result, rows = prepared[name]
    assert result.rows == len(rows) == COUNTS[name]
    assert [row["idx"] for row in rows] == list(range(len(rows)))
    assert [problem for problem in check_dataset(result.path) if problem.fatal] == []
    examples, _ = load_dataset(result.path)
    assert len(examples) == len(rows)
    for row in rows:
        assert not Path(row["image_path"] or "x").is_absolute()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_judge_accepts_every_solution_and_the_forms_a_model_gives_it(prepared, name):
    examples, _ = load_dataset(prepared[name][1].path)
    others = 0
    for example in examples:

        def status(answer, example=example):
            return judge(answer, example.solution, **hints(example)).status

        assert status(example.solution) == "correct", example
        if "letter" in example.meta:
            letter = example.meta["letter"]
            if letter not in example.meta.get("choices", "")[: ord(letter) - 65]:  # else it is another option's text
                assert status(f"So the answer is \\boxed{{{letter}}}.") == "correct"
                assert status(f"({letter.lower()})") == "correct"
        if "option" in example.meta:
            assert status(f"\\boxed{{{example.meta['option']}}}") == "correct"
            for i, choice in enumerate(example.meta["choices"]):
                if chr(65 + i) != letter and choice not in "ABC":
                    assert status(f"\\boxed{{{chr(65 + i)}}}") == status(f"{chr(65 + i)}. {choice}") == "wrong"
                    others += 1
        assert status("The answer is 123456.") != "correct"
    assert others > 0 or name in ("mmmath", "hallusionbench")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_preparing_again_changes_nothing(prepared, name):
    source, result, _ = prepared[name]
    before = snapshot(result.path.parent)
    again = prepare(name, result.path.parents[1], source=source)
    assert again.written == [] and again.path == result.path
    assert snapshot(result.path.parent) == before
    # The checksums are enough: with everything in place the source is not even opened.
    assert prepare(name, result.path.parents[1], source="no such folder").written == []


@pytest.mark.parametrize("name", BENCHMARKS)
def test_another_folder_gets_the_same_bytes_and_a_manifest_of_all_of_them(prepared, name, tmp_path):
    source, result, _ = prepared[name]
    prepare(name, tmp_path, source=source)
    files = {path: content for path, (_, _, content) in snapshot(tmp_path / name).items()}
    assert files == {path: content for path, (_, _, content) in snapshot(result.path.parent).items()}
    manifest = json.loads(files.pop("manifest.json"))
    assert manifest["files"] == {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
    assert manifest["source"] == {"repo": BENCHMARKS[name].repo, "revision": None}


# ------------------------------------------------------------------------------------- one by one


def test_mathvista_keeps_what_its_metric_needs(prepared):
    rows = prepared["mathvista"][2]
    assert [row["solution"] for row in rows] == ["B. No", "A. 6", "B. A", "17", "1.2", "[0, 8]"]
    assert [row.get("kind") for row in rows] == ["choice"] * 3 + ["number", "number", "list"]
    assert rows[0]["prompt"] == "Which is larger?\n\nOptions:\nA. Yes\nB. No"
    assert (rows[2]["letter"], rows[2]["option"]) == (
        "B",
        "A",
    )  # the answer is a text, also when it looks like a letter
    assert rows[4]["precision"] == 1 and rows[4]["unit"] == "$" and "(Unit: $)" in rows[4]["prompt"]
    assert "1 decimal place." in rows[4]["prompt"] and "whole number" in rows[3]["prompt"]
    assert {row["answer_type"] for row in rows} == {"text", "integer", "float", "list"}
    assert rows[0]["category"] == "math-targeted-vqa" and rows[0]["skills"] == ["scientific reasoning"]
    assert [row["id"] for row in rows] == list("123456")  # the large split's row is not among them
    meta = {"kind": rows[4]["kind"], "precision": rows[4]["precision"]}
    assert judge("\\boxed{1.21}", rows[4]["solution"], **meta).status == "correct"
    assert judge("\\boxed{1.3}", rows[4]["solution"], **meta).status == "wrong"


def test_mathvision_reads_letters_values_and_free_answers(prepared):
    rows = prepared["mathvision"][2]
    expected = ["C", "B. $\\frac{1}{2}$", "2\\sqrt{3}", "42", "B. (Image 4)", "B. 8"]
    assert [row["solution"] for row in rows] == expected
    assert rows[0]["prompt"] == "Which figure fits?\n\nOptions: A, B, C, D, E"  # they are marked in the picture
    assert rows[1]["choices"] == ["$2$", "$\\frac{1}{2}$", "1,000", "4", "5"]  # not split at the comma
    assert rows[4]["prompt"].startswith("(Image 1) becomes (Image 2). Which?") and rows[4]["pictures"] == 4
    assert not any("<image" in row["prompt"] for row in rows)
    meta = {"choices": rows[1]["choices"], "kind": "choice", "question": rows[1]["prompt"]}
    assert judge("\\boxed{\\frac{1}{2}}", rows[1]["solution"], **meta).status == "correct"


def test_mm_math_takes_the_boxed_answers_in_order(prepared):
    rows = prepared["mmmath"][2]
    assert [row["answers"] for row in rows] == [["5"], ["30^{\\circ}", "\\frac{9\\sqrt{3}}{2}"], ["3", "1,200"]]
    assert [row["relative_tolerance"] for row in rows] == [0.01] * 3
    assert rows[0]["solution"] == "\\boxed{5}" and "kind" not in rows[0]
    assert "in order" in rows[1]["prompt"] and "in order" not in rows[0]["prompt"]
    assert (rows[2]["category"], rows[2]["difficulty"], rows[2]["year"]) == ("circles", "easy", "eight")
    assert [row["id"] for row in rows] == ["52977666.png", "52977667.png", "a b.jpg"]
    both = {"kind": rows[2]["kind"], "question": rows[2]["prompt"]}
    assert judge("\\boxed{3, 1200}", "['3', '1200']", **both).status == "correct"
    assert judge("\\boxed{1200, 3}", rows[2]["solution"], **both).status == "wrong"
    examples, _ = load_dataset(prepared["mmmath"][1].path)
    near = [judge(answer, examples[0].solution, **hints(examples[0])).status for answer in ("5.04", "5.06")]
    assert near == ["correct", "wrong"]


def test_hallusionbench_has_its_groups_and_its_questions_without_image(prepared):
    _, result, rows = prepared["hallusionbench"]
    assert [row["solution"] for row in rows] == ["Yes", "No", "No", "Yes", "Yes"]
    assert [row["image_path"] is None for row in rows] == [False] * 4 + [True]
    assert [row["figure_group"] for row in rows] == [
        "VS/chart/0/1", "VS/chart/0/1", "VS/chart/0/2", "VD/chart/0/1", None,
    ]  # fmt: skip
    assert [row["question_group"] for row in rows] == [
        "VS/chart/0/0", "VS/chart/0/1", "VS/chart/0/0", "VD/chart/0/0", "VS/chart/0/0",
    ]  # fmt: skip
    assert load_dataset(result.path)[0][4].image is None
    assert any("5 rows, where the benchmark has 1129" in remark for remark in result.remarks)
    records = [{**row, "data_idx": row["idx"], "verdict": "correct"} for row in rows]
    records[2]["verdict"] = "wrong"
    figures, questions = (group_accuracy(records, key) for key in ("figure_group", "question_group"))
    assert (figures.correct, figures.total, questions.correct, questions.total) == (2, 3, 2, 3)


def test_hallusionbench_without_the_text_only_split_says_so(tmp_path):
    hallusionbench(tmp_path / "source")
    (tmp_path / "source/data/non_image-00000-of-00001.parquet").unlink()
    result = prepare("hallusionbench", tmp_path / "out", source=tmp_path / "source")
    assert result.rows == 4 and any("'non_image'" in remark for remark in result.remarks)


@pytest.mark.parametrize("swapped", [True, False])
def test_mmvp_answers_are_right_whichever_copy_is_read(tmp_path, swapped):
    mmvp(tmp_path / "source")
    path = tmp_path / "source/data/train-00000-of-00001.parquet"
    if not swapped:  # a copy in which they were mended already must not be damaged again
        columns = pq.read_table(path)
        position = columns.schema.get_field_index("Correct Answer")
        mended = pa.array(["(a)", "(b)"] + ["(b)", "(a)"] * 2)
        pq.write_table(columns.set_column(position, "Correct Answer", mended), path)
    rows = json.loads(prepare("mmvp", tmp_path / "out", source=tmp_path / "source").path.read_bytes())
    expected = ["A. Open", "B. Closed", "B. Short", "A. Long", "B. Sitting", "A. Standing"]
    assert [row["solution"] for row in rows] == expected
    assert [row["pair_id"] for row in rows] == [0, 0, 49, 49, 139, 139]
    assert [row["id"] for row in rows] == [1, 2, 99, 100, 279, 280]
    records = [{**row, "data_idx": row["idx"], "verdict": "correct" if row["idx"] else "wrong"} for row in rows]
    assert (pair_accuracy(records).correct, pair_accuracy(records).total) == (2, 3)


def test_mmstar_finds_the_options_in_the_question(prepared):
    rows = prepared["mmstar"][2]
    assert rows[0]["choices"] == ["a cat, small", "a dog", "none of them", "Vitamin C"]
    assert [row["solution"] for row in rows] == ["A. a cat, small", "B. two", "A. one", "D"]
    assert rows[0]["prompt"].count("a dog") == 1  # the question names its options itself
    assert rows[1]["prompt"] == "What?\nA. one\nB. two"
    assert "choices" not in rows[3] and rows[3]["kind"] == "choice"
    assert (rows[1]["category"], rows[1]["l2_category"], rows[1]["source"]) == ("math", "geometry", "MMBench")
    records = [{**row, "verdict": "correct" if row["idx"] in (0, 1) else "wrong"} for row in rows]
    assert category_mean(records, "l2_category") == pytest.approx((1 + 1 / 3) / 2)


def test_scienceqa_has_the_hint_and_the_answer_with_index_zero(prepared):
    _, result, rows = prepared["scienceqa"]
    assert [row["solution"] for row in rows] == ["A. copepod", "C", "B. no"]
    assert rows[1]["prompt"] == "Gordon tests it.\n\nWhat follows?\n\nOptions:\nA. a. b\nB. A 3\nC. C"
    assert rows[0]["prompt"].startswith("Which is it?")
    assert rows[0]["skill"] == "Compare magnets" and rows[0]["category"] == "Magnets"
    assert [row["image_path"] for row in rows] == [f"images/0000{i}.png" for i in range(3)]  # WEBP became PNG
    assert Image.open(result.path.parent / rows[1]["image_path"]).format == "PNG"
    assert len(rows) == 3  # and not those of ScienceQA-FULL


def test_images_are_kept_byte_for_byte(prepared):
    for name, suffix in (("mathvista", ".jpg"), ("mathvision", ".png")):
        _, result, rows = prepared[name]
        for i, row in enumerate(rows):
            assert row["image_path"] == f"images/{i:05d}{suffix}"
            content = (result.path.parent / row["image_path"]).read_bytes()
            assert content == picture(i, format="JPEG" if suffix == ".jpg" else "PNG")


def test_several_images_of_a_row_are_laid_side_by_side(tmp_path):
    row = {"id": "1", "question": "<image1> or <image2>?", "options": ["<image1>", "<image2>"], "answer": "A"}
    row |= {"decoded_image": [image(1, size=(200, 60)), image(2, size=(30, 120))], "level": 1, "subject": "logic"}
    string = pa.string()
    types = {"id": string, "question": string, "options": TEXTS, "decoded_image": pa.list_(IMAGE), "answer": string}
    table(tmp_path / "source/testmini.parquet", [row], **types, level=pa.int64(), subject=string)
    result = prepare("mathvision", tmp_path / "out", source=tmp_path / "source")
    [made] = json.loads(result.path.read_bytes())
    assert made["choices"] == ["(Image 1)", "(Image 2)"] and made["solution"] == "A. (Image 1)"
    canvas = np.asarray(open_image(result.path.parent / made["image_path"]))
    for number, size in ((1, (200, 60)), (2, (30, 120))):
        pixels = np.asarray(Image.open(io.BytesIO(picture(number, size=size))))
        height, width = canvas.shape[0] - 120, canvas.shape[1]
        starts = [x for x in range(width - size[0] + 1)
                  if np.array_equal(canvas[height : height + size[1], x : x + size[0]], pixels)]  # fmt: skip
        assert len(starts) == 1
        assert (canvas[:height, starts[0] : starts[0] + 60] < 128).any()  # its caption stands above it


# ----------------------------------------------------------------------------- interrupted and damaged


def test_an_interrupted_preparation_is_completed_without_touching_what_is_done(prepared, tmp_path, monkeypatch):
    source, result, _ = prepared["mmvp"]
    whole, write, done = snapshot(result.path.parent), ManifestFolder.write, []

    def killed(self, name, content, **how):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(name)
        write(self, name, content, **how)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ManifestFolder, "write", killed)
        prepare("mmvp", tmp_path, source=source)
    partial = snapshot(tmp_path / "mmvp")
    assert sorted(partial) == sorted(done) and "manifest.json" not in partial
    (tmp_path / "mmvp" / done[1]).write_bytes(b"half an im")  # as after a power cut
    again = prepare("mmvp", tmp_path, source=source)
    assert done[0] not in again.written and done[1] in again.written and "mmvp.json" in again.written
    after = snapshot(tmp_path / "mmvp")
    assert after[done[0]] == partial[done[0]]
    assert {k: v[2] for k, v in after.items()} == {k: v[2] for k, v in whole.items()}


def test_damaged_files_are_made_again_and_named(prepared, tmp_path):
    source, _, rows = prepared["mmstar"]
    prepare("mmstar", tmp_path, source=source)
    result = prepare("mmstar", tmp_path, source=source, sample=2)
    before = snapshot(tmp_path / "mmstar")
    (tmp_path / "mmstar" / rows[1]["image_path"]).write_bytes(b"x")
    result.path.unlink()
    again = prepare("mmstar", tmp_path, source=source)
    assert sorted(again.written) == sorted([rows[1]["image_path"], result.path.name])
    assert rows[1]["image_path"] in again.remarks[0]
    assert {k: v[2] for k, v in snapshot(tmp_path / "mmstar").items()} == {k: v[2] for k, v in before.items()}


def test_another_source_is_refused_and_overwrites_nothing(prepared, tmp_path):
    source, _, rows = prepared["mmstar"]
    prepare("mmstar", tmp_path / "out", source=source)
    (tmp_path / "out/mmstar" / rows[0]["image_path"]).unlink()
    before = snapshot(tmp_path / "out")
    columns = pq.read_table(source / "mmstar.parquet")
    (tmp_path / "other").mkdir()
    pq.write_table(columns.take([1, 0, 2, 3]), tmp_path / "other/mmstar.parquet")
    with pytest.raises(ManifestError, match=r"another content.*remove"):
        prepare("mmstar", tmp_path / "out", source=tmp_path / "other")
    assert snapshot(tmp_path / "out") == before


def test_a_second_process_is_told_to_wait(tmp_path, prepared):
    with ManifestFolder(tmp_path / "mmvp").lock(), pytest.raises(ManifestError, match="another process"):
        prepare("mmvp", tmp_path, source=prepared["mmvp"][0])


# ---------------------------------------------------------------------------------------------- samples


def test_a_sample_is_drawn_by_its_seed(prepared, tmp_path):
    source, _, rows = prepared["mathvista"]
    result = prepare("mathvista", tmp_path, source=source, sample=3, seed=1)
    before = snapshot(tmp_path)
    chosen = json.loads(result.path.read_bytes())
    assert result.path.name == "mathvista-3-seed1.json" and result.rows == len(chosen) == 3
    assert chosen == [row for row in rows if row in chosen] == sample_rows(rows, 3, 1)
    assert not [problem for problem in check_dataset(result.path) if problem.fatal]
    assert prepare("mathvista", tmp_path, source=source, sample=3, seed=1).written == []
    assert snapshot(tmp_path) == before
    more = prepare("mathvista", tmp_path, source=source, sample=99, seed=1)  # more than there are: all of them
    assert more.written == ["mathvista-99-seed1.json"] and json.loads(more.path.read_bytes()) == rows
    with pytest.raises(BenchmarkError, match="at least one"):
        prepare("mathvista", tmp_path, source=source, sample=0)


def test_samples_are_even_nested_and_stable():
    rows = [{"idx": i} for i in range(50)]
    assert [row["idx"] for row in sample_rows(rows, 5, 0)] == [10, 16, 31, 39, 46]
    assert all(row in sample_rows(rows, 20, 0) for row in sample_rows(rows, 10, 0))
    counts = collections.Counter(row["idx"] for seed in range(400) for row in sample_rows(rows, 10, seed))
    assert len(counts) == 50 and min(counts.values()) > 45 and max(counts.values()) < 120  # 80 each, sigma 8


# ------------------------------------------------------------------------------- sources that are no good


def run(*argv):
    return main(["data", *map(str, argv)])


def test_the_command_prepares_and_then_verifies(prepared, tmp_path, capsys):
    source = prepared["scienceqa"][0]
    assert run("ScienceQA", "--out", tmp_path, "--source", source, "--sample", 2, "--seed", 5) == 0
    assert "scienceqa-2-seed5.json: 2 rows (5 files written)" in capsys.readouterr().out
    assert run("ScienceQA", "--out", tmp_path, "--source", source) == 0
    assert "3 rows (unchanged, checksums verified)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["mathvist"], "unknown benchmark 'mathvist' (did you mean 'mathvista'?)"),
        (["zzz"], "unknown benchmark 'zzz'"),
        (["mmvp", "--source", "nowhere"], "nowhere: no such folder"),
        (["mmvp", "--source", "."], "holds no parquet file of split 'train'"),
        (["mm-math", "--source", "."], "expected one .jsonl file"),
        (["mmvp"], "lmms-lab-eval/MMVP: the hub cannot be reached"),
    ],
)
def test_what_cannot_work_ends_in_one_sentence(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*argv) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error
    assert list(tmp_path.rglob("manifest.json")) == []


def test_wrong_arguments_are_status_2(capsys):
    assert run() == run("mmvp", "--sample", "many") == 2
    assert run("--help") == 0 and "hallusionbench" in capsys.readouterr().out


def damaged_mmvp(folder, **changes):
    row = {"Index": 1, "Question": "?", "Options": "(a) Yes (b) No", "Correct Answer": "(a)", "image": image()}
    row |= changes
    types = {name: pa.string() for name in ("Question", "Options", "Correct Answer")}
    types = {"Index": pa.int64(), **types, "image": IMAGE}
    table(folder / "train.parquet", [row], **{name: types[name] for name in types if name in row})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": {"bytes": b"no image", "path": "1.jpg"}}, "row 0: its image cannot be read"),
        ({"image": {"bytes": picture()[:60], "path": "1.jpg"}}, "row 0: image: cannot be read"),
        ({"image": {"bytes": None, "path": "/etc/hostname"}}, "row 0: has no image in column 'image'"),
        ({"image": None}, "row 0: has no image in column 'image'"),
        ({"Correct Answer": "(c)"}, "row 0: cannot be read (answer '(c)' is not among the options"),
        ({"Question": None}, "row 0: cannot be read"),
    ],
)
def test_a_damaged_row_is_named(changes, message, tmp_path, capsys):
    damaged_mmvp(tmp_path / "source", **changes)
    assert run("mmvp", "--source", tmp_path / "source", "--out", tmp_path / "out") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out/mmvp/manifest.json").exists()


def test_a_row_that_no_run_could_use_leaves_no_manifest(tmp_path, capsys):
    mmmath(tmp_path / "source")
    path = tmp_path / "source/MM_Math.jsonl"
    path.write_text(path.read_text().replace("As shown, find the length of $AB$.", ""))
    assert run("mmmath", "--source", tmp_path / "source", "--out", tmp_path / "out") == 1
    assert "row 0 is unusable: the prompt is empty" in capsys.readouterr().err
    assert not (tmp_path / "out/mmmath/manifest.json").exists()


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path, capsys):
    string = pa.string()
    table(tmp_path / "train.parquet", [{"Question": "?", "image": image()}], Question=string, image=IMAGE)
    assert run("mmvp", "--source", tmp_path, "--out", tmp_path / "out") == 1
    assert "row 0: has no column 'Index' (columns: Question, image)" in capsys.readouterr().err


def test_files_that_are_no_parquet_or_json_or_archive_are_named(tmp_path, capsys):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and no more")
    assert run("mmvp", "--source", tmp_path, "--out", tmp_path / "out") == 1
    assert "train.parquet: cannot be read" in capsys.readouterr().err
    mmmath(tmp_path / "math")
    (tmp_path / "math/MM_Math.jsonl").write_text('{"file_name": "52977666.png"')
    assert run("mmmath", "--source", tmp_path / "math", "--out", tmp_path / "out") == 1
    assert "MM_Math.jsonl, line 1: not valid JSON" in capsys.readouterr().err
    (tmp_path / "math/MM_Math.jsonl").write_text('{"file_name": "../../Image/none.png"}')
    assert run("mmmath", "--source", tmp_path / "math", "--out", tmp_path / "out") == 1
    assert "'../../Image/none.png' is not in the archive" in capsys.readouterr().err
    (tmp_path / "math/Image.zip").write_bytes(b"PK and no more")
    assert run("mmmath", "--source", tmp_path / "math", "--out", tmp_path / "out") == 1
    assert "Image.zip: cannot be read as a ZIP archive" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["../evil.png", "Image/../../evil.png", "/tmp/evil.png", "..\\evil.png", "C:\\evil.png"]
)
def test_an_archive_that_reaches_outside_is_refused(tmp_path, name):
    mmmath(tmp_path / "source", **{name: picture()})
    with pytest.raises(SourceError, match="points outside the archive"):
        prepare("mmmath", tmp_path / "out", source=tmp_path / "source")
    assert list(tmp_path.rglob("evil*")) == [] and not (tmp_path / "out/mmmath/images").exists()


def test_names_inside_an_archive_are_told_from_those_outside():
    assert not any(map(leaves_folder, ["Image/a.png", "a..b/c.png", "Image/...png", "a b.jpg"]))
    assert all(map(leaves_folder, ["\\\\server\\a.png", "a/..", "//a.png", "c:a.png/.."]))


def test_shards_of_a_split_are_found_in_every_layout_and_in_order():
    names = [f"data/{split}-0000{i}-of-00002.parquet" for split in ("test", "testmini") for i in (1, 0)]
    assert shards(names, None, "testmini") == sorted(names[2:])
    assert shards(names, None, "test") == sorted(names[:2])
    assert shards(["default/test/0000.parquet", "default/train/0000.parquet"], None, "test") == [
        "default/test/0000.parquet"
    ]
    both = ["A/test-00000-of-00001.parquet", "B/test-00000-of-00001.parquet"]
    assert shards(both, "B", "test") == both[1:]
    assert shards(["data/non_image-0.parquet", "data/image-0.parquet"], None, "image") == ["data/image-0.parquet"]


def test_shards_are_read_in_order_from_a_folder_with_an_odd_name(prepared, tmp_path):
    columns = pq.read_table(prepared["mmvp"][0] / "data/train-00000-of-00001.parquet")
    folder = tmp_path / "odd [x] fo*der?"
    folder.mkdir()
    for i in reversed(range(6)):
        pq.write_table(columns.take([i]), folder / f"train-0000{i}-of-00006.parquet")
    result = prepare("mmvp", tmp_path / "out", source=folder)
    assert json.loads(result.path.read_bytes()) == prepared["mmvp"][2]


def test_a_manifest_that_cannot_be_read_is_made_anew(prepared, tmp_path):
    source, result, _ = prepared["mmvp"]
    prepare("mmvp", tmp_path, source=source)
    for content in (b"{", b"[]", b'{"files": 1}'):
        (tmp_path / "mmvp/manifest.json").write_bytes(content)
        assert prepare("mmvp", tmp_path, source=source).written == []  # the other files are as they should be
        assert (tmp_path / "mmvp/manifest.json").read_bytes() == (result.path.parent / "manifest.json").read_bytes()


def test_hidden_files_of_a_clone_are_no_data(tmp_path):
    for name in (".git/train.parquet", ".cache/x/train.parquet", "data/train.parquet"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert open_folder(tmp_path).names == ("data/train.parquet",)


def test_options_in_a_line():
    assert inline_options("Options: A: red, B: blue") == {"A": "red", "B": "blue"}
    assert inline_options("Which?\nOptions: A. 1,000; B. 2 B: x") == {"A": "1,000", "B": "2 B: x"}
    assert inline_options("Options: A: red") == inline_options("A: red, B: blue") == {}
    with pytest.raises(IndexError):
        choice_fields("?", ["one"], 1)


def test_unknown_names_are_refused_and_known_ones_found_in_any_spelling(prepared):
    out = prepared["mmmath"][1].path.parents[1]
    for name in ("MM-Math", "mm_math", "MMMath"):
        assert prepare(name, out, source="unused").path == prepared["mmmath"][1].path
    assert prepare("MathVista-mini", out, source="unused").path == prepared["mathvista"][1].path
    with pytest.raises(ConfigError, match="did you mean 'hallusionbench'"):
        prepare("halusion-bench", out)


def test_a_local_source_is_read_without_calling_out(prepared, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **how: asked.append(address) or [])
    for library in (constants, datasets.config):
        monkeypatch.setattr(library, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    assert prepare("mmvp", tmp_path, source=prepared["mmvp"][0]).rows == 6
    assert asked == []


# ------------------------------------------------------------------------------------- a hub on loopback


class Hub(http.server.BaseHTTPRequestHandler):
    """The parts of the hub's protocol that a download needs: facts of a repository, and files at a commit."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, self.path.split("?")[0]
        hub.requests.append((self.command, path, self.headers.get("Authorization")))
        code, headers, body = hub.status, {}, b"{}"
        api = f"/api/datasets/{hub.repo}"
        if code == 200 and path in (api, f"{api}/revision/{hub.sha}"):
            siblings = [{"rfilename": name} for name in hub.files]
            body = json.dumps({"id": hub.repo, "sha": hub.sha, "siblings": siblings}).encode()
        elif code == 200 and (name := path.partition(f"/datasets/{hub.repo}/resolve/{hub.sha}/")[2]) in hub.files:
            body = hub.files[name]
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": hub.sha}
        elif code == 200:
            code = 404
        if code in (401, 403, 404):
            headers["X-Error-Code"] = {403: "GatedRepo"}.get(code, "RepoNotFound")
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server with the small MMVP, which the hub's library takes for the hub."""
    mmvp(tmp_path / "source")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repo, server.sha, server.status, server.requests = "lmms-lab-eval/MMVP", "ab" * 20, 200, []
    name = "data/train-00000-of-00001.parquet"
    content = (tmp_path / "source" / name).read_bytes()
    server.files = {name: content, "run_me.py": b"raise SystemExit(77)", "data/test-00000-of-00001.parquet": b"unread"}
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template[template.index("/{repo_id}") :])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    close_session()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield server
    close_session()
    server.shutdown()
    server.server_close()


def test_a_download_gives_the_same_files_at_one_commit_and_only_what_is_needed(hub, prepared, tmp_path):
    assert run("mmvp", "--out", tmp_path / "out") == 0
    made = {name: content for name, (_, _, content) in snapshot(tmp_path / "out/mmvp").items()}
    expected = {name: content for name, (_, _, content) in snapshot(prepared["mmvp"][1].path.parent).items()}
    manifest = json.loads(made.pop("manifest.json"))
    assert manifest["source"] == {"repo": hub.repo, "revision": hub.sha}
    assert made.items() <= expected.items() and len(made) == len(expected) - 1
    fetched = {path.rpartition("/")[2] for _, path, _ in hub.requests if "/resolve/" in path}
    assert fetched == {"train-00000-of-00001.parquet"}
    assert {token for _, _, token in hub.requests} == {"Bearer hf_secret"}
    assert not any(b"hf_secret" in content for _, _, content in snapshot(tmp_path / "out").values())
    # Repeated: nothing is asked. Damaged: mended from the commit in the manifest.
    hub.requests.clear()
    assert run("mmvp", "--out", tmp_path / "out") == 0 and hub.requests == []
    (tmp_path / "out/mmvp/images/00001.png").unlink()
    assert run("mmvp", "--out", tmp_path / "out") == 0
    assert hub.requests[0][1].endswith(f"/revision/{hub.sha}")
    assert (tmp_path / "out/mmvp/images/00001.png").read_bytes() == picture(2)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (403, "gated on the hub; accept its conditions"),
        (404, "the hub shows no such dataset"),
        (400, "the hub refused"),
    ],
)
def test_a_hub_that_refuses_is_reported_in_one_sentence(hub, status, message, tmp_path, capsys):
    hub.status = status
    assert run("mmvp", "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert message in error and "--source" in error and error.count("\n") == 1
    assert "hf_secret" not in error and not (tmp_path / "out/mmvp/mmvp.json").exists()


def test_a_hub_that_is_not_there_is_reported_in_one_sentence(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # "discard": nothing listens there
    assert run("mmvp", "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "lmms-lab-eval/MMVP: the hub cannot be reached" in error and error.count("\n") == 1
