"""The model card: README.md of a published model, written from the run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from ldm.conditioning import Words
from ldm.masks import palette
from ldm.tasks import Inpaint, Restore, Segment, Task, Upscale
from pipelines.diffusers_format import OURS
from pipelines.evaluation.memorisation import Copies
from pipelines.publishing.card_snippets import our_snippet, stock_snippet
from pipelines.publishing.gate import Proof
from pipelines.publishing.samples import Sample

TAGS = {  # what it is told, or its task -> the hub's `pipeline_tag`, and a tag for more
    "text": ("text-to-image", None),
    "class+text": ("text-to-image", "class-conditional"),
    "class": ("unconditional-image-generation", "class-conditional"),
    "none": ("unconditional-image-generation", None),
    "inpaint": ("image-to-image", "inpainting"),
    "upscale": ("image-to-image", "super-resolution"),
    "restore": ("image-to-image", "image-restoration"),
    "segment": ("image-segmentation", None),
}

UNSAID = (
    "The author has not said what the pictures show, where they are from, and on which terms they were used."
)
BODY = """
# {{ title }}

A latent diffusion model that {{ does }}. It was trained from zero: \
{% if encoder %}the text encoder {{ encoder }} was taken as it is, all other weights began as random numbers. \
{% else %}all weights began as random numbers. {% endif %}
The weights here are averages over the training (exponential moving average, decay {{ ema }}).

| part | class | weights |
|---|---|---|
{% for name, kind, count in parts %}
| {{ name }} | `{{ kind }}` | {{ count }} |
{% endfor %}

{% if samples %}
## Samples

Unselected: {{ request.steps }} steps, guidance {{ request.guidance }}, seeds as given.

{% if task %}
| given |{% if task.kind == "inpaint" %} white is drawn |{% endif %} made | |
|---|---|---|{% if task.kind == "inpaint" %}---|{% endif %}

{% for told, seed, file, given in samples %}
| {% for one in given %}![given]({{ one }}) | {% endfor %}![made]({{ file }}) | {{ told | cell }} (seed {{ seed }}) |
{% endfor %}
{% else %}
| {% for told, seed, file, _ in samples %}![{{ told | cell or "drawn" }}]({{ file }}) | {% endfor %}

|{% for _ in samples %}---|{% endfor %}

| {% for told, seed, file, _ in samples %}{{ told | cell }} (seed {{ seed }}) | {% endfor %}


{% endif %}
{% else %}
No samples are shown: {{ no_samples }}.
{% endif %}

## Use

With stock [diffusers](https://github.com/huggingface/diffusers):

```python
{{ stock_snippet }}
```

{% if not stock %}
No stock pipeline does this with these parts, so the repository has a small one in `pipeline.py`; `trust_remote_code`
runs that file: read it first.

{% endif %}
With the tool that it was trained with:

```python
{{ our_snippet }}
```

{% if half %}There are float16 weights too (`variant="fp16"`). The largest magnitude of a weight or an activation was \
{{ "%.4g" | format(scan.largest) }}, in `{{ scan.where }}`, over the pictures above; float16 ends at 65504.{% else %}
Use float32 or bfloat16. The largest magnitude of a weight or an activation was \
{{ "%.4g" | format(scan.largest) }}, in `{{ scan.where }}`; float16 ends at 65504.{% endif %}


## Training data

{{ about }}

- Name in the recipe: `{{ data_name }}`, split `{{ data_split }}`.
- Brought to {{ size }} x {{ size }} pixels{{ flipped }}.
{% for line in data_facts %}
- {{ line }}
{% endfor %}

## Training

{{ trained }}

<details><summary>The recipe of the latent model</summary>

```yaml
{{ recipe }}```

</details>
{% if first_recipe %}

<details><summary>The recipe of the autoencoder</summary>

```yaml
{{ first_recipe }}```

</details>
{% endif %}

## Evaluation

{% if metrics %}
| what | value | protocol |
|---|---|---|
{% for metric in metrics %}
| {{ metric.name }} | {{ metric.value }} | {{ metric.protocol }} |
{% endfor %}
{% else %}
No figures were measured.
{% endif %}

**Copies of training pictures.** {{ copies }}

**Safety.** {{ safety }}

## Limits

{{ limits }}

## Provenance

Published by `ldm publish`. Before, stock diffusers {{ diffusers }} drew {{ request.count }} pictures from these files
in a process without the training code; they differ from the trainer's by at most {{ difference }} of 255.
`manifest.json` has the SHA-256 of every file. The latents are those of the autoencoder with the weight hash
`{{ autoencoder }}`. Pictures in `samples/` that the model made say so in notes of their own.
"""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure, with how it was measured."""

    kind: str
    """As the hub calls it: psnr, fid, ..."""
    name: str
    value: float
    protocol: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that a card says, from the run and the gate."""

    name: str
    license: str
    license_name: str | None
    """Of one that the hub doesn't know"""
    words: Words
    """What it is told"""
    task: Task | None
    """If it begins with a picture"""
    pipeline: str
    """The class in model_index.json"""
    recipe: dict[str, Any]
    first_recipe: dict[str, Any] | None
    """Of the autoencoder, if it was trained by a run that is still there"""
    trained: str
    parts: Sequence[tuple[str, str, str]]
    classes: Sequence[str]
    autoencoder: str
    """Weight hash"""
    about: str
    data_facts: Sequence[str]
    metrics: Sequence[Metric]
    proof: Proof
    samples: Sequence[Sample]
    no_samples: str
    safety: str


def model_card(facts: Facts) -> str:
    """README.md as text: the YAML header that the hub reads, then the card."""
    data = facts.recipe["data"]
    text = facts.recipe["conditioning"]["text"]
    taken = [text[key] for key in ("encoder", "encoder_2") if text.get(key)]
    encoder = " and ".join(map(leaf, taken)) if text.get("weights", "pretrained") == "pretrained" else ""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["cell"] = cell
    body = environment.from_string(BODY).render(
        {
            **vars(facts),
            **vars(facts.proof),
            "title": facts.name.split("/")[1],
            "size": data["size"],
            "does": does(facts),
            "stock": facts.pipeline != OURS,
            "encoder": encoder,
            "about": facts.about or UNSAID,
            "ema": facts.recipe["ema_decay"],
            "stock_snippet": stock_snippet(facts.name, facts.pipeline, facts.proof.request, facts.samples),
            "our_snippet": our_snippet(facts.name, facts.task, facts.proof.request, facts.samples),
            "data_name": leaf(data["path"], hub=False),
            "data_split": data["split"],
            "flipped": ", half of them mirrored" if data["flip"] else "",
            "recipe": published_recipe(facts.recipe),
            "first_recipe": published_recipe(facts.first_recipe) if facts.first_recipe else "",
            "copies": about_copies(facts.proof.copies, facts.task),
            "limits": limits(facts),
        }
    )
    return f"---\n{header(facts)}\n---\n{body}"


def cell(text: str) -> str:
    """Text for a cell of a table, or of a link in one: on one line, and ending neither."""
    return re.sub(r"([\\|\[\]])", r"\\\1", " ".join(text.split()))


def header(facts: Facts) -> str:
    """The YAML that the hub validates."""
    tag, more = TAGS[facts.task.kind if facts.task else facts.words]
    path = facts.recipe["data"]["path"]
    paths = [path] if isinstance(path, str) else path
    results = [
        EvalResult(
            task_type=tag,
            dataset_type=leaf(path, hub=False),
            dataset_name=leaf(path, hub=False),
            metric_type=metric.kind,
            metric_name=metric.name,
            metric_value=metric.value,
        )
        for metric in facts.metrics
    ]
    return ModelCardData(
        license=facts.license,
        license_name=facts.license_name,
        license_link="LICENSE" if facts.license_name else None,
        library_name="diffusers",
        pipeline_tag=tag,
        tags=["latent-diffusion", "trained-from-scratch", *([more] if more else [])],
        datasets=[one.removeprefix("hub:") for one in paths if one.startswith("hub:")] or None,
        model_name=facts.name.split("/")[1] if results else None,
        eval_results=results or None,
    ).to_yaml()


def about_copies(copies: Copies | None, task: Task | None) -> str:
    if isinstance(task, Segment):
        return "Not looked for: the model makes masks."
    if copies is None:
        return "Not checked: the training data was not at hand when the model was published."
    return (
        f"{copies.count} of {copies.total} drawn pictures are copies, in the sense of Carlini et al. 2023 (nearer to "
        f"one of {copies.compared:,} training pictures, or its mirror image, than half the mean distance to the 50 "
        "nearest; pixels at 32 x 32). Near repetitions in the training data hide copies from this test."
    )


def does(facts: Facts) -> str:
    """What the model does, after "A latent diffusion model that"."""
    size, task, count = facts.recipe["data"]["size"], facts.task, len(facts.classes)
    classes = f"of {count} classes"
    told = {
        "text": "from captions",
        "class": classes,
        "class+text": f"{classes} from captions",
        "none": "of one kind",
    }
    if task is None:
        return f"draws {size} x {size} pixel pictures {told[facts.words]}"
    by = {
        "text": "captions",
        "class": "the names of classes",
        "class+text": "captions and the names of classes",
    }
    told_by = f", told by {by[facts.words]}" if facts.words in by else ""
    if isinstance(task, Inpaint):
        what = "fills holes in pictures"
    elif isinstance(task, Upscale):
        what = f"makes pictures {task.factor} times as wide and high"
    elif isinstance(task, Restore):
        what = f"removes {listed(damage(task))} from pictures"
    else:
        what = f"says what each pixel of a picture shows, by one of {len(task.classes)} colours"
    return f"{what}{told_by}; it was trained on {size} x {size} pixels"


def damage(task: Restore) -> list[str]:
    """What the task undoes, in words."""
    names = {"blur": "blur", "noise": "noise", "jpeg": "JPEG artefacts"}
    return [name for key, name in names.items() if getattr(task, key) is not None]


def listed(words: Sequence[str]) -> str:
    """a, b and c"""
    return " and ".join([*([", ".join(words[:-1])] if words[1:] else []), words[-1]])


def limits(facts: Facts) -> str:
    """What the model can't do, as far as the recipe tells."""
    size, task = facts.recipe["data"]["size"], facts.task
    known = []
    if isinstance(task, Segment):
        named = zip(task.classes, palette(len(task.classes)).tolist(), strict=True)
        colours = ", ".join(f"{name} `rgb{tuple(colour)}`" for name, colour in named)
        known += [f"It knows {len(task.classes)} classes, the nearest of these colours each: {colours}."]
    elif task:
        known += ["What it adds to a picture is guessed, and no record of what was there."]
    if "text" in facts.words:
        known += ["It knows the words and things of its training captions and no others."]
    if "class" in facts.words:
        known += [f"It knows {len(facts.classes)} classes: {', '.join(facts.classes)}."]
    if facts.words == "none" and task is None:
        known += ["It can't be told what to draw."]
    return (
        f"{' '.join(known)} Pictures much larger or smaller than {size} pixels, or of other proportions, are outside "
        "of what it was trained on. It repeats the prejudices of its data, and what it draws is no record of anything "
        "real."
    )


def published_recipe(recipe: dict[str, Any]) -> str:
    """The resolved recipe as YAML, without where things lay on the author's machine."""
    run = {key: value for key, value in recipe["run"].items() if key not in ("out", "tracker")}
    cleaned = recipe | {
        "run": run,
        "data": recipe["data"] | {"path": leaf(recipe["data"]["path"], hub=False)},
    }
    if "segment" in recipe:
        cleaned["segment"] = recipe["segment"] | {
            "masks": recipe["segment"]["masks"] and leaf(recipe["segment"]["masks"], hub=False)
        }
    for name in ("autoencoder", "start"):
        if recipe.get(name):
            cleaned[name] = leaf(recipe[name])
    if "loss" in recipe:
        lpips = recipe["loss"]["lpips"]
        hidden = lpips | {"weights": lpips["weights"] and leaf(lpips["weights"], hub=False)}
        cleaned["loss"] = recipe["loss"] | {"lpips": hidden}
    if "conditioning" in recipe:
        text = recipe["conditioning"]["text"]
        text = {key: leaf(value) if "encoder" in key and value else value for key, value in text.items()}
        cleaned["conditioning"] = recipe["conditioning"] | {"text": text}
    return yaml.safe_dump(cleaned, sort_keys=False, allow_unicode=True, width=100)


def leaf(name: str | Sequence[str], hub: bool = True) -> str:
    """The last part of a path, or of each; names within packages as they are, and names on the hub: those after hub:,
    and where `hub` says so all of two parts that are nothing here."""
    if not isinstance(name, str):
        return ", ".join(leaf(one, hub) for one in name)
    if name.startswith(("hub:", "package:")):
        return name
    path = Path(name).expanduser()
    local = (
        path.is_absolute() or name.startswith((".", "~")) or path.exists() or len(path.parts) != 2 or not hub
    )
    return PurePosixPath(path.as_posix()).name if local else name
