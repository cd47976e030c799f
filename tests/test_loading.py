"""Loading as people load: folders, the hub's refusals, several devices, few bits."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from recomputed import noise_of
from safetensors.torch import load_file, save_file
from tiny import noise_image, tiny_vlm
from transformers import AutoModelForImageTextToText, LlamaConfig

from dmlr.config import Config, ConfigError
from dmlr.loop.optimize import optimize
from dmlr.methods.answers import Question
from dmlr.model.attention import ATTENTION
from dmlr.model.decode import decode
from dmlr.model.encode import encode
from dmlr.model.families import ModelError
from dmlr.model.vlm import VLM
from dmlr.run.batches import answer_batch

LOOP = {"num_thought_tokens": 2, "max_num_steps": 3, "lr": 0.02, "sigma": 0.05, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, vlm = tmp_path_factory.mktemp("model"), tiny_vlm()
    vlm.model.save_pretrained(path)
    vlm.processor.save_pretrained(path)
    return path


def everything(vlm):
    """Prefill, loop and decoding of a batch in which rows finish at different times."""
    config = Config(**LOOP)
    encoded = [encode(vlm, "", "?" * (3 * i + 1), [noise_image(i)], 2) for i in range(3)]
    trace = optimize(vlm, vlm.prefill(encoded), config, noise_of(vlm, config, range(3)))
    prefix = vlm.prefill(encoded).select(torch.tensor([0, 2]))
    return trace.best_reward, trace.final.patches.tolist(), decode(vlm, prefix, 8)


def test_layers_on_several_devices_give_the_same(folder, tmp_path):
    """accelerate's hooks move inputs to each layer: here one layer, the head and the vision tower wait on the disk."""
    expected = everything(VLM.load(Config(model_name_or_path=str(folder), device="cpu", max_pixels=None)))
    elsewhere = {"model.language_model.layers.1": "disk", "lm_head": "disk", "model.visual": "disk"}
    here = ("model.language_model.layers.0", "model.language_model.embed_tokens", "model.language_model.norm",
            "model.language_model.rotary_emb")  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation={"text_config": ATTENTION, "vision_config": "sdpa"},
        device_map={**dict.fromkeys(here, "cpu"), **elsewhere},
        offload_folder=tmp_path,
    )
    assert model.lm_head.weight.device.type == "meta"
    processor = VLM.load(Config(model_name_or_path=str(folder), max_pixels=None)).processor
    rewards, patches, decoded = everything(VLM(model, processor))
    torch.testing.assert_close(rewards, expected[0])
    assert (patches, decoded) == expected[1:]
    auto = VLM.load(Config(model_name_or_path=str(folder), device_map="auto", dtype="float32", max_pixels=None))
    torch.testing.assert_close(everything(auto)[0].cpu(), expected[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("bits", "layer", "alike"), [(8, "Linear8bitLt", 0.99), (4, "Linear4bit", 0.9)])
def test_few_bits_are_nearly_all_of_them(tmp_path, bits, layer, alike):
    """Only the language model is quantised, and its logits point where those of float32 point."""
    pytest.importorskip("bitsandbytes")
    exact = tiny_vlm(hidden=64)  # widths that the library's kernels take
    exact.model.save_pretrained(tmp_path)
    exact.processor.save_pretrained(tmp_path)
    vlm = VLM.load(Config(model_name_or_path=str(tmp_path), device="cpu", load_in_bits=bits, max_pixels=None))
    quantised = {name for name, module in vlm.model.named_modules() if type(module).__name__ == layer}
    assert quantised and all("language_model.layers" in name for name in quantised)
    encoded = [encode(exact, "", "?" * (3 * i + 1), [noise_image(i)], 2) for i in range(4)]
    few, all_ = vlm.prefill(encoded).logits, exact.prefill(encoded).logits
    assert torch.cosine_similarity(few, all_).min() > alike
    assert not torch.allclose(few, all_, atol=1e-6)
    rewards, _, decoded = everything(vlm)
    assert rewards.isfinite().all() and all(one.num_tokens for one in decoded)


def test_bits_without_their_library_say_so(monkeypatch):
    monkeypatch.setattr("dmlr.model.loading.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="load_in_bits = 4 needs the library bitsandbytes: pip install"):
        VLM.load(Config(load_in_bits=4))
    with pytest.raises(ConfigError, match="load_in_bits = 3 is not one of .4, 8."):
        Config(load_in_bits=3)


NORM, STORED = "model.language_model.norm.weight", "model.norm.weight"  # a weight in the model, and in its file
FAULTS = {  # message: what was done to the folder of a checkpoint, whose weights by name are given too
    f"weights are missing: {NORM}": lambda path, weights: weights.pop(STORED),
    "missing: model.visual.* and [0-9]+ more": lambda path, weights: [
        weights.pop(key) for key in list(weights) if "visual" in key
    ],
    f"weights have another shape: {NORM}": lambda path, weights: weights.update({STORED: weights[STORED][:5].clone()}),
    "okenizer": lambda path, weights: [file.unlink() for file in path.glob("tokenizer*")],
    "cannot load folder": lambda path, weights: (path / "config.json").write_text("{}"),
    "'llama' is not supported: it has no vision tower": lambda path, weights: LlamaConfig().save_pretrained(path),
}


def damaged(folder, tmp_path, change):
    """Of a copy of a checkpoint to which `change` was done."""
    path = shutil.copytree(folder, tmp_path / "damaged")
    weights = load_file(path / "model.safetensors")
    change(path, weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return Config(model_name_or_path=str(path), device="cpu", max_pixels=None, max_new_tokens=4, max_num_steps=1)


@pytest.mark.parametrize("message", FAULTS)
def test_a_damaged_checkpoint_says_what_is_wrong(folder, tmp_path, message):
    """Weights that are not there are not random instead."""
    with pytest.raises(ModelError, match=message):
        VLM.load(damaged(folder, tmp_path, FAULTS[message]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", "no such folder here, .* cannot be reached"),
        ("data/models/shapes_vl/x", "no name of the form owner/model"),
    ],
)
def test_a_model_that_is_not_here_says_so(name, message):
    with pytest.raises(ModelError, match=f"cannot load name '{name}': .*{message}"):
        VLM.load(Config(model_name_or_path=name))


@pytest.mark.parametrize("method", ["vanilla", "dmlr", "multimodal-cot"])
def test_weights_that_are_no_numbers_are_an_error_of_every_method(folder, tmp_path, method):
    config = damaged(folder, tmp_path, lambda path, weights: weights[STORED].fill_(torch.nan))
    questions = [Question(i, "How many?", [noise_image(i)]) for i in range(2)]
    for answer in answer_batch(VLM.load(config), method, questions, config):
        assert (answer.stop_reason, answer.text) == ("error", "") and "not" in answer.error and "finite" in answer.error


def test_a_model_that_is_dropped_is_gone(folder):
    vlm = VLM.load(Config(model_name_or_path=str(folder), device="cpu", max_pixels=None))
    everything(vlm)
    gone = weakref.ref(vlm)
    del vlm
    assert gone() is None


REFUSALS = {  # by owner: as the hub says it, and what is said here
    "gated": (403, "GatedRepo", "accept its terms"),
    "nobody": (401, "RepoNotFound", "misspelt, or private"),
    "empty": (404, "EntryNotFound", "Unrecognized model"),
    "old": (404, "RevisionNotFound", "not this revision"),
}


class Hub(http.server.BaseHTTPRequestHandler):
    """Refuses as the hub does: by headers."""

    def do_HEAD(self):
        status, code, _ = REFUSALS[next((owner for owner in REFUSALS if owner in self.path), "empty")]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


def test_what_the_hub_refuses_is_said_in_a_line(tmp_path):
    """Gated, misspelt, of another kind, without that revision: each with what helps, and never the token."""
    code = """if True:
        import json, sys
        from dmlr.config import Config
        from dmlr.model.families import ModelError
        from dmlr.model.vlm import VLM
        said = {}
        for owner in sys.argv[1:]:
            try:
                VLM.load(Config(model_name_or_path=owner + "/model", revision="v1" if owner == "old" else ""))
            except ModelError as error:
                said[owner] = str(error)
        print(json.dumps(said))
    """
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        own = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HOME": str(tmp_path),
               "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret"}  # fmt: skip
        command = [sys.executable, "-c", code, *REFUSALS]
        done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
        server.shutdown()
    said = json.loads(done.stdout.splitlines()[-1])
    for owner, (_, _, message) in REFUSALS.items():
        assert message in said[owner]
    assert "hf_secret" not in done.stdout + done.stderr
