"""Numbers that the real trainers gave, in tests/data/trainers.json, and how they are made again.

`python -m tests.helpers.records` writes those of the trainers that have a checkout. A record holds
inputs, losses and gradients of our own runs, and no code.
"""

import itertools
import json
import math
import random
import re
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn

from s2dm_loss import SkipSet, SkipStepLoss
from tests.helpers import trainers, trainers_of_today
from tests.helpers.patches import TRAINERS
from tests.helpers.sd_scripts_parts import OPTIONS, step

FILE = Path(__file__).parents[1] / "data" / "trainers.json"
DATE = "2026-11-28"
SMALL = {"IMAGES": (4, 1, 2, 2), "ACTIONS": (4, 4, 2)}


class Probe(nn.Module):
    """A network whose output is a leaf: a function of x_t and t that any torch computes alike."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen = {}

    def forward(self, x_t, t, *_, **__):
        scale = 1 + t.detach().double().reshape(-1, *[1] * (x_t.ndim - 1)) % 7
        output = torch.sin(3 * x_t.detach().double() + scale).to(x_t.dtype).requires_grad_()
        self.seen = {"x_t": x_t.detach(), "t": t.detach(), "output": output}
        return output


def summary(run):
    """What a trainer's own step sees and gives: of each sample its t, and sums over its values."""
    torch.manual_seed(0)
    random.seed(0)
    model = Probe()
    loss = run(model)
    (gradient,) = torch.autograd.grad(loss.sum(), model.seen["output"])
    parts = {
        "t": model.seen["t"].flatten(),
        "x_t": model.seen["x_t"].flatten(1).sum(1),
        "loss": loss.flatten(),
        "gradient": gradient.flatten(1).norm(dim=1),
        "gradient on output": (gradient * model.seen["output"]).flatten(1).sum(1),
    }
    return {name: rounded(part) for name, part in parts.items()}


def rounded(values):
    """Eight digits: what float32 has."""
    return [float(f"{value:.8g}") for value in values.detach().double().flatten().tolist()]


def ddim(package):
    x0, noise = torch.randn(2, 6, 2, 3, 3, generator=seeded()).unbind(0)
    t = torch.tensor([999, 3, 500, 0, 49, 48])
    for schedule in ("linear", "quad", "const", "jsd", "sigmoid"):
        b = torch.from_numpy(trainers.ddim_betas(package, schedule, 1000)).float()
        for keepdim in (False, True):
            rest = (x0, t, noise, b, keepdim)
            name = f"{schedule}, keepdim={keepdim}"
            yield name, lambda model, rest=rest: package.noise_estimation_loss(model, *rest)


def sd_scripts(kind):
    for name, options in OPTIONS.items():
        yield name, lambda model, options=options: step(kind(), kind, model, options)


def score_sde(package):
    batch = torch.randn(6, 2, 3, 3, generator=seeded())
    for kind in trainers.SDE_PATHS:
        sde = getattr(package, kind)()
        for continuous, likelihood in itertools.product((True, False), repeat=2):
            if continuous or kind != "subVPSDE":
                made = package.get_sde_loss_fn(sde, True, True, continuous, likelihood)
                name = f"{kind}, continuous={continuous}, likelihood_weighting={likelihood}"
                yield name, lambda model, made=made: made(model, batch)
        if kind in trainers.DISCRETE:
            made = getattr(package, trainers.DISCRETE[kind])(sde, True)
            yield f"{kind}, {trainers.DISCRETE[kind]}", lambda model, made=made: made(model, batch)


def seeded():
    return torch.Generator().manual_seed(5)


DOUBLED = {
    "ddim": (ddim, trainers.DDIM),
    "sd-scripts": (sd_scripts, list(trainers.SD_SCRIPTS.items())),
    "score_sde_pytorch": (score_sde, trainers.SCORE_SDE),
}
"""Of trainers with a double that no package of CI stands beside: cases, the double, their code."""


def of_today(case):
    """Everything that one of today's trainers compares, and what comes of it, in small."""
    seen = {}
    torch.manual_seed(0)
    with mock.patch.multiple(trainers_of_today, **SMALL):
        loss = case.loss(trainers_of_today.source_of(*case.file), Probe(), seen, **case.options)
    (gradient,) = torch.autograd.grad(loss, seen["output"])
    weight = seen.get("weight", torch.ones_like(gradient))
    parts = {**seen, "weight": weight, "gradient": gradient}
    values = {name: rounded(part) for name, part in parts.items()}
    return {"shape": list(gradient.shape), "loss": rounded(loss)[0], **values}


def criterion_of(case, tau):
    """The loss that a trainer's patch makes, for what this case trains."""
    if case.file[0] in ("flow_matching", "conditional-flow-matching", "sd-scripts"):  # makes none
        skips = SkipSet.for_sampling_steps(20)
        return SkipStepLoss(case.schedule, skips, tau=tau, prediction_type=case.predicts)
    # What stands beside the lines that make it, in one trainer or another.
    options = {"prediction_type": "epsilon", "path_type": "linear", "model_type": ""} | case.options
    angle = math.pi / 2
    interpolants = {
        "linear": lambda t: (1 - t, t),
        "cosine": lambda t: (torch.cos(angle * t), torch.sin(angle * t)),
    }
    return trainers_of_today.made(
        *case.file,
        tau,
        noise_scheduler=trainers_of_today.policy_scheduler(options["prediction_type"]),
        config=SimpleNamespace(**options),
        interpolant=interpolants.get(options["path_type"]),
        PathType=SimpleNamespace(LINEAR="LINEAR", GVP="GVP", VP="VP"),
        path_type=options["path_type"],
        model_type=SimpleNamespace(name=options["model_type"]),
        th=torch,
    )


def ours(case, tau):
    """Our loss on what the trainer compared, and its gradient."""
    record = read()[case.file[0]]["losses"][case.name]
    parts = (record[name] for name in ("output", "target", "x_t", "weight"))
    output, target, x_t, weights = (torch.tensor(x).reshape(record["shape"]) for x in parts)
    t = torch.tensor(record["t"])
    t = t.long() if "prediction_type" in case.options else t
    changed, weight = criterion_of(case, tau).regression_target(target, t, x_t)
    output.requires_grad_()
    weight = weight.reshape(-1, *[1] * (output.ndim - 1))
    loss = (weight * weights * (output - changed).square()).mean()
    return loss.item(), torch.autograd.grad(loss, output)[0]


def ratios(case):
    """Each sample's gradient at τ = 0.99 next to the trainer's own."""
    gradients = [ours(case, tau)[1].flatten(1).norm(dim=1) for tau in (0.99, 1.0)]
    return gradients[0] / gradients[1]


def table(names):
    """What a page of docs/adapters says of these trainers: commit, losses, least and most ratio."""
    rows = []
    for trainer in names:
        cases = [case for case in trainers_of_today.CASES if case.file[0] == trainer]
        values = torch.cat([ratios(case) for case in cases])
        commit = TRAINERS[trainer].commit[:7]
        rows.append((trainer, commit, len(cases), values.min().item(), values.max().item()))
    return rows


@lru_cache(maxsize=1)
def read():
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def main():
    """Write the records again, those whose trainers are at hand."""
    records = read()

    def keep(trainer, part, cases):
        known, record = TRAINERS[trainer], records.setdefault(trainer, {})
        record |= {"repository": known.repository, "commit": known.commit, "date": DATE}
        record[part] = cases

    for trainer, (cases, which) in DOUBLED.items():
        keep(trainer, "steps", {name: summary(run) for name, run in cases(which[1][1]())})
    for trainer in dict.fromkeys(case.file[0] for case in trainers_of_today.CASES):
        ours = [case for case in trainers_of_today.CASES if case.file[0] == trainer]
        keep(trainer, "losses", {case.name: of_today(case) for case in ours})
    text = json.dumps(records, indent=1, sort_keys=True)
    # A list of numbers on one line.
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", text)
    FILE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
