"""Parameters: one pydantic model a notebook, and the flat YAML profiles that fill them.

The defaults are the smoke size and stand literally in each notebook's parameters cell; the
descriptions are the remarks behind them. A profile (params/*.yaml) is one flat mapping of these
names; every notebook takes the keys that it declares. Errors are one line that names the key,
the value and what is allowed. Used by `Run` in every notebook and by the command line.
"""

import difflib
import typing
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

MAX_PROFILE_BYTES = 64 * 1024
LIMITS = {"ge": "from", "gt": "above", "le": "up to", "lt": "below", "multiple_of": "a multiple of"}
PATH_KEYS = ("csv", "image_root", "extra_csv", "base_model", "unet_weights", "clip_model")
PATH_KEYS += ("classifier_weights", "judge", "baseline", "vqa_backend")


class ParamError(ValueError):
    """A parameter is unknown or its value is not allowed."""


class ProfileError(ParamError):
    """A profile cannot be read, or holds something that a profile may not hold."""


def _number(value: object) -> object:
    # YAML 1.1 reads 1e-5 as text (only 1.0e-5 is a number there), and papermill passes that on.
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ValueError("a number is needed") from None
    return value


def _whole(value: object) -> object:
    value = _number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _text(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError("text is needed; put it in quotes")
    if "{" in value or "}" in value or not value.isprintable():
        raise ValueError("text without braces and control characters is needed")
    return value


def _flag(value: object) -> object:
    if not isinstance(value, bool):
        raise ValueError("true or false is needed")
    return value


def _edit(value: str) -> str:
    from prism_nb.findings import finding_from

    verb, _, name = value.partition(" ")
    if verb not in ("add", "remove") or not name:
        raise ValueError('"add" or "remove" and a finding is needed, as "remove Pleural Effusion"')
    finding = finding_from(name)
    if finding == "No Finding":
        raise ValueError("No Finding follows from the others; name a finding to add or remove")
    return f"{verb} {finding}"


def _different(values: list) -> list:
    if len(set(values)) < len(values):
        raise ValueError("each may be named once only")
    return values


def _comparable(arms: list) -> list:
    if len(set(arms)) < len(arms) or not {"plain", "counterfactuals"} <= set(arms):
        raise ValueError("name each arm once, plain and counterfactuals among them")
    return arms


Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_number)]
Text = Annotated[str, BeforeValidator(_text)]
Flag = Annotated[bool, BeforeValidator(_flag)]
Edit = Annotated[str, BeforeValidator(_edit), BeforeValidator(_text)]  # the last one runs first
# The names of layouts.LAYOUTS, inversion.METHODS, editing.PRESETS and arms.ARMS: slow to import.
Layout = Literal[
    "auto", "chexpert", "chexpert_plus", "mimic", "nih", "padchest", "vindr", "plain", "dicom"
]
Inversion = Literal["ddim", "fixed_point", "negative_prompt", "null_text", "direct", "ddpm", "bdia"]
Preset = Literal["default", "prism", "sdedit", "diffedit", "ledits++"]
Arm = Literal[
    "plain",
    "duplicates",
    "standard_augmentation",
    "text_to_image",
    "gan_counterfactuals",
    "counterfactuals",
    "counterfactuals_filtered",
    "true_counterfactuals",
    "group_balanced",
    "group_dro",
]


def _is(default: object, remark: str, **limits: object) -> object:
    return Field(default, description=remark, **limits)


class Params(BaseModel):
    """What every notebook declares."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True
    )
    run_dir: Text = _is("runs/smoke", "folder this run reads and writes", min_length=1)
    seed: Whole = _is(0, "every random draw starts here", ge=0, le=2**31 - 1)


class WithDevice(Params):
    """What every notebook with a model declares."""

    device: Literal["auto", "cpu", "cuda"] = _is("auto", "auto, cpu or cuda")


class Caption(Params):
    """01_caption: a cohort, its labels, its split, its captions."""

    csv: Text = _is("phantom", 'labels CSV, or "phantom" to render a cohort', min_length=1)
    image_root: Text = _is("", "folder the paths start from; empty: the CSV's folder")
    layout: Layout = _is("auto", "columns of the CSV")
    extra_csv: Text = _is("", "CSV of further labels for the same images; empty: none")
    views: Literal["frontal", "all"] = _is("frontal", "films to keep")
    uncertain: Literal["zeros", "ones", "ignore", "mention"] = _is("ones", "what -1 becomes")
    blank: Literal["absent", "missing"] = _is("absent", "what a blank label means")
    template: Literal["plain", "listing1"] = _is("plain", "plain, or listing1: the paper's code")
    negatives: Flag = _is(False, "captions also name what is absent")
    test_share: Number = _is(0.15, "share of patients for the test", gt=0, lt=1)
    val_share: Number = _is(0.15, "share of the other patients for validation", gt=0, lt=1)
    image_size: Whole = _is(256, "pixels a side; 512 in the paper", ge=64, le=1024, multiple_of=8)
    fit: Literal["squash", "crop", "pad"] = _is("squash", "how a film becomes square")
    max_films: Whole = _is(0, "use at most so many films; 0: all", ge=0)
    phantom_patients: Whole = _is(160, "patients to render when csv is phantom", ge=8, le=1_000_000)
    device_given_effusion: Number = _is(
        0.75, "P(device | effusion) in the phantom; 0.567: no link", ge=0.567, le=0.97
    )


class Finetune(WithDevice):
    """02_finetune: train the U-Net on image and caption."""

    base_model: Text = _is("phantom", '"phantom", a folder, or a name on the hub', min_length=1)
    revision: Text = _is("", "commit of a base model on the hub; empty: newest")
    unet_weights: Text = _is("", "U-Net to start from instead of the base model's; empty: none")
    clip_model: Text = _is(
        "base", '"base" (the base model\'s own), openai, medsiglip, a folder, a hub name'
    )
    num_train_steps: Whole = _is(24, "updates of the weights", ge=1)
    train_batch_size: Whole = _is(8, "films a step; 8 in the paper", ge=1, le=4096)
    accumulation: Whole = _is(1, "batches summed before an update", ge=1, le=4096)
    learning_rate: Number = _is(1e-5, "AdamW; the same in the paper", gt=0, le=1)
    lr_schedule: Literal["constant", "cosine"] = _is("constant", "constant, or cosine to zero")
    lr_warmup_steps: Whole = _is(0, "updates in which the learning rate rises", ge=0)
    weight_decay: Number = _is(0.01, "AdamW", ge=0, le=1)
    grad_clip: Number = _is(1.0, "largest norm of the gradient", gt=0)
    caption_dropout: Number = _is(0.1, "share of captions replaced by the empty one", ge=0, le=1)
    min_snr_gamma: Number = _is(0.0, "less weight to easy timesteps, 5 is usual; 0: none", ge=0)
    ema_decay: Number = _is(0.99, "averaging of the weights; 0: none", ge=0, lt=1)
    lora_rank: Whole = _is(0, "train low-rank additions alone; 0: every weight", ge=0, le=1024)
    train_text_encoder: Flag = _is(False, "train the text encoder too; frozen in the paper")
    precision: Literal["fp32", "bf16"] = _is("fp32", "fp32 or bf16")
    validate_every: Whole = _is(12, "updates between two looks at validation films", ge=1)
    num_prompts: Whole = _is(2, "captions an edit from which films are generated", ge=1)
    checkpoint_every: Whole = _is(100, "updates between two checkpoints", ge=1)
    tracker: Literal["csv", "tensorboard", "none"] = _is("csv", "csv, tensorboard or none")


class Invert(WithDevice):
    """03_invert: films to noise and back."""

    inversion: Inversion = _is("direct", "how films become noise; null_text in the paper")
    num_ddim_steps: Whole = _is(10, "N; 50 in the paper", ge=1, le=999)
    num_test_films: Whole = _is(12, "films of the test split to invert", ge=1)
    num_train_films: Whole = _is(12, "films of the training split to invert", ge=0)
    num_compared: Whole = _is(2, "films on which all inversions are compared", ge=1)
    num_compared_steps: Whole = _is(3, "N in that comparison", ge=1, le=999)
    edit_batch_size: Whole = _is(8, "films inverted together", ge=1, le=4096)
    precision: Literal["fp32", "bf16"] = _is("fp32", "fp32 or bf16")


class Editing(WithDevice):
    """04_edit: counterfactuals."""

    edits: Annotated[list[Edit], AfterValidator(_different)] = Field(
        ["remove Support Devices", "remove Pleural Effusion"],
        description="add or remove a finding",
        min_length=1,
    )
    preset: Preset = _is("default", "how an edit is made; prism: as the paper does")
    guidance_scale: Number = _is(0.0, "w; 7.5 in the paper; 0: the preset's", ge=0, le=25)
    mask: Literal["preset", "auto", "none"] = _is("preset", "where an edit may act")
    detail: Number = _is(-1.0, "share of grain given back in a mask; -1: the preset's", ge=-1, le=1)
    s_clip_min: Number = _is(0.1, "keep edits with S_CLIP of at least this, eq. (1)", ge=-1, le=1)
    clip_model: Text = _is(
        "base", '"base" (the base model\'s own), openai, medsiglip, a folder, a hub name'
    )
    edit_batch_size: Whole = _is(8, "films edited together", ge=1, le=4096)
    precision: Literal["fp32", "bf16"] = _is("fp32", "fp32 or bf16")
    peers: Annotated[list[Preset], AfterValidator(_different)] = _is(
        ["sdedit"], "other presets that make the same edits of the test films"
    )


class Classify(WithDevice):
    """What the notebooks that train classifiers declare."""

    classifier: Text = _is("test_efficientnet", "timm name; efficientnet_b0 in the paper")
    classifier_weights: Text = _is("", 'start weights: "imagenet", a file, or empty: none')
    classifier_size: Whole = _is(128, "pixels a side that it sees; 0: all", ge=0, le=1024)
    classifier_batch_size: Whole = _is(16, "films a step", ge=1, le=4096)
    classifier_learning_rate: Number = _is(5e-3, "AdamW", gt=0, le=1)
    num_bootstrap: Whole = _is(200, "resamples of the patients", ge=20, le=100_000)


class Evaluate(Classify):
    """05_evaluate: what a classifier and the truth say of the counterfactuals."""

    judge: Text = _is("test_resnet", "timm name, not the classifier's; or a judge's folder")
    judge_films: Whole = _is(
        0, "phantom: films of other patients that it learns from; 0: the training split", ge=0
    )
    judge_epochs: Whole = _is(4, "passes over the films that it learns from", ge=1, le=10_000)
    judge_precision: Literal["fp32", "bf16"] = _is("fp32", "fp32 or bf16, where it is asked")
    baseline: Text = _is("train", 'GANterfactual: "bundled", "train", "none", or its folder')
    baseline_steps: Whole = _is(20, "updates of its weights where it is trained", ge=1)
    baseline_size: Whole = _is(
        64, "pixels a side where it is trained; 224 in the paper", ge=64, le=1024, multiple_of=16
    )
    num_cycle_films: Whole = _is(1, "films edited there and back, five times over", ge=1)


class Augment(Classify):
    """06_augment: classifiers trained with counterfactuals."""

    classifier_epochs: Whole = _is(4, "passes over the training films", ge=1, le=10_000)
    arms: Annotated[list[Arm], AfterValidator(_comparable)] = _is(
        ["plain", "duplicates", "counterfactuals", "true_counterfactuals"], "what is compared"
    )
    augment_budget: Whole = _is(0, "films that each arm adds; 0: all counterfactuals", ge=0)
    num_augment_seeds: Whole = _is(1, "trainings an arm", ge=1, le=1000)
    augment_workers: Whole = _is(0, "processes that train, a thread each; 0: this one", ge=0)
    num_balanced_patients: Whole = _is(
        60, "of the balanced 2x2 test, four films each; phantom only", ge=8, le=1_000_000
    )
    sweep_runs: list[Text] = _is([], "names of runs beside this one, at other links")


class Question(WithDevice):
    """A1_vqa: what models that see say of pairs of films."""

    vqa_backend: Text = _is(
        "clip", "clip, anthropic, or a folder or hub name of an image-text-to-text model"
    )
    anthropic_model: Text = _is("claude-sonnet-5-5", "name of Anthropic's model")
    allow_upload: Flag = _is(False, "films may be sent to another company's servers")
    num_pairs: Whole = _is(12, "pairs of film and counterfactual, as many of each edit", ge=1)
    clip_model: Text = _is(
        "base", '"base" (the base model\'s own), openai, medsiglip, a folder, a hub name'
    )
    num_bootstrap: Whole = _is(200, "resamples of the patients", ge=20, le=100_000)


class Again(WithDevice):
    """A2_confounders and A3_limits: few films, edited anew as the run's own were."""

    num_cases: Whole = _is(3, "films that are edited anew", ge=1, le=1000)
    num_bootstrap: Whole = _is(200, "resamples of the patients", ge=20, le=100_000)


MODELS: dict[str, type[Params]] = {
    "01_caption": Caption,
    "02_finetune": Finetune,
    "03_invert": Invert,
    "04_edit": Editing,
    "05_evaluate": Evaluate,
    "06_augment": Augment,
    "A1_vqa": Question,
    "A2_confounders": Again,
    "A3_limits": Again,
}


def known_keys() -> list[str]:
    """Every name that some notebook declares, in the order of the road."""
    return list(dict.fromkeys(name for model in MODELS.values() for name in model.model_fields))


def validate(notebook: str, values: dict) -> Params:
    """Check one notebook's values; ParamError names the key, the value and what is allowed."""
    model = MODELS[notebook_name(notebook)]
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ParamError(f"{notebook}: {_one_line(model, error)}") from None


def load_profile(path: Path | str) -> dict:
    """Read a profile: one flat YAML mapping of known keys (ProfileError otherwise)."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_PROFILE_BYTES:
            raise ProfileError(f"{path} has {size} bytes; a profile has at most 64 KiB")
        text = path.read_text(encoding="utf-8")
        _refuse_odd_yaml(path, text)
        profile = yaml.safe_load(text) or {}
    except OSError as error:
        raise ProfileError(f"cannot read the profile {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ProfileError(f"{path} is not UTF-8 text; a profile is flat YAML") from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ProfileError):
            raise
        raise ProfileError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    return check_profile(profile, where=str(path))


def check_profile(profile: dict, where: str = "profile") -> dict:
    """The same profile with checked values (1e-5 a number); ProfileError if one is refused."""
    for key in profile:
        check_key(key, where)
    checked = {}
    for notebook in MODELS:
        try:
            given = for_notebook(profile, notebook)
            checked |= validate(notebook, given).model_dump(include=set(given))
        except ParamError as error:
            raise ProfileError(f"{where}: {str(error).partition(': ')[2]}") from None
    for key in checked.keys() & {*PATH_KEYS, "run_dir"}:
        expanded(key, checked[key], where)
    inversion = checked.get("inversion", Invert.model_fields["inversion"].default)
    named = {"preset": [checked.get("preset")], "peers": checked.get("peers", [])}
    key = next((key for key, presets in named.items() if "prism" in presets), None)
    if key and inversion != "null_text":
        raise ProfileError(
            f"{where}: {key} = 'prism' with inversion = {inversion!r}: it guides from the caption "
            "that null_text tunes; set inversion to null_text"
        )
    return checked


def expanded(key: str, value: str, where: str) -> Path:
    """A path parameter with ~ spelt out; ProfileError where that is nobody's home."""
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise ProfileError(
            f"{where}: {key} = {value!r}: there is no such user; write the path out"
        ) from None


def for_notebook(profile: dict, notebook: str) -> dict:
    """The keys of a profile that one notebook declares."""
    fields = MODELS[notebook_name(notebook)].model_fields
    return {key: value for key, value in profile.items() if key in fields}


def check_key(key: object, where: str) -> None:
    """Refuse a key that no notebook declares, with the nearest that one does."""
    if key not in known_keys():
        near = nearest(str(key), known_keys())
        hint = f"did you mean {near}?" if near else "`prism-nb params` lists the keys"
        raise ProfileError(f"{where}: unknown key {key}; {hint}")


def notebook_name(text: str) -> str:
    """The full name of a notebook: 03, 03_invert and notebooks/03_invert.ipynb all do."""
    name = Path(text).name.removesuffix(".ipynb")
    found = [known for known in MODELS if known == name or known.split("_")[0] == name]
    if not found:
        near = nearest(name, list(MODELS))
        hint = f"did you mean {near}?" if near else f"there are {', '.join(MODELS)}"
        raise ParamError(f"there is no notebook {text}; {hint}")
    return found[0]


def nearest(name: str, names: list[str]) -> str:
    """The most similar of some names, or "" if none is similar."""
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.5)), "")


def describe(notebook: str) -> list[dict]:
    """Rows of the table of one notebook's parameters: name, type, default, allowed, help."""
    fields = MODELS[notebook_name(notebook)].model_fields
    return [
        {
            "name": name,
            "type": _type_name(field.annotation),
            "default": field.default,
            "allowed": allowed(field),
            "help": field.description or "",
        }
        for name, field in fields.items()
    ]


def allowed(field: typing.Any) -> str:
    """In words, the values that a field takes; "" where every text does."""
    if typing.get_origin(field.annotation) is Literal:
        *most, last = typing.get_args(field.annotation)
        return f"{', '.join(most)} or {last}"
    if items := [x for x in typing.get_args(field.annotation) if typing.get_origin(x) is Literal]:
        return f"any of {', '.join(typing.get_args(items[0]))}"  # of a list
    if field.annotation is bool:
        return "true or false"
    limits = [(limit, name) for limit in field.metadata for name in LIMITS if hasattr(limit, name)]
    return ", ".join(f"{LIMITS[name]} {getattr(limit, name)}" for limit, name in limits)


def _type_name(annotation: typing.Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return "str"
    return "list" if typing.get_origin(annotation) is list else annotation.__name__


def _one_line(model: type[Params], error: ValidationError) -> str:
    first, *others = error.errors()
    key = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        near = nearest(key, list(model.model_fields))
        return f"unknown key {key}" + (f"; did you mean {near}?" if near else "")
    value = repr(first["input"])
    value = value if len(value) <= 60 else value[:57] + "..."
    rule = allowed(model.model_fields[key])
    reason = f"allowed is {rule}"
    if first["type"] == "value_error" or not rule:
        reason = first["msg"].removeprefix("Value error, ") + (f" ({rule})" if rule else "")
    more = f" (and {len(others)} more)" if others else ""
    return f"{key} = {value}: {reason}{more}"


def _refuse_odd_yaml(path: Path, text: str) -> None:
    # Tags can build objects, aliases can grow without end, and the last of two equal keys wins
    # in silence; a profile needs none of them.
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ProfileError(f"{path}: anchors and aliases are not for profiles; write it out")
        if getattr(event, "tag", None):
            raise ProfileError(f"{path}: the tag {event.tag} is not for profiles; use plain values")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise ProfileError(f"{path} is not a mapping; write one `key: value` a line")
    seen: dict[str, int] = {}
    for key, _ in root.value:
        line = key.start_mark.line + 1
        if str(key.value) in seen:
            first = seen[str(key.value)]
            raise ProfileError(f"{path}: {key.value} stands on line {first} and {line}; keep one")
        seen[str(key.value)] = line
