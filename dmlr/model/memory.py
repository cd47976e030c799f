"""What a model needs, from its settings (config.json) alone: parameters, memory of a run's stages, arithmetic.

All memory is in bytes. With b bytes per number, H heads and K key heads of size d, hidden size D, MLP size I, one layer
at a time without gradient, the terms are

    weights        b · parameters (linear layers in 4 or 8 bits where the run asks for that); of a model that is small
                   beside a CPU's memory those of the language model twice (cpu_linear.py), which is not counted
    cache          2 · layers · K · d · b                    a position: keys and values
    activations    b · (3 · max(I, 2 · H · d) + 4 · D)       a position: MLP or attention, residuals beside it
    attention map  (8 · H + 4 · H / K) · S · (P + S)         S slots of the loop over P prompt positions: scores and
                                                             weights of every head, the mask of one key head; float32
    logits         16 · vocabulary                           a row that is read: float32, and copies of it

A stage holds the weights, its share of the cache and its own terms: `vision` (all images of a batch at once),
`prefill`, `probe` (a prompt's text once more, for its attention), `loop`, `decode` (the cache grows by half when it is
full; rows that finish leave a copy behind). A run peaks at its largest stage; caches that recorded kernels read are
there in each. The sum is that of tensors, within a factor of 1.5 (tests/test_footprint.py); what an allocator loses and
libraries take comes on top, on a CPU about as much again.
Knows nothing about devices, files or data.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PretrainedConfig

USABLE = {"cuda": 0.8, "cpu": 0.4}  # share of free memory that tensors may plan with, by type of device
MOST = {"cuda": 64, "cpu": 16}  # examples of a batch, beyond which speed gains nothing


@dataclass(frozen=True)
class Parameters:
    """How many there are (tied ones once), and where."""

    total: int
    shrinkable: int  # in linear layers but the output head: what 4 and 8 bits apply to
    language: int  # that a position of text goes through, without the output head
    head: int
    vision: int

    def bytes(self, itemsize: int, bits: int | None = None) -> int:
        """Of the weights. bits: 4 or 8, of what is shrinkable; none: all have `itemsize`."""
        if bits is None:
            return itemsize * self.total
        scales = 1.125 if bits == 4 else 1  # a float32 for every 64 numbers
        return round(itemsize * (self.total - self.shrinkable) + self.shrinkable * bits / 8 * scales)


class Shape:
    """Sizes that decide memory and time: of the language model, and of the vision tower per patch.

    From a model's settings; of a vision tower that does not say its sizes, what its kind usually has.
    """

    def __init__(self, settings: PretrainedConfig) -> None:
        text, vision = settings.get_text_config(), settings.vision_config
        self.settings = settings
        self.context = getattr(text, "max_position_embeddings", None)  # positions that it was made for
        self.layers, self.hidden, self.intermediate = text.num_hidden_layers, text.hidden_size, text.intermediate_size
        self.heads, self.vocabulary = text.num_attention_heads, text.vocab_size
        self.kv_heads = getattr(text, "num_key_value_heads", None) or self.heads
        self.head = getattr(text, "head_dim", None) or self.hidden // self.heads
        self.vision_hidden = getattr(vision, "embed_dim", None) or vision.hidden_size
        self.vision_intermediate = getattr(vision, "intermediate_size", None) or 4 * self.vision_hidden
        merge = getattr(vision, "spatial_merge_size", None) or getattr(settings, "scale_factor", None)
        merge = merge or 1 / (getattr(settings, "downsample_ratio", None) or 1)
        self.patches_per_token = round(merge**2)  # of the vision tower, that are merged into one image token

    @cached_property
    def parameters(self) -> Parameters:
        """Counted exactly, on torch's meta device: the model is built without any memory for its weights."""
        from transformers import AutoModelForImageTextToText  # transformers' models: seconds

        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(self.settings)
        head = model.get_output_embeddings()
        linear = {m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head}
        text = getattr(model.model, "language_model", None) or model.model.text_model
        tables = sum(m.weight.numel() for m in text.modules() if isinstance(m, torch.nn.Embedding))
        total = sum(p.numel() for p in model.parameters())
        language = sum(p.numel() for p in text.parameters()) - tables
        untied = head.weight.numel() if head.weight is not model.get_input_embeddings().weight else 0
        vision = total - language - tables - untied
        return Parameters(total, sum(weight.numel() for weight in linear), language, head.weight.numel(), vision)

    def cache(self, itemsize: int) -> int:
        """Keys and values of one position."""
        return 2 * self.layers * self.kv_heads * self.head * itemsize

    def activations(self, itemsize: int) -> int:
        """Of one position in one layer of the language model."""
        return itemsize * (3 * max(self.intermediate, 2 * self.heads * self.head) + 4 * self.hidden)

    def vision(self, itemsize: int) -> int:
        """Of one image token in one layer of the vision tower: its patches, and their pixels (two frames of 14 x 14 in
        three colours, float32)."""
        patch = itemsize * (3 * max(self.vision_intermediate, 2 * self.vision_hidden) + 4 * self.vision_hidden)
        return self.patches_per_token * (patch + 4 * 3 * 2 * 14**2)


@dataclass(frozen=True)
class Work:
    """What one example asks of the model, at most; `workload.py` makes it from a run's parameters."""

    prompt: int  # positions, image included
    image_tokens: int
    slots: int = 0  # think tokens and patches of a pass of the loop, of all samples
    reads: int = 0  # of them, positions whose logits are read
    loop_positions: int = 0  # of all passes together
    passes: int = 0  # of the loop
    new_tokens: int = 1
    copies: int = 1  # of the cache while answers are decoded
    graph: bool = False  # the exact gradient keeps every layer's activations
    probed: int = 0  # positions of the prompt that go through once more, for their attention
    buffers: int = 0  # copies of the cache that stay between batches (recorded kernels read them)


def stages(shape: Shape, itemsize: int, work: Work) -> dict[str, int]:
    """Bytes of one example of a batch in each stage, over the weights."""
    cache, activations = shape.cache(itemsize), shape.activations(itemsize)
    capacity = work.prompt  # positions that the cache has space for in the end
    while capacity < work.prompt + work.slots + work.new_tokens:
        capacity += max(1, capacity // 2)
    positions = work.prompt + work.slots
    # a probe's scores and weights of the think tokens' rows, and the mask of all slots, stacked by key head
    maps = (8 * shape.heads * work.reads + 4 * shape.heads // shape.kv_heads * work.slots) * positions
    rows = 16 * shape.vocabulary
    loop = work.slots * activations * (shape.layers if work.graph else 1) + maps + work.reads * rows
    held = work.buffers * (work.prompt + max(work.slots, work.new_tokens)) * cache
    # scores, weights and what is between; the masks of forward and probe
    scores = (12 * shape.heads + 8 * shape.heads // shape.kv_heads) * (work.prompt + work.probed)
    parts = {
        "vision": work.image_tokens * shape.vision(itemsize) + work.prompt * shape.hidden * itemsize,
        "prefill": work.prompt * (cache + activations + work.prompt * (itemsize + 2)),
        "loop": work.slots and (min(capacity, 3 * work.prompt // 2) * cache * (1 + work.graph) + loop),
        "probe": work.probed and (work.prompt + work.probed) * cache + work.probed * (activations + scores),
        "decode": round(capacity * cache * (work.copies + 0.5)) + activations + rows,
    }
    return {stage: size and size + held for stage, size in parts.items()}


def peak(shape: Shape, itemsize: int, work: Work, batch: int) -> int:
    """Bytes of the largest stage of a batch, over the weights."""
    return batch * max(stages(shape, itemsize, work).values())


def fitting_batch(shape: Shape, itemsize: int, work: Work, free: int, device: str = "cuda") -> int:
    """Examples that go through together in `free` bytes, the weights being there already; 0 when not even one does.

    device: its type, cuda or another, which counts as a CPU.
    """
    kind = "cuda" if device == "cuda" else "cpu"
    return max(0, min(MOST[kind], int(USABLE[kind] * free / peak(shape, itemsize, work, 1))))


def seconds(shape: Shape, itemsize: int, work: Work, batch: int, flops: float, bandwidth: float) -> float:
    """Per example of a batch: each stage at the rate of arithmetic or of memory, whichever takes longer.

    flops: floating-point operations per second; bandwidth: bytes read per second.

    Weights are read once by a forward, the cache once by a position of the loop or of the answer. What a device does
    beside that (starting kernels, small operations) is not in it, so this is less than a run takes; answers are taken
    to be `new_tokens` long, which is more than most are.
    """
    parameters = shape.parameters
    weights = itemsize * (parameters.language + parameters.head)
    kept = shape.cache(itemsize)

    def attention(positions: float, over: float) -> float:
        return 4 * shape.layers * shape.heads * shape.head * positions * over

    def stage(operations: float, read: float) -> float:
        return max(operations / flops, read / bandwidth)

    body = 2 * parameters.language
    seen = work.image_tokens * shape.patches_per_token * 2 * parameters.vision
    prefill = stage(seen + work.prompt * body + attention(work.prompt, work.prompt / 2), weights / batch)
    passes, total = work.passes, work.prompt + work.slots
    loop = stage(
        work.loop_positions * body + attention(work.loop_positions, total) + passes * work.reads * 2 * parameters.head,
        passes * (weights / batch + total * kept),
    )
    longest = total + work.new_tokens / 2
    decode = stage(
        work.new_tokens * (body + 2 * parameters.head) + attention(work.new_tokens, longest),
        work.new_tokens * (weights / batch + longest * kept),
    )
    return prefill + loop + decode
