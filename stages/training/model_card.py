"""The README.md of models/gpt2/: a model card with the metadata header that the Hugging Face hub reads."""

import math
from pathlib import Path

from stages.common.settings import Settings
from stages.model.intervals import perplexity
from stages.text.streams import Split
from stages.training.best import BestWeights
from stages.training.checkpoints import Checkpoints

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

TRAINER = ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val")

BODY = """# GPT-2 with {parameters:,} parameters

{origin} on {train.documents:,} documents: {train.bytes:,} bytes of UTF-8 text, {train_tokens:,} tokens.
Training took {steps:,} steps of up to {step_tokens:,} tokens{best}.

```python
from transformers import pipeline

generate = pipeline("text-generation", ".")  # this folder, or the id it has on the hub
print(generate("The", max_new_tokens={new_tokens})[0]["generated_text"])
```

## Figures

{figures}

## Settings

```yaml
{settings}```

The header names no license and no language: only you know those of your text. Add them before you publish the model.
"""

FIGURES = """On {documents:,} validation documents ({bytes:,} bytes, {tokens:,} predicted tokens), {context} at a time:

| loss (nats a token) | perplexity | bits per byte |
| --- | --- | --- |
| {loss:.4f} | {ppl:.2f} | {bits_per_byte:.4f} |"""

LOSSY = """

The tokenizer changes the text of {changed:,} of the documents: a figure by bytes is not exact."""

FIGURES_OF_A_PART = """On {tokens:,} of the {all:,} predicted tokens of the validation text, {context} at a time:

| loss (nats a token) | perplexity |
| --- | --- |
| {loss:.4f} | {ppl:.2f} |"""


def valid_figures(best: BestWeights, valid: Split) -> dict[str, float]:
    """loss, ppl and, where all of the split was scored, bits_per_byte, as stages/model/scoring.py defines them."""
    figures = {"loss": best.loss, "ppl": perplexity(best.loss)}
    if best.tokens == len(valid.tokens) - 1:
        figures["bits_per_byte"] = best.loss * best.tokens / math.log(2) / valid.bytes
    return figures


def figures_table(best: BestWeights, valid: Split, context: int) -> str:
    """The figures on the validation text, in Markdown."""
    if best.step is None:
        return "It was trained without validation."
    figures = valid_figures(best, valid)
    table = FIGURES if "bits_per_byte" in figures else FIGURES_OF_A_PART
    counts = {"documents": valid.documents, "bytes": valid.bytes, "tokens": best.tokens, "all": len(valid.tokens) - 1}
    lossy = LOSSY.format(changed=valid.changed_documents) if valid.changed_documents else ""
    return table.format(context=context, **counts, **figures) + lossy


def training_settings(settings: Settings) -> dict:
    """What a training was told, as a card and TensorBoard show it."""
    return {
        "model": settings.model.model_dump(),
        "optimizer": settings.optimizer.model_dump(),
        "trainer": {key: getattr(settings.trainer, key) for key in TRAINER},
        "seed_everything": settings.seed_everything,
    }


def model_card(
    settings: Settings, parameters: int, train: Split, valid: Split, checkpoints: Checkpoints, step_tokens: int
) -> ModelCard:
    """The card of a trained model.

    It says only what the train stage's inputs decide (no date, no commit, no name of a text file),
    so that two runs of the same inputs make the same bytes.

    Args:
        settings: all settings.
        parameters: how many the model has.
        train, valid: the token streams.
        checkpoints: of the finished training: its steps, and step and loss of the best weights.
        step_tokens: that a step learned from at most.
    """
    best = checkpoints.best
    pretrained = settings.model.from_pretrained
    figures = valid_figures(best, valid) if best.step is not None else {}
    body = BODY.format(
        parameters=parameters,
        origin=f"`{pretrained}`, trained further" if pretrained else "Trained from random weights",
        train=train,
        train_tokens=len(train.tokens),
        steps=checkpoints.steps,
        step_tokens=step_tokens,
        best=f"; these are the weights of step {best.step:,}, at the lowest validation loss" if figures else "",
        new_tokens=settings.model.block_size // 2,  # the prompt has to fit in beside them
        figures=figures_table(best, valid, settings.model.block_size),
        settings=yaml.safe_dump(training_settings(settings), sort_keys=False),
    )
    return ModelCard(f"---\n{header_of(pretrained, figures)}\n---\n{body}", ignore_metadata_errors=False)


def header_of(pretrained: str | None, figures: dict[str, float]) -> ModelCardData:
    """The metadata of a model, by the model that it was before and its figures on the validation text."""
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2"],
        base_model=pretrained if pretrained and not Path(pretrained).exists() else None,
        model_name="gpt2",
        eval_results=[
            EvalResult("text-generation", "text", "validation text", {"ppl": "perplexity"}.get(name, name), value)
            for name, value in figures.items()
        ],
    )
