"""Whatever a run holds becomes JSON that any reader takes, and a file is the old one or the new one."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dmlr.json_files import as_plain, write_json


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (math.nan, None),
        ([-math.inf, 1.5], [None, 1.5]),
        (np.float32(0.5), 0.5),
        (np.array([[1.0, np.nan]]), [[1.0, None]]),
        (torch.arange(3), [0, 1, 2]),
        (np.bool_(True), True),
        ({1: (2, None)}, {"1": [2, None]}),
        (Path("a/b"), "a/b"),
    ],
)
def test_everything_becomes_plain(value, plain):
    found = as_plain(value)
    assert found == plain
    assert json.loads(json.dumps(found, allow_nan=False)) == plain


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"text": "é\u2028\ud800"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"text": "é\u2028?"}
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
