"""Every parameter of a run: one pydantic model, checked when it is made.

A field's declaration is the only place of its type, range, help and default; messages, command line and JSON schema
(`Config.model_json_schema()`) are read from it. Names, types and meanings are those of the original command line; the
defaults are the paper's (App. A.3), and `PRESETS` is the only place of the other sets of values that people use:
notebooks and parameter files name one, and state what differs. Knows nothing about models or data.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

NONE = ("none", "null", "")  # what a command line may write for None
T = TypeVar("T")
OrNone = Annotated[T | None, BeforeValidator(lambda value: None if f"{value}".strip().lower() in NONE else value)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Reward = Literal["entropy", "logprob", "self-certainty", "progress", "ulr"]
RewardPosition = Literal["think", "think_next", "group_end", "answer"]
AcceptAt = Literal["updated", "candidate"]
Generation = Literal["checkpoint", "plain"]
Bits = Annotated[Literal[4, 8], BeforeValidator(lambda value: int(value) if value in ("4", "8") else value)]


def field(default: Any, description: str, **limits: float) -> Any:
    """Of a parameter: its default, its help, its range (ge, le)."""
    return Field(default, description=description, **limits)


class ConfigError(ValueError):
    """A parameter that does not exist, has the wrong type or is out of range; the message names the mend."""


class Config(BaseModel):
    """All parameters of a run, in the order in which people look for them.

    Frozen, and ConfigError at construction for any value outside its range. Use `Config.make` to start from a preset.
    Strings are accepted as a command line gives them ("true", "1e-4", "none").
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    # what runs
    model_name_or_path: str = field("data/models/shapes-vl", "hub id or local folder of the vision-language model")
    revision: str = field("", "commit, branch or tag of a model on the hub; empty: the newest")
    dataset: str = field("data/shapes/mathematics.json", "path of a dataset JSON (several: separated by commas)")
    methods: str = field("vanilla,dmlr", "methods to run, separated by commas")
    output_dir: str = field("", "folder of the run; empty: reports/runs/<model>_<dataset>")
    start_data_idx: int = field(0, "first example", ge=0)
    end_data_idx: OrNone[int] = field(100, "one past the last example; none: to the end", ge=0)
    device: str = field("auto", "torch device; auto: cuda if present, else cpu")
    dtype: Dtype = field("auto", "weights and activations; auto: bfloat16 on a GPU, float32 on a CPU")
    device_map: str = field("", "layers over several devices by accelerate: auto, balanced, ...; empty: one device")
    load_in_bits: OrNone[Bits] = field(None, "language model in 4 or 8 bits (pip install bitsandbytes)")
    batch_size: OrNone[int] = field(None, "examples that go through the model together; none: by free memory", ge=1)
    cuda_graphs: bool = field(False, "replay the loop's kernels on a GPU: faster at small batches, not run on one yet")
    num_workers: int = field(1, "processes with a model each; more than 1: on Ray (pip install -e '.[ray]')", ge=1)
    worker_device_round_robin: bool = field(False, "more workers than GPUs: let them share the GPUs evenly")
    ray_address: str = field("", "a running Ray cluster, host:port or auto; empty: this machine alone")
    seed: int = field(42, "noise of an example comes from (seed, its idx)", ge=0)
    trust_remote_code: bool = field(False, "let the checkpoint run its own code")
    # prompt and answer
    solver_prompt_idx: int = field(0, "0 step by step, 1 detailed steps, 2 answer only", ge=0, le=2)
    prompts_file: str = field("", "YAML file that replaces prompt templates")
    max_new_tokens: int = field(2048, "most tokens of an answer", ge=1)
    generation: Generation = field("checkpoint", "checkpoint: rules of its generation_config apply; plain: none")
    banned_strings: str = field("addCriterion", "strings never generated (a glitch of Qwen2.5-VL), separated by |")
    min_pixels: OrNone[int] = field(None, "image size at least, in merged visual tokens; none: the model's own", ge=1)
    max_pixels: OrNone[int] = field(256, "image size at most, in merged visual tokens; none: the model's own", ge=1)
    # optimisation of the think tokens
    num_thought_tokens: int = field(4, "L, think tokens", ge=1, le=256)
    max_num_steps: int = field(15, "T, iterations; 0 leaves the think tokens as they are", ge=0)
    lr: float = field(1e-3, "eta, learning rate", ge=0)
    sigma: float = field(0.1, "noise scale, absolute in embedding units", ge=0)
    lr_relative: OrNone[float] = field(None, "eta as a multiple of sigma squared, in place of lr; none: lr", ge=0)
    sigma_relative: OrNone[float] = field(None, "sigma as a multiple of the embedding's RMS; none: sigma", ge=0)
    sigma_decay: float = field(0.95, "factor on sigma after each iteration", ge=0, le=1)
    num_samples: int = field(1, "perturbed samples per iteration: 1, or an even number (antithetic pairs)", ge=1)
    reward: Reward = field("entropy", "entropy: equations 6, 7; logprob: negative mean log-probability")
    reward_position: RewardPosition = field("think", "where the reward reads the next-token logits")
    top_k: int = field(10, "k most probable next tokens in the reward", ge=1)
    reward_threshold: float = field(-1.0, "stop an example once its best reward reaches this; <= 0 is off")
    accept_at: AcceptAt = field("updated", "state that must raise the reward to be accepted")
    use_auto_grad: bool = field(False, "exact gradient with Adam instead of REINFORCE")
    disable_conf_reward: bool = field(False, "reward is the model's own 0-1 score of its latents")
    disable_best_reward: bool = field(False, "decode the last state instead of the best one")
    visual_only: bool = field(False, "start the think tokens from mean-pooled visual features")
    # injection of image patches
    num_selected_patches: OrNone[int] = field(16, "most patches per think token; none: no cap", ge=0)
    max_total_patches: OrNone[int] = field(16, "most patches over all think tokens; none: no cap", ge=0)
    initial_patch_count: OrNone[int] = field(
        2, "patches per think token at the start; none: every patch; 0: none (the released 0 is every)", ge=0
    )
    patch_increment: int = field(2, "budget growth whenever the best reward improves", ge=0)
    visual_insert_stride: int = field(1, "inject after every N-th think token", ge=1)
    visual_injection_start_step: int = field(0, "first iteration that injects", ge=0)
    deep_patches: bool = field(False, "Qwen3-VL: interleaved patches bring their DeepStack features too")
    visual_injection_interval: int = field(1, "look for new patches every N iterations", ge=1)
    # the other methods
    rationale_tokens: int = field(512, "multimodal-cot: most tokens of the rationale", ge=1)
    rationale_answer_tokens: int = field(64, "multimodal-cot: most tokens of the answer after it", ge=1)
    scene_graph_tokens: int = field(256, "ccot: most tokens of the scene graph", ge=1)
    icot_newlines: int = field(2, "icot: insert patches at every N-th newline", ge=1)
    icot_patches: int = field(16, "icot: patches of an insertion", ge=1)
    icot_insertions: int = field(3, "icot: most insertions in an answer", ge=0)
    ltpo_thought_tokens: int = field(10, "ltpo: think tokens", ge=1, le=256)
    ltpo_steps: int = field(10, "ltpo: iterations", ge=0)
    ltpo_lr: float = field(0.03, "ltpo: learning rate", ge=0)
    ltpo_sigma: float = field(0.1, "ltpo: noise scale, absolute in embedding units", ge=0)
    ltpo_sigma_decay: float = field(0.99, "ltpo: factor on its noise scale after each iteration", ge=0, le=1)
    ulr_thought_tokens: int = field(4, "ulr: think tokens", ge=2, le=256)
    ulr_steps: int = field(20, "ulr: iterations of both stages", ge=0)
    ulr_alignment_steps: int = field(5, "ulr: of them, those of stage I", ge=0)
    ulr_lr: float = field(1e-3, "ulr: learning rate of both stages", ge=0)
    ulr_sigma: float = field(25.0, "ulr: noise scale, absolute in embedding units", ge=0)
    ulr_sigma_decay: float = field(0.95, "ulr: factor on its noise scale after each iteration", ge=0, le=1)
    ulr_temperature: float = field(0.2, "ulr: temperature of the alignment loss", ge=0.001)
    consistency_samples: OrNone[int] = field(
        None, "self-consistency: sampled answers; none: what dmlr costs, 3 to 40", ge=1
    )
    consistency_temperature: float = field(0.7, "self-consistency: temperature of the samples", ge=0.01)
    # records
    resume: bool = field(False, "keep the finished examples of an earlier run in output_dir")
    verify_only: bool = field(False, "judge the saved answers in output_dir again, without the model")
    use_llm_verify: bool = field(False, "ask an LLM where the rules cannot decide (settings: OPENAI_API_KEY, ...)")
    llm_verify_all: bool = field(False, "with use_llm_verify: ask it about every answer, to compare it with the rules")
    save_reward_csv: bool = field(True, "one CSV per example with reward, sigma and patches per iteration")
    visual_token_viz: bool = field(False, "draw the kept patches of every example")
    visual_token_viz_dir: str = field("visual_token_viz", "folder of those drawings, under output_dir")
    verbose: int = field(1, "0 silent, 1 progress, 2 every record", ge=0, le=2)

    def __init__(self, **values: Any) -> None:
        check_names(values)
        try:
            super().__init__(**values)
        except ValidationError as errors:
            raise _config_error(errors.errors()[0], values) from None

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("pydantic would read it as 0 or 1")
        return value

    @model_validator(mode="after")
    def _together(self) -> Config:
        """What no single parameter can tell."""
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ConfigError(f"min_pixels = {self.min_pixels} is greater than max_pixels = {self.max_pixels}")
        if self.end_data_idx is not None and self.end_data_idx < self.start_data_idx:
            raise ConfigError(f"end_data_idx = {self.end_data_idx} is before start_data_idx = {self.start_data_idx}")
        sigma = "sigma" if self.sigma_relative is None else "sigma_relative"
        if getattr(self, sigma) == 0 and self.max_num_steps > 0 and not self.use_auto_grad:
            raise ConfigError(
                f"{sigma} = 0 gives REINFORCE nothing to learn from; use {sigma} > 0 or use_auto_grad = true"
            )
        if self.ltpo_sigma == 0 and self.ltpo_steps > 0 and not self.use_auto_grad:
            raise ConfigError("ltpo_sigma = 0 gives LTPO nothing to learn from; use ltpo_sigma > 0")
        if self.ulr_sigma == 0 and self.ulr_steps > 0:
            raise ConfigError("ulr_sigma = 0 gives ULR's stage II nothing to learn from; use ulr_sigma > 0")
        if self.num_samples > 1 and (self.num_samples % 2 or self.use_auto_grad):
            raise ConfigError(
                f"num_samples = {self.num_samples}: samples come in antithetic pairs, so 1 or an even number, "
                "and the exact gradient (use_auto_grad) needs none"
            )
        if self.llm_verify_all and not self.use_llm_verify:
            raise ConfigError("llm_verify_all = true asks the LLM about every answer; it needs use_llm_verify = true")
        if self.disable_conf_reward and self.use_auto_grad:
            raise ConfigError("disable_conf_reward = true scores in words, which has no gradient; drop use_auto_grad")
        return self

    @classmethod
    def make(cls, preset: str | None = None, **overrides: Any) -> Config:
        """Preset (none: the defaults), then overrides; sigma or lr among them stands in place of the preset's relative
        one. Unknown names are errors that name the nearest parameter."""
        if preset is not None:
            check_names([preset], PRESETS, what="preset")
        absolute = {f"{name}_relative": None for name in ("sigma", "lr") if name in overrides}
        return cls(**{**(PRESETS[preset] if preset else {}), **absolute, **overrides})

    @classmethod
    def of_cell(cls, cell: Mapping[str, Any]) -> Config:
        """That of a notebook's parameters cell, names that are not Config's aside.

        Where the cell has a `preset`, none stands for the preset's value wherever a preset sets one.
        """
        given = {name: cell[name] for name in cls.model_fields if name in cell}
        if "preset" in cell:
            given = {n: value for n, value in given.items() if str(value).lower() not in NONE or n not in LOOP}
        return cls.make(cell.get("preset"), **given)

    def replace(self, **overrides: Any) -> Config:
        """A copy with some values changed, checked the same way."""
        return Config(**{**dict(self), **overrides})

    def absolute(self, rms: float) -> Config:
        """The same with sigma and lr in embedding units; rms: that of the think tokens' start, per dimension."""
        sigma = self.sigma if self.sigma_relative is None else self.sigma_relative * rms
        lr = self.lr if self.lr_relative is None else self.lr_relative * sigma**2
        return self.replace(sigma=sigma, lr=lr, sigma_relative=None, lr_relative=None)

    def scales(self, rms: float) -> dict[str, Any]:
        """What sigma and lr mean for a model whose think tokens start at this RMS per dimension: `sigma_rms` = sigma /
        RMS; `lr_sigma2` = lr / sigma^2, the step of one sample of reward 1 in units of sigma; and a `warning` where
        nothing can move or everything does, else None. None for all three where nothing is drawn (the exact gradient,
        sigma 0), or where the start is zero or no number."""
        config = self.absolute(rms) if rms > 0 and not self.use_auto_grad else None
        if config is None or not config.sigma:
            return dict.fromkeys(("sigma_rms", "lr_sigma2", "warning"))
        step, warning = config.lr / config.sigma**2, None
        if step < 0.01:
            warning = f"a step is {step:.1g} of sigma: the latents hardly move; raise lr, or set lr_relative"
        elif step > 100:
            warning = f"a step is {step:.0f} times sigma: it leaves what was explored; lower lr"
        return {"sigma_rms": config.sigma / rms, "lr_sigma2": step, "warning": warning}

    @staticmethod
    def scales_line(scales: Mapping[str, Any]) -> str:
        """`scales` in one line for people, with its warning; empty where there are none."""
        if not scales or scales["sigma_rms"] is None:
            return ""
        told = f"sigma is {scales['sigma_rms']:.2g} times the start's RMS, a step {scales['lr_sigma2']:.2g} times sigma"
        return f"{told}. Warning: {scales['warning']}" if scales["warning"] else told

    @property
    def evaluations(self) -> int:
        """Most states that an iteration of DMLR's loop runs through the model: M explored ones, and the updated one or,
        with "candidate", M that rank the patches."""
        return self.num_samples + (1 if self.accept_at == "updated" else self.num_samples)


def root() -> Path:
    """The project's folder, wherever a notebook or a command is started."""
    return Path(__file__).resolve().parents[1]


def locate(path: str) -> Path | str:
    """A path as given, else under the project's root (so that notebooks and commands name the same files).

    What exists at neither place comes back as given: a hub id, or a path that the reader will complain about.
    """
    beside = root() / path
    return path if Path(path).exists() or not beside.exists() else beside


def resolved(path: str) -> str:
    """A path as it is meant here, for a process that works in another folder: `locate`'s other side.

    What the project's root has stays as it is, what exists here becomes absolute; all else comes back as given.
    """
    path = path.strip()
    return str(Path(path).resolve()) if path and Path(path).exists() and not (root() / path).exists() else path


def hub_token() -> str | None:
    """The key to private models and datasets; the hub's own variable comes first."""
    return os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_TOKEN") or None


def shown(text: Path | str) -> str:
    """A path, or text that names some, without where the project lies on this machine."""
    return str(text).replace(f"{root()}{os.sep}", "")


def check_names(names: Iterable[str], known: Iterable[str] | None = None, what: str = "parameter") -> None:
    """ConfigError for the first name that is not known (none: no field of Config), with the nearest that is."""
    known = list(Config.model_fields if known is None else known)
    for name in names:
        if name not in known:
            few = f"; there are {', '.join(known)}" if len(known) < 20 else ""
            raise ConfigError(f"unknown {what} {name!r}{_nearest(name, known)}{few}")


def _nearest(name: str, known: Iterable[str]) -> str:
    spelled = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=0.4)
    return f" (did you mean {spelled[close[0]]!r}?)" if close else ""


@cache
def declared(name: str) -> tuple[str, str, list[Any]]:
    """What a parameter takes, by its JSON schema: type as Python writes it, range for people, choices (none: any)."""
    schema = Config.model_json_schema()["properties"][name]
    first, *more = schema.get("anyOf", [schema])
    kind = {"integer": "int", "number": "float", "boolean": "bool", "string": "str"}[first["type"]]
    choices, low, high = first.get("enum", []), first.get("minimum"), first.get("maximum")
    within = f" [{', '.join(map(str, choices))}]" if choices else ""
    if low is not None:
        within = f" [>= {low}]" if high is None else f" [{low} to {high}]"
    return kind + " | None" * len(more), within, choices


def _config_error(error: Mapping[str, Any], values: Mapping[str, Any]) -> ConfigError:
    """pydantic's error in this project's words: the parameter, what it was given, and what it takes."""
    if not error["loc"]:
        return error["ctx"]["error"]  # of the parameters together
    name = error["loc"][0]
    value, (kind, within, choices) = values[name], declared(name)
    if error["type"] == "literal_error" and value is not None:
        return ConfigError(f"{name} = {value!r} is not one of{within}{_nearest(str(value), map(str, choices))}")
    if error["type"].endswith("_than_equal"):
        return ConfigError(f"{name} = {float(value):g} is out of range{within}")
    return ConfigError(f"{name} = {value!r}: expected {kind}{within}")


_SMALL = {"min_pixels": None, "max_pixels": None, "max_new_tokens": 128}  # the embedded models' images and answers
PRESETS: dict[str, dict[str, Any]] = {  # where they differ from the defaults
    # The paper, App. A.3: the defaults above.
    "paper": {},
    # The defaults of the released README (commit 881c21a): every image token after each think token, sigma in the tens.
    "released": {"num_thought_tokens": 8, "max_num_steps": 20, "lr": 0.005, "sigma": 20.0}
    | {"initial_patch_count": None, "patch_increment": 0, "num_selected_patches": None, "max_total_patches": None}
    | {"reward": "logprob", "reward_position": "think_next", "accept_at": "candidate", "min_pixels": 128},
    # The embedded model on a laptop: small budgets, the model's own image size.
    "demo": {"max_num_steps": 10, "lr": 0.01, "sigma": 0.04}
    | {"initial_patch_count": 1, "patch_increment": 1, "num_selected_patches": 2, "max_total_patches": 8}
    | _SMALL,
    # A search that moves, for models that listen to their latents. Think tokens start as a text embedding, an order of
    # magnitude smaller than the visual features beside it, so sigma must be many times the start's RMS before a think
    # token says anything; the step must scale with sigma squared; and one sample is too noisy an estimate of the
    # gradient to beat displacements at random that are kept by the same reward. An iteration costs nine evaluations
    # instead of the paper's two. No patches: what the latents do stands alone.
    "search": {"num_samples": 8, "sigma_relative": 15.0, "lr_relative": 5.0}
    | {"initial_patch_count": 0, "patch_increment": 0}
    | _SMALL,
}
LOOP = frozenset({"sigma_decay"}.union(*PRESETS.values()))  # what presets set, none of them the decay so far
