"""Every parameter of a run: one frozen dataclass, checked when it is made.

Names, types and meanings are those of the original command line; the defaults are the paper's (App. A.3), and
`PRESETS` holds the other sets of values that people use. The module knows nothing about models or data.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REWARDS = ("entropy", "logprob", "self-certainty", "progress")
REWARD_POSITIONS = ("think", "think_next", "group_end", "answer")
ACCEPT_AT = ("updated", "candidate")
GENERATION = ("checkpoint", "plain")
DTYPES = ("auto", "float32", "bfloat16", "float16")


class ConfigError(ValueError):
    """A parameter that does not exist, has the wrong type or is out of range; the message names the mend."""


def _param(default: Any, help: str, *, low: float | None = None, high: float | None = None, choices: tuple = ()) -> Any:
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class Config:
    """All parameters of a run, in the order in which people look for them.

    Raises ConfigError at construction for any value outside its range. Use `Config.make` to start from a
    preset and to accept the strings that a command line gives ("true", "1e-4", "none").
    """

    # what runs
    model_name_or_path: str = _param("data/models/shapes-vl", "hub id or local folder of the vision-language model")
    revision: str = _param("", "commit, branch or tag of a model on the hub; empty: the newest")
    dataset: str = _param("data/shapes/mathematics.json", "path of a dataset JSON (several: separated by commas)")
    methods: str = _param("vanilla,dmlr", "methods to run, separated by commas")
    output_dir: str = _param("", "folder of the run; empty: reports/runs/<model>_<dataset>")
    start_data_idx: int = _param(0, "first example", low=0)
    end_data_idx: int | None = _param(100, "one past the last example; none: to the end", low=0)
    device: str = _param("auto", "torch device; auto: cuda if present, else cpu")
    dtype: str = _param("auto", "weights and activations; auto: bfloat16 on a GPU, float32 on a CPU", choices=DTYPES)
    device_map: str = _param("", "layers over several devices by accelerate: auto, balanced, ...; empty: one device")
    load_in_bits: int | None = _param(None, "language model in 4 or 8 bits (pip install bitsandbytes)", choices=(4, 8))
    batch_size: int | None = _param(None, "examples that go through the model together; none: by free memory", low=1)
    cuda_graphs: bool = _param(False, "replay the loop's kernels on a GPU: faster at small batches, not run on one yet")
    num_workers: int = _param(1, "processes with a model each; more than 1: on Ray (pip install -e '.[ray]')", low=1)
    worker_device_round_robin: bool = _param(False, "more workers than GPUs: let them share the GPUs evenly")
    ray_address: str = _param("", "a running Ray cluster, host:port or auto; empty: this machine alone")
    seed: int = _param(42, "noise of an example comes from (seed, its idx)", low=0)
    trust_remote_code: bool = _param(False, "let the checkpoint run its own code")
    # prompt and answer
    solver_prompt_idx: int = _param(0, "0 step by step, 1 detailed steps, 2 answer only", low=0, high=2)
    prompts_file: str = _param("", "YAML file that replaces prompt templates")
    max_new_tokens: int = _param(2048, "most tokens of an answer", low=1)
    generation: str = _param(
        "checkpoint", "checkpoint: rules of its generation_config apply; plain: none", choices=GENERATION
    )
    banned_strings: str = _param("addCriterion", "strings never generated (a glitch of Qwen2.5-VL), separated by |")
    min_pixels: int | None = _param(None, "image size at least, in merged visual tokens; none: the model's own", low=1)
    max_pixels: int | None = _param(256, "image size at most, in merged visual tokens; none: the model's own", low=1)
    # optimisation of the think tokens
    num_thought_tokens: int = _param(4, "L, think tokens", low=1, high=256)
    max_num_steps: int = _param(15, "T, iterations; 0 leaves the think tokens as they are", low=0)
    lr: float = _param(1e-3, "eta, learning rate", low=0)
    sigma: float = _param(0.1, "noise scale, absolute in embedding units", low=0)
    lr_relative: float | None = _param(None, "eta as a multiple of sigma squared, in place of lr; none: lr", low=0)
    sigma_relative: float | None = _param(None, "sigma as a multiple of the embedding's RMS; none: sigma", low=0)
    sigma_decay: float = _param(0.95, "factor on sigma after each iteration", low=0, high=1)
    num_samples: int = _param(1, "perturbed samples per iteration: 1, or an even number (antithetic pairs)", low=1)
    reward: str = _param("entropy", "entropy: equations 6, 7; logprob: negative mean log-probability", choices=REWARDS)
    reward_position: str = _param("think", "where the reward reads the next-token logits", choices=REWARD_POSITIONS)
    top_k: int = _param(10, "k most probable next tokens in the reward", low=1)
    reward_threshold: float = _param(-1.0, "stop an example once its best reward reaches this; <= 0 is off")
    accept_at: str = _param("updated", "state that must raise the reward to be accepted", choices=ACCEPT_AT)
    use_auto_grad: bool = _param(False, "exact gradient with Adam instead of REINFORCE")
    disable_conf_reward: bool = _param(False, "reward is the model's own 0-1 score of its latents")
    disable_best_reward: bool = _param(False, "decode the last state instead of the best one")
    visual_only: bool = _param(False, "start the think tokens from mean-pooled visual features")
    # injection of image patches
    num_selected_patches: int | None = _param(16, "most patches per think token; none: no cap", low=0)
    max_total_patches: int | None = _param(16, "most patches over all think tokens; none: no cap", low=0)
    initial_patch_count: int | None = _param(2, "patches per think token at the start; none: every patch", low=0)
    patch_increment: int = _param(2, "budget growth whenever the best reward improves", low=0)
    visual_insert_stride: int = _param(1, "inject after every N-th think token", low=1)
    visual_injection_start_step: int = _param(0, "first iteration that injects", low=0)
    deep_patches: bool = _param(False, "Qwen3-VL: interleaved patches bring their DeepStack features too")
    visual_injection_interval: int = _param(1, "look for new patches every N iterations", low=1)
    # the other methods
    rationale_tokens: int = _param(512, "multimodal-cot: most tokens of the rationale", low=1)
    rationale_answer_tokens: int = _param(64, "multimodal-cot: most tokens of the answer after it", low=1)
    scene_graph_tokens: int = _param(256, "ccot: most tokens of the scene graph", low=1)
    icot_newlines: int = _param(2, "icot: insert patches at every N-th newline", low=1)
    icot_patches: int = _param(16, "icot: patches of an insertion", low=1)
    icot_insertions: int = _param(3, "icot: most insertions in an answer", low=0)
    ltpo_thought_tokens: int = _param(10, "ltpo: think tokens", low=1, high=256)
    ltpo_steps: int = _param(10, "ltpo: iterations", low=0)
    ltpo_lr: float = _param(0.03, "ltpo: learning rate", low=0)
    ltpo_sigma: float = _param(0.1, "ltpo: noise scale, absolute in embedding units", low=0)
    ltpo_sigma_decay: float = _param(0.99, "ltpo: factor on its noise scale after each iteration", low=0, high=1)
    consistency_samples: int | None = _param(
        None, "self-consistency: sampled answers; none: what dmlr costs, 3 to 40", low=1
    )
    consistency_temperature: float = _param(0.7, "self-consistency: temperature of the samples", low=0.01)
    # records
    resume: bool = _param(False, "keep the finished examples of an earlier run in output_dir")
    verify_only: bool = _param(False, "judge the saved answers in output_dir again, without the model")
    use_llm_verify: bool = _param(False, "ask an LLM where the rules cannot decide (settings: OPENAI_API_KEY, ...)")
    llm_verify_all: bool = _param(False, "with use_llm_verify: ask it about every answer, to compare it with the rules")
    save_reward_csv: bool = _param(True, "one CSV per example with reward, sigma and patches per iteration")
    visual_token_viz: bool = _param(False, "draw the kept patches of every example")
    visual_token_viz_dir: str = _param("visual_token_viz", "folder of those drawings, under output_dir")
    verbose: int = _param(1, "0 silent, 1 progress, 2 every record", low=0, high=2)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _checked(f, getattr(self, f.name)))
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ConfigError(f"min_pixels = {self.min_pixels} is greater than max_pixels = {self.max_pixels}")
        if self.end_data_idx is not None and self.end_data_idx < self.start_data_idx:
            raise ConfigError(f"end_data_idx = {self.end_data_idx} is before start_data_idx = {self.start_data_idx}")
        if self.sigma == 0 and self.max_num_steps > 0 and not self.use_auto_grad:
            raise ConfigError("sigma = 0 gives REINFORCE nothing to learn from; use sigma > 0 or use_auto_grad = true")
        if self.ltpo_sigma == 0 and self.ltpo_steps > 0 and not self.use_auto_grad:
            raise ConfigError("ltpo_sigma = 0 gives LTPO nothing to learn from; use ltpo_sigma > 0")
        if self.num_samples > 1 and (self.num_samples % 2 or self.use_auto_grad):
            raise ConfigError(
                f"num_samples = {self.num_samples}: samples come in antithetic pairs, so 1 or an even number, "
                "and the exact gradient (use_auto_grad) needs none"
            )
        if self.llm_verify_all and not self.use_llm_verify:
            raise ConfigError("llm_verify_all = true asks the LLM about every answer; it needs use_llm_verify = true")
        if self.disable_conf_reward and self.use_auto_grad:
            raise ConfigError("disable_conf_reward = true scores in words, which has no gradient; drop use_auto_grad")

    @classmethod
    def make(cls, preset: str | None = None, **overrides: Any) -> Config:
        """Preset (none: the defaults), then overrides. Unknown names are errors that name the nearest parameter."""
        if preset is not None and preset not in PRESETS:
            raise ConfigError(f"unknown preset {preset!r}{_nearest(preset, PRESETS)}; presets are {', '.join(PRESETS)}")
        check_names(overrides)
        return cls(**{**(PRESETS[preset] if preset else {}), **overrides})

    def replace(self, **overrides: Any) -> Config:
        """A copy with some values changed, checked the same way."""
        check_names(overrides)
        return dataclasses.replace(self, **overrides)

    def absolute(self, rms: float) -> Config:
        """The same with sigma and lr in embedding units; rms: that of the think tokens' start, per dimension."""
        sigma = self.sigma if self.sigma_relative is None else self.sigma_relative * rms
        lr = self.lr if self.lr_relative is None else self.lr_relative * sigma**2
        return self.replace(sigma=sigma, lr=lr, sigma_relative=None, lr_relative=None)

    @property
    def evaluations(self) -> int:
        """Most states that an iteration of DMLR's loop runs through the model: M explored ones, and the updated one or,
        with "candidate", M that rank the patches."""
        return self.num_samples + (1 if self.accept_at == "updated" else self.num_samples)

    def as_dict(self) -> dict[str, Any]:
        """Plain values by name, in declaration order, as written into results.json."""
        return dataclasses.asdict(self)

    @classmethod
    def help(cls, name: str) -> str:
        """One line about a parameter: what it means and its range."""
        f = {f.name: f for f in dataclasses.fields(cls)}[name]
        return f"{f.metadata['help']}{_range(f)}"


def root() -> Path:
    """The project's folder, wherever a notebook or a command is started."""
    return Path(__file__).resolve().parents[1]


def locate(path: str) -> Path | str:
    """A path as given, else under the project's root (so that notebooks and commands name the same files).

    What exists at neither place comes back as given: a hub id, or a path that the reader will complain about.
    """
    beside = root() / path
    return path if Path(path).exists() or not beside.exists() else beside


def check_names(
    names: typing.Iterable[str], known: typing.Iterable[str] | None = None, what: str = "parameter"
) -> None:
    """ConfigError for the first name that is not known (none: no field of Config), with the nearest that is."""
    known = list(known) if known is not None else [f.name for f in dataclasses.fields(Config)]
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown {what} {name!r}{_nearest(name, known)}")


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    spelled = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=0.4)
    return f" (did you mean {spelled[close[0]]!r}?)" if close else ""


def _range(f: dataclasses.Field) -> str:
    low, high, choices = (f.metadata[key] for key in ("low", "high", "choices"))
    if choices:
        return f" [{', '.join(map(str, choices))}]"
    if low is None and high is None:
        return ""
    return f" [{low} to {high}]" if high is not None else f" [>= {low}]"


def _checked(f: dataclasses.Field, value: Any) -> Any:
    """The value in the field's type, or ConfigError. Strings are parsed: papermill and YAML hand over both."""
    kind = f.type.removesuffix(" | None")
    optional = kind != f.type
    text = value.strip().lower() if isinstance(value, str) else None
    if value is None or (optional and text in ("none", "null", "")):
        if not optional:
            raise ConfigError(f"{f.name} = {value!r}: expected {kind}{_range(f)}")
        return None
    try:
        value = _PARSERS[kind](value, text)
    except (TypeError, ValueError, KeyError, OverflowError):
        raise ConfigError(f"{f.name} = {value!r}: expected {f.type}{_range(f)}") from None
    low, high, choices = (f.metadata[key] for key in ("low", "high", "choices"))
    if choices and value not in choices:
        raise ConfigError(f"{f.name} = {value!r} is not one of{_range(f)}{_nearest(str(value), map(str, choices))}")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        raise ConfigError(f"{f.name} = {value!r} is out of range{_range(f)}")
    return value


def _as_bool(value: Any, text: str | None) -> bool:
    if text is not None:
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text]
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise ValueError(value)


def _as_int(value: Any, text: str | None) -> int:
    if isinstance(value, bool):
        raise ValueError(value)
    number = float(text) if text is not None else value
    if number != int(number):
        raise ValueError(value)
    return int(text) if text is not None and text.lstrip("+-").isdigit() else int(number)


def _as_float(value: Any, text: str | None) -> float:
    number = float(text if text is not None else value)
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(value)
    return number


def _as_str(value: Any, text: str | None) -> str:
    if text is None:
        raise TypeError(value)
    return value


_PARSERS = {"bool": _as_bool, "int": _as_int, "float": _as_float, "str": _as_str}

PRESETS: dict[str, dict[str, Any]] = {
    # The paper, App. A.3.
    "paper": {
        "num_thought_tokens": 4,
        "max_num_steps": 15,
        "lr": 1e-3,
        "sigma": 0.1,
        "sigma_decay": 0.95,
        "initial_patch_count": 2,
        "patch_increment": 2,
        "num_selected_patches": 16,
        "max_total_patches": 16,
        "reward": "entropy",
        "reward_position": "think",
        "accept_at": "updated",
        "min_pixels": None,
        "max_pixels": 256,
    },
    # The defaults of the released README (commit 881c21a).
    "released": {
        "num_thought_tokens": 8,
        "max_num_steps": 20,
        "lr": 0.005,
        "sigma": 20.0,
        "sigma_decay": 0.95,
        "initial_patch_count": None,
        "patch_increment": 0,
        "num_selected_patches": None,
        "max_total_patches": None,
        "reward": "logprob",
        "reward_position": "think_next",
        "accept_at": "candidate",
        "min_pixels": 128,
        "max_pixels": 256,
    },
    # The embedded model on a laptop: small budgets, the model's own image size.
    "demo": {
        "num_thought_tokens": 4,
        "max_num_steps": 10,
        "lr": 0.01,
        "sigma": 0.04,
        "sigma_decay": 0.95,
        "initial_patch_count": 1,
        "patch_increment": 1,
        "num_selected_patches": 2,
        "max_total_patches": 8,
        "reward": "entropy",
        "reward_position": "think",
        "accept_at": "updated",
        "min_pixels": None,
        "max_pixels": None,
        "max_new_tokens": 128,
    },
}
