"""TWA: train the averaging coefficients.

Shape suffixes: G = groups of tensors (blocks), N = candidates.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from ckptavg.coefficients import EVERYTHING
from ckptavg.errors import UsageError, counted
from ckptavg.objective import SCORED_ALONE, Hessian, Learned, Losses, Objective, SelectBy, Stage, Strategy, check_split
from ckptavg.score import Split

LINEAR = "linear constraint"  # the panel of the fit for models that are linear in their weights
FAR = (-1.0, 2.0)  # affine coefficients outside hint at overfitting of a small data set


@dataclass(frozen=True, kw_only=True)
class TWA(Strategy):
    """Train the coefficients by gradient descent in the subspace spanned by the candidates.

    w(x) = w̄ + Σ_i x_i p_i with the mean w̄ and p_i = (w_i − w̄)/‖w_i − w̄‖ (0 if 0/0), starting at x = 0. So
    β_i = 1/N + x_i/‖w_i − w̄‖ − (1/N)·Σ_j x_j/‖w_j − w̄‖, which sums to 1 and may be negative: the authors' affine form.
    The simplex form is β = softmax(N·x_i/‖w_i − w̄‖), the chart of the convex combinations that agrees with the affine
    form to first order at x = 0, so that a learning rate has the same effect in both. Layer-wise, every block of
    tensors has its own x.

    Training uses validation data (TWA-v, the default if available) or training data (TWA-t), AdamW, a linear
    warm-up over a fifth of the steps and a cosine decay to 0. The mean and ten points of the training are scored, and
    then the single candidates; the best of all is the result, by ``--select-by``. ``--patience`` monitors the score on
    a held-out half of the validation data instead (all of it for TWA-t) and returns the coefficients of the best epoch,
    including the initial mean.

    Differences from the authors' code: unless ``--lr`` is given, x is measured in units of the mean distance
    ‖w_i − w̄‖ (of each block), and the learning rate is 0.24/N on validation data: a step changes each coefficient by
    up to 0.24/N, in the simplex form each logit by up to 0.24, whatever the scale of the model and the number of
    candidates (``scripts/benchmark/answers.py``). On training data, where larger steps fit the label noise, it is a
    hundredth of that (``scripts/benchmark/rates.py``). At least 200 steps are taken unless ``--epochs`` is given.
    Clipping and the SAM step act on the gradient of x instead of that of all D parameters, and the SAM gradient
    replaces the plain one instead of being added to it at a tenth.

    ``--constraint linear`` leaves the sum of the coefficients free too (OWA), for models that are linear in their
    weights, such as logistic regressions of several shards: the outputs of all candidates are computed once, and
    the mean loss + (ridge/2)·‖β‖² is minimised exactly over all β. Other models are refused; ``--force-linear`` trains
    β_i = 1/N + x_i/‖w_i − w̄‖ by gradients for them, though offsets that the weights share do not survive another sum.

    References:
        Li et al. 2023, Trainable Weight Averaging, ICLR 2023 and arXiv:2205.13104v3. SAM: Foret et al. 2021,
        arXiv:2010.01412. The simplex form is the learned soup of Wortsman et al. 2022 (arXiv:2203.05482) in other
        units. OWA: Izbicki and Shelton 2019, ECML-PKDD 2019; see `ckptavg.strategies.solvers.linear.fit`.
    """

    on: Annotated[
        Literal["val", "train"] | None, "Data to fit the coefficients to; default val if the task has it.",
        "both solvers",
    ] = None  # fmt: skip
    solver: Annotated[Literal["gradient", "quadratic"], "Training or a quadratic model."] = "gradient"
    hessian: Annotated[Hessian, "Second derivatives to use.", "quadratic solver"] = "auto"
    ridge: Annotated[
        float | Literal["auto"] | None,
        "Shrinkage to the mean, in mean curvatures, or to 0 (linear), λ of the loss + λ/2·‖β‖²; auto, the default: by "
        "cross-validation.",
        "quadratic solver", LINEAR,
    ] = None  # fmt: skip
    constraint: Annotated[
        Literal["affine", "simplex", "linear"] | None,
        "simplex: no negative coefficients; linear: any sum, for linear models; default affine, or by "
        "cross-validation.",
    ] = None  # fmt: skip
    force_linear: Annotated[
        bool, "With --constraint linear: train by gradients, of any model, instead of solving exactly."
    ] = False  # fmt: skip
    layerwise: Annotated[bool, "Separate coefficients for every module.", "gradient solver"] = False
    block_size: Annotated[
        int | None, "Separate coefficients for every N elements; 0: per tensor.", "gradient solver"
    ] = None
    epochs: Annotated[
        int | None, "Passes over the data; default 10, or as many as give 200 steps.", "gradient solver"
    ] = None
    lr: Annotated[
        float | None,
        "Learning rate of x in weight units (authors: 0.001); default 0.24/N (train 0.0024/N) of the mean distance.",
        "gradient solver",
    ] = None
    optimizer: Annotated[Literal["adamw", "sgd"], "Optimizer of x; sgd has momentum 0.9.", "gradient solver"] = "adamw"
    weight_decay: Annotated[float, "Decay towards the mean of all candidates.", "gradient solver"] = 0.0
    clip: Annotated[float | None, "Largest norm of the gradient of x.", "gradient solver"] = None
    sam_rho: Annotated[float, "Radius of a sharpness-aware (SAM) step.", "gradient solver"] = 0.0
    patience: Annotated[int | None, "Stop after N epochs without a better held-out score.", "gradient solver"] = None
    select_by: Annotated[SelectBy, "What chooses: auto is the loss if the metric agrees.", "both solvers"] = "auto"
    evaluations: Annotated[int, "Scores to spend with --score-cmd or --lm-eval.", "search by scores"] = 100

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("patience", 1), ("block_size", 0), ("evaluations", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
        if self.patience is not None and self.select_by != "auto":
            message = f"--select-by {self.select_by} chooses among scored points, and --patience takes the best epoch"
            raise UsageError(message, hint="give only one of them")
        for name in ("lr", "clip"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise UsageError(f"--{name} must be greater than 0, not {value}")
        for name in ("weight_decay", "sam_rho", "ridge"):
            if (value := getattr(self, name)) not in (None, "auto") and not 0 <= value < math.inf:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 0, not {getattr(self, name)}")
        if self.force_linear and self.constraint != "linear":
            raise UsageError("--force-linear goes with --constraint linear")
        if self.constraint == "linear" and self.solver == "quadratic":
            raise UsageError("--constraint linear is not for the quadratic solver", hint="leave out --solver")

    @property
    def runs(self) -> str:
        """The panel of the settings that apply: that of the solver, or of the exact fit of a linear model."""
        exact = self.constraint == "linear" and not self.force_linear
        return LINEAR if exact else f"{self.solver} solver"

    def check(self, n: int, splits: Collection[Split], *, bounded: bool) -> None:
        """See `Strategy.check`."""
        check_split(self.on, splits)
        if self.solver == "quadratic" and not splits:
            raise UsageError("the quadratic solver needs a loss, not scores alone", hint="choose --solver gradient")
        if self.constraint == "linear" and not splits:
            message = "--constraint linear needs a loss and the model's outputs, not scores alone"
            raise UsageError(message, hint="choose --constraint affine")

    def stages(self, n: int, losses: Losses | None, scored_on: Split) -> Sequence[Stage]:
        """See `Strategy.stages`."""
        if losses is None:
            return (Stage("searching by scores", scores=self.evaluations),)
        fit = self.on or scored_on
        if self.runs == LINEAR:
            from ckptavg.objective.output_losses import CHECKS, STAGE
            from ckptavg.strategies.solvers.linear import FITTING

            return Stage(STAGE, forward=n * losses.batches(fit) + CHECKS), Stage(FITTING)
        if self.solver == "quadratic":
            from ckptavg.objective import curvature_stages
            from ckptavg.strategies.solvers.cross_validated import MOVES, VERIFYING

            verifying = Stage(VERIFYING, scores=1 + MOVES, singles=True)
            return curvature_stages(n, losses.batches(fit), verifying, 1 + MOVES)
        from ckptavg.strategies.solvers.subspace import SCORED, TRAINING, default_epochs

        per_epoch = losses.batches("fit" if self.patience and fit == scored_on else fit)
        epochs = self.epochs or default_epochs(per_epoch)
        count = epochs * per_epoch * (2 if self.sam_rho else 1)
        scores = 1 + (epochs if self.patience else min(epochs, SCORED))
        training = Stage(TRAINING, forward=count, backward=count, scores=scores)
        return (training,) if self.patience else (training, SCORED_ALONE)

    def learn(self, objective: Objective) -> Learned:
        """See `Strategy.learn`."""
        from ckptavg.strategies.solvers import cross_validated, linear, score_search, subspace

        losses, ridge = objective.losses, None if self.ridge == "auto" else self.ridge
        layerwise = self.layerwise or self.block_size is not None
        if self.constraint == "linear":
            assert losses is not None  # see `check`
            if not self.force_linear:
                return linear.fit(objective, losses, on=self.on, ridge=ridge, select_by=self.select_by)
            losses.check_any_sum()
        if self.solver == "quadratic":
            assert losses is not None and self.constraint != "linear"  # see `check` and `__post_init__`
            learned = cross_validated.descend(
                objective, losses, on=self.on, hessian=self.hessian, constraint=self.constraint, ridge=ridge,
                select_by=self.select_by,
            )  # fmt: skip
        elif losses is None:
            learned = score_search.cma_es(
                objective, constraint=self.constraint or "affine", evaluations=self.evaluations
            )  # fmt: skip
        else:
            learned = subspace.train(
                objective, losses, on=self.on, groups=losses.blocks(self.block_size) if layerwise else EVERYTHING,
                constraint=self.constraint or "affine", epochs=self.epochs, lr=self.lr, optimizer=self.optimizer,
                weight_decay=self.weight_decay, clip=self.clip, sam_rho=self.sam_rho, patience=self.patience,
                select_by=self.select_by,
            )  # fmt: skip
        if self.constraint == "linear":
            free = "coefficients of any sum were forced: offsets that all candidates share are scaled by it too"
            coefficients = replace(learned.coefficients, linear=True)
            learned = replace(learned, coefficients=coefficients, notes=[*learned.notes, free])
        far = [c for row in learned.coefficients.values for c in row if not FAR[0] <= c <= FAR[1]]
        if not far:
            return learned
        ways = "--weight-decay or --patience" if self.solver == "gradient" else "--ridge 1"
        note = (
            f"{counted(len(far), 'coefficient')} outside [−1, 2], up to {max(far, key=abs):.2f}, suggest overfitting: "
            f"try --constraint simplex, {ways}"
        )
        return replace(learned, notes=[*learned.notes, note])


STRATEGY: type[Strategy] = TWA
