"""What the doctor says of this machine, of the embedded files, and of models that are or are not here."""

import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from tiny import tiny_vlm

from dmlr import doctor
from dmlr.cli import main
from dmlr.planning import PAPER_MODELS

SECRET = "sk-do-not-print-me"
GIB, PAPER = 2**30, list(PAPER_MODELS)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the doctor calls nobody")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_the_doctor_finds_this_machine_well_and_keeps_its_secrets(capsys, monkeypatch):
    for name in ("HF_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setattr(doctor, "PAPER_MODELS", PAPER[:1])
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert f"torch {torch.__version__}" in told and "3 suites and the model are whole" in told
    assert PAPER[0] in told and "broken" not in told
    assert "HF_TOKEN, OPENAI_API_KEY set" in told and "can be asked" in told and SECRET not in told


def test_what_is_broken_makes_the_exit_status(monkeypatch, capsys, tmp_path):
    (tmp_path / "suite.json").write_text('[{"prompt": "how many?", "solution": "3", "image_path": "none.png"}]')
    model = shutil.copytree(Path(__file__).parents[1] / doctor.EMBEDDED_MODEL, tmp_path / "model")
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-1000])
    monkeypatch.setattr(doctor, "EMBEDDED_DATA", (str(tmp_path / "suite.json"), str(tmp_path / "gone.json")))
    monkeypatch.setattr(doctor, "EMBEDDED_MODEL", str(model))
    monkeypatch.setattr(doctor, "PAPER_MODELS", {})
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert "none.png" in told and "gone.json: No such file" in told and "broken: cannot load folder" in told
    assert "cannot be asked, OPENAI_API_KEY: " in told


def test_what_fits_depends_on_memory_and_device_and_needs_no_weights(tmp_path):
    tiny_vlm().model.config.save_pretrained(tmp_path / "mine")
    names = ["Qwen/Qwen2.5-VL-7B-Instruct", str(tmp_path / "mine")]
    (gpu, none), (cpu, _) = (doctor.fits(names, 24 * GIB, kind) for kind in ("cuda", "cpu"))
    assert "24.0 GiB of GPU memory" in gpu and none == []
    assert "30.9 GiB, too large  15.4 GiB, batch 24  8.7 GiB, batch 43  5.8 GiB, batch 52" in gpu
    assert "30.9 GiB, too large  15.4 GiB, batch 12  GPUs only  GPUs only" in cpu
    assert re.search(r"/mine +\S+ G .* folder$", gpu, re.MULTILINE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "no such folder, and not in the hub's cache"),
        ('{"model_type": "gpt2"}', "the architecture 'gpt2' is not supported: it has no vision tower"),
        ('{"model_type": "nonesuch"}', "no settings that transformers can read"),
    ],
)
def test_a_model_that_cannot_be_described_is_an_error_that_says_why(tmp_path, settings, message):
    if settings is not None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "config.json").write_text(settings)
    table, unknown = doctor.fits([str(tmp_path / "mine")], GIB, "cpu")
    assert message in unknown[0] and "unknown" in table
