"""How far apart two numeric results may lie: bounds that follow from the arithmetic, not from trial."""

import torch
from torch import Tensor


def assert_no_worse_than(actual: Tensor, baseline: Tensor, exact: Tensor, *, factor: float = 2.0) -> None:
    """`actual` may lie at most `factor` times as far from `exact` as `baseline` does.

    exact: the float64 reference. baseline: the same reference run in `actual`'s dtype, never the package itself (both
    could be wrong alike). The unavoidable error of storing `exact` in that dtype comes on top, so that a baseline that
    happens to be exact is no demand for perfection. All three of one shape; NaN and infinity never pass.
    """
    if not actual.shape == baseline.shape == exact.shape:
        raise ValueError(f"Shapes must agree; got {actual.shape}, {baseline.shape} and {exact.shape}.")
    if exact.dtype != torch.float64 or baseline.dtype != actual.dtype:
        raise ValueError(
            "`exact` must be float64 and `baseline` of `actual`'s dtype; "
            f"got {exact.dtype}, and {baseline.dtype} for {actual.dtype}."
        )
    storing = distance(exact.to(actual.dtype), exact)
    allowed = factor * distance(baseline, exact) + storing
    error = distance(actual, exact)
    assert error <= allowed, f"largest error {error:.1e}; the baseline allows {allowed:.1e}"


def assert_close_to_scale(actual: Tensor, expected: Tensor, *, relative: float) -> None:
    """The largest difference is at most `relative` times the largest value of `expected`."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = distance(actual, expected) / expected.double().abs().max().item()
    assert error <= relative, f"largest relative error {error:.1e}; allowed {relative:.1e}"


def distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference, in float64; NaN if either holds one."""
    return (a.double() - b.double()).abs().max().item()
