"""The maths of the methods, as pure functions. Shapes: M members, B batch, C classes, D width, H W pixels.

Every loss is a mean over the batch in nats per example, computed in at least float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from okdc.errors import RecipeError
from okdc.ranks import gather

_class_weights: Tensor | None = None  # of --class-weights, while a method is trained


@contextmanager
def weighted(class_weights: Tensor | None) -> Iterator[None]:
    """Meanwhile `cross_entropy`, and nothing else, counts each image by the weight of its class (C,); None: all alike.

    Of several labels, `binary_cross_entropy` counts each that is there by its weight.

    >>> with weighted(torch.tensor([0.5, 1.5])):
    ...     cross_entropy(torch.zeros(2, 2), torch.tensor([0, 0]))  # half of log 2
    tensor(0.3466)
    """
    global _class_weights
    before, _class_weights = _class_weights, class_weights
    try:
        yield
    finally:
        _class_weights = before


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """CE of logits (B, C) with labels (B,), or with class probabilities (B, C) as mixup and smoothing give them.

    The loss with labels: what weights of classes act on (`weighted`). Weights are not divided out again in a batch, so
    that parts of a batch, on several devices or accumulated, add up to the whole.

    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))  # log 4
    tensor(1.3863)
    """
    logits = _full(logits)
    if _class_weights is None:
        return F.cross_entropy(logits, labels if labels.dim() == 1 else _full(labels))
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels, _class_weights.to(logits), reduction="sum") / len(labels)
    return F.cross_entropy(logits, _full(labels), _class_weights.to(logits))


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, *, eps: float = 0.0, detach: bool = True) -> Tensor:
    """KL(teacher || student) of softened logits (B, C), times T^2 so that its gradient does not shrink with T.

    The teacher is a constant unless `detach` is False. `eps` is added to the teacher's probabilities without
    renormalising, as some official codes do; 0 is the exact divergence.

    >>> student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, 2.0]])
    >>> kl(student, teacher), kl(student, teacher, 4.0), kl(teacher, teacher)
    (tensor(0.3278), tensor(0.4848), tensor(0.))
    """
    student, teacher = _classes(student), _classes(teacher.detach() if detach else teacher)
    log_q = F.log_softmax(student / temperature, dim=1)
    log_p = F.log_softmax(teacher / temperature, dim=1)
    p = log_p.exp()
    if eps:
        p = p + eps
        log_p = p.log()
    return temperature**2 * (p * (log_p - log_q)).sum(dim=1).mean()


def standardized(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, *, eps: float = 0.0, detach: bool = True
) -> Tensor:
    """`kl` of logits (B, C) after each image's are standardised: less their mean, over their standard deviation.

    The student is not asked to match how large the teacher's logits are (Sun et al., CVPR 2024, algorithm 1).

    >>> student, teacher = torch.tensor([[0.0, 1.0, 5.0]]), torch.tensor([[0.0, 2.0, 1.0]])
    >>> standardized(student, teacher), standardized(3 * teacher + 1, teacher)
    (tensor(0.9780), tensor(0.))
    """
    student, teacher = (_standard(_classes(x)) for x in (student, teacher))
    return kl(student, teacher, temperature, eps=eps, detach=detach)


def _standard(logits: Tensor) -> Tensor:
    spread, mean = torch.var_mean(logits, dim=1, correction=0, keepdim=True)
    return (logits - mean) / (spread + 1e-14).sqrt()  # of equal logits the root alone would have no gradient


def decoupled(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    detach: bool = True,
) -> Tensor:
    """(alpha KL of the image's class against all others + beta KL among the others) T^2 of softened logits (B, C).

    Zhao et al., CVPR 2022, equation 7 (TCKD and NCKD). KL itself has alpha 1 and, for beta, the teacher's probability
    of all others. Of labels (B, C), which mixup gives, the image's class is the one with the largest share.

    >>> student, teacher, labels = torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])
    >>> decoupled(student, teacher, labels, beta=0.0), decoupled(student, teacher, labels, alpha=0.0, beta=1.0)
    (tensor(0.2291), tensor(0.1109))
    """
    student, teacher = _classes(student) / temperature, _classes(teacher.detach() if detach else teacher) / temperature
    classes = labels if labels.dim() == 1 else labels.argmax(1)
    own = F.one_hot(classes, student.shape[1]).bool()
    (log_q, log_q_rest), (log_p, log_p_rest) = (_decoupled(x, own) for x in (student, teacher))
    ours, theirs = ((p.exp() * (p - q)).sum(1).mean() for p, q in ((log_p, log_q), (log_p_rest, log_q_rest)))
    return temperature**2 * (alpha * ours + beta * theirs)


def _decoupled(logits: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities (B, 2) of its own class and of all others, and (B, C) of each among those."""
    rest = logits.masked_fill(own, -torch.inf)
    pair = torch.stack([logits.masked_fill(~own, 0).sum(1), rest.logsumexp(1)], 1)
    # What stands for its own class is far below all others, but finite: infinities have no gradient.
    return F.log_softmax(pair, 1), F.log_softmax(logits.masked_fill(own, logits.detach().amin() - 1000), 1)


def correlation(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    *,
    beta: float = 2.0,
    gamma: float = 2.0,
    detach: bool = True,
) -> Tensor:
    """(beta d over each image's classes + gamma d over each class's images) T^2, d = 1 - Pearson's correlation.

    Of softened probabilities, logits (B, C): DIST, Huang et al., NeurIPS 2022, equations 6 to 10. Images are those of
    all devices.

    >>> student, teacher = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[0.0, 3.0], [1.0, 0.0]])
    >>> correlation(student, teacher), correlation(teacher, student, gamma=0.0)
    (tensor(0.), tensor(0.))
    """
    student, teacher = (
        gather(F.softmax(_classes(x) / temperature, 1)) for x in (student, teacher.detach() if detach else teacher)
    )
    return temperature**2 * (beta * _apart(student, teacher) + gamma * _apart(student.T, teacher.T))


def _apart(left: Tensor, right: Tensor) -> Tensor:
    """1 - the correlation of rows with rows, its mean over rows."""
    left, right = (x - x.mean(1, keepdim=True) for x in (left, right))
    return 1 - F.cosine_similarity(left, right, dim=1).mean()


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0, *, detach: bool = True) -> Tensor:
    """Cross entropy of softened logits (B, C) with the teacher's softened ones: `kl` plus entropy, without the T^2.

    >>> student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, 2.0]])
    >>> soft_cross_entropy(student, teacher), soft_cross_entropy(teacher, teacher)
    (tensor(0.6931), tensor(0.3653))
    """
    student, teacher = _classes(student), _classes(teacher.detach() if detach else teacher)
    return F.cross_entropy(student / temperature, F.softmax(teacher / temperature, dim=1))


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """CE of each of several labels, there or not, with logits and labels (B, C): the mean over labels, nats.

    Labels that are there count by the weight of their column where there are some (`weighted`: --pos-weight).

    >>> binary_cross_entropy(torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 0.0]]))  # log 2
    tensor(0.6931)
    """
    logits = _full(logits)
    weights = None if _class_weights is None else _class_weights.to(logits)
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits), pos_weight=weights)


def binary_kl(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, *, eps: float = 0.0, detach: bool = True
) -> Tensor:
    """KL(teacher || student) of each of several labels, there or not, with logits (B, C): the mean over labels, T^2.

    As `kl` of the two logits (z, 0) of each label; `eps` is added to both probabilities of the teacher.

    >>> student, teacher = torch.zeros(1, 1), torch.tensor([[2.0]])
    >>> binary_kl(student, teacher), kl(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]))
    (tensor(0.3278), tensor(0.3278))
    """
    student, teacher = _classes(student), _classes(teacher.detach() if detach else teacher)
    total = student.new_zeros(())
    for sign in (1, -1):  # there, and not there
        log_q = F.logsigmoid(sign * student / temperature)
        log_p = F.logsigmoid(sign * teacher / temperature)
        p = log_p.exp()
        if eps:
            p = p + eps
            log_p = p.log()
        total = total + (p * (log_p - log_q)).mean()
    return temperature**2 * total


def soft_binary_cross_entropy(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, *, detach: bool = True
) -> Tensor:
    """Cross entropy of each softened label (B, C) with the teacher's: `binary_kl` plus entropy, without the T^2.

    >>> soft_binary_cross_entropy(torch.zeros(1, 1), torch.tensor([[2.0]]))
    tensor(0.6931)
    """
    student, teacher = _classes(student), _classes(teacher.detach() if detach else teacher)
    return F.binary_cross_entropy_with_logits(student / temperature, torch.sigmoid(teacher / temperature))


def memory_scores(memory: Tensor, embeddings: Tensor, temperature: float) -> Tensor:
    """Logarithms (B, 1 + K) of how alike embeddings (B, D) and rows of a memory (B, 1 + K, D) are: e^(cosine / T) / Z.

    The constant Z makes the mean over the whole batch 1 (MCL-OKD, Yang et al. 2020, whose scores are these / N).

    >>> memory_scores(torch.eye(2)[None], torch.tensor([[1.0, 0.0]]), 0.5).exp()  # e^2 and e^0, over their mean
    tensor([[1.7616, 0.2384]])
    """
    return all_memory_scores([(memory, embeddings)], temperature)[0]


def all_memory_scores(pairs: Sequence[tuple[Tensor, Tensor]], temperature: float) -> list[Tensor]:
    """`memory_scores` of pairs of memory and embeddings; several ranks tell each other of all of them in one message.

    >>> [scores] = all_memory_scores([(torch.eye(2)[None], torch.tensor([[1.0, 0.0]]))], 0.5)
    >>> torch.equal(scores, memory_scores(torch.eye(2)[None], torch.tensor([[1.0, 0.0]]), 0.5))
    True
    """
    with torch.autocast(pairs[0][1].device.type, enabled=False):  # exponents of ten and more need the precision
        alike = [torch.einsum("bkd,bd->bk", _full(rows), _full(each)) / temperature for rows, each in pairs]
    means = [(torch.logsumexp(each.flatten(), 0) - math.log(each.numel())).detach() for each in alike]
    of_ranks = gather(torch.stack(means)[None])  # the logarithms of means over parts of equal size
    means_of_all = torch.logsumexp(of_ranks, 0) - math.log(len(of_ranks))
    return [each - mean for each, mean in zip(alike, means_of_all, strict=True)]


def nce(log_scores: Tensor, population: int, *, eps: float = 1e-7, weights: Tensor | None = None) -> Tensor:
    """Noise contrastive estimation: the first of log scores (B, 1 + K) is of the data, K are noise, of a population.

    The loss of MCL-OKD (Yang et al. 2020) and CRD (Tian et al. 2020): -log h_0 - sum_k log (1 - h_k), with
    h = g / (g + K / population + eps) and g = score / population; eps is the authors'. `weights` (B,) are of images.

    >>> scores = torch.tensor([[1.76, 0.24]]).log()  # the first is of the data, as it should be
    >>> nce(scores, 100) < nce(scores.flip(1), 100)
    tensor(True)
    """
    log_g = _full(log_scores) - math.log(population)
    noise = (log_scores.shape[1] - 1) / population
    all_told = log_g.exp() + noise + eps
    truth = log_g[:, 0] - all_told[:, 0].log()
    each = truth + (noise / all_told[:, 1:]).log().sum(dim=1)
    return -(each if weights is None else weights.to(each) * each).mean()


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of feature maps (B, D, H, W), the teacher's a constant (FitNets, Romero et al. 2015).

    >>> feature_mse(torch.zeros(1, 8, 4, 4), 2 * torch.ones(1, 8, 4, 4))
    tensor(4.)
    """
    return F.mse_loss(_full(student), _full(teacher.detach()))


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """The same of where two maps (B, D_i, H, W) are active: mean squares over D_i, of length 1 (Zagoruyko 2017).

    >>> left, right = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
    >>> attention_transfer(left, 5 * left), attention_transfer(left, right)
    (tensor(0.), tensor(1.))
    """
    student, teacher = (F.normalize(_full(x).square().mean(1).flatten(1)) for x in (student, teacher.detach()))
    return F.mse_loss(student, teacher)


def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """||G_s - G_t||^2 / B^2, G the rows, of length 1, of the images' inner products (Tung and Mori 2019).

    Maps (B, D_i, H, W) of any size; the teacher's is a constant.

    >>> unlike = torch.eye(2).view(2, 2, 1, 1)  # two images that have nothing in common
    >>> similarity(unlike, 3 * unlike), similarity(torch.ones(2, 8, 4, 4), unlike)
    (tensor(0.), tensor(0.2929))
    """
    student, teacher = (gather(_full(x).flatten(1)) for x in (student, teacher.detach()))
    return F.mse_loss(F.normalize(student @ student.T), F.normalize(teacher @ teacher.T))


def rampup(epoch: Tensor, length: Tensor | float) -> Tensor:
    """Sigmoid ramp exp(-5 (1 - e/R)^2) from epoch 0 to R, then 1 (Laine & Aila 2017); R = 0 is always 1.

    >>> rampup(torch.tensor([0.0, 40.0, 80.0, 99.0]), 80)
    tensor([0.0067, 0.2865, 1.0000, 1.0000])
    """
    length = torch.as_tensor(length, dtype=epoch.dtype, device=epoch.device)
    progress = torch.where(length > 0, epoch.clamp_min(0).minimum(length) / length.clamp_min(1e-12), 1.0)
    return torch.exp(-5 * (1 - progress) ** 2)


def _classes(x: Tensor) -> Tensor:
    """Logits (B, C) in full precision; of maps (B, K, H, W) the softmax over K would be no distribution of anything."""
    x = _full(x)
    if x.dim() != 2:
        advice = (
            "Labels are taught by cross_entropy."
            if x.dim() < 2
            else ("Heat maps are compared pixel by pixel: a method for --task pose (okdc methods).")
        )
        raise RecipeError(
            f"the distributions of two networks were to be compared, and one gives {tuple(x.shape)}; expected logits "
            f"(batch, classes). {advice}"
        )
    return x


def _full(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise RecipeError(f"a loss was given a {type(x).__name__}; expected one tensor, such as out.logits[0].")
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
