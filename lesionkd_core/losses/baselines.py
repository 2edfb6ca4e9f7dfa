"""The rivals: published distillers that the method is held against at the same budget (METHOD, Baselines).

Each is a pure function of the student's and the teacher's tensors; the teacher gets no gradient, sums
run in float32 (or float64) whatever comes in, and a batch given twice over has the same loss. The functions
of maps take activations, after the ReLU; `OnMaps` applies it, since the networks hand out maps before it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ranks
from ..networks import Network, match_levels
from .feature_refinement import Connector, require_same_size

if TYPE_CHECKING:
    from . import Step

Loss = Callable[[Tensor, Tensor], Tensor]


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    require_same_size(student, teacher)
    return _precise(student), _precise(teacher.detach())


def kd_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Logit distillation: the student learns how sure the teacher is of every pixel, not only its decision.

    L = T^2 mean KL(q || p), KL = q log(q / p) + (1 - q) log((1 - q) / (1 - p)), q = sigmoid(t / T),
    p = sigmoid(s / T): the paper's softmax over the two logits (z, 0). T^2 keeps the gradient's size
    when T changes.

    Parameters
    ----------
    student, teacher : (N, 1, H, W)
        Logits s and t.
    temperature : float
        T. Source of 4: the paper's range for small students (2.5 to 4), and what Zagoruyko & Komodakis 2017 use.

    Returns
    -------
    ()
        Mean over N and pixels.

    Source: Hinton et al. 2015, sections 2 and 3; there the hard labels weigh considerably less than this term.
    """
    student, teacher = (x / temperature for x in _pair(student, teacher))
    q = teacher.sigmoid()
    cross_entropy, entropy = (F.binary_cross_entropy_with_logits(x, q, reduction="none") for x in (student, teacher))
    return temperature**2 * (cross_entropy - entropy).mean()  # of differences: that of two means would lose the digits


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """FitNets hint: the regressed student map should equal the teacher's.

    L = 1/2 mean (r(v) - u)^2, with hint u, guided map v and regressor r.

    Parameters
    ----------
    student, teacher : (N, C, H, W)
        r(v), the student's map brought to the teacher's channels, and u; activations of one nonlinearity.

    Returns
    -------
    ()
        Mean over all elements: the paper's 1/2 ||u - r(v)||^2 would grow with image and teacher.

    Source: Romero et al. 2015, equation 3. There the hint trains the lower half first, alone; here it
    is a term beside L_seg as every rival, since all arms share one budget of steps.
    """
    return 0.5 * F.mse_loss(*_pair(student, teacher))


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Attention transfer: the student should be active where the teacher is, in whichever channels.

    L = mean (Q_S / ||Q_S|| - Q_T / ||Q_T||)^2, Q = sum over c of A_c^2, each image's Q one vector over pixels.
    The scale of neither map matters.

    Parameters
    ----------
    student, teacher : (N, C_S, H, W), (N, C_T, H, W)
        Activations A; channels may differ.

    Returns
    -------
    ()
        Mean over N and pixels, as in the authors' code, whose weight is 1000.

    Source: Zagoruyko & Komodakis 2017, equation 2 with F_sum^2 and p = 2.
    """
    ours, theirs = (_precise(x).square().sum(1) for x in (student, teacher.detach()))
    require_same_size(ours, theirs)
    return F.mse_loss(F.normalize(ours.flatten(1), dim=1), F.normalize(theirs.flatten(1), dim=1))


def cwd_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Channel-wise distillation: every channel is a distribution over pixels, and the student's should be the teacher's.

    L = T^2 / C sum over c and i of phi(t_ci) log(phi(t_ci) / phi(s_ci)), phi(x_ci) = exp(x_ci / T) / sum_j exp(x_cj / T).
    A constant added to a channel changes nothing.

    Parameters
    ----------
    student, teacher : (N, C, H, W)
        Logits, as the paper prefers, or activations of equal C.
    temperature : float
        T. Source of 4: the authors' published command, which goes with a weight of 3 on logits.

    Returns
    -------
    ()
        Mean over N and C of the sum over pixels.

    Source: Shu et al. 2021.
    """
    ours, theirs = ((x.flatten(2) / temperature).log_softmax(2) for x in _pair(student, teacher))
    return temperature**2 / (student.shape[0] * student.shape[1]) * F.kl_div(ours, theirs, reduction="sum", log_target=True)


def dist_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """DIST: the student's probabilities should rise and fall with the teacher's, not equal them.

    L = beta L_inter + gamma L_intra, each T^2 (1 - rho) with Pearson's rho between student and teacher:
    inter over a pixel's classes, averaged over pixels; intra over the pixels of the whole batch, averaged
    over classes (the authors' reading of the paper for segmentation).

    Two classes, probabilities (p, 1 - p): L_inter degenerates. Less its mean the vector is (p - 1/2) (1, -1),
    so rho is +1 where student and teacher decide alike and -1 elsewhere: twice the share of pixels decided
    differently, a step function with no gradient (in the authors' code, whose denominator holds 1e-8, one that
    only bursts at p = 1/2). It is left out. L_intra is the same for both classes, so one is computed:
    L = T^2 (1 - rho(p_S, p_T)), and beta has nothing to weigh. The first author, asked about two classes:
    L_inter holds little then, L_intra may still help.

    Parameters
    ----------
    student, teacher : (N, 1, H, W)
        Logits; p = sigmoid(logit / T).
    temperature : float
        T. Source of 1: the authors' segmentation code, as for gamma = 1; they advise 4 where the task is easy.

    Returns
    -------
    ()
        0 for probabilities that agree up to a positive scale and a shift, T^2 for unrelated, 2 T^2 for opposed ones;
        half of T^2 and no gradient where either network gives every pixel one value.

    Source: Huang et al. 2022.
    """
    ours, theirs = (F.batch_norm((x / temperature).sigmoid(), None, None, training=True, eps=1e-12) for x in _pair(student, teacher))
    return temperature**2 / 2 * F.mse_loss(ours, theirs)  # of standardized a and b: 1 - mean(a b) = mean (a - b)^2 / 2


class OnLogits(nn.Module):
    """A rival that compares logits: `kd_loss`, `cwd_loss` or `dist_loss`, with its temperature bound.

    `whole` is for a loss that is no mean over cases: every rank then computes it of the whole batch.
    """

    def __init__(self, loss: Loss, whole: bool = False) -> None:
        super().__init__()
        self.loss, self.whole = loss, whole

    def forward(self, step: Step) -> Tensor:
        """Full-size logits (N, 1, H, W) of both networks -> ()."""
        both = step.logits, step.teacher_logits
        return self.loss(*(ranks.gather(x.float()) for x in both) if self.whole else both)


class OnMaps(nn.Module):
    """A rival that compares feature maps, summed over levels: `hint_loss`, `attention_loss` or `cwd_loss`.

    Parameters
    ----------
    student, teacher : networks
        Read for channels; neither is kept.
    levels : tuple of str
        Names of maps of equal stride; see `match_levels`.
    loss : function of (student, teacher) activations
    regress : bool
        Bring the student's activations to the teacher's channels: 1x1 convolution, BN, ReLU. FitNets asks
        for the teacher's nonlinearity after its regressor; the BN, which L_feat's connector has too, keeps
        alive the outputs that the few nonnegative channels of a small student would leave below zero for good.
    """

    def __init__(self, student: Network, teacher: Network, levels: tuple[str, ...], loss: Loss, regress: bool) -> None:
        super().__init__()
        self.pairs, self.loss = match_levels(student, teacher, levels), loss
        norms, teacher_norms = student.feature_norms(), teacher.feature_norms()
        self.regressors = nn.ModuleList(
            nn.Sequential(Connector(norms[s].num_features, teacher_norms[t].num_features), nn.ReLU()) if regress else nn.Identity()
            for s, t in self.pairs
        )

    def forward(self, step: Step) -> Tensor:
        """Maps before their last ReLU, by name -> ()."""
        with torch.autocast(step.logits.device.type, enabled=False):
            return reduce(operator.add, [
                self.loss(regressor(F.relu(_precise(step.maps[s]))), F.relu(step.teacher_maps[t]))
                for regressor, (s, t) in zip(self.regressors, self.pairs)
            ])
