"""What the doctor says of this machine, of the embedded files, and of models that are or are not here."""

import json
import shutil
import socket
from pathlib import Path

import psutil
import pytest
import torch
from tiny import tiny_vlm

from dmlr import doctor
from dmlr.cli import main
from dmlr.config import Config
from dmlr.judge.llm_settings import JudgeError
from dmlr.methods.workload import workload
from dmlr.model.memory import USABLE, Shape, peak
from dmlr.planning import GIB, PAPER_MODELS, dry_run, fit, paper_settings

SECRET = "sk-do-not-print-me"


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the doctor calls nobody and loads no weights")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)


def test_the_doctor_finds_this_machine_well(offline, capsys):
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert f"torch {torch.__version__}" in told and "3 suites and the model are whole" in told
    assert all(name in told for name in PAPER_MODELS)
    if not torch.cuda.is_available():
        assert "none that torch sees" in told and "GPUs only" in told
    assert "broken" not in told


def test_json_has_everything_and_no_secret(offline, capsys, monkeypatch):
    for name in ("HF_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    assert main(["doctor", "--json"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    assert SECRET not in text and SECRET not in doctor.as_text(found)
    assert found["hub"]["token_set"] and found["judge"]["usable"] and found["judge"]["set"]["OPENAI_API_KEY"]
    assert found["machine"]["ram_bytes"] == psutil.virtual_memory().total
    assert len(found["machine"]["gpus"]) == torch.cuda.device_count()
    assert found["software"]["pinned"] > 20 and not found["software"]["missing"]
    embedded = next(row for row in found["models"] if row["model"] == "data/models/shapes-vl")
    assert embedded["settings"] == "folder" and embedded["parameters"] == 4_080_288


def test_nothing_set_is_said_too(offline, capsys, monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "token not set" in told and "needs OPENAI_API_KEY" in told


# models


def test_a_model_of_yours_is_described_without_its_weights(offline, tmp_path, capsys):
    vlm = tiny_vlm()
    vlm.model.config.save_pretrained(tmp_path / "mine")
    row = fit(str(tmp_path / "mine"), 10 * GIB, "cuda")
    assert row["parameters"] == sum(p.numel() for p in vlm.model.parameters())
    assert row["precisions"]["float32"]["weight_bytes"] == 4 * row["parameters"]
    assert row["architecture"] == "qwen2_5_vl"
    assert main(["doctor", str(tmp_path / "mine"), "--memory", "24"]) == 0
    assert str(tmp_path / "mine") in capsys.readouterr().out


def test_what_fits_is_weights_and_a_batch_within_the_memory():
    row = fit("Qwen/Qwen2.5-VL-7B-Instruct", 24 * GIB, "cuda")
    batches = {name: held["batch"] for name, held in row["precisions"].items()}
    assert batches["float32"] == 0, "31 GiB of weights"
    assert 0 < batches["bfloat16"] < batches["8 bits"] < batches["4 bits"]
    shape = Shape.of(paper_settings("Qwen/Qwen2.5-VL-7B-Instruct"))
    batch = peak(shape, 2, workload(Config.make("paper")), batches["bfloat16"])
    assert batch <= USABLE["cuda"] * (24 * GIB - row["precisions"]["bfloat16"]["weight_bytes"])
    assert set(fit("Qwen/Qwen2.5-VL-7B-Instruct", 24 * GIB, "cpu")["precisions"]) == {"float32", "bfloat16"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "no such folder, and not in the hub's cache"),
        ("{", "no settings that transformers can read"),
        ('{"model_type": "gpt2"}', "not a vision-language model"),
        ('{"model_type": "nonesuch"}', "no settings that transformers can read"),
    ],
)
def test_a_model_that_cannot_be_described_is_an_error_that_says_why(offline, tmp_path, capsys, settings, message):
    if settings is not None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "config.json").write_text(settings)
    assert main(["doctor", str(tmp_path / "mine")]) == 1
    assert message in capsys.readouterr().out


# embedded files


@pytest.fixture
def copy(tmp_path):
    target = tmp_path / "shapes-vl"
    shutil.copytree(Path(__file__).parents[1] / doctor.EMBEDDED_MODEL, target)
    return target


def test_damage_to_a_checkpoint_is_found(copy):
    assert doctor.weights_problems(copy) == []
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    assert len(doctor.weights_problems(copy)) == 1
    weights.write_bytes(whole)
    (copy / "tokenizer.json").unlink()
    assert doctor.weights_problems(copy) == ["shapes-vl: tokenizer.json is missing"]
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] -= 1
    config["text_config"]["layer_types"].pop()
    (copy / "config.json").write_text(json.dumps(config))
    assert "its settings call for" in doctor.weights_problems(copy)[0]


def test_what_is_broken_makes_the_exit_status(monkeypatch, capsys, tmp_path):
    (tmp_path / "suite.json").write_text('[{"prompt": "how many?", "solution": "3", "image_path": "none.png"}]')
    monkeypatch.setattr(doctor, "EMBEDDED_DATA", (str(tmp_path / "suite.json"), str(tmp_path / "gone.json")))
    assert main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert "none.png" in told and "gone.json: No such file" in told


def test_a_missing_package_is_broken_and_another_version_is_told(monkeypatch):
    versions = {"torch": None, "pandas": "0.1"}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions[name] if name in versions else real(name))
    found = doctor.software()
    assert found["missing"] == ["torch"] and found["other_versions"] == {"pandas": "0.1"}


def test_a_dry_run_finds_the_key_where_the_run_will_look(tmp_path, monkeypatch):
    """In the notebook's folder, in which its kernel works."""
    shutil.copy(Path(__file__).parents[1] / "notebooks" / "03_benchmark.ipynb", tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("dmlr.judge.llm_settings.root", lambda: tmp_path / "elsewhere")
    given = {"use_llm_verify": True, "output_dir": str(tmp_path / "run"), "end_data_idx": 2}
    with pytest.raises(JudgeError, match="OPENAI_API_KEY"):
        dry_run(tmp_path / "03_benchmark.ipynb", given)
    (tmp_path / ".env").write_text(f"OPENAI_API_KEY={SECRET}\n")
    assert dry_run(tmp_path / "03_benchmark.ipynb", given)[1] == []
