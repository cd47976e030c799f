"""How the embedded model is made: its processor is Qwen's, and packed training is what happens at test time."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLForConditionalGeneration

from data.shapes.scenes import EASY, random_scene, render
from dmlr import notebooks
from dmlr.config import Config, locate
from dmlr.loop.injection import Patches
from dmlr.methods.latent import append_latents
from dmlr.model.encode import encode
from dmlr.model.vlm import VLM
from dmlr.prompts import Prompts
from notebooks.training.learner import Learner, Recipe, see
from notebooks.training.packing import NO_LABEL, Phase, ask, batches, collate, interleaved, pack, pixel_rows
from notebooks.training.parts import (
    FAMILIES,
    IM_END,
    build_model,
    build_processor,
    build_tokenizer,
    save_checkpoint,
    wordings,
)
from notebooks.training.tree_attention import TREE, Tree, tree_attention

PROMPTS = Prompts()


@pytest.fixture(scope="module")
def processor():
    texts = [p.system + p.latent_task("How many red stars are there?", n) for p in wordings(PROMPTS) for n in range(9)]
    return build_processor(build_tokenizer(texts, 600))


def test_any_text_comes_back(processor):
    for text in ["How many?", "Grüße, 你好 \\boxed{7}\n\tx", "<think>a</think><answer>\\boxed{B}</answer>"]:
        ids = processor.tokenizer.encode(text)
        assert processor.tokenizer.decode(ids) == text


def test_pixels_are_those_of_the_processor(processor):
    image = render(random_scene(random.Random(0), "train"))
    expected = processor.image_processor(images=[Image.fromarray(image)], return_tensors="pt")["pixel_values"].numpy()
    np.testing.assert_allclose(pixel_rows(image), expected, atol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_branches_equal_separate_conversations(processor, family):
    """Loss positions of a packed scene have the logits that the core computes for each conversation alone."""
    sizes = {"hidden": 64, "layers": 2, "vision_hidden": 64, "vision_blocks": 2}
    model = build_model(len(processor.tokenizer), 3, family, **sizes)
    processor = build_processor(processor.tokenizer, family)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.set_attn_implementation({"text_config": TREE, "vision_config": "sdpa"})
    learner = Learner.__new__(Learner)
    learner.model, learner.device, learner.recipe = model.eval(), torch.device("cpu"), Recipe(questions=6)
    packed = pack(random.Random(8), [PROMPTS], processor.tokenizer, 6)
    batch = collate([packed], len(packed.ids) + 7)
    with torch.no_grad():
        features, deep = see(model, batch.pixels)
        logits = model.lm_head(learner.hidden(features, deep, batch))[0]
    assert len(deep) == (family == "qwen3_vl")

    # The same scene and questions, drawn again in the same order, one by one through the core.
    rng = random.Random(8)
    scene = random_scene(rng, "train")
    asked = ask(scene, rng, 6)
    if rng.random() >= 0.5:
        rng.choice([PROMPTS])
    solver = rng.choices((0, 1, 2), (0.8, 0.12, 0.08))[0]
    groups = [interleaved(rng, scene, question, 0.55) for question in asked]
    assert any(groups) and not all(groups), "this seed must have branches with and without think tokens"
    from dmlr.model.attention import ATTENTION

    model.set_attn_implementation({"text_config": ATTENTION, "vision_config": "sdpa"})
    vlm = VLM(model, processor)
    picture = Image.fromarray(packed.image)
    for number, (question, think) in enumerate(zip(asked, groups, strict=True), 1):
        text, count = question.prompt, len(think)
        task = PROMPTS.latent_task(text, count, solver) if think else PROMPTS.task(text, solver)
        prefix = vlm.prefill([encode(vlm, PROMPTS.system, task, [picture], len(think))])
        if think:
            width = max(len(group) for group in think)
            index = torch.tensor([[group + [0] * (width - len(group)) for group in think]])
            patches = Patches(index.view(1, len(think), width), torch.tensor([[len(group) for group in think]]))
            latents = vlm.embed(torch.full((1, len(think)), vlm.think_id))
            append_latents(vlm, prefix, latents, patches)
        where = [j for j, b in enumerate(packed.branch) if b == number and packed.labels[j] != NO_LABEL]
        answer = [packed.labels[j] for j in where]
        assert processor.tokenizer.decode(answer[:-1]) == question.response and answer[-1] == IM_END
        for j, token in zip(where, answer, strict=True):
            torch.testing.assert_close(prefix.logits[0], logits[j], atol=2e-3, rtol=1e-3)
            vlm.append(prefix, vlm.embed(torch.tensor([[token]])), torch.ones(1, 1, dtype=torch.bool))


def test_think_tokens_guess_the_final_answer(processor):
    """At each think token, and at the last patch after it, the first token of the boxed answer; nowhere else."""
    packed = pack(random.Random(8), [PROMPTS], processor.tokenizer, 6)
    scene = random_scene(rng := random.Random(8), "train")
    firsts = [processor.tokenizer.encode(q.answer)[0] for q in ask(scene, rng, 6)]
    for j, guess in enumerate(packed.guesses):
        last_patch = packed.patch[j] >= 0 and packed.patch[j + 1] < 0
        assert guess == (firsts[packed.branch[j] - 1] if packed.think[j] or last_patch else NO_LABEL)
    assert sum(packed.think) >= 4 and max(packed.patch) >= 0


def dense_mask(branch):
    """bool [B, 1, S, S]: prefix and own branch, causally; padding sees itself only."""
    key, query = branch[:, None], branch[:, :, None]
    seen = ((key == 0) | (key == query)) & (key >= 0)
    return (seen.tril() | torch.eye(branch.shape[1], dtype=torch.bool))[:, None]


@pytest.mark.parametrize("seed", range(2))
def test_tree_attention_equals_dense_attention(processor, seed):
    """Outputs of all real slots, and the gradients that reach queries, keys and values through them."""
    rng = random.Random(seed)
    packed = [pack(rng, wordings(PROMPTS), processor.tokenizer, 5, 0.5) for _ in range(3)]
    batch = collate(packed, max(len(p.ids) for p in packed) + 9)
    torch.manual_seed(seed)
    shape = (3, 4, batch.ids.shape[1], 8)
    query = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(3, 2, *shape[2:], dtype=torch.float64, requires_grad=True) for _ in range(2))
    real = (batch.branch >= 0)[:, :, None, None]
    weight = torch.randn(3, shape[2], 4, 8, dtype=torch.float64) * real
    tree = tree_attention(query, key, value, 0.3, Tree.of(batch.branch))
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=dense_mask(batch.branch), scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(tree * real, dense * real)
    through_tree, through_dense = (torch.autograd.grad((o * weight).sum(), (query, key, value)) for o in (tree, dense))
    for ours, theirs in zip(through_tree, through_dense, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_batches_have_one_shape_and_follow_the_seed(processor):
    def first_batch(seed):
        return next(
            batches(processor.tokenizer, wordings(PROMPTS), seed, lambda: Phase(4, 0.55, 0.1, 0.05, EASY), 2, 700, 240)
        )

    first, again, other = first_batch("a"), first_batch("a"), first_batch("b")
    assert torch.equal(first.ids, again.ids) and not torch.equal(first.ids, other.ids)
    assert first.ids.shape == other.ids.shape == (2, 700)
    assert first.think.any() and (first.patch >= 0).any()


def test_think_token_embedding_can_learn(processor):
    """A padding index would freeze the embedding that think tokens start from at zero."""
    model = build_model(len(processor.tokenizer), hidden=64, layers=1, vision_hidden=64, vision_blocks=1)
    embedding = model.get_input_embeddings()
    assert embedding.padding_idx is None and embedding.weight[0].abs().sum() > 0


def test_checkpoint_folder_is_an_ordinary_one(processor, tmp_path):
    model = build_model(len(processor.tokenizer), hidden=64, layers=1, vision_hidden=64, vision_blocks=1)
    save_checkpoint(model, processor, tmp_path, {"steps": 0})
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is Qwen2_5_VLForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(tmp_path)).__name__ == "Qwen2_5_VLProcessor"
    vlm = VLM.load(Config(model_name_or_path=str(tmp_path), device="cpu", max_pixels=None))
    encoded = encode(vlm, "", "How many?", [Image.new("RGB", (400, 400))])
    assert encoded.patch_grid == (6, 6)
    assert vlm.model.generation_config.do_sample is False and IM_END in vlm.eos_ids


@pytest.mark.slow
def test_notebook_trains_and_examines(tmp_path):
    """Every cell of the training notebook, in seconds instead of minutes."""
    small = {"minutes": 0.1, "vision_minutes": 0.03, "hidden": 64, "layers": 1, "scenes": 1, "processes": 1}
    given = small | {"test_examples": 2, "output_dir": str(tmp_path / "run")}
    report = notebooks.run(locate("notebooks/00_train_shapes_vl.ipynb"), given, tmp_path / "out.ipynb")
    assert "best blind guess" in report.read_text(encoding="utf-8")
    assert (tmp_path / "run/model/model.safetensors").is_file()
