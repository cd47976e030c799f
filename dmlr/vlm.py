"""The model: load, prefill, extend, decode.

The only file that knows transformers' models (encode.py knows its processors, kv_cache.py its caches). It knows
nothing about rewards, which patches are chosen, or what the extra embeddings mean: it runs embeddings over a cached
prefix and returns logits and attention.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor, NoBadWordsLogitsProcessor

from dmlr.config import Config, locate
from dmlr.encode import Encoded, Encoder
from dmlr.kv_cache import ATTENTION, AttentionProbe, KVCache, at_least_float32

LOOK_EVERY = defaultdict(lambda: 16, cpu=1)  # decoding steps between looks at which rows are finished


class ModelError(ValueError):
    """The checkpoint cannot be loaded, or its architecture lacks something the method needs."""


@dataclass
class Prefix:
    """A batch of prompts that went through the model once; `cache` holds them, left-padded to P positions."""

    cache: KVCache
    mask: torch.Tensor  # [B, committed], True where a position is real
    next_position: torch.Tensor  # [B], position of the first token after the prefix
    logits: torch.Tensor  # [B, V], float32, after the last committed position
    images: torch.Tensor  # [B, N, D], merged visual features, right-padded
    image_mask: torch.Tensor  # [B, N]
    image_columns: torch.Tensor  # [B, N], their columns among the P
    suffix_ids: torch.Tensor  # [S], shared by the batch

    def select(self, rows: torch.Tensor) -> Prefix:
        """These rows [B'] of the batch only."""
        names = ("mask", "next_position", "logits", "images", "image_mask", "image_columns")
        return replace(self, cache=self.cache.select(rows), **{name: getattr(self, name)[rows] for name in names})

    def branch(self) -> Prefix:
        """A continuation that can be appended to and decoded, and leaves this prefix as it is."""
        return replace(self, cache=self.cache.branch())

    def compact(self) -> Prefix:
        """The same in as few columns as the longest row needs: empty ones leave, real ones close up to the right.

        Keys carry their positions with them, so attention over them is what it was.
        """
        width = int(self.mask.sum(dim=1).max())
        order = self.mask.long().argsort(dim=1, stable=True)  # [B, committed], real columns last, in their order
        columns, dropped = order[:, -width:], order.shape[1] - width
        ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
        moved = torch.empty_like(order).scatter_(1, order, ranks) - dropped  # where each column is now
        return replace(
            self,
            cache=self.cache.take(columns),
            mask=self.mask.gather(1, columns),
            image_columns=moved.gather(1, self.image_columns).clamp(min=0),
        )


@dataclass(frozen=True)
class Decoded:
    """Text of one answer, its tokens (the one that ended it included) and why it ended: `eos_token` or `length`."""

    text: str
    stop_reason: str
    ids: list[int]

    @property
    def num_tokens(self) -> int:
        return len(self.ids)


# logits [B, V], which rows of the batch they are, how many tokens came before -> next tokens [B]
Pick = Callable[[torch.Tensor, list[int], int], torch.Tensor]
# prefix, a token [B] for each row, which rows of the batch they are -> the prefix with them
Feed = Callable[["Prefix", torch.Tensor, list[int]], "Prefix"]


def greedy(logits: torch.Tensor, rows: list[int], step: int) -> torch.Tensor:
    """The most probable token."""
    return logits.argmax(dim=-1)


class VLM:
    """A frozen vision-language model with its processor. Qwen2.5-VL's architecture is what is tested."""

    def __init__(self, model, processor, min_pixels: int | None = None, max_pixels: int | None = None):
        self.model = model.eval().requires_grad_(False)
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.core = model.model  # vision tower, language model and M-RoPE index
        missing = [n for n in ("language_model", "get_rope_index", "get_image_features") if not hasattr(self.core, n)]
        if missing:
            raise ModelError(f"{type(model).__name__} has no {', '.join(missing)}: this architecture is not supported")
        if "sliding_attention" in (self.text_config.layer_types or ()):
            raise ModelError(
                "sliding-window layers are not supported: the prefix must stay visible to every think token"
            )
        self.encode = Encoder(self, min_pixels, max_pixels)

    @classmethod
    def load(cls, config: Config) -> VLM:
        """Loads `model_name_or_path` (hub id or folder) without running code from it. ModelError says what failed."""
        device = config.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        name = config.dtype if config.dtype != "auto" else ("float32" if device == "cpu" else "bfloat16")
        path = str(locate(config.model_name_or_path))
        shared = {
            "trust_remote_code": config.trust_remote_code,
            "token": os.environ.get("HUGGING_FACE_TOKEN") or os.environ.get("HF_TOKEN"),
        }
        try:
            model = AutoModelForImageTextToText.from_pretrained(
                path,
                dtype=getattr(torch, name),
                attn_implementation={"text_config": ATTENTION, "vision_config": "sdpa"},
                use_safetensors=True,
                **shared,
            )
            processor = AutoProcessor.from_pretrained(path, **shared)
        except (OSError, ValueError, KeyError, ImportError) as error:
            kind = "folder" if Path(path).is_dir() else "name (no such folder here; the hub was asked)"
            raise ModelError(f"cannot load {kind} {config.model_name_or_path!r}: {error}") from error
        return cls(model.to(device), processor, config.min_pixels, config.max_pixels)

    # what the model is

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def text_config(self):
        return self.model.config.get_text_config()

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
    def vision_marks(self) -> torch.Tensor:
        """[2]: the tokens between which an image stands."""
        config = self.model.config
        return torch.tensor([config.vision_start_token_id, config.vision_end_token_id], device=self.device)

    def fitting_batch(self, positions: int) -> int:
        """Examples of so many positions that go through together: by half of the GPU's free memory, at most 64; 16 on
        a CPU. An estimate: who asks for too much is answered by an out-of-memory error, and halves the batch."""
        if self.device.type != "cuda":
            return 16
        text, bytes_ = self.text_config, self.dtype.itemsize
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        cache = 2 * text.num_hidden_layers * text.num_key_value_heads * head * bytes_  # keys and values of one position
        prefill = 8 * text.intermediate_size * bytes_  # activations of one position in one layer
        free, _ = torch.cuda.mem_get_info(self.device)
        return int(max(1, min(64, 0.5 * free / (positions * (cache + prefill)))))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings [..., D] of token ids [...]."""
        return self.model.get_input_embeddings()(ids.to(self.device))

    @cached_property
    def embedding_rms(self) -> float:
        """Root mean square per dimension of the think tokens' start: what sigma is relative to."""
        return float(self.embed(torch.tensor(self.think_id)).float().pow(2).mean().sqrt())

    # prefill, extend, decode

    @torch.no_grad()
    def prefill(self, batch: list[Encoded]) -> Prefix:
        """Vision tower and prompt, once per example; rows are padded on the left."""
        length = max(len(e.input_ids) for e in batch)
        pads = [length - len(e.input_ids) for e in batch]
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.stack([F.pad(e.input_ids, (n, 0), value=pad) for e, n in zip(batch, pads, strict=True)])
        positions = torch.stack([F.pad(e.positions, (n, 0)) for e, n in zip(batch, pads, strict=True)], dim=1)
        mask = (torch.arange(length) >= torch.tensor(pads)[:, None]).to(self.device)  # [B, P]

        count = max(len(e.image_columns) for e in batch)
        columns = [e.image_columns + n for e, n in zip(batch, pads, strict=True)]
        image_mask = torch.arange(count) < torch.tensor([[len(c)] for c in columns])  # [B, N]
        columns = torch.stack([F.pad(c, (0, count - len(c))) for c in columns]).to(self.device)
        embeds = self.embed(ids)  # [B, P, D]
        features = self._image_features(batch).to(embeds.dtype)  # [sum of N, D]
        images = embeds.new_zeros(len(batch), count, embeds.shape[2])
        images[image_mask.to(self.device)] = features
        embeds[ids.to(self.device) == self.model.config.image_token_id] = features

        cache = KVCache()
        causal = None  # without padding SDPA needs no mask
        if max(pads):
            causal = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
            causal = (causal & mask[:, None]) | torch.eye(length, dtype=torch.bool, device=self.device)
            causal = causal[:, None]
        hidden = self._run(embeds, positions.to(self.device), causal, cache)
        cache.commit(length)
        suffix = batch[0].suffix_ids
        assert all(torch.equal(e.suffix_ids, suffix) for e in batch), "one chat template, one suffix"
        return Prefix(
            cache=cache,
            mask=mask,
            next_position=torch.stack([e.positions.max() + 1 for e in batch]).to(self.device),
            logits=self._logits(hidden[:, -1]),
            images=images,
            image_mask=image_mask.to(self.device),
            image_columns=columns,
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
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs S more slots over the cached prefix; drops them again unless `commit`.

        embeds: [B, S, D]; filled: [B, S], False for slots that nothing may attend to and that take no position;
        read: [B, R], slots whose next-token logits are wanted; probe_rows: [A], slots whose attention over the image
        tokens is wanted; samples: M sequences of S / M slots each that all follow the prefix and do not see each
        other (they share its keys and values instead of repeating them). Returns logits [B, R, V] in float32 and
        attention [B, A, N], mean over layers and heads (None without probe_rows). Differentiable in `embeds`.
        """
        batch, slots, _ = embeds.shape
        assert filled.shape == (batch, slots) and read.shape[0] == batch
        assert not commit or samples == 1
        order = filled.view(batch, samples, -1).long().cumsum(dim=2).view(batch, slots)
        positions = (prefix.next_position[:, None] + order - 1).expand(3, batch, slots)
        sample = torch.arange(slots, device=embeds.device) // (slots // samples)
        causal = torch.ones(slots, slots, dtype=torch.bool, device=embeds.device).tril() & (sample[:, None] == sample)
        new = (causal & filled[:, None]) | torch.eye(slots, dtype=torch.bool, device=embeds.device)
        mask = torch.cat([prefix.mask[:, None].expand(-1, slots, -1), new.expand(batch, -1, -1)], dim=2)[:, None]
        probe = AttentionProbe(probe_rows) if probe_rows is not None else None
        hidden = self._run(embeds.to(self.dtype), positions, mask, prefix.cache, probe)
        if commit:
            prefix.cache.commit(slots)
            prefix.mask = torch.cat([prefix.mask, filled], dim=1)
            prefix.next_position = prefix.next_position + order[:, -1]
        rows = hidden.gather(1, read[..., None].expand(-1, -1, hidden.shape[2]))
        logits = self._logits(rows)  # [B, R, V]
        if probe is None:
            return logits, None
        weights = probe.mean()  # [B, rows, T]
        index = prefix.image_columns[:, None].expand(-1, weights.shape[1], -1)
        return logits, weights.gather(2, index.to(weights.device)).masked_fill(~prefix.image_mask[:, None], 0.0)

    @torch.no_grad()
    def append(self, prefix: Prefix, embeds: torch.Tensor, filled: torch.Tensor) -> None:
        """Makes slots part of the prefix, and `prefix.logits` those after each row's last filled one."""
        last = torch.where(filled, torch.arange(filled.shape[1], device=filled.device), 0).amax(dim=1, keepdim=True)
        prefix.logits = self.extend(prefix, embeds, filled, last, commit=True)[0][:, 0]

    def feed(self, prefix: Prefix, token: torch.Tensor, rows: list[int]) -> Prefix:
        """The prefix followed by one token [B] in each row."""
        self.append(prefix, self.embed(token[:, None]), torch.ones(len(rows), 1, dtype=torch.bool, device=self.device))
        return prefix

    @torch.no_grad()
    def decode(
        self,
        prefix: Prefix,
        max_new_tokens: int,
        banned: tuple[str, ...] = (),
        pick: Pick = greedy,
        feed: Feed | None = None,
        reserve: int = 0,
    ) -> list[Decoded]:
        """Decoding from `prefix.logits` until end of turn, `max_new_tokens` or the end of the context.

        `pick` chooses each next token, `feed` gives it to the model (and may insert more behind it, for which
        `reserve` positions of the context are left free); both are told which rows of the batch they see, since
        finished rows leave it. The checkpoint's own sampling settings (temperature, repetition penalty) are not
        applied. The prefix is used up.
        """
        ban, feed = self._ban(banned), feed or self.feed
        eos = torch.tensor(self.eos_ids, device=self.device)
        room = self.context_length - reserve - prefix.mask.sum(dim=1)
        limit = room.clamp(1, max_new_tokens)  # [B], each row's own
        tokens = torch.zeros(len(limit), 0, dtype=torch.long, device=self.device)
        finished = torch.zeros_like(limit, dtype=torch.bool)
        rows, limits, said = list(range(len(limit))), limit.tolist(), {}  # rows still in the batch; what others said
        last = max(limits)
        for step in range(1, last + 1):
            if step > 1:
                prefix = feed(prefix, tokens[:, -1], rows)
            logits = ban(tokens, prefix.logits) if ban else prefix.logits
            token = pick(logits, rows, step - 1)
            tokens = torch.cat([tokens, token[:, None]], dim=1)
            finished = finished | torch.isin(token, eos) | (limit == step)
            if step % LOOK_EVERY[self.device.type] and step < last:
                continue  # looking at `finished` makes a GPU wait
            over = finished.tolist()
            if 2 * sum(over) >= len(over):  # finished rows leave, half a batch at a time
                said |= {rows[i]: tokens[i].tolist() for i, done in enumerate(over) if done}
                rows = [row for row, done in zip(rows, over, strict=True) if not done]
                if not rows:
                    break
                stay = (~finished).nonzero()[:, 0]
                prefix, tokens, limit, finished = prefix.select(stay), tokens[stay], limit[stay], finished[stay]
        return [self._decoded(said[row][:end]) for row, end in enumerate(limits)]

    # inside

    def _run(self, embeds, positions, mask, cache: KVCache, probe: AttentionProbe | None = None) -> torch.Tensor:
        """Language model only; mask is bool [B, 1, S, T] or None for plain causal. Returns hidden states [B, S, D]."""
        return self.core.language_model(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask={"full_attention": mask},
            past_key_values=cache,
            use_cache=True,
            probe=probe,
        ).last_hidden_state

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., V] in float32 or more."""
        head = self.model.lm_head
        if hidden.device.type == "cpu" and type(head) is torch.nn.Linear and head.bias is None:
            # For a few rows MKL multiplies a tall matrix from the left up to four times faster than from the right.
            logits = (head.weight @ hidden.reshape(-1, hidden.shape[-1]).mT).mT
            return at_least_float32(logits.contiguous().view(*hidden.shape[:-1], -1))
        return at_least_float32(head(hidden))

    def _image_features(self, batch: list[Encoded]) -> torch.Tensor:
        """[sum of N, D]: merged visual features of all images, in order."""
        seen = [e for e in batch if e.pixel_values is not None]
        if not seen:
            return torch.zeros(0, self.text_config.hidden_size, device=self.device)
        pixels = torch.cat([e.pixel_values for e in seen]).to(self.device, self.dtype)
        grids = torch.cat([e.grid_thw for e in seen]).to(self.device)
        return torch.cat(self.core.get_image_features(pixels, grids).pooler_output)

    def _ban(self, banned: tuple[str, ...]) -> NoBadWordsLogitsProcessor | None:
        """Forbids the strings at the start of a text and within it (tokenizers differ on the leading space)."""
        spelled = [
            self.tokenizer.encode(lead + word, add_special_tokens=False) for word in banned for lead in ("", " ")
        ]
        return NoBadWordsLogitsProcessor(spelled, eos_token_id=self.eos_ids) if spelled else None

    def _decoded(self, ids: list[int]) -> Decoded:
        end = next((i for i, token in enumerate(ids) if token in self.eos_ids), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return Decoded(text, "length" if end is None else "eos_token", ids if end is None else ids[: end + 1])
