"""What goes on a page says what it was given, is embedded, and nothing in it runs."""

import base64
import io
import re

import pandas as pd
from bs4 import BeautifulSoup
from PIL import Image

from dmlr.show import page

ATTACK = '<script>alert("x")</script><img src=x onerror=alert(1)> & "quoted"'


def test_galleries_escape_what_models_and_datasets_say():
    answers = [
        {"name": ATTACK, "text": ATTACK, "right": True, "note": ATTACK},
        {"name": "b", "text": "", "right": None},
    ]
    card = {
        "idx": ATTACK,
        "question": ATTACK,
        "truth": ATTACK,
        "category": ATTACK,
        "image": Image.new("RGB", (6, 4)),
        "answers": answers,
    }
    soup = BeautifulSoup(page.gallery([card]), "html.parser")
    assert not soup.find("script")
    assert not soup.find("img")
    assert [image["href"][:16] for image in soup.find_all("image")] == ["data:image/webp;"]
    assert soup.get_text().count(ATTACK) == 7
    assert [b.get_text() for b in soup.find_all("b")] == ["✓ right"]


def test_gallery_images_are_embedded_small_or_left_out(tmp_path):
    Image.new("RGB", (900, 300), "red").save(tmp_path / "wide.png")
    card = {"question": "q", "truth": "t", "answers": []}
    html = page.gallery([{**card, "idx": 1, "image": "wide.png"}, {**card, "idx": 2, "image": "gone.png"}], tmp_path)
    found = re.findall(r"base64,([^\"]+)", html)
    assert len(found) == 1
    assert Image.open(io.BytesIO(base64.b64decode(found[0]))).size == (224, 75)
    assert "gone.png: No such file" in html


def test_tables_escape_and_set_numbers_flush_right():
    soup = BeautifulSoup(page.table(pd.DataFrame({"name": [ATTACK], "n": [12], "share": ["81.2%"]})), "html.parser")
    cells = soup.find_all("td")
    assert cells[0].get_text() == ATTACK
    assert [cell.get("class") for cell in cells] == [None, ["number"], ["number"]]


def test_what_a_model_says_cannot_steer_the_page_or_its_neighbours():
    """ESC and NUL are shown as symbols, and text that turns the direction ends where it stands."""
    answers = [{"name": "vanilla", "text": "red\x1b[2J\x00", "right": True, "note": ""}]
    card = {"idx": "q\u202e1", "question": "Which?\x07", "truth": "red", "answers": answers}
    html = page.gallery([card])
    assert "red␛[2J␀" in html and "Which?␇" in html and not {"\x1b", "\x00", "\x07"} & set(html)
    assert "<bdi>q\u202e1</bdi>" in html
    assert "a␛b" in page.table(pd.DataFrame({"x": ["a\x1bb"]}))
