"""Looking at an online experiment before its end: an interval that holds at all looks at once, and the harm without it.

A p-value of `ab_test.lift` holds for one look, planned beforehand. The confidence sequence here covers the difference
at all looks with the chance promised, so that the experiment may be stopped at any. It is the normal mixture of Robbins
(1970): the mixture sequential probability ratio test of Johari, Pekelis and Walsh (2015; with Koomen 2022, "Always
Valid Inference"), tuned as in Howard, Ramdas, McAuliffe and Sekhon (2021), and valid for estimates like ours
asymptotically (Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas 2021). [C]: the paper says nothing of it.

It takes an estimate and its standard error at each look, nothing else, so it serves plain and CUPED lifts. Users may
come back at later looks: their days being alike, the estimate so far is to the later one as a sum of independent steps
whose time is 1 / standard_error ** 2, which is all that the test asks. Like the delta method it is asymptotic: let each
arm have some hundreds of users before the first look. In simulated A/A experiments of 20 looks and very uneven users it
rejected 1 to 2 % from 40 users of both arms at the first look on, but 6 to 8 % with 8 to 18 of them.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import lambertw
from scipy.stats import norm

from rgalign.evaluation.bootstrap import Interval


class Monitored(NamedTuple):
    """What always-valid inference says at each look, (..., looks), and where it could have stopped, (...)."""

    difference: Interval
    p_value: np.ndarray  # never rises: what was found stays found
    first: np.ndarray  # the first look, from 0, whose interval excludes zero; -1 if none does


def always_valid(difference, standard_error, mixture: float, *, level: float = 0.95) -> Monitored:
    """Interval and p-value of a difference at every look, both valid at all looks at once.

    difference, standard_error  (..., looks): `ab_test.lift` of all sums up to each look
    mixture   > 0, in units of the difference: the standard deviation of the differences that the test is tuned to. Any
              is valid if it is fixed before the experiment; `mixture_for` picks one
    level     of the interval: the chance that it covers the true difference at all looks
    With s = standard_error ** 2 and v = mixture ** 2, the likelihood ratio of a true difference drawn from N(d, v)
    against d itself is sqrt(s / (s + v)) exp(v (difference - d) ** 2 / (2 s (s + v))). If d is true it is a martingale
    of mean 1, and exceeds 1 / (1 - level) at any look with a chance of at most 1 - level (Ville). A look without a
    standard error, or with 0 (no click yet), says nothing: its interval is infinite.
    Raises ValueError for shapes that differ or a mixture that is not above 0.
    """
    difference, standard_error = (np.asarray(values, dtype=np.float64) for values in (difference, standard_error))
    if difference.shape != standard_error.shape or not difference.ndim:
        raise ValueError(
            f"difference and standard_error have the shapes {difference.shape} and {standard_error.shape}; "
            "expected one shape (..., looks)"
        )
    if not mixture > 0:
        raise ValueError(f"mixture is {mixture}; expected a number above 0, such as mixture_for gives")
    known = standard_error > 0
    s, v = np.where(known, standard_error, 1) ** 2, mixture**2
    evidence = v * difference**2 / (2 * s * (s + v)) - np.log1p(v / s) / 2  # log of the likelihood ratio at d = 0
    evidence = np.where(known, evidence, -np.inf)
    half = np.sqrt(s * (s + v) / v * (np.log1p(v / s) - 2 * np.log(1 - level)))
    half = np.where(known, half, np.inf)
    estimate = np.where(known, difference, 0)
    excludes = np.abs(estimate) > half
    first = np.where(excludes.any(axis=-1), excludes.argmax(axis=-1), -1)
    p_value = np.exp(-np.maximum(np.maximum.accumulate(evidence, axis=-1), 0))
    return Monitored(Interval(difference, estimate - half, estimate + half), p_value, first)


def mixture_for(standard_error: float, *, level: float = 0.95) -> float:
    """The mixture whose interval is narrowest where the difference has this standard error.

    standard_error  `ab_plan.planned_error` at the look that matters most, such as the last; never the one measured in
                    the experiment itself, which the mixture must not know
    Exact, by Lambert's W (Howard et al. 2021).
    """
    return float(standard_error * np.sqrt(-lambertw(-((1 - level) ** 2) / np.e, -1).real - 1))


def rejected_by_look(p_values, *, alpha: float = 0.05, level: float = 0.95) -> Interval:
    """The share of experiments found significant at some look so far: the harm of peeking, if they are A/A.

    p_values  (experiments, looks): of the fixed horizon (`ab_test.lift`) or always valid
    Returns (looks,), with Wilson's interval of the share; each look includes those before. NaN never rejects.
    """
    p_values = np.asarray(p_values)
    rejected = np.maximum.accumulate(p_values < alpha, axis=-1)
    share, experiments, z = rejected.mean(axis=0), len(rejected), norm.ppf((1 + level) / 2)
    middle = (share + z**2 / (2 * experiments)) / (1 + z**2 / experiments)
    half = z * np.sqrt(share * (1 - share) / experiments + (z / (2 * experiments)) ** 2) / (1 + z**2 / experiments)
    return Interval(share, middle - half, middle + half)
