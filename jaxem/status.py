"""How a fit ended: one integer a fit, and what to do about it."""

from enum import IntEnum


class Status(IntEnum):
    """Why the iteration stopped (REMEDIES explains each). Results hold it as an int32 array, one entry a restart."""

    RUNNING = -1
    CONVERGED = 0
    MAX_STEPS = 1
    NONFINITE = 2
    DEGENERATE = 3
    DECREASED = 4
    STALLED = 5


REMEDIES = {
    Status.RUNNING: "the fit is not finished: it was read before its loop ended",
    Status.MAX_STEPS: (
        "the step limit came first: raise max_steps, loosen tol, or wrap the algorithm in an accelerator; one that "
        "draws at random never tells that it has converged, but its average may (jaxem.averaged)"
    ),
    Status.NONFINITE: (
        "a step gave NaN or infinity; the last finite parameters are returned. Check the data and the start for "
        "non-finite or extreme values, standardise the columns, or fit in float64"
    ),
    Status.DEGENERATE: (
        "a component died, or its covariance is singular to this precision: it collapsed onto a few rows or onto a "
        "plane, where the likelihood has no maximum. Use a prior (jaxem.default_prior(x, num_components, covariance); "
        "jaxem.pseudo_rows for other families; jaxem.Dirichlet on the weights where components die; pseudo_steps of a "
        "linear system), fewer components, a simpler covariance, no columns that are constant or repeat each other, "
        "more restarts, or float64. In a factor model a uniqueness went to 0 (a Heywood case): take fewer factors, or "
        "hold it by jaxem.Fixed. A gate that tells all rows apart becomes a step: give it a ridge. In an item response "
        "model all answered an item alike, or its slope went to infinity: drop it. In a mixed model a variance of "
        "random effects is 0: leave these out"
    ),
    Status.DECREASED: (
        "the objective fell by more than rounding; the parameters before the fall are returned. For exact EM that "
        "means an m_step that does not maximise q_function + log_prior, or an e_step that does not fit the likelihood, "
        "or an `expect` whose posterior is not the model's (one that is meant so says `monotone = False`); "
        "or a covariance so nearly singular that rounding outweighs what a step gains: then do as for DEGENERATE"
    ),
    Status.STALLED: (
        "steps no longer move the parameters by more than rounding, or an M-step no longer moves them at all, while "
        "more than tol may still be left to gain. Fit in float64, wrap the algorithm in an accelerator "
        "(jaxem.squarem), or ask for less with a larger tol; where an optimiser makes the M-step, give it larger steps "
        "or another one"
    ),
}


class EMError(RuntimeError):
    """A fit that did not converge, with the remedy; `.status` holds the Status."""

    def __init__(self, status: Status, detail: str = ""):
        self.status = status
        super().__init__(f"{status.name}: {REMEDIES[status]}{detail}")
