"""Encoding, prefill, extension and decoding on a tiny random model; test_families.py does the same for every family."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from test_oracle import GPU
from tiny import noise_image, tiny_vlm

from dmlr.model.decode import LOOK_EVERY, decode
from dmlr.model.encode import PromptError, encode


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


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
        logits, states = (half.extend(prefix, *slots, logits=wanted)[0] for wanted in (True, False))
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
