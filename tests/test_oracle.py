"""The fast path against full recomputation: rewards, patches, latents of every iteration, and the answers."""

from types import SimpleNamespace

import pytest
import torch
from recomputed import assert_close, equals_full_recomputation, noise_of
from tiny import noise_image, tiny_vlm

from dmlr.config import Config
from dmlr.loop.optimize import optimize
from dmlr.loop.reference import Reference, eager
from dmlr.loop.score import Scored
from dmlr.methods import Question
from dmlr.methods.latent import prefill_latent
from dmlr.model.vlm import VLM
from dmlr.prompts import Prompts

GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
QUESTIONS = [
    ("How many?", (112, 112)),
    ("Which colour is the shape that stands to the left of the big red star near the lower border?", (56, 140)),
    ("Is there a square?\nOptions:\nA. yes\nB. no", (140, 84)),
    ("?", (56, 56)),
]
LATE = {"visual_injection_start_step": 1, "visual_injection_interval": 2}
BASE = {"num_thought_tokens": 4, "max_num_steps": 5, "lr": 0.02, "sigma": 0.05, "max_new_tokens": 6}
VARIANTS = {
    "paper": {},
    "released": {"reward": "logprob", "reward_position": "think_next", "accept_at": "candidate"},
    "every patch": {"initial_patch_count": None, "num_selected_patches": None, "max_total_patches": None},
    "group_end": {"reward_position": "group_end", "initial_patch_count": 1, "patch_increment": 1},
    "group_end, candidate": {"reward_position": "group_end", "accept_at": "candidate", "patch_increment": 1},
    "think_next": {"reward_position": "think_next"},
    "answer": {"reward_position": "answer", "reward": "logprob"},
    "stride 2": {"visual_insert_stride": 2, "num_selected_patches": 3},
    "stride 3, odd cap": {"visual_insert_stride": 3, "num_thought_tokens": 7, "max_total_patches": 5},
    "late start": {"visual_injection_start_step": 2},
    "interval 2": {"visual_injection_interval": 2, "patch_increment": 1},
    "late start, interval, candidate": LATE | {"accept_at": "candidate"},
    "uneven cap": {"max_total_patches": 6, "initial_patch_count": 1, "patch_increment": 1},
    "no patches": {"initial_patch_count": 0, "patch_increment": 0},
    "one think token": {"num_thought_tokens": 1, "num_selected_patches": 5},
    "relative scales": {"sigma_relative": 3.0, "lr_relative": 5.0, "num_samples": 2},
    "visual start": {"visual_only": True},
    "exact gradient": {"use_auto_grad": True},
    "exact gradient, candidate": {"use_auto_grad": True, "accept_at": "candidate", "reward": "logprob"},
    "four samples": {"num_samples": 4},
    "two samples, candidate": {"num_samples": 2, "accept_at": "candidate", "reward_position": "think_next"},
    "last state": {"disable_best_reward": True},
    "early stop": {"reward_threshold": 0.12, "lr": 0.05},
    "no iterations": {"max_num_steps": 0},
}


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


def encode(vlm, config, count):
    asked = [Question(i, text, [noise_image(i, *size)]) for i, (text, size) in enumerate(QUESTIONS[:count])]
    return prefill_latent(vlm, asked, config, Prompts())[1]


@pytest.mark.parametrize("name", VARIANTS)
def test_loop_equals_full_recomputation(vlm, name):
    config = Config(**{**BASE, **VARIANTS[name]})
    equals_full_recomputation(vlm, config, encode(vlm, config, 3))


def test_variants_are_not_vacuous(vlm):
    """The matrix above must contain acceptances, rejections, growth and an early stop, or it proves little."""
    seen = set()
    for name in ("paper", "every patch", "early stop", "no patches"):
        config = Config(**{**BASE, **VARIANTS[name]})
        trace = optimize(vlm, vlm.prefill(encode(vlm, config, 4)), config, noise_of(vlm, config, range(4)))
        seen |= {f"accepted {bool(a)}" for step in trace.steps for a in step.accepted}
        seen |= {f"patches {sum(map(len, row))}" for row in trace.final.patches.tolist()}
        seen |= {"stopped early" for step in trace.steps if not step.active.all()}
    assert {"accepted True", "accepted False", "patches 0", "patches 16", "stopped early"} <= seen


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
@pytest.mark.parametrize(
    ("device", "hidden"),
    [("cpu", 48), ("cpu", 512), *(pytest.param("cuda", hidden, marks=GPU) for hidden in (48, 256, 512))],
)
def test_half_precision_loop_is_the_same_within_rounding(device, hidden, dtype, share):
    """Every state that the loop tried in half precision has, recomputed in full in float32 with the same weights, the
    reward that the loop saw, and the start looks where it looked, up to a share of what these differ among themselves.
    hidden: heads of 12, 64 and 128, which other kernels of a GPU take.
    """
    config = Config(**BASE, reward_position="group_end")
    half, exact = tiny_vlm(hidden=hidden), tiny_vlm(hidden=hidden)
    half = VLM(half.model.to(device, dtype), half.processor)  # there: on a GPU its tower is asked in another way
    exact.model.load_state_dict({name: x.float().cpu() for name, x in half.model.state_dict().items()})
    for name, frequencies in half.model.named_buffers():
        exact.model.get_buffer(name).copy_(frequencies)  # `to` rounds them too, as loading a checkpoint does not
    encoded = encode(exact, config, 4)
    trace = optimize(half, half.prefill(encoded), config, noise_of(half, config, range(4)))
    rewards, wanted = [], []
    for row in range(4):
        reference = Reference(eager(exact), encoded[row], config)
        start = half.embed(torch.full((4,), half.think_id)).float().cpu()
        again, attention = reference.reward(start, [[]] * 4)
        assert_close(trace.start_attention[row, :, : len(encoded[row].image_columns)].cpu(), attention, share)
        rewards.append(trace.start_reward[row].item()), wanted.append(float(again))
        for step in trace.steps:
            rewards.append(step.reward[row].item())
            wanted.append(float(reference.reward(step.tried.latents[row].cpu(), step.tried.patches.tolist()[row])[0]))
    assert_close(rewards, wanted, share)
    assert rewards != wanted, "nothing was rounded: this tested float32"


# two traces worked by hand: what the loop does with given rewards and attention, whatever a model is

LOW, HIGH = [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]  # attention over four image tokens
ONE = SimpleNamespace(
    embedding_rms=1.0, think_id=0, embed=lambda ids: torch.zeros(*ids.shape, 1), device=torch.device("cpu")
)
FOUR_TOKENS = SimpleNamespace(image_mask=torch.ones(1, 4, dtype=torch.bool), images=torch.zeros(1, 4, 1))
BY_HAND = {"num_thought_tokens": 2, "max_num_steps": 2, "lr": 0.5, "sigma": 1.0, "sigma_decay": 0.5}
BY_HAND |= {"initial_patch_count": 1, "patch_increment": 1, "num_selected_patches": 2}
XI = torch.tensor([[1.0, -1.0], [2.0, 1.0]]).view(1, 2, 1, 2, 1)  # standard normal draws of two iterations


def by_hand(passes, **how):
    """What the loop asked for in each of the passes that return these rewards and attentions, and its trace."""
    asked, told = [], iter(passes)

    def score(latents, patches, with_attention=True, with_gradient=False):
        asked.append(([round(x, 3) for x in latents.flatten().tolist()], patches.tolist()[0]))
        reward, attention = next(told)
        return Scored(torch.tensor([[reward]]), torch.tensor([attention]), None)

    trace = optimize(ONE, FOUR_TOKENS, Config(**BY_HAND, **how), XI, score=score)
    assert next(told, None) is None, "fewer passes than expected"
    return asked, trace


def test_the_papers_loop_by_hand():
    asked, trace = by_hand(
        [
            (0.2, [HIGH, LOW]),  # the start, no patches: V_best becomes the most attended patch of each, 3 and 0
            (0.5, [LOW, HIGH]),  # T + (1, -1); T becomes 0.5 * 0.5 * (1, -1) / 1 = (.25, -.25)
            (0.6, [LOW, HIGH]),  # with a budget of 1 V_best is all of Z_cand; .6 > .2: accepted, the budget is 2
            (-0.4, [LOW, HIGH]),  # sigma .5: T + (1, .5); T becomes (.25, -.25) - .5 * .4 * (1, .5) / .25
            (0.55, [LOW, HIGH]),  # with one more patch each, 0 and 3; .55 < .6: rejected
        ],
    )
    assert asked == [
        ([0, 0], [[], []]),
        ([1, -1], [[3], [0]]),
        ([0.25, -0.25], [[3], [0]]),
        ([1.25, 0.25], [[3], [0]]),
        ([-0.55, -0.65], [[3, 0], [0, 3]]),
    ]
    assert [bool(step.accepted) for step in trace.steps] == [True, False]
    assert [int(step.budget) for step in trace.steps] == [1, 2]
    assert [step.evaluations for step in trace.steps] == [2, 2]
    assert (trace.best_reward.item(), trace.best_step.item()) == (pytest.approx(0.6), 1)
    assert trace.final.latents.flatten().tolist() == [0.25, -0.25] and trace.final.patches.tolist() == [[[3], [0]]]


def test_the_released_loop_by_hand():
    asked, trace = by_hand(
        [
            (0.9, [LOW, LOW]),  # the start, whose reward is no threshold: that begins at 0
            (0.1, [HIGH, LOW]),  # T + (1, -1) without patches, for its attention
            (0.5, [LOW, LOW]),  # the same with patches 3 and 0; .5 > 0: accepted, T becomes (.25, -.25), the budget 2
            (0.7, [LOW, HIGH]),  # sigma .5: T + (1, .5) with them, for its attention: next are 0 and 3
            (0.5, [LOW, LOW]),  # the same with these too; .5 is no more than .5: rejected
        ],
        accept_at="candidate",
    )
    assert asked == [
        ([0, 0], [[], []]),
        ([1, -1], [[], []]),
        ([1, -1], [[3], [0]]),
        ([1.25, 0.25], [[3], [0]]),
        ([1.25, 0.25], [[3, 0], [0, 3]]),
    ]
    assert [bool(step.accepted) for step in trace.steps] == [True, False]
    assert [step.evaluations for step in trace.steps] == [2, 2]
    assert (trace.best_reward.item(), trace.best_step.item()) == (0.5, 1)
    assert trace.final.latents.flatten().tolist() == [0.25, -0.25], "what is kept is the updated state"
    assert trace.steps[0].tried.latents.flatten().tolist() == [1, -1], "and not the one that earned the reward"
    assert trace.final.patches.tolist() == [[[3], [0]]]


@pytest.mark.parametrize("accept_at", ["updated", "candidate"])
def test_where_nothing_is_accepted_the_start_is_decoded_without_patches(accept_at):
    _, trace = by_hand([(0.2, [HIGH, LOW]), *[(-0.5, [LOW, HIGH])] * 4], accept_at=accept_at)
    assert trace.final.latents.flatten().tolist() == [0, 0] and trace.final.patches.tolist() == [[[], []]]
    assert trace.best_step.item() == 0


@pytest.mark.parametrize("rewards", [[0.9, 0.1, 0.95], [0.9, 0.1, 0.7, 0.1, 0.2]])
def test_an_early_stop_is_for_what_an_iteration_reached(rewards):
    """The start is above the threshold; the first iteration raises it, or nothing is accepted."""
    _, trace = by_hand([(reward, [LOW, LOW]) for reward in rewards], reward_threshold=0.5)
    assert len(trace.steps) == len(rewards) // 2
