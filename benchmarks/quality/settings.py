"""What all cells of a run depend on: as text in its folder, back from that text, and in words."""

from __future__ import annotations

import ast
from typing import Any

from benchmarks.quality.budget import Budget
from benchmarks.quality.features import ClassifierFeatures, EfficientNetFeatures, InceptionFeatures
from benchmarks.quality.networks import (
    MLPSpec,
    PreconditionedUNetSpec,
    SpectralUNetSpec,
    UNetSpec,
)

RECORDS = {
    kind.__name__: kind
    for kind in (
        *(Budget, MLPSpec, UNetSpec, PreconditionedUNetSpec, SpectralUNetSpec),
        *(ClassifierFeatures, EfficientNetFeatures, InceptionFeatures),
    )
}


def read(text: str) -> Any:
    """Return the settings that a text says, the defaults of today for what it does not name.

    So that a folder from before a setting was thought of is still recognised.

    Args:
        text: The `repr` of one of `RECORDS`, of a version of this code with perhaps fewer
            fields; any other text stands for itself.
    """
    try:
        return _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, TypeError):
        return text


def _value(node: ast.expr) -> Any:
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    if not (isinstance(node.func, ast.Name) and node.func.id in RECORDS):
        raise ValueError(f"expected one of {', '.join(RECORDS)}, got {ast.unparse(node.func)}")
    given = {word.arg: _value(word.value) for word in node.keywords if word.arg is not None}
    return RECORDS[node.func.id](**given)


def differences(stored: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Return the names of the settings that two runs do not share."""
    return [
        key
        for key in current
        if stored.get(key) != current[key] and read(str(stored.get(key))) != read(str(current[key]))
    ]


def in_words(text: str) -> str:
    """Return settings as a clause for a page."""
    settings = read(text)
    for kind, say in WORDS.items():
        if isinstance(settings, kind):
            return say(settings)
    return text


def _budget(budget: Budget) -> str:
    rate = "falling along a cosine" if budget.anneal else "constant"
    parts = [
        f"{budget.steps:,} steps of {budget.batch_size} images with Adam",
        f"learning rate {budget.learning_rate:g}, {rate}",
    ]
    if budget.warmup:
        parts.append(f"rising over the first {budget.warmup:,} steps")
    if budget.grad_clip is not None:
        parts.append(f"gradients clipped at {budget.grad_clip:g}")
    if budget.flip:
        parts.append("images mirrored at random")
    if budget.branch_at is not None:
        parts.append(
            "every loss but the plain one and Min-SNR from the plain run's state after "
            f"{budget.branch_at:.0%} of the steps, with the same images, timesteps and noise"
        )
    power = budget.ema_power
    ramp = "(1 + n) / (10 + n)" if power is None else f"1 - (1 + n)^-{power:g}"
    return (
        f"{', '.join(parts)}; weights averaged for sampling with a decay of {ramp} after n steps, "
        f"at most {budget.ema_decay:g}, {budget.decay(budget.steps):.4g} at the end"
    )


def _mlp(network: MLPSpec) -> str:
    return (
        f"a residual MLP of {network.blocks} blocks and width {network.width}, with a gated "
        "connection from input to output"
    )


def _unet(network: UNetSpec) -> str:
    channels = ", ".join(str(network.channels * m) for m in network.multipliers)
    blocks = "1 block" if network.blocks == 1 else f"{network.blocks} blocks"
    return f"diffusers' U-Net with {channels} channels and {blocks} a level"


def _on_blocks(patch: int) -> str:
    return f" on blocks of {patch} x {patch} pixels" if patch > 1 else ""


def _preconditioned(network: PreconditionedUNetSpec) -> str:
    return f"{_unet(network.unet)}{_on_blocks(network.patch)}, preconditioned"


def _spectral(network: SpectralUNetSpec) -> str:
    return (
        f"{_unet(network.unet)}{_on_blocks(network.patch)}, added to the predictor that is exact "
        "for Gaussian data of the training images' mean, colours and power at each frequency"
    )


WORDS: dict[type, Any] = {
    Budget: _budget,
    MLPSpec: _mlp,
    UNetSpec: _unet,
    PreconditionedUNetSpec: _preconditioned,
    SpectralUNetSpec: _spectral,
}
