"""Numbers that the real trainers gave, in tests/data/trainers.json, and how they are made again.

    python -m tests.helpers.records

writes the records of those trainers whose checkouts the environment variables name. A record holds
inputs, losses and gradients of our own runs, and no code. The doubles are held to them, and so is
our loss on today's trainers, also where there is no checkout.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from s2dm_loss import ContinuousSchedule, SkipSet, SkipStepLoss
from tests.helpers import trainers_of_today
from tests.helpers.patches import TRAINERS
from tests.helpers.upstream import root_of

FILE = Path(__file__).parents[1] / "data" / "trainers.json"
DATE = "2026-11-28"
SMALL = {"IMAGES": (4, 1, 2, 2), "ACTIONS": (4, 4, 2)}
Run = Callable[[nn.Module], Tensor]


class Probe(nn.Module):
    """A network whose output is a leaf: a function of x_t and t that any torch computes alike."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: dict[str, Tensor] = {}

    def forward(self, x_t: Tensor, t: Tensor, *_: Any, **__: Any) -> Tensor:
        scale = 1 + t.detach().double().reshape(-1, *[1] * (x_t.ndim - 1)) % 7
        output = torch.sin(3 * x_t.detach().double() + scale).to(x_t.dtype).requires_grad_()
        self.seen = {"x_t": x_t.detach(), "t": t.detach(), "output": output}
        return output


def summary(run: Run) -> dict[str, list[float]]:
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


def rounded(values: Tensor) -> list[float]:
    """Eight digits: what float32 has."""
    return [float(f"{value:.8g}") for value in values.detach().double().flatten().tolist()]


def ddim(package: Any) -> Iterator[tuple[str, Run]]:
    x0, noise = torch.randn(2, 6, 2, 3, 3, generator=torch.Generator().manual_seed(5)).unbind(0)
    t = torch.tensor([999, 3, 500, 0, 49, 48])
    for schedule in ("linear", "quad", "const", "jsd", "sigmoid"):
        betas = package.get_beta_schedule(
            schedule, beta_start=1e-4, beta_end=0.02, num_diffusion_timesteps=1000
        )
        b = torch.from_numpy(betas).float()
        for keepdim in (False, True):
            arguments = (x0, t, noise, b, keepdim)
            name = f"{schedule}, keepdim={keepdim}"
            yield name, lambda model, a=arguments: package.noise_estimation_loss(model, *a)


def denoising_diffusion_pytorch(package: Any) -> Iterator[tuple[str, Run]]:
    images = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    times = torch.tensor([0, 48, 49, 300, 700, 999])
    for objective in ("pred_noise", "pred_x0", "pred_v"):
        for schedule in ("linear", "cosine", "sigmoid"):
            for min_snr in (False, True):
                options = {
                    "objective": objective,
                    "beta_schedule": schedule,
                    "min_snr_loss_weight": min_snr,
                    "offset_noise_strength": 0.1,
                }

                def run(model: nn.Module, options: dict[str, Any] = options) -> Tensor:
                    vars(model).update(channels=3, out_dim=3, self_condition=False)
                    diffusion = package.GaussianDiffusion(model, image_size=4, **options)
                    return diffusion(images, times=times, loss_reduction="none")

                yield f"{objective}, {schedule}, min_snr={min_snr}", run


def k_diffusion(package: Any) -> Iterator[tuple[str, Run]]:
    x0, noise = torch.randn(2, 5, 2, 3, 3, generator=torch.Generator().manual_seed(5)).unbind(0)
    sigma = torch.tensor([0.011, 0.3, 2.0, 11.0, 80.0])
    for weighting in ("karras", "snr", "soft-min-snr"):
        for sigma_data in (0.5, 1.0):
            options = {"weighting": weighting, "sigma_data": sigma_data}
            yield (
                f"{weighting}, sigma_data={sigma_data}",
                lambda model, options=options: package.Denoiser(model, **options).loss(
                    x0, noise, sigma
                ),
            )


def sd_scripts(package: Any) -> Iterator[tuple[str, Run]]:
    from tests.helpers.sd_scripts_parts import OPTIONS, step

    kind = package.NetworkTrainer
    for name, options in OPTIONS.items():
        yield name, lambda model, options=options: step(kind(), kind, model, options)


def score_sde(package: Any) -> Iterator[tuple[str, Run]]:
    batch = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(5))
    for kind in ("VPSDE", "subVPSDE", "VESDE"):
        sde = getattr(package, kind)()
        for continuous in (True, False) if kind != "subVPSDE" else (True,):
            for likelihood in (True, False):
                arguments = (sde, True, True, continuous, likelihood)
                yield (
                    f"{kind}, continuous={continuous}, likelihood_weighting={likelihood}",
                    lambda model, a=arguments: package.get_sde_loss_fn(*a)(model, batch),
                )
        if kind != "subVPSDE":
            name = "get_smld_loss_fn" if kind == "VESDE" else "get_ddpm_loss_fn"
            yield (
                f"{kind}, {name}",
                lambda model, sde=sde, name=name: getattr(package, name)(sde, True)(model, batch),
            )


def _real_ddim() -> Any:
    from tests.helpers.ddim_checkout import load_ddim

    return load_ddim(root_of("S2DM_DDIM_ROOT"))


def _real_denoising_diffusion_pytorch() -> Any:
    from tests.helpers.packages import denoising_diffusion_pytorch

    return denoising_diffusion_pytorch()[0]


def _real_k_diffusion() -> Any:
    from tests.helpers.packages import k_diffusion_layers

    return k_diffusion_layers()


def _real_sd_scripts() -> Any:
    from tests.helpers.sd_scripts_parts import load_sd_scripts

    return load_sd_scripts("train_network")[0]


def _real_score_sde() -> Any:
    from tests.helpers.score_sde_checkout import load_score_sde

    return load_score_sde(root_of("S2DM_SCORE_SDE_ROOT"))


DOUBLED = {
    "ddim": ("ermongroup/ddim", ddim, _real_ddim, "ddim_double"),
    "denoising-diffusion-pytorch": (
        "lucidrains/denoising-diffusion-pytorch",
        denoising_diffusion_pytorch,
        _real_denoising_diffusion_pytorch,
        "denoising_diffusion_pytorch_double",
    ),
    "k-diffusion": ("crowsonkb/k-diffusion", k_diffusion, _real_k_diffusion, "k_diffusion_double"),
    "sd-scripts": ("kohya-ss/sd-scripts", sd_scripts, _real_sd_scripts, "sd_scripts_double"),
    "score_sde_pytorch": (
        "yang-song/score_sde_pytorch",
        score_sde,
        _real_score_sde,
        "score_sde_double",
    ),
}
"""Of each trainer that has a double: its repository, its cases, its real code and the double."""


def of_today(case: trainers_of_today.Case) -> dict[str, Any]:
    """Everything that one of today's trainers compares, and what comes of it, in small."""
    sizes = {name: getattr(trainers_of_today, name) for name in SMALL}
    vars(trainers_of_today).update(SMALL)
    try:
        torch.manual_seed(0)
        seen: dict[str, Tensor] = {}
        loss = case.loss(trainers_of_today.source_of(*case.file), Probe(), seen, **case.options)
    finally:
        vars(trainers_of_today).update(sizes)
    (gradient,) = torch.autograd.grad(loss, seen["output"])
    weight = seen.get("weight", torch.ones_like(gradient))
    parts = {name: seen[name] for name in ("output", "target", "t", "x_t")}
    parts |= {"weight": weight, "gradient": gradient}
    values = {name: rounded(part) for name, part in parts.items()}
    return {"shape": list(gradient.shape), "loss": rounded(loss)[0], **values}


def commits() -> dict[str, tuple[str, str]]:
    """Repository and commit of each trainer on record."""
    known = {name: (each.repository, each.commit) for name, each in TRAINERS.items()}
    pins = (FILE.parents[2] / ".ci" / "trainers.txt").read_text(encoding="utf-8").splitlines()
    packages = dict(pin.split("==") for pin in pins if not pin.startswith("#"))
    return known | {
        name: (DOUBLED[name][0], f"{version} on PyPI") for name, version in packages.items()
    }


def criterion_of(case: trainers_of_today.Case, tau: float) -> Any:
    """The loss that a trainer's patch makes, for what this case trains."""
    options, made, predicts = case.options, trainers_of_today.made, "velocity"
    if "prediction_type" in options:
        scheduler = trainers_of_today.policy_scheduler(options["prediction_type"])
        names = {"noise_scheduler": scheduler, "config": SimpleNamespace(**options)}
        return made(*case.file, tau, **names)
    if case.file == trainers_of_today.REPA:
        linear, half_pi = options["path_type"] == "linear", math.pi / 2
        return made(
            *case.file,
            tau,
            interpolant=lambda t: (
                (1 - t, t) if linear else (torch.cos(half_pi * t), torch.sin(half_pi * t))
            ),
        )
    if case.file == trainers_of_today.SIT:
        return made(
            *case.file,
            tau,
            PathType=SimpleNamespace(LINEAR="LINEAR", GVP="GVP", VP="VP"),
            path_type=options["path_type"],
            model_type=SimpleNamespace(name=options["model_type"]),
            th=torch,
        )
    if case.file == trainers_of_today.FLOW_MATCHING:
        path = trainers_of_today.SCHEDULERS[options["scheduler"]]
        schedule = ContinuousSchedule.from_alpha_sigma(path, data_at=1, min_time=1e-5)
    elif case.file == trainers_of_today.TORCHCFM:
        schedule = ContinuousSchedule.flow(data_at=1)
    elif "kind" in options and case.file[0] == "sd-scripts":
        schedule = ContinuousSchedule.flow()
        predicts = "flow" if options["kind"] == trainers_of_today.KOHYA_FLUX else "sample"
    else:
        return made(*case.file, tau)
    skips = SkipSet.for_sampling_steps(20)
    return SkipStepLoss(schedule, skips, tau=tau, prediction_type=predicts)


def ours(case: trainers_of_today.Case, tau: float) -> tuple[float, Tensor]:
    """Our loss on what the trainer compared, and its gradient."""
    record = read()[case.file[0]]["losses"][case.name]
    names = ("output", "target", "x_t", "weight")
    output, target, x_t, weights = (
        torch.tensor(record[name]).reshape(record["shape"]) for name in names
    )
    t = torch.tensor(record["t"])
    t = t.long() if "prediction_type" in case.options else t
    changed, weight = criterion_of(case, tau).regression_target(target, t, x_t)
    output.requires_grad_()
    weight = weight.reshape(-1, *[1] * (output.ndim - 1))
    loss = (weight * weights * (output - changed).square()).mean()
    return loss.item(), torch.autograd.grad(loss, output)[0]


def ratios(case: trainers_of_today.Case) -> Tensor:
    """Each sample's gradient at τ = 0.99 next to the trainer's own."""
    gradients = [ours(case, tau)[1].flatten(1).norm(dim=1) for tau in (0.99, 1.0)]
    return gradients[0] / gradients[1]


def table(trainers: list[str]) -> list[tuple[str, str, int, float, float]]:
    """What a page of docs/adapters says of these trainers: commit, losses, least and most ratio."""
    rows = []
    for trainer in trainers:
        cases = [case for case in trainers_of_today.CASES if case.file[0] == trainer]
        values = torch.cat([ratios(case) for case in cases])
        commit = TRAINERS[trainer].commit[:7]
        rows.append((trainer, commit, len(cases), values.min().item(), values.max().item()))
    return rows


@lru_cache(maxsize=1)
def read() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def main() -> None:
    """Write the records again, those whose trainers are at hand."""
    records: dict[str, Any] = read()
    whence = commits()

    def keep(trainer: str, part: str, cases: dict[str, Any]) -> None:
        repository, commit = whence[trainer]
        record = records.setdefault(trainer, {})
        record |= {"repository": repository, "commit": commit, "date": DATE, part: cases}

    for trainer, (_, cases, real, _) in DOUBLED.items():
        keep(trainer, "steps", {name: summary(run) for name, run in cases(real())})
    for trainer in dict.fromkeys(case.file[0] for case in trainers_of_today.CASES):
        ours = [case for case in trainers_of_today.CASES if case.file[0] == trainer]
        keep(trainer, "losses", {case.name: of_today(case) for case in ours})
    text = json.dumps(records, indent=1, sort_keys=True)
    # A list of numbers on one line.
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", text)
    FILE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
