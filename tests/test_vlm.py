"""Encoding, prefill, extension and decoding on tiny random models of the real architecture."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from test_oracle import GPU
from tiny import noise_image, tiny_vlm
from transformers import AutoModelForImageTextToText

from dmlr.model.decode import LOOK_EVERY, decode
from dmlr.model.encode import PromptError, encode
from dmlr.model.vlm import VLM
from dmlr.prompts import Prompts

PROMPTS = Prompts()


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


@pytest.fixture(scope="module")
def folder(vlm, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny-model")
    vlm.model.save_pretrained(path)
    vlm.processor.save_pretrained(path)
    return path


def generate(vlm, model, image, question, max_new_tokens):
    """Plain transformers: chat template, processor, `generate`."""
    encoded = encode(vlm, PROMPTS.system, PROMPTS.task(question), [image])
    inputs = vlm.processor(text=[encoded.prompt], images=[image], return_tensors="pt", return_mm_token_type_ids=True)
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def test_the_rules_of_a_checkpoint_apply_as_in_generate(vlm, folder, monkeypatch):
    """Repetition penalty, n-grams and banned words, in a padded batch; sampling does not apply."""
    rules = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "bad_words_ids": [[104], [105, 106]]}
    sampling = {"do_sample": True, "temperature": 0.1}
    plain = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    for name, value in rules.items():
        setattr(plain.generation_config, name, value)
        monkeypatch.setattr(vlm.model.generation_config, name, value)
    for name, value in sampling.items():
        monkeypatch.setattr(vlm.model.generation_config, name, value)
    asked = [("What is it" + "?" * (9 * i), noise_image(i)) for i in range(3)]
    prompts = [encode(vlm, PROMPTS.system, PROMPTS.task(text), [image]) for text, image in asked]
    free = decode(vlm, vlm.prefill(prompts), 24)
    for (text, image), ruled, one in zip(
        asked, decode(vlm, vlm.prefill(prompts), 24, generation="checkpoint"), free, strict=True
    ):
        assert ruled.ids == generate(vlm, plain, image, text, 24) != one.ids


def test_image_size_follows_min_and_max_pixels(vlm):
    image = noise_image(0, 280, 280)  # 100 merged tokens
    for low, high, count in [(None, 25, 25), (144, 160, 144), (None, None, 16)]:
        resized = VLM(vlm.model, vlm.processor, low, high)
        encoded = encode(resized, "", "How many?", [image])
        assert len(encoded.image_columns) == count
        assert encoded.patch_grid[0] * encoded.patch_grid[1] == count


def test_extend_leaves_the_prefix_as_it_was(vlm):
    prefix = vlm.prefill([encode(vlm, "", "?", [noise_image(1)], 2)])
    before = [layer.keys[:, :, : layer.length].clone() for layer in prefix.cache.layers]
    embeds = torch.randn(1, 5, prefix.images.shape[2])
    vlm.extend(prefix, embeds, torch.ones(1, 5, dtype=torch.bool), torch.tensor([[4]]))
    assert prefix.cache.length == before[0].shape[2] == prefix.mask.shape[1]
    for layer, keys in zip(prefix.cache.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, : layer.length], keys)


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_rewards_are_read_from_logits_that_half_precision_does_not_round(device, placed):
    """placed: by accelerate, whose hook moves what the head gets."""
    half = tiny_vlm()
    head = half.model.to(device, torch.bfloat16).get_output_embeddings()
    if placed:
        add_hook_to_module(head, AlignDevicesHook(device))
    prefix = half.prefill([encode(half, "", "?", [noise_image(1)], 2)])
    slots = torch.randn(1, 5, 48), torch.ones(1, 5, dtype=torch.bool), torch.arange(5)[None]
    slots = [tensor.to(device) for tensor in slots]
    with torch.no_grad():
        (logits, _), (states, _) = half.extend(prefix, *slots), half.states(prefix, *slots)
    torch.testing.assert_close(logits, states.float() @ head.weight.float().T, atol=1e-4, rtol=1e-5)
    assert (logits != logits.bfloat16()).any()


def test_banned_strings_are_never_said(vlm):
    encoded = [encode(vlm, "", "?", [noise_image(i)]) for i in range(3)]
    free = decode(vlm, vlm.prefill(encoded), 12)
    word = next(c for d in free for c in d.text if c.isascii() and c.isprintable())
    assert all(word not in d.text for d in decode(vlm, vlm.prefill(encoded), 12, (word,)))


@pytest.mark.parametrize(
    ("question", "image", "message"),
    [
        ("what is <|image_pad|> here", noise_image(0), "special token <|image_pad|>"),
        ("<|im_end|>", noise_image(0), "special token <|im_end|>"),
        ("?" * 2000, noise_image(0), "tokens; the model's context is 1024"),
        ("?" * 20_000, noise_image(0), "20000 characters; the model's context is 1024"),
        ("long image", noise_image(0).resize((8000, 10)), "8000 x 10 pixels cannot be resized .* aspect ratio"),
        ("too long for 16 tokens", noise_image(0).resize((3000, 40)), "3000 x 40 pixels cannot be resized"),
    ],
)
def test_bad_prompts_say_what_is_wrong(vlm, question, image, message):
    with pytest.raises(PromptError, match=message.replace("|", r"\|")):
        encode(vlm, "", question, [image])


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (300, 40)])
def test_odd_image_sizes_are_answered(vlm, size):
    encoded = encode(vlm, "", "?", [noise_image(0).resize(size)], 1)
    assert len(encoded.image_columns) >= 4
    assert vlm.prefill([encoded]).logits.isfinite().all()


def test_decoding_stops_at_the_end_of_the_context(vlm):
    encoded = encode(vlm, "", "?" * 1, [noise_image(0)])
    short = tiny_vlm(context=len(encoded.input_ids) + 3)
    (answer,) = decode(short, short.prefill([encoded]), 50)
    assert (answer.stop_reason, answer.num_tokens) == ("length", 3)


def test_finished_rows_leave_and_the_others_go_on(vlm, monkeypatch):
    """Rows that end at different times say what they say alone, however rarely the loop looks."""
    encoded = [encode(vlm, "", "?" * (3 * i + 1), [noise_image(i)]) for i in range(6)]
    alone = [decode(vlm, vlm.prefill([e]), 30)[0] for e in encoded]
    letters = [d.text for d in alone]
    # End-of-turn becomes a token that some answers contain early, some late and some never.
    ends = vlm.tokenizer.encode(letters[0][4:6] + letters[1][12:14])
    monkeypatch.setitem(vlm.__dict__, "eos_ids", ends)
    alone = [decode(vlm, vlm.prefill([e]), 30)[0] for e in encoded]
    assert len({d.num_tokens for d in alone}) > 2 and {d.stop_reason for d in alone} == {"eos_token", "length"}
    for look in (1, 4, 64):
        monkeypatch.setitem(LOOK_EVERY, "cpu", look)
        assert decode(vlm, vlm.prefill(encoded), 30) == alone
