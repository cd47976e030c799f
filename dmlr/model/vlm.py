"""The model: prefill, extend, append, step.

The only file that runs transformers' models (loading.py loads them, families.py says how architectures differ, cache.py
holds their caches). It runs embeddings over a cached prefix and returns logits and attention. Knows nothing about how a
question becomes a prompt (encode.py), how an answer is chosen token by token (decode.py), rewards, or what the extra
embeddings mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from dmlr.config import Config
from dmlr.model import memory
from dmlr.model.cache import AttentionProbe, KVCache, Prefix, additive_mask
from dmlr.model.cpu_linear import Linear, through_onednn
from dmlr.model.families import FAMILIES, Grid, check_known
from dmlr.model.graphs import Recordings
from dmlr.model.memory import Shape, Work

# Without cuDNN's, which plans anew for every shape: a prefix has another length at every token, images have many sizes.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Encoded:
    """One example's prompt on the CPU: P prefix tokens, N of them image tokens.

    Image token i is the one in column `image_columns[i]`. The first height * width of `patch_grid` lie row-major on the
    first image; thumbnails, ends of lines and further images are numbered after them.
    """

    prompt: str  # the exact text given to the tokenizer, chat template applied
    input_ids: torch.Tensor  # [P], everything before the first think token
    positions: torch.Tensor  # [axes, P], three axes with M-RoPE
    suffix_ids: torch.Tensor  # [S], what follows the think tokens (empty without any)
    image_columns: torch.Tensor  # [N], where the image tokens are in input_ids
    image_inputs: Mapping[str, torch.Tensor]  # what the vision tower reads, by its names; empty without image
    patch_grid: Grid  # (height, width) of the first image in image tokens; (0, 0) without image
    num_tokens: int  # of the whole prompt: prefix, think tokens, suffix


class VLM:
    """A frozen vision-language model with its processor, of one of the architectures in families.py.

    min_pixels, max_pixels: limits of image sizes in merged visual tokens, as far as the family can choose; none: the
    processor's own. deep_patches: interleaved patches bring their deep features too, where the model has any
    (DeepStack).
    """

    def __init__(
        self,
        model,
        processor,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        deep_patches: bool = False,
    ):
        check_known(model.config)
        self.model = through_onednn(model.eval().requires_grad_(False))
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.family = FAMILIES[model.config.model_type](model, processor, min_pixels, max_pixels)
        self.text_model = self.family.text_model  # the language model without its head
        self.deep_levels = self.family.deep_levels if deep_patches else 0
        self.text_config, self.shape = model.config.get_text_config(), Shape(model.config)
        self.image_token_id: int = model.config.image_token_id
        self.key_group = self.shape.heads // self.shape.kv_heads  # query heads that share a key head
        self.recordings = Recordings()
        self.budget = math.inf  # bytes that a batch may be estimated at: half of what ran out of memory

    @classmethod
    def load(cls, config: Config) -> VLM:
        """Loads `model_name_or_path` (hub id or folder) without running code from it. ModelError says what failed."""
        from dmlr.model.loading import load_checkpoint  # transformers' models: seconds

        model, processor = load_checkpoint(config)
        return cls(model, processor, config.min_pixels, config.max_pixels, config.deep_patches)

    # what the model is

    @property
    def device(self) -> torch.device:
        """Where inputs go: the embedding's, also when accelerate keeps its weights elsewhere until they are needed."""
        embedding = self.model.get_input_embeddings()
        hook = getattr(embedding, "_hf_hook", None)
        return torch.device(hook.execution_device) if hook else embedding.weight.device

    @property
    def on_one_gpu(self) -> bool:
        """No part of it on another GPU, the CPU or a disk."""
        return self.device.type == "cuda" and {p.device for p in self.model.parameters()} == {self.device}

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def context_length(self) -> int:
        """Positions that the language model was made for."""
        return self.text_config.max_position_embeddings

    @cached_property
    def eos_ids(self) -> list[int]:
        ids = self.model.generation_config.eos_token_id
        ids = [ids] if isinstance(ids, int) else list(ids or [])
        return ids or [self.tokenizer.eos_token_id]

    @cached_property
    def think_id(self) -> int:
        """Token whose embedding the think tokens start from: the end-of-text token (`<|endoftext|>` for Qwen)."""
        name = "<|endoftext|>"
        known = self.tokenizer.convert_tokens_to_ids(name)
        return known if known not in (None, self.tokenizer.unk_token_id) else self.tokenizer.eos_token_id

    @cached_property
    def longest_token(self) -> int:
        """Characters, at most, that one token stands for."""
        return max(map(len, self.tokenizer.get_vocab()))

    def fitting_batch(self, work: Work) -> int:
        """Examples that ask for so much and go through together: by the GPU's free memory; 16 on a CPU.

        An estimate (memory.py): who asks for too much gets an out-of-memory error, and halves the batch.
        """
        if self.device.type != "cuda":
            return memory.MOST["cpu"]
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)  # by the allocator
        held += self.recordings.nbytes if work.buffers else 0  # which `work` counts among what it asks for
        free = torch.cuda.mem_get_info(self.device)[0] + held
        size = memory.fitting_batch(self.shape, self.dtype.itemsize, work, free)
        return int(max(1, min(size, self.budget / memory.peak(self.shape, self.dtype.itemsize, work, 1))))

    def ran_out(self, work: Work, batch: int) -> None:
        """So many examples that ask for so much were too many: later batches ask for half of that at most."""
        self.budget = min(self.budget, memory.peak(self.shape, self.dtype.itemsize, work, batch) / 2)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings [..., D] of token ids [...]."""
        return self.model.get_input_embeddings()(ids.to(self.device))

    @cached_property
    def embedding_rms(self) -> float:
        """Root mean square per dimension of the think tokens' start: what sigma is relative to."""
        return float(self.embed(torch.tensor(self.think_id)).float().pow(2).mean().sqrt())

    # prefill, extend, append, step

    @torch.no_grad()
    def prefill(self, batch: list[Encoded]) -> Prefix:
        """Vision tower and prompt, once per example; rows are padded on the left."""
        length = max(len(e.input_ids) for e in batch)
        pads = [length - len(e.input_ids) for e in batch]
        left = partial(pad_sequence, batch_first=True, padding_side="left")
        ids = left([e.input_ids for e in batch], padding_value=self.tokenizer.pad_token_id or 0).to(self.device)
        positions = left([e.positions.T for e in batch]).permute(2, 0, 1).to(self.device)  # [axes, B, P]
        mask = left([torch.ones_like(e.input_ids, dtype=torch.bool) for e in batch]).to(self.device)  # [B, P]
        prompts = [
            torch.cat([e.input_ids[:1].expand(n), e.input_ids, e.suffix_ids]) for e, n in zip(batch, pads, strict=True)
        ]
        columns = [e.image_columns + n for e, n in zip(batch, pads, strict=True)]
        columns = pad_sequence(columns, batch_first=True, padding_value=-1).to(self.device)  # [B, N]
        image_mask, columns = columns >= 0, columns.clamp(min=0)
        embeds = self._with_features(self.embed(ids), ids == self.image_token_id, batch)
        images = at(embeds, columns) * image_mask[..., None]
        if not self.deep_levels:
            images = images[..., : self.text_config.hidden_size]

        cache = KVCache()
        # without padding SDPA needs no mask
        hidden = self._run(embeds, positions, visible(mask)[:, None] if max(pads) else None, cache)
        cache.length = length
        suffix = batch[0].suffix_ids
        assert all(torch.equal(e.suffix_ids, suffix) for e in batch), "one chat template, one suffix"
        return Prefix(
            cache=cache,
            mask=mask,
            next_position=torch.stack([e.positions.max() + 1 for e in batch]).to(self.device),
            logits=self._logits(hidden[:, -1]),
            images=images,
            image_states=at(hidden, columns),
            image_mask=image_mask,
            image_columns=columns,
            prompt_ids=torch.stack(prompts).to(self.device),
            suffix_ids=suffix.to(self.device),
        )

    def extend(
        self,
        prefix: Prefix,
        embeds: torch.Tensor,
        filled: torch.Tensor,
        read: torch.Tensor,
        probe_rows: torch.Tensor | None = None,
        samples: int = 1,
        commit: bool = False,
        logits: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs S more slots over the cached prefix; drops them again unless `commit`.

        embeds: [B, S, D], or [B, S, (1 + n) D] with what n deep levels add.
        filled: [B, S], False for slots that nothing may attend to and that take no position.
        read: [B, R], slots whose next-token logits are wanted; without `logits` their last hidden states.
        probe_rows: [A], slots whose attention over the image tokens is wanted.
        samples: M sequences of S / M slots each that all follow the prefix and do not see each other (they share its
        keys and values instead of repeating them).

        Returns logits [B, R, V] in float32 or states [B, R, D], and attention [B, A, N], mean over layers and heads
        (None without probe_rows). Differentiable in `embeds`.
        """
        batch, slots, _ = embeds.shape
        assert filled.shape == (batch, slots) and read.shape[0] == batch
        assert not commit or samples == 1
        order = filled.view(batch, samples, -1).long().cumsum(dim=2).view(batch, slots)
        positions = (prefix.next_position[:, None] + order - 1).expand(self.family.position_axes, batch, slots)
        mask = torch.cat([prefix.mask[:, None].expand(-1, slots, -1), visible(filled, samples)], dim=2)  # [B, S, T]
        probe = None
        if probe_rows is not None:
            wide = torch.promote_types(self.dtype, torch.float32)
            probe = AttentionProbe(probe_rows, mask.index_select(1, probe_rows), self.key_group, wide)
        mask = additive_mask(mask, self.key_group, self.dtype)
        hidden = self._run(embeds.to(self.dtype), positions, mask, prefix.cache, probe)
        if commit:
            prefix.cache.length += slots
            prefix.mask = torch.cat([prefix.mask, filled], dim=1)
            prefix.next_position = prefix.next_position + order[:, -1]
        out = at(hidden, read)  # [B, R, D]
        if logits:
            out = (self._logits if commit else self._exact_logits)(out)
        if probe is None:
            return out, None
        weights = probe.total / len(prefix.cache.stored)  # [B, A, T], each row sums to one
        index = prefix.image_columns[:, None].expand(-1, weights.shape[1], -1)
        return out, weights.gather(2, index.to(weights.device)).masked_fill(~prefix.image_mask[:, None], 0.0)

    @torch.no_grad()
    def append(self, prefix: Prefix, embeds: torch.Tensor, filled: torch.Tensor) -> None:
        """Makes slots part of the prefix, and `prefix.logits` those after each row's last filled one."""
        last = torch.where(filled, torch.arange(filled.shape[1], device=filled.device), 0).amax(dim=1, keepdim=True)
        prefix.logits = self.extend(prefix, embeds, filled, last, commit=True)[0][:, 0]

    @torch.no_grad()
    def step(self, buffer: Prefix, token: torch.Tensor, position: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Next-token logits [B, V] after one more token [B] at `position` [B] in each row of a `Prefix.buffer`.

        It is written to `column` [1] of the buffer and sees the columns before: at every token the same kernels on the
        same memory.
        """
        batch, columns = buffer.mask.shape
        buffer.cache.column = column
        capacity = buffer.cache.stored[0][0].shape[2]
        behind = torch.arange(columns, capacity, device=token.device) <= column
        mask = torch.cat([buffer.mask, behind.expand(batch, -1)], dim=1)[:, None]  # [B, 1, capacity]
        mask = additive_mask(mask, self.key_group, self.dtype)
        position = position.expand(self.family.position_axes, batch)[..., None]
        return self._logits(self._run(self.embed(token[:, None]), position, mask, buffer.cache)[:, -1])

    # inside

    def _with_features(self, embeds: torch.Tensor, places: torch.Tensor, batch: list[Encoded]) -> torch.Tensor:
        """Embeddings [B, P, D] with visual features at `places` [B, P], and the deep ones beside them."""
        seen = [e.image_inputs for e in batch if e.image_inputs]
        if not seen:
            return embeds
        with sdpa_kernel(KERNELS):
            features, deep = self.family.features(seen, self.device, self.dtype)
        embeds[places] = features.to(embeds)
        for level in deep:
            added = torch.zeros_like(embeds[..., : level.shape[1]])
            added[places] = level.to(embeds)
            embeds = torch.cat([embeds, added], dim=2)
        return embeds

    def _run(self, embeds, positions, mask, cache: KVCache, probe: AttentionProbe | None = None) -> torch.Tensor:
        """Language model only; mask is as `attend` takes it. Returns hidden states [B, S, D]."""
        embeds, *deep = embeds.split(self.text_config.hidden_size, dim=2)
        also = {}
        if deep:  # zeros for what is no patch, so all rows are named: a mask would make a GPU wait for its count
            rows = torch.arange(len(embeds), device=embeds.device)
            also = {"visual_pos_masks": rows, "deepstack_visual_embeds": deep}
        with sdpa_kernel(KERNELS):
            out = self.text_model(
                inputs_embeds=embeds,
                position_ids=positions if self.family.position_axes > 1 else positions[0],
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                probe=probe,
                **also,
            )
        return out.last_hidden_state.to(self.device)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., V] in float32 or more: half precision is widened for softmax and entropy."""
        logits = self.model.get_output_embeddings()(hidden).to(self.device)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _exact_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same of a few rows by a product in float32, also in half precision: what rewards are compared by."""
        head = self.model.get_output_embeddings()
        half = self.dtype.itemsize < 4 and type(head) in (torch.nn.Linear, Linear)
        if not half or head.bias is not None or head.weight.is_meta:  # meta: accelerate keeps the weights elsewhere
            return self._logits(hidden)
        rows = hidden.to(head.weight.device).flatten(0, -2)
        if rows.device.type == "cuda" and not rows.requires_grad:  # without a wide copy of the weights
            wide = torch.mm(rows, head.weight.T, out_dtype=torch.float32)
        else:
            wide = F.linear(rows.float(), head.weight.float())
        return wide.unflatten(0, hidden.shape[:-1]).to(self.device)


def at(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[B, R, D]: what x [B, S, D] has at `places` [B, R]."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))


def visible(filled: torch.Tensor, samples: int = 1) -> torch.Tensor:
    """[B, S, S], True where slots [B, S] may look: at themselves, and at those before that are `filled` and of the same
    sample of S / M slots."""
    slots = filled.shape[1]
    sample = torch.arange(slots, device=filled.device) // (slots // samples)
    causal = torch.ones(slots, slots, dtype=torch.bool, device=filled.device).tril() & (sample[:, None] == sample)
    return (causal & filled[:, None]) | torch.eye(slots, dtype=torch.bool, device=filled.device)
