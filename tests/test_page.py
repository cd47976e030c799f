"""What goes on a page says what it was given, is embedded, and nothing in it runs."""

import pandas as pd
from bs4 import BeautifulSoup

from dmlr.show import gallery, page

ATTACK = '<script>alert("x")</script><img src=x onerror=alert(1)> & "quoted"'


def test_tables_escape_and_set_numbers_flush_right():
    soup = BeautifulSoup(page.table(pd.DataFrame({"name": [ATTACK], "n": [12], "share": ["81.2%"]})), "html.parser")
    cells = soup.find_all("td")
    assert cells[0].get_text() == ATTACK
    assert [cell.get("class") for cell in cells] == [None, ["number"], ["number"]]


def test_what_a_model_says_cannot_steer_the_page_or_its_neighbours():
    """ESC and NUL are shown as symbols, and text that turns the direction ends where it stands."""
    said = {"question": "Which?\x07", "ground_truth": "red", "model_output": "red\x1b[2J\x00"}
    entry = {"data_idx": "q\u202e1", "stop_reason": "eos_token", "verdict": "correct", "is_correct": True, **said}
    run = {("suite", "vanilla"): {"entries": [entry]}}
    html = page.gallery(gallery.cards(run))
    assert "red␛[2J␀" in html and "Which?␇" in html and not {"\x1b", "\x00", "\x07"} & set(html)
    assert "<bdi>q\u202e1</bdi>" in html
    assert "a␛b" in page.table(pd.DataFrame({"x": ["a\x1bb"]}))
