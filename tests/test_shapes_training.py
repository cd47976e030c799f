"""How the embedded model is made: its processor is Qwen's, packed training is what happens at test time, one update on
several processes is that on their mean gradient; training goes on where it stopped, with the tokenizer it began with,
and its processes hold the same weights."""

import json
import random
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLForConditionalGeneration

from data.shapes.scenes import EASY, random_scene, render
from dmlr import notebooks
from dmlr.config import Config, locate
from dmlr.loop.injection import Patches
from dmlr.methods.latent import append_latents
from dmlr.model.attention import ATTENTION
from dmlr.model.encode import encode
from dmlr.model.vlm import VLM
from dmlr.prompts import Prompts
from notebooks.training import learner, lesson
from notebooks.training.learner import Learner, Recipe, language_states, orthogonal, see, update
from notebooks.training.lesson import check_same_everywhere, corpus, train
from notebooks.training.packing import NO_LABEL, Phase, ask, batches, collate, converse, interleaved, pack, pixel_rows
from notebooks.training.parts import IM_END, build_model, build_processor, build_tokenizer, save_checkpoint, wordings
from notebooks.training.tree_attention import TREE, Tree, tree_attention

PROMPTS = Prompts()
TINY = {"hidden": 64, "layers": 1, "vision_hidden": 64, "vision_blocks": 1}
SMALL = Recipe(hidden=64, layers=1, noise=0.0)
PHASE = Phase(3, 0.5, 0.3, 0.05, EASY)


def make_processor():
    texts = [p.system + p.latent_task("How many red stars are there?", n) for p in wordings(PROMPTS) for n in range(9)]
    return build_processor(build_tokenizer(texts, 600))


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def conversation(processor):
    """A scene, six questions about it, the patches of their think tokens (some have none), and all of it packed."""
    scene = random_scene(rng := random.Random(8), "train")
    asked = ask(scene, rng, 6)
    groups = [interleaved(rng, scene, question, 0.55) for question in asked]
    assert any(groups) and not all(groups), "this seed must have branches with and without think tokens"
    return scene, asked, groups, converse(scene, asked, groups, PROMPTS, processor.tokenizer)


# the parts


def test_any_text_comes_back_also_from_a_processor_that_was_saved(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    for text in [*corpus(scenes=40), "Grüße, 你好 \\boxed{7}\n\tx", "<think>a</think><answer>\\boxed{B}</answer>"]:
        ids = processor.tokenizer.encode(text)
        assert processor.tokenizer.decode(ids) == text and loaded.tokenizer.encode(text) == ids
    assert loaded.chat_template == processor.chat_template and len(loaded.tokenizer) == len(processor.tokenizer)


def test_pixels_are_those_of_the_processor(processor):
    image = render(random_scene(random.Random(0), "train"))
    expected = processor.image_processor(images=[Image.fromarray(image)], return_tensors="pt")["pixel_values"].numpy()
    np.testing.assert_allclose(pixel_rows(image), expected, atol=2e-3)


def test_a_checkpoint_is_an_ordinary_one_whose_think_tokens_can_learn(processor, tmp_path):
    """A padding index would freeze the embedding that think tokens start from at zero."""
    model = build_model(len(processor.tokenizer), **TINY)
    embedding = model.get_input_embeddings()
    assert embedding.padding_idx is None and embedding.weight[0].abs().sum() > 0
    save_checkpoint(model, processor, tmp_path, {"steps": 0})
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is Qwen2_5_VLForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(tmp_path)).__name__ == "Qwen2_5_VLProcessor"
    vlm = VLM.load(Config(model_name_or_path=str(tmp_path), device="cpu", max_pixels=None))
    assert encode(vlm, "", "How many?", [Image.new("RGB", (400, 400))]).patch_grid == (6, 6)
    assert vlm.model.generation_config.do_sample is False and IM_END in vlm.eos_ids


# packed scenes


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_packed_branches_equal_separate_conversations(processor, conversation, family):
    """Loss positions of a packed scene have the logits that the core computes for each conversation alone."""
    scene, asked, groups, packed = conversation
    model = build_model(len(processor.tokenizer), 3, family, **TINY | {"layers": 2, "vision_blocks": 2}).eval()
    batch, picture = collate([packed], len(packed.ids) + 7), Image.fromarray(render(scene))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
        model.set_attn_implementation({"text_config": TREE, "vision_config": "sdpa"})
        features, deep = see(model, batch.pixels)
        logits = model.lm_head(language_states(model, batch, features, 0.0, deep))[0]
    assert len(deep) == (family == "qwen3_vl")
    model.set_attn_implementation({"text_config": ATTENTION, "vision_config": "sdpa"})
    vlm = VLM(model, build_processor(processor.tokenizer, family))
    for number, (question, think) in enumerate(zip(asked, groups, strict=True), 1):
        task = PROMPTS.latent_task(question.prompt, len(think)) if think else PROMPTS.task(question.prompt)
        prefix = vlm.prefill([encode(vlm, PROMPTS.system, task, [picture], len(think))])
        if think:
            latents = vlm.embed(torch.full((1, len(think)), vlm.think_id))
            append_latents(vlm, prefix, latents, Patches.of([think], vlm.device))
        where = [j for j, b in enumerate(packed.branch) if b == number and packed.labels[j] != NO_LABEL]
        answer = [packed.labels[j] for j in where]
        assert processor.tokenizer.decode(answer[:-1]) == question.response and answer[-1] == IM_END
        for j, token in zip(where, answer, strict=True):
            torch.testing.assert_close(prefix.logits[0], logits[j], atol=2e-3, rtol=1e-3)
            vlm.append(prefix, vlm.embed(torch.tensor([[token]])), torch.ones(1, 1, dtype=torch.bool))


def test_think_tokens_guess_the_final_answer(processor, conversation):
    """At each think token, and at the last patch after it, the first token of the boxed answer; nowhere else."""
    _, asked, _, packed = conversation
    firsts = [processor.tokenizer.encode(question.answer)[0] for question in asked]
    for j, guess in enumerate(packed.guesses):
        last_patch = packed.patch[j] >= 0 and packed.patch[j + 1] < 0
        assert guess == (firsts[packed.branch[j] - 1] if packed.think[j] or last_patch else NO_LABEL)
    assert sum(packed.think) >= 4 and max(packed.patch) >= 0


def dense_mask(branch):
    """bool [B, 1, S, S]: prefix and own branch, causally; padding sees itself only."""
    key, query = branch[:, None], branch[:, :, None]
    seen = ((key == 0) | (key == query)) & (key >= 0)
    return (seen.tril() | torch.eye(branch.shape[1], dtype=torch.bool))[:, None]


def test_tree_attention_equals_dense_attention(processor):
    """Outputs of all real slots, and the gradients that reach queries, keys and values through them."""
    rng, numbers = random.Random(0), torch.Generator().manual_seed(0)
    packed = [pack(rng, wordings(PROMPTS), processor.tokenizer, 5, 0.5) for _ in range(3)]
    batch = collate(packed, max(len(p.ids) for p in packed) + 9)

    def draw(heads):
        return torch.randn(3, heads, batch.ids.shape[1], 8, dtype=torch.float64, generator=numbers, requires_grad=True)

    inputs = query, key, value = draw(4), draw(2), draw(2)
    real = (batch.branch >= 0)[:, :, None, None]
    weight = draw(4).detach().transpose(1, 2) * real
    tree = tree_attention(query, key, value, 0.3, Tree.of(batch.branch))
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=dense_mask(batch.branch), scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(tree * real, dense * real)
    through_tree, through_dense = (torch.autograd.grad((out * weight).sum(), inputs) for out in (tree, dense))
    torch.testing.assert_close(through_tree, through_dense)


def test_batches_have_one_shape_and_follow_the_seed(processor):
    def first_batch(seed):
        phase = Phase(4, 0.55, 0.1, 0.05, EASY)
        return next(batches(processor.tokenizer, wordings(PROMPTS), seed, lambda: phase, 2, 700, 240))

    first, again, other = first_batch("a"), first_batch("a"), first_batch("b")
    assert torch.equal(first.ids, again.ids) and not torch.equal(first.ids, other.ids)
    assert first.ids.shape == other.ids.shape == (2, 700)
    assert first.think.any() and (first.patch >= 0).any()


# updates


def batch_of(seed):
    """A batch, the same for the same seed, and how many tokens there are."""
    tokenizer = make_processor().tokenizer
    made = pack(random.Random(seed), [PROMPTS], tokenizer, PHASE.questions, PHASE.latent, PHASE.dense, PHASE.hard)
    return collate([made], 640), len(tokenizer)


def updated(rank=0):
    batch, size = batch_of(rank)
    new = Learner(size, SMALL, torch.device("cpu"))
    new.step(batch, 1e-3, PHASE, torch.Generator().manual_seed(0))
    return new


def gradients(rank):
    """Those of the first update of a process that is alone, which is not made."""
    with mock.patch.object(learner, "update"):
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in updated(rank).parameters]


def one_process(rank, meeting, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    torch.save([p.detach() for p in updated(rank).parameters], folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_make_the_update_of_their_mean_gradient(tmp_path):
    torch.multiprocessing.spawn(one_process, ((tmp_path / "meeting").as_uri(), tmp_path), 2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(map(torch.equal, first, second))
    alone = Learner(batch_of(0)[1], SMALL, torch.device("cpu"))
    start = [p.detach().clone() for p in alone.parameters]
    for parameter, *both in zip(alone.parameters, gradients(0), gradients(1), strict=True):
        parameter.grad = sum(both) / 2
    update(alone.parameters, alone.optimizers, 1e-3)
    for before, one, two in zip(start, alone.parameters, first, strict=True):
        torch.testing.assert_close(one.detach() - before, two - before, atol=2e-5, rtol=0.05)


def test_an_update_is_nearly_orthogonal():
    for shape in ((24, 40), (40, 24)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.slow
def test_a_state_is_continued_or_refused(tmp_path):
    first = updated()
    first.save_state(tmp_path, {"step": 1})
    batch, size = batch_of(1)
    again = Learner(size, replace(SMALL, seed=7), torch.device("cpu"))
    again.load_state(tmp_path)
    for each in (first, again):
        each.step(batch, 1e-3, PHASE, torch.Generator().manual_seed(1))
    assert all(map(torch.equal, first.parameters, again.parameters))
    for other, message in (({"layers": 2}, "Missing key"), ({"hidden": 128}, "size mismatch")):
        with pytest.raises(RuntimeError, match=message):
            Learner(size, replace(SMALL, **other), torch.device("cpu")).load_state(tmp_path)


# whole trainings

RECIPE = Recipe(minutes=0.03, vision_minutes=0.01, hidden=64, layers=1, scenes=1, questions=3, processes=1)


def told(folder):
    return json.loads((folder / "model/training.json").read_text())


def tokens(folder, text="Is there a red star left of the blue circle? \\boxed{No}"):
    return AutoProcessor.from_pretrained(folder).tokenizer.encode(text)


def test_training_runs_and_continues_with_its_tokenizer(tmp_path, monkeypatch):
    """A second call has nothing left to do, one with more time goes on, also when questions now read differently."""
    few = corpus(scenes=40)
    monkeypatch.setattr(lesson, "corpus", lambda: few)
    train(tmp_path / "model", RECIPE, tmp_path / "state")
    first, words = told(tmp_path), tokens(tmp_path / "model")
    assert first["steps"] > 0
    monkeypatch.setattr(lesson, "corpus", lambda: ["quite other words"] * 9)
    train(tmp_path / "model", RECIPE, tmp_path / "state")
    assert told(tmp_path)["steps"] == first["steps"]
    more = (first["seconds"] + 1) / 60  # on a busy machine the last step may take seconds
    train(tmp_path / "model", replace(RECIPE, minutes=more), tmp_path / "state")
    assert told(tmp_path)["steps"] > first["steps"]
    assert tokens(tmp_path / "model") == words
    with pytest.raises(ValueError, match="another recipe"):
        train(tmp_path / "model", replace(RECIPE, lr=1e-4), tmp_path / "state")
    (tmp_path / "state/processor").rename(tmp_path / "lost")
    with pytest.raises(ValueError, match="without its processor"):
        train(tmp_path / "model", RECIPE, tmp_path / "state")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU trains in one process")
@pytest.mark.slow
def test_two_processes_train_with_the_kept_processor(processor, tmp_path):
    """They end only if their weights are the same, bit for bit (the next test), and make no tokenizer of their own."""
    processor.save_pretrained(tmp_path / "state/processor")
    train(tmp_path / "model", replace(RECIPE, processes=2), tmp_path / "state")
    assert told(tmp_path)["steps"] > 0
    assert len(AutoProcessor.from_pretrained(tmp_path / "model").tokenizer) < 700
    assert tokens(tmp_path / "model") == tokens(tmp_path / "state/processor")


def test_a_bit_that_differs_between_processes_is_an_error(monkeypatch):
    """Two processes, of which this one plays both: what each would send is kept, and handed to the next."""
    sent = []

    def gather(found, mine):
        sent.append(mine)
        found[:] = [sent[0], mine]

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    weights = [torch.arange(6.0), torch.ones(2, 2)]
    check_same_everywhere(weights)
    check_same_everywhere([weight.clone() for weight in weights])
    weights[0][3] = torch.nextafter(weights[0][3], weights[0][4])
    with pytest.raises(RuntimeError, match="ended with different weights"):
        check_same_everywhere(weights)


@pytest.mark.slow
def test_notebook_trains_and_examines(tmp_path):
    """Every cell of the training notebook, in seconds instead of minutes."""
    small = {"minutes": 0.1, "vision_minutes": 0.03, "hidden": 64, "layers": 1, "scenes": 1, "processes": 1}
    given = small | {"test_examples": 2, "output_dir": str(tmp_path / "run")}
    report = notebooks.run(locate("notebooks/00_train_shapes_vl.ipynb"), given, tmp_path / "out.ipynb")
    assert "best blind guess" in report.read_text(encoding="utf-8")
    assert (tmp_path / "run/model/model.safetensors").is_file()
