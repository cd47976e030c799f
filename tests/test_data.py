"""Dataset files, good and damaged, and images of every awkward kind."""

from __future__ import annotations

import base64
import http.server
import io
import json
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmlr.cli import main
from dmlr.data import images
from dmlr.data.check import check_dataset, report
from dmlr.data.examples import DatasetError, load_dataset
from dmlr.data.images import ImageError, open_image
from dmlr.judge import judge
from dmlr.run.evaluate import shown_path

OFFICIAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "official"


@pytest.fixture
def write(tmp_path):
    """Writes rows as a dataset file beside one readable image, `a b.png`."""
    Image.new("RGB", (4, 3), "red").save(tmp_path / "a b.png")

    def write(rows):
        path = tmp_path / "data.json"
        path.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
        return path

    return write


def row(**changes):
    base = {"prompt": "How many?", "solution": "3", "image_path": "a b.png", "idx": 0}
    return {key: value for key, value in {**base, **changes}.items() if value is not ...}


def kinds(problems, fatal=None):
    return [problem.kind for problem in problems if fatal is None or problem.fatal is fatal]


# ------------------------------------------------------------------------------------------- rows


def test_a_good_row_becomes_an_example_with_its_other_keys_and_images_from_two_folders(write, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Image.new("RGB", (2, 2)).save("here.png")
    lists = [["a b.png", "here.png"], [], [(tmp_path / "a b.png").as_uri()], "here.png"]
    path = write([row(idx=f"q{i}", prompt=f"{i}?", image_path=paths, category="sum") for i, paths in enumerate(lists)])
    examples, problems = load_dataset(path)
    assert problems == check_dataset(path) == []
    first, none, third, last = examples
    assert (last.row, last.idx, last.question, last.solution, last.meta) == (3, "q3", "3?", "3", {"category": "sum"})
    assert first.images == (str(tmp_path / "a b.png"), "here.png") and first.image == first.images[0]
    assert (none.image, none.images, third.images, last.image) == (None, (), first.images[:1], "here.png")


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        ("text", "not_an_object"),
        (row(prompt=...), "prompt_missing"),
        (row(prompt="  \n"), "prompt_empty"),
        (row(prompt=["x"]), "prompt_empty"),
        (row(idx=1), "idx_doubled"),
        (row(idx=True), "idx_invalid"),
        (row(idx=[1]), "idx_invalid"),
        (row(idx=5, image_path="none.png"), "image_missing"),
        (row(idx=5, image_path="x" * 5000), "image_missing"),
        (row(idx=5, image_path="a\0b"), "image_missing"),
        (row(idx=5, image_path=""), "image_missing"),
        (row(idx=5, image_path=...), "image_missing"),
        (row(idx=5, image_path=["a b.png", "none.png"]), "image_missing"),
        (row(idx=5, image_path=["a b.png", None]), "image_invalid"),
        (row(idx=5, image_path=7), "image_invalid"),
    ],
)
def test_an_unusable_row_is_one_fatal_problem_and_the_rest_goes_on(write, bad, kind):
    examples, problems = load_dataset(write([row(idx=1), bad, row(idx=2)]))
    assert [e.row for e in examples] == [0, 2]
    assert [(p.row, p.kind) for p in problems if p.fatal] == [(1, kind)]
    assert all(p.message for p in problems)


@pytest.mark.parametrize(
    ("content", "found", "kind"),
    [
        ([row(idx=...)], {"idx": 0}, "idx_missing"),
        ([row(solution=...)], {"solution": ""}, "solution_missing"),
        ([row(solution="")], {"solution": ""}, "solution_empty"),
        ([row(solution=12)], {"solution": "12"}, None),
        ([row(image_path=None)], {"image": None}, None),
        ([row(image_path=...)], {"image": None}, None),  # as of all rows of this file
        # Half of a character: nothing can write it down, so the first file or page would fail on it.
        ([row(idx="q\ud83d", hint=["\ude00"])], {"idx": "q?", "meta": {"hint": ["?"]}}, "half_characters"),
        ([row(prompt="A smile \U0001f600?")], {"question": "A smile \U0001f600?"}, None),
        ('[{"prompt": "q?", "solution": 3, "solution": 1e999, "idx": 1.0}]', {"solution": "1e999"}, "key_doubled"),
        ([row(prompt="Look.\\n Is $a \\neq b$, \\nu, \\\\n?\\nOr")],
         {"question": "Look.\n Is $a \\neq b$, \\nu, \\\\n?\nOr"}, "literal_newline"),
    ],
)  # fmt: skip
def test_what_is_odd_but_bearable_is_read_with_a_remark(write, content, found, kind):
    [example], problems = load_dataset(write(content))
    assert {name: getattr(example, name) for name in found} == found
    assert [(p.kind, p.fatal) for p in problems] == ([(kind, False)] if kind else [])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not valid JSON"),
        (b"[{]", "not valid JSON"),
        (b'[{"idx": NaN}]', "NaN"),
        (b'{"prompt": "x"}', "expected a JSON list"),
        (b"[]", "empty"),
        (b"[" * 100_000, "nested too deeply|not valid JSON"),
        ('["é"]'.encode("latin-1"), "not UTF-8"),
        (None, "No such file"),
        (Path.mkdir, "directory"),
    ],
)
def test_an_unusable_file_is_one_clear_error(tmp_path, content, reason):
    path = tmp_path / "data.json"
    if content is not None:
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
    with pytest.raises(DatasetError, match=reason) as error:
        load_dataset(path)
    assert str(path) in str(error.value)


# ----------------------------------------------------------------------------------------- checks


OPTIONS = "Which?\nA. cat\nB. dog\nC. C. elegans"


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"prompt": OPTIONS, "solution": "D"}, "letter_not_an_option"),
        ({"prompt": OPTIONS, "solution": "D. cow"}, "letter_not_an_option"),
        ({"prompt": OPTIONS, "solution": "B. cat"}, "option_text_differs"),
        ({"prompt": OPTIONS, "solution": "cow"}, "solution_not_an_option"),
        ({"prompt": "Which?\nA. C. elegans\nB. dog\nC. cat", "solution": "C. elegans"}, "option_like_letter"),
        ({"prompt": "Which?\nA. B cells\nB. T cells", "solution": "B cells"}, "option_like_letter"),
        ({"prompt": "Which?\nA. cat\nB. cat", "solution": "A"}, "options_doubled"),
        ({"prompt": "Which?\nA. cat\nB. Cat!", "solution": "A"}, "options_alike"),
        ({"prompt": "Which?\nA. cat\nB.", "solution": "A"}, "options_empty"),
        ({"solution": "4", "choices": ["3", "5"]}, "solution_not_an_option"),
        ({"solution": "\\boxed{3"}, "solution_unparsable"),
        ({"solution": "\\boxed{}"}, "solution_unparsable"),
        ({"prompt": "How\x07 many?"}, "control_characters"),
        ({"solution": "3\x00"}, "control_characters"),
    ],
)
def test_check_holds_solutions_against_options(write, changes, kind):
    assert kinds(check_dataset(write([row(**changes)]))) == [kind]


@pytest.mark.parametrize(
    "solution", ["A", "a", "(b)", "B. dog", "B: dog", "(b) dog", "dog", "C. C. elegans", "\\boxed{B}"]
)
def test_check_accepts_every_form_of_a_right_solution(write, solution):
    assert check_dataset(write([row(prompt=OPTIONS, solution=solution)])) == []


@pytest.mark.parametrize("choices", [["(a) Open", "(b) Closed"], {"A": "Open", "B": "Closed"}])
def test_check_reads_choices_as_the_judge_does(write, choices):
    """What the judge accepts as the truth is no problem, and what is none of its options is one."""
    for solution in ("Open", "(a) Open", "A"):
        assert judge("Open", solution, choices=choices).status == "correct"
        assert check_dataset(write([row(solution=solution, choices=choices)])) == []
    assert kinds(check_dataset(write([row(solution="Ajar", choices=choices)]))) == ["solution_not_an_option"]


def test_check_opens_images_finds_twins_and_looks_at_solutions_of_rows_without_images(write, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    rows = [row(), row(idx=1), row(idx=2, solution="4"), row(idx=3, image_path="text.png")]
    rows += [row(idx=4, image_path="none.png", prompt=OPTIONS, solution="D")]
    assert [(p.row, p.kind, p.fatal) for p in check_dataset(write(rows))] == [
        (1, "row_doubled", False),
        (2, "rows_contradict", False),
        (3, "image_unreadable", True),
        (4, "image_missing", True),
        (4, "letter_not_an_option", False),
    ]


def test_a_first_option_that_is_never_right_is_suspicious(write):
    rows = [row(idx=i, prompt=f"{i}? {OPTIONS}", solution="B" if i < 20 else "") for i in range(23)]
    (problem,) = [p for p in check_dataset(write(rows)) if p.row is None]
    assert problem.kind == "first_option_never" and "none of 20" in problem.message and "3 are empty" in problem.message
    for changed in ({"solution": "A"}, {"solution": "(a)"}, {"solution": "no option at all"}):
        some = [rows[0] | changed, *rows[1:]]  # once right, or one fewer than can be told from chance
        assert [p for p in check_dataset(write(some)) if p.row is None] == []


def test_what_is_wrong_with_many_rows_alike_is_said_once(write):
    rows = [row(idx=i, prompt=f"{i}?", solution="") for i in range(12)]
    lost = [row(idx=f"q{i}", prompt=f"{i} or {i}?", image_path=f"none{i}.png") for i in range(5)]
    lines = report(check_dataset(write([*rows, *lost]))).splitlines()
    assert lines[0].split() == ["5", "image_missing", "(row", "unusable)"]
    assert "row 12: image file 'none0.png'" in lines[1] and "none2" in lines[3] and lines[4].strip() == "and 2 more"
    assert lines[5].split() == ["12", "solution_empty"]
    assert "rows 0, 1, 2, 3, 4, 5, 6, 7 and 4 more: the solution is empty" in lines[6]
    assert kinds(check_dataset(write(lost))) == ["images_elsewhere", *["image_missing"] * 5], "here none is there"


@pytest.mark.parametrize(
    ("rows", "status", "said"),
    [
        ([row()], 0, "no problems"),
        ([row(solution="")], 1, "1 rows: 0 unusable, 1 without a solution; 1 problems\n     1  solution_empty"),
        ("", 2, "not valid JSON"),
    ],
)
def test_the_check_command_and_its_exit_status(write, capsys, rows, status, said):
    assert main(["check", str(write(rows))]) == status
    assert said in "".join(capsys.readouterr())


@pytest.mark.skipif(not OFFICIAL.exists(), reason="the released data files are not part of the repository")
def test_what_the_check_finds_in_released_files():
    science = Counter(kinds(check_dataset(OFFICIAL / "scienceqa.json"), fatal=False))
    assert science == {"solution_empty": 713, "first_option_never": 1, "images_elsewhere": 1}
    mmvp = Counter(kinds(check_dataset(OFFICIAL / "mmvp.json"), fatal=False))
    assert mmvp == {"idx_missing": 300, "literal_newline": 300, "options_alike": 2, "images_elsewhere": 1}


# ----------------------------------------------------------------------------------------- images


def saved(tmp_path, image, name="image.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


PALETTE = Image.new("P", (2, 2), 1)
PALETTE.putpalette([0, 0, 0, 0, 0, 255])
EXIF = Image.Exif()
EXIF[0x0112] = 6  # turned by 90 degrees


@pytest.mark.parametrize(
    ("image", "name", "options", "size", "pixels"),
    [
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "a.png", {}, (2, 2), {255}),  # on white
        (Image.new("LA", (2, 2), (0, 255)), "a.png", {}, (2, 2), {0}),
        (PALETTE, "a.png", {}, (2, 2), {0, 255}),
        (PALETTE, "a.png", {"transparency": 1}, (2, 2), {255}),
        (Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16)), "a.png", {}, (3, 1), {0, 128, 255}),
        (Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32)), "a.tiff", {}, (3, 1), {0, 128, 255}),
        (Image.new("RGB", (8, 4), "white"), "a.jpg", {"exif": EXIF}, (4, 8), {255}),
        (Image.new("CMYK", (8, 4)), "a.jpg", {}, (8, 4), {255}),
        (Image.new("1", (8, 4), 1), "a.png", {}, (8, 4), {255}),
    ],
)
def test_whatever_an_image_is_like_becomes_rgb(tmp_path, image, name, options, size, pixels):
    opened = open_image(saved(tmp_path, image, name, **options))
    assert (opened.mode, opened.size) == ("RGB", size) and set(np.unique(opened).tolist()) == pixels


def test_every_kind_of_source(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (3, 2), "lime"), "a b.png")
    data = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    for source in (path, str(path), path.as_uri(), data, Image.open(path)):
        assert open_image(source).getpixel((0, 0)) == (0, 255, 0)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("cut.png", "(?i)truncated"),
        ("text.png", "not an image"),
        ("empty.png", "empty"),
        ("none.png", "No such file"),
        ("", "directory"),
        ("wide.png", "8000 x 10.*differ by more than 200"),
        ("nan.tiff", "no number"),
        ("sum.png", "checksum"),
        ("large.png", "bomb"),
        ("data:image/png;base64,&&&", "base64"),
    ],
)
def test_what_is_no_image_is_a_clear_error(tmp_path, monkeypatch, source, reason):
    good = saved(tmp_path, Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)))
    content = bytearray(good.read_bytes())
    content[-14] ^= 1  # of the checksum of the last chunk of pixels; without it, other pixels pass
    made = {"cut.png": content[:2000], "text.png": b"hello", "empty.png": b"", "sum.png": content}
    if source in made:
        (tmp_path / source).write_bytes(made[source])
    saved(tmp_path, Image.new("L", (8000, 10)), "wide.png")
    saved(tmp_path, Image.fromarray(np.array([[0, np.nan, 1]], dtype=np.float32)), "nan.tiff")
    saved(tmp_path, Image.new("L", (500, 400)), "large.png")
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 100_000)
    with pytest.raises(ImageError, match=reason) as error:
        open_image(source if source.startswith("data:") else tmp_path / source)
    assert source in str(error.value)


def test_a_password_in_a_url_is_not_shown():
    assert images.without_password("see HTTPS://me:pw@host/a.png") == "see HTTPS://host/a.png"
    assert images.without_password("https://host/a@b.png") == "https://host/a@b.png"
    assert shown_path(("https://me:pw@host/a.png", "b.png")) == ["https://host/a.png", "b.png"], "nor is it in records"
    with pytest.raises(ImageError) as error:
        open_image("http://me:secret@127.0.0.1:9/a.png")
    assert "127.0.0.1:9/a.png" in str(error.value) and "secret" not in str(error.value)


@pytest.fixture
def server():
    """Address of a server with a good image, one whose bytes drip, and one whose headers do."""
    content = io.BytesIO()
    Image.new("RGB", (3, 2), "lime").save(content, "PNG")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            head = b"HTTP/1.0 200 OK\r\nX-Filler: dripping\r\n\r\n"
            drips = {"/good.png": b"", "/body.png": content.getvalue(), "/head.png": head}.get(self.path)
            if self.path != "/head.png":
                self.send_response(404 if drips is None else 200)
                self.end_headers()
            for byte in drips or b"":
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)
            self.wfile.write(content.getvalue())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_image_comes_from_a_server_within_a_time_or_not_at_all(server, monkeypatch):
    assert open_image(f"{server}/good.png").getpixel((0, 0)) == (0, 255, 0)
    bad = {f"{server}/none.png": "404", "http://127.0.0.1:9/good.png": "cannot be fetched"}
    for url, reason in (bad | {"http://127.0.0.1:99999/good.png": "Port out of range"}).items():
        with pytest.raises(ImageError, match=reason):
            open_image(url)
    monkeypatch.setattr(images, "_DOWNLOAD_SECONDS", 0.2)
    for dripping in ("body", "head"):
        start = time.monotonic()
        with pytest.raises(ImageError, match="not fetched within 0.2 seconds"):
            open_image(f"{server}/{dripping}.png")
        assert time.monotonic() - start < 1.5
    monkeypatch.setattr(images, "MAX_DOWNLOAD", 50)
    with pytest.raises(ImageError, match="larger than"):
        open_image(f"{server}/good.png")
