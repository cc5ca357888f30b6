"""The loss by another way, sharing no code with the library.

Coefficients in mpmath with 40 digits, from the definitions of each schedule. The loss in float64:
as the two terms that the paper writes, and as A · mse(output, regression target).
"""

from dataclasses import dataclass

from mpmath import mp, mpf

mp.dps = 40


def vp_pair(abar):
    return mp.sqrt(abar), mp.sqrt(1 - abar)


def discrete_path(kind, table):
    """(a, b) of every timestep, from β, ᾱ, log SNR or σ as Python floats."""
    if kind == "sigmas":
        return [(mpf(1), mpf(sigma)) for sigma in table]
    if kind == "alphas_cumprod":
        return [vp_pair(mpf(value)) for value in table]
    if kind == "log_snr":
        return [vp_pair(1 / (1 + mp.exp(-mpf(value)))) for value in table]
    pairs, abar = [], mpf(1)
    for beta in table:
        abar *= 1 - mpf(beta)
        pairs.append(vp_pair(abar))
    if kind == "zero_snr":
        root = [a for a, _ in pairs]
        scale = root[0] / (root[0] - root[-1])
        pairs = [vp_pair(((value - root[-1]) * scale) ** 2) for value in root]
    return pairs


def continuous_pair(kind, t):
    """(a, b) at one time; "gvp" is SiT's GVP and TrigFlow, "polynomial" any path."""
    t = mpf(t)
    if kind == "flow":
        return 1 - t, t
    if kind == "ve":
        return mpf(1), 80 * t
    if kind == "polynomial":
        return (1 - t) ** 3, t**2
    if kind in ("cosine", "gvp"):
        shift = mpf("0.008") if kind == "cosine" else 0
        angle, start = ((time + shift) / (1 + shift) * mp.pi / 2 for time in (t, 0))
        return vp_pair((mp.cos(angle) / mp.cos(start)) ** 2)
    a, b = vp_pair(mp.exp(-(t**2) * (mpf(20) - mpf("0.1")) / 2 - t * mpf("0.1")))
    return a, (b**2 if kind == "sub_vp" else b)


def continuous_rates(kind, t):
    """da/dt and db/dt by differences of 40 digits."""
    a, b = (mp.diff(lambda time, i=i: continuous_pair(kind, time)[i], mpf(t)) for i in (0, 1))
    return a, b


def abar_of(pair):
    return pair[0] ** 2 / (pair[0] ** 2 + pair[1] ** 2)


def weight_of(name, pair):
    """What the noise's error counts; None where the trainer's own scale is kept."""
    a, b = pair
    snr = (a / b) ** 2 if b else mpf(10) ** 26
    snr = min(max(snr, mp.exp(-60)), mp.exp(60))
    return {
        "uniform": mpf(1),
        "min_snr": min(snr, 5) / snr,
        "soft_min_snr": 4 / (4 + snr),
        "truncated_snr": max(snr, 1) / snr,
        "p2": 1 / (1 + snr),
        "debiased": 1 / mp.sqrt(snr),
        "sigmoid": 1 / (1 + snr / mp.exp(2)),
    }.get(name)


# ζ = u ε + v ξ + a noise of variance n that only its expectation shows.
ESTIMATORS = {"expected": (0, 0, 1), "fresh": (0, 1, 0), "shared": (1, 0, 0)}


@dataclass(frozen=True)
class Scales:
    """The loss at one time, in exact numbers turned to floats; output = p x_0 + q ε."""

    tau: float
    c: float
    c2: float
    a: float
    b: float
    p: float
    q: float
    ratio: float
    weight: float | None

    @property
    def big_a(self):
        return self.tau + (1 - self.tau) * self.c2

    @property
    def gain(self):
        """What the loss teaches ε̂ to be multiplied by."""
        return self.tau / self.big_a

    def noise_in(self, output, x_t):
        """The ε̂ that an output says, with x_t = a x_0 + b ε."""
        return (self.a * output - self.p * x_t) / (self.a * self.q - self.b * self.p)

    def output_of(self, eps_hat, x_t):
        """The output that says ε̂ on an x_t."""
        of_noise = self.q * eps_hat
        return self.p * (x_t - self.b * eps_hat) / self.a + of_noise if self.p else of_noise

    def scaled(self, output, x_t, factor=None):
        """The output with the gain, or another factor, on its ε̂."""
        if self.ratio == 0:  # no signal: the output says nothing of the noise
            return output
        factor = self.gain if factor is None else factor
        return self.output_of(factor * self.noise_in(output, x_t), x_t)

    def best(self, eps, xi, estimator):
        """The ε̂ at which the two terms are least."""
        u, v, _ = ESTIMATORS[estimator]
        if self.big_a == 0:
            return eps  # any ε̂ will do
        zeta = u * eps + (v * xi if v else 0)
        return (self.tau * eps + (1 - self.tau) * self.c * zeta) / self.big_a

    def target(self, x0, eps, xi, estimator):
        """The output that stands for `best` on the same x_t."""
        if self.ratio == 0:  # no signal: the output says nothing of the noise
            return self.p * x0 + self.q * eps
        return self.output_of(self.best(eps, xi, estimator), self.a * x0 + self.b * eps)

    def loss(self, output, x0, eps, xi, estimator, *, normalize=False):
        """A · mse(output, target) of one sample, times the weighting of the noise's error."""
        weight = 1.0 if normalize else self.big_a
        weight *= 1.0 if self.weight is None else self.weight * self.ratio**2
        return weight * (output - self.target(x0, eps, xi, estimator)).square().mean()

    def two_terms(self, eps_hat, eps, xi, estimator):
        """mse(ε̂, ε), mse(c ε̂, ζ) and their sum as in Eq. 13, each times the weighting."""
        u, v, n = ESTIMATORS[estimator]
        zeta = u * eps + (v * xi if v else 0)
        simple = (eps_hat - eps).square().mean()
        skip = self.c2 * eps_hat.square() - 2 * self.c * eps_hat * zeta + zeta**2 + n
        skip = skip.mean() if self.tau < 1 else 0 * simple
        weight = 1.0 if self.weight is None else self.weight
        return weight * simple, weight * skip, weight * (self.tau * simple + (1 - self.tau) * skip)


def scales(pair, earlier, tau, max_c2=100.0, weighting=None, kind="epsilon", rates=None):
    """Return the scales of an output at a time with these earlier ones."""
    (a, b), weight, abar = pair, weight_of(weighting, pair), abar_of(pair)
    p, q = parts(kind, pair, rates)
    d = a * q - b * p
    ratio = (a / d if d else mp.inf) if p else 1 / q
    squares = []
    for other in earlier:
        c2 = abar_of(other) / abar - 1 if abar else mp.inf
        squares.append(min(max(c2, mpf(0)), mpf(max_c2)))
    count = max(len(squares), 1)
    c, c2 = sum(map(mp.sqrt, squares)) / count, sum(squares) / count
    reach = min(mpf(1), ratio**2)  # 0 where the output says nothing of the noise
    bound = mpf(max_c2) * reach if reach else mpf(0)
    if weight is not None:
        bound = min(bound, mpf(max_c2) / max(weight, 1))
    of_c = mp.sqrt(max_c2) * reach if reach else mpf(0)
    values = min(c, mp.sqrt(bound), of_c), min(c2, bound), a, b, p, q, ratio
    return Scales(
        tau if squares else 1.0,
        *(float(value) for value in values),
        weight=None if weight is None else float(weight),
    )


def at(t, kind, bar):
    """The scales at a timestep of a table of ᾱ, with k = 99."""
    now, *earlier = (vp_pair(mpf(float(bar[i]))) for i in (t, t - 99) if i >= 0)
    return scales(now, earlier, 0.99, kind=kind)


def parts(kind, pair, rates=None):
    """p and q of an output p x_0 + q ε; `rates` are da/dt and db/dt."""
    a, b = pair
    norm = mp.sqrt(a**2 + b**2)
    return {
        "epsilon": (mpf(0), mpf(1)),
        "v_prediction": (-b / norm, a / norm),
        "sample": (mpf(1), mpf(0)),
        "flow": (mpf(-1), mpf(1)),
        "score": (mpf(0), -1 / b if b else -mp.inf),
        "velocity": rates,
    }[kind]
