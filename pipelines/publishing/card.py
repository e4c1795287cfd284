"""The model card: README.md of a published model, written from the run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from pipelines.diffusers_format import OURS
from pipelines.evaluation.memorisation import Copies
from pipelines.evaluation.protocol import OURS as TOOL
from pipelines.publishing.card_figures import Metric
from pipelines.publishing.card_snippets import our_snippet, stock_snippet
from pipelines.publishing.card_words import (
    about_copies,
    about_half,
    beginnings,
    does,
    leaf,
    limits,
    prepared,
    published_recipe,
    training,
)
from pipelines.publishing.gate import Proof
from pipelines.publishing.publication import Candidate
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
ROW = 4
"""Samples beside each other"""
UNSAID = (
    "The author has not said what the pictures show, where they are from, and on which terms they were used."
)
BODY = """
# {{ title }}

A latent diffusion model that {{ does }}. {{ beginnings }}

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
{% for some in samples | batch(row) %}
| {% for told, seed, file, _ in some %}![{{ told | cell or "drawn" }}]({{ file }}) | {% endfor %}

{% if loop.first %}
|{% for _ in some %}---|{% endfor %}

{% endif %}
| {% for told, seed, file, _ in some %}{{ told | cell }} (seed {{ seed }}) | {% endfor %}

{% endfor %}
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
With {{ tool }}, the tool that it was trained with:

```python
{{ our_snippet }}
```

{% if task and task.kind == "inpaint" %}
That also shifts the colours of what was drawn so that it meets what is known, unlike stock pipelines, with which the
samples here agree.

{% endif %}
{{ half }}

## Training data

{{ about }}

- Name in the recipe: `{{ data_name }}`, split `{{ data.split }}`.
- {{ prepared }}
{% if source %}
- {{ "{:,}".format(source | length) }} pictures: {{ source.kind }}
{% endif %}

## Training

{% for line in training %}
- {{ line }}
{% endfor %}

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
| {{ metric.name }} | {{ "%.4g" | format(metric.value) }} | {{ metric.protocol }} |
{% endfor %}
{% else %}
No figures were measured.
{% endif %}

**Copies of training pictures.** {{ copies }}

**Safety.** {{ safety }}

## Limits

{{ limits }}

## Provenance

Published by `ldm publish` of {{ tool }}. Before, stock diffusers {{ proof.diffusers }} made {{ request.count }} \
pictures with these files in a process without the training code; \
{% if proof.difference %}they differ from the trainer's by at most {{ proof.difference }} of 255.\
{% else %}they are the trainer's, to the last bit.{% endif %}

`manifest.json` has the SHA-256 of every file. The latents are those of the autoencoder with the weight hash
`{{ autoencoder }}`.\
{% if samples %} Pictures in `samples/` that the model made say so in notes of their own.{% endif %}

"""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that a card says, from the run and the gate."""

    candidate: Candidate
    pipeline: str
    """The class in model_index.json"""
    parts: Sequence[tuple[str, str, str]]
    """(folder, class, number of weights) of each network"""
    autoencoder: str
    """Weight hash"""
    metrics: Sequence[Metric]
    proof: Proof
    copies: Copies | None
    """None: not looked for"""
    samples: Sequence[Sample]
    no_samples: str
    """Why there are none"""
    safety: str


def model_card(facts: Facts) -> str:
    """README.md as text: the YAML header that the hub reads, then the card."""
    candidate, request = facts.candidate, facts.proof.request
    what, run, task = candidate.what, candidate.run, candidate.model.task
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["cell"] = cell
    body = environment.from_string(BODY).render(
        {
            **vars(facts),
            "tool": TOOL,
            "title": what.name.split("/")[1],
            "does": does(candidate),
            "beginnings": beginnings(candidate),
            "task": task,
            "request": request,
            "row": ROW,
            "stock": facts.pipeline != OURS,
            "stock_snippet": stock_snippet(what.name, facts.pipeline, request, facts.samples),
            "our_snippet": our_snippet(what.name, task, request, facts.samples),
            "half": about_half(facts.proof),
            "about": what.about or UNSAID,
            "data": run.data,
            "data_name": leaf(run.data.path, hub=False),
            "prepared": prepared(run.data),
            "source": candidate.source,
            "training": training(candidate),
            "recipe": published_recipe(run.recipe),
            "first_recipe": published_recipe(candidate.stage1.recipe) if candidate.stage1 else "",
            "copies": about_copies(facts.copies, task),
            "limits": limits(candidate),
        }
    )
    return f"---\n{header(candidate, facts.metrics)}\n---\n{body}"


def cell(text: str) -> str:
    """Text for a cell of a table, or of a link in one: on one line, and ending neither."""
    return re.sub(r"([\\|\[\]])", r"\\\1", " ".join(text.split()))


def header(candidate: Candidate, metrics: Sequence[Metric]) -> str:
    """The YAML that the hub validates."""
    what, data, task = candidate.what, candidate.run.data, candidate.model.task
    tag, more = TAGS[task.kind if task else candidate.words]
    scratch = None if candidate.run.recipe.get("start") else "trained-from-scratch"
    results = [
        EvalResult(
            task_type=tag,
            dataset_type=metric.data,
            dataset_name=metric.data,
            dataset_split=metric.split,
            metric_type=metric.kind,
            metric_name=metric.name,
            metric_value=metric.value,
        )
        for metric in metrics
    ]
    return ModelCardData(
        license=what.license,
        license_name=what.license_name,
        license_link="LICENSE" if what.license_name else None,
        library_name="diffusers",
        pipeline_tag=tag,
        tags=["latent-diffusion", *(word for word in (scratch, more) if word)],
        datasets=[one.removeprefix("hub:") for one in data.paths if one.startswith("hub:")] or None,
        model_name=what.name.split("/")[1] if results else None,
        eval_results=results or None,
    ).to_yaml()
