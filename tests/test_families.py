"""Every family on tiny random models of its real classes: the proofs behind the table in notebooks/README."""

from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from recomputed import equals_full_recomputation
from tiny import noise_image
from tiny_families import TINY
from transformers import AutoModelForImageTextToText, Gemma3Config, LlamaConfig

from dmlr.config import Config
from dmlr.methods import METHODS
from dmlr.methods.answers import Question
from dmlr.methods.latent import NO_IMAGE
from dmlr.model.decode import decode
from dmlr.model.encode import encode
from dmlr.model.families import FAMILIES, ModelError, check_known
from dmlr.model.vlm import VLM
from dmlr.prompts import Prompts

PROMPTS = Prompts()
WIDE, TALL, SMALL = (112, 168), (224, 84), (56, 56)
ASKED = [  # question, sizes of its images
    ("How many?", [WIDE]),
    ("Which colour is the shape to the left of the big red star?", [TALL]),
    ("No picture here.", []),
    ("Are they the same?", [WIDE, SMALL]),
    ("?", [SMALL]),
]
LOOP = {"num_thought_tokens": 3, "max_num_steps": 3, "lr": 0.02, "sigma": 0.05, "max_new_tokens": 5}
USE_PATCHES = ("icot", "unoptimised")
RULES = {
    "repetition_penalty": 1.2,
    "no_repeat_ngram_size": 3,
    "bad_words_ids": [[104], [105, 106]],
    "min_new_tokens": 3,
    "suppress_tokens": [100, 101],
    "do_sample": True,
    "temperature": 0.1,
}
ATTENTION_BLOCKS = ("attn", "self_attn", "attention")  # of vision towers
VARIANTS = {
    "paper": {"initial_patch_count": 1, "patch_increment": 1},
    "released": {"reward": "logprob", "reward_position": "think_next", "accept_at": "candidate"},
    "group_end, gradient": {"reward_position": "group_end", "use_auto_grad": True, "initial_patch_count": 2},
}


@pytest.fixture(scope="module", params=TINY)
def vlm(request):
    return TINY[request.param]()


def pictures(sizes, seed=0):
    return [noise_image(seed + i, *size) for i, size in enumerate(sizes)]


def asked(vlm, think=0):
    task = PROMPTS.latent_task if think else PROMPTS.task
    arguments = (think,) if think else ()
    return [
        encode(vlm, PROMPTS.system, task(text, *arguments), pictures(sizes, i), think)
        for i, (text, sizes) in enumerate(ASKED)
    ]


def test_every_family_is_here():
    assert set(TINY) == set(FAMILIES)


@pytest.mark.parametrize("rules", [{}, RULES], ids=["plain", "rules"])
def test_answers_of_a_loaded_checkpoint_equal_generate(vlm, tmp_path, rules):
    """A batch of mixed questions against transformers' own `generate`, one by one. Of the rules in generation_config
    sampling does not apply."""
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager")
    loaded = VLM.load(Config(model_name_or_path=str(tmp_path), device="cpu", max_pixels=None))
    for settings in (plain.generation_config, loaded.model.generation_config):
        vars(settings).update(rules)
    free, said = (decode(loaded, loaded.prefill(asked(loaded)), 8, generation=how) for how in ("plain", "checkpoint"))
    for decoded, encoded, (_, sizes), seed in zip(said, asked(vlm), ASKED, range(len(ASKED)), strict=True):
        inputs = vlm.family.inputs(encoded.prompt, pictures(sizes, seed))
        out = plain.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert decoded.ids == out[0, inputs["input_ids"].shape[1] :].tolist()
    assert (said == free) == (not rules)
    assert len({decoded.text for decoded in said}) > 2, "a random model that always says the same proves little"


@pytest.mark.parametrize("name", VARIANTS)
def test_loop_equals_full_recomputation(vlm, name):
    """Rewards, patches and answers of a batch with one, two and no images, against pixels and whole sequences."""
    config = Config(**LOOP | VARIANTS[name])
    trace = equals_full_recomputation(vlm, config, asked(vlm, config.num_thought_tokens)[:4])
    assert any(step.tried.patches.count.any() for step in trace.steps), "no patches, nothing proved"


def test_deep_features_of_patches_equal_full_recomputation():
    """DeepStack: patches that bring their deep features change the rewards, and still equal full recomputation."""
    config, rewards = Config(**LOOP | VARIANTS["paper"]), []
    for deep in (True, False):
        vlm = TINY["qwen3_vl"](deep_patches=deep)
        trace = equals_full_recomputation(vlm, config, asked(vlm, config.num_thought_tokens)[:4])
        rewards.append([step.reward.tolist() for step in trace.steps])
    assert rewards[0] != rewards[1]


@pytest.fixture(scope="module", params=TINY)
def local(request):
    """A model whose vision tower mixes its patches little, so that features show where they come from."""
    vlm = TINY[request.param]()
    with torch.no_grad():
        for name, parameter in vlm.model.named_parameters():
            block, layer = name.split(".")[-3:-1] if name.count(".") > 1 else ("", "")
            if "vis" in name and block in ATTENTION_BLOCKS and layer in ("proj", "out_proj", "projection_layer"):
                parameter.mul_(0.01)
    return vlm


@pytest.mark.parametrize("size", [WIDE, TALL, SMALL])
def test_image_tokens_are_numbered_as_they_lie_on_the_picture(local, size):
    """Brightening the pixels under a cell changes the features of the token with that number more than any other."""
    vlm = local
    dark = Image.new("RGB", size[::-1], (40, 40, 40))
    encoded = encode(vlm, "", "?", [dark])
    before = vlm.prefill([encoded]).images[0]
    (height, width), bright, off = encoded.patch_grid, [], []
    for row, column in product(range(height), range(width)):
        pixels = np.array(dark)
        top, bottom = row * size[0] // height, (row + 1) * size[0] // height
        left, right = column * size[1] // width, (column + 1) * size[1] // width
        pixels[top:bottom, left:right] = 255
        bright.append(encode(vlm, "", "?", [Image.fromarray(pixels)]))
    for cell, after in enumerate(vlm.prefill(bright).images):
        hit = divmod(int((after - before).norm(dim=1)[: height * width].argmax()), width)
        off.append(max(abs(hit[0] - cell // width), abs(hit[1] - cell % width)))
    # LLaVA-OneVision pads a picture to its tiles and cuts whole columns of padding away: half a cell may stay
    assert max(off) <= (vlm.model.config.model_type == "llava_onevision" and size == TALL)


@pytest.mark.parametrize("name", USE_PATCHES)
def test_patches_come_from_one_two_and_no_images(vlm, name):
    """Of each family the methods that ask it for something of its own: image marks, patches, a suffix."""
    config = Config(**{**LOOP, **VARIANTS["paper"]}, icot_newlines=1, icot_patches=2)
    questions = [Question(i, text, pictures(sizes, i)) for i, (text, sizes) in enumerate(ASKED)]
    together = METHODS[name](vlm, questions, config)
    for question, answer in zip(questions, together, strict=True):
        assert answer.error is None and answer.num_new_tokens > 0
        assert question.images or NO_IMAGE.items() <= answer.details.items()
        if name == "unoptimised":
            assert any(answer.reasoning.patches) == bool(question.images)


def test_image_sizes_follow_min_and_max_pixels(vlm):
    """Where a family can choose; the fixed sizes of the LLaVA family stay, and only Qwen's have a least one."""

    def count(low, high):
        return len(encode(VLM(vlm.model, vlm.processor, low, high), "", "?", [noise_image(0, 224, 224)]).image_columns)

    kind, own = vlm.model.config.model_type, count(None, None)
    assert count(None, 6) == own if kind.startswith("llava") else count(None, 6) <= 6 < own
    assert 144 <= count(144, 160) <= 160 if kind.startswith("qwen") else count(2, None) == own


def test_an_architecture_that_is_not_known_says_what_is_missing():
    with pytest.raises(ModelError, match="'gemma3' is not supported: nobody has tested it; supported are qwen2_vl"):
        check_known(Gemma3Config())
    with pytest.raises(ModelError, match="'llama' is not supported: it has no vision tower .*, no image token"):
        check_known(LlamaConfig())
    sliding = TINY["qwen2_vl"]().model.config
    sliding.text_config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(ModelError, match="qwen2_vl: sliding-window layers are not supported"):
        check_known(sliding)
