"""What one recording holds: plain frozen values, no torch, nothing of ours.

Conventions, everywhere in a trace:

* ``None`` means *not measured*; it is never written as 0. NaN and Inf are measurements.
* Fully qualified names are those of ``nn.Module.named_modules``; the root is ``""``.
* With several steps every number is the median over the steps that measured it.
* ``N`` is the batch size of the run: the leading dimension that the inputs share.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

SCHEMA_VERSION = 1


class Coverage(StrEnum):
    """Why a row has the numbers it has; never empty."""

    MEASURED = "measured"
    NEVER_CALLED = "never called"
    """The module did not run in this forward, nor did any op consume its parameters."""
    NO_GRAD = "no grad"
    """It ran, and no gradient arrived: under ``no_grad``, detached, or its output was not used by the loss."""
    FROZEN = "frozen"
    """It ran with ``requires_grad=False`` parameters and nothing before it asks for a gradient."""
    BYPASSED = "bypassed"
    """Its parameters were consumed by a functional call or a fused kernel; its own call was never seen."""
    NON_TENSOR = "non-tensor output"
    """It returned nothing floating: an integer tensor, ``None``, or some other object."""
    UNUSED = "unused"
    """Parameters only: the module ran, and no op consumed this parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorStatistics:
    """Statistics of one tensor's values at the moment its producer returned it."""

    mean: float | None = None
    std: float | None = None
    """Over all elements, population form (divided by n)."""
    rms: float | None = None
    """f: sqrt(mean(h^2)) over all elements."""
    absmax: float | None = None
    zero_fraction: float | None = None
    """Share of elements that are exactly 0."""
    nonfinite: int | None = None
    """How many elements are NaN or Inf; exact."""
    signal: float | None = None
    """c: RMS over units of the across-sample standard deviation. None for fewer than two samples."""
    common_mode: float | None = None
    """CMF: ||mean_i h||^2 / mean_i ||h||^2, in 0..1. None for fewer than two samples."""
    sample: int | None = None
    """Elements that zero_fraction, signal and common_mode were taken from; equal to numel when exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """One floating output leaf of one call of one module."""

    order: int
    """Position in execution order, from 0; modules never called come last, in definition order."""
    name: str
    """Fully qualified name; "" for the root."""
    call: int
    """The how-manieth call of this module in the forward, from 0."""
    output: str
    """Path of the leaf in a nested output ("0", "hidden_states.3", "logits"); "" for a lone tensor."""
    type: str
    """Class name of the module."""
    shape: tuple[int, ...]
    """Empty for a 0-d tensor and where there is no tensor (see ``coverage``)."""
    dtype: str
    """"float32", "bfloat16"; "" where there is no tensor."""
    coverage: Coverage
    activation: TensorStatistics | None = None
    gradient_norm: float | None = None
    """g: sqrt(mean_i ||dL/dh_i||_2^2), L2 over all dimensions but the batch's."""
    gradient_nonfinite: int | None = None
    note: str = ""
    """Why, where ``coverage`` alone does not say ("recomputed by a checkpoint", "returned by a sibling")."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphCut:
    """Where the path from a parameter to the loss ends although values flow on."""

    op: str
    """The op that dropped the gradient: "detach", "data", "no_grad", "argmax", "item"; "" when unknown."""
    module: str
    """The last module before the cut (for ``encoder(x).detach()`` it is ``encoder``)."""
    where: str
    """Fully qualified name of the module whose forward runs the op."""
    source: str
    """"model.py:31", or "" where there is no source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterRecord:
    """One parameter; tied ones once, under the first name, with the others in ``aliases``."""

    name: str
    aliases: tuple[str, ...]
    module: str
    """Fully qualified name of the module that owns it."""
    shape: tuple[int, ...]
    dtype: str
    coverage: Coverage
    norm: float | None = None
    """L2 of the whole tensor."""
    gradient_norm: float | None = None
    gradient_nonfinite: int | None = None
    elasticity: float | None = None
    """E: ||W|| . ||dL/dW||, in units of the loss."""
    gradient_ratio: float | None = None
    """||dL/dW|| / ||W||; None for a zero parameter."""
    value_nonfinite: int | None = None
    """NaN or Inf elements of the parameter itself."""
    module_type: str = ""
    """Class name of the owning module."""
    requires_grad: bool = True
    in_optimizer: bool | None = None
    """None where no optimizer is known ("not checked")."""
    cut: GraphCut | None = None
    """Set where an op consumed the parameter and the path to the loss is cut."""
    update_ratio: float | None = None
    """U: ||W' - W|| / ||W|| of one true step of the optimizer; None for a zero parameter or a rate of 0."""
    update_lost: float | None = None
    """Share of the elements with a gradient that the step left as they were; float16 and bfloat16 only."""
    gradient_to_eps: float | None = None
    """r: RMS of the gradient's elements that are not 0, over the eps of an optimizer like Adam."""
    underflow: float | None = None
    """Share of the gradient's elements that are 0 and would not be from a larger loss; float16 only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrunkPoint:
    """One tensor T_k of the trunk, first (nearest the input) to last."""

    name: str
    """Fully qualified name of the module whose forward makes the tensor."""
    op: str
    """"linear", "conv2d", "lstm", "attention", "add" ..."""
    layer: int | None
    """``order`` of the layer row that is this very tensor, or None (a functional call inside a module)."""
    shape: tuple[int, ...]
    width: int
    """Units per position: channels or features. 0 where unknown."""
    gradient_norm: float | None
    gradient_nonfinite: int | None = None
    activation: TensorStatistics | None = None
    token_signal: float | None = None
    """RMS over units and samples of the across-token standard deviation; (batch, tokens, features) only."""
    token_common_mode: float | None = None
    """||mean_t h||^2 / mean_t ||h||^2 over tokens; (batch, tokens, features) only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trunk:
    """The tensors that carry the gradient from the loss back to the input (docs/numbers.md)."""

    kind: str
    """"residual" (outputs of residual adds), "weights" (outputs of weight layers) or "none"."""
    points: tuple[TrunkPoint, ...] = ()
    batch_norm: bool = False
    """True where a batch normalisation stands between two points."""
    path: str = ""
    """From where to where: "input_ids → loss", "x → outputs.aux", "x → loss via tower.0" where an earlier trunk
    has the same ends; "" where there is no trunk."""
    token_geometry: float | None = None
    """Which token is which: similarity of T_K to the first tensors, over tokens; None where there are no tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NonFiniteOrigin:
    """The first producer of a NaN or Inf whose own inputs are finite."""

    phase: str
    """"forward", "backward", or "parameter" (the value was there before anything ran)."""
    name: str
    """Fully qualified name of the module that ran it; of the parameter in phase "parameter"."""
    op: str
    """"log", "div", "linear"; "" where only the module is known."""
    source: str
    """"model.py:31", or ""."""
    value: str
    """"nan", "inf", "-inf", or "nan and inf"."""
    count: int
    """How many elements of the producer's output are not finite."""
    last_finite: str = ""
    """The neighbour on the clean side: the input it was made from (forward), the consumer (backward)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OverwrittenSkip:
    """An in-place op wrote over the tensor that the skip then carried."""

    op: str
    """"relu", "add" ..."""
    name: str
    """Fully qualified name of the module that ran it."""
    source: str
    """"model.py:31": the statement of the adding forward that led to it; "" where there is no source."""
    rebound: bool | None
    """True where that statement binds the result to the skip's own name (meant); None where there is no source."""
    change: float | None = None
    """||x' - x|| / ||x||: how far the op moved what the skip carries, x before it and x' when the add runs; inf
    for a zero x. Measured where ``rebound`` is not True."""
    distance: float | None = None
    """||y - (x + F)|| / ||x + F||: how far the sum y is from what it reads as."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualRecord:
    """One residual site: an add of a stream and a branch of it. Norms are Frobenius norms of whole tensors."""

    order: int
    name: str
    """Fully qualified name of the module whose forward adds."""
    index: int
    """The how-manieth residual site of that call, from 0."""
    call: int
    """The how-manieth call of that module, from 0."""
    kind: str
    """"identity", "projection", "scaled", "gated", "concat", "low_rank" or "opaque"."""
    source: str
    """"model.py:31" of the add, or ""."""
    shape: tuple[int, ...]
    skip_norm: float | None = None
    """Of what the skip brings to the add."""
    branch_norm: float | None = None
    """Of F: what the branch brings to the add (of parallel branches their sum)."""
    rho: float | None = None
    """branch_norm / skip_norm; inf for a zero skip, None where both are zero."""
    cosine: float | None = None
    """Between skip and branch, over all elements; None where one is zero."""
    block_influence: float | None = None
    """1 - mean cos(x, x + F), over tokens of a (batch, tokens, features) stream, else over samples."""
    gradient_norm: float | None = None
    """Of the gradient at the sum."""
    source_gradient_norm: float | None = None
    """Of the gradient at the tensor that skip and branch both come from: what both bring back."""
    branch_scale: float | None = None
    """The factor on the branch (LayerScale, ReZero, a constant): the number, or the RMS of the parameter."""
    branches: int = 1
    """How many parallel branches are summed."""
    parent: int | None = None
    """``order`` of the site in whose branch this one stands."""
    span: int = 0
    """Weight layers in the branch."""
    gradient_ratio: float | None = None
    """source_gradient_norm / gradient_norm."""
    std: float | None = None
    """Standard deviation of the sum's elements."""
    source_std: float | None = None
    """Standard deviation of the source's elements."""
    skip_scale: float | None = None
    """The factor on the skip of a scaled site."""
    in_place: bool = False
    """The add wrote into one of its operands."""
    branch_ops: tuple[str, ...] = ()
    """What the branch consists of, first to last: "batch_norm", "relu", "conv2d"."""
    shortcut_ops: tuple[str, ...] = ()
    """What stands on the skip, first to last; empty for a bare skip."""
    branch_parameters: tuple[str, ...] = ()
    """Fully qualified names of the parameters in the branch, factors included."""
    opened_by: tuple[str, ...] = ()
    """Those of them that multiply (no biases) and get a gradient that is not zero."""
    broadcast: bool = False
    """The stream was broadcast to a larger shape by the add, in a dimension other than the batch."""
    like: str = ""
    """Sites of the same make share this: class of the adding module, index, kind and branch ops."""
    overwritten: OverwrittenSkip | None = None
    """Set where an in-place op stands between the stream and what both skip and branch took."""
    angular_distance: float | None = None
    """Mean arccos(cos(x, x + F)) / pi, in 0..1, over what ``block_influence`` is taken over."""
    source_variance: float | None = None
    """``source_std`` squared."""
    variance: float | None = None
    """``std`` squared."""
    skip_gradient_norm: float | None = None
    """Of what the skip brings back to the source: the sum's gradient itself where the skip is bare."""
    branch_gradient_norm: float | None = None
    """||F^T d||: of what the branch brings back to the source, d being the gradient at the sum."""
    gradient_cosine: float | None = None
    """Between what skip and branch bring back; None where one is zero."""
    branch_gain: float | None = None
    """r: branch_gradient_norm / gradient_norm; None where the gradient at the sum is zero."""
    path_share: float | None = None
    """The branch's share of the energy, branch^2 / (skip^2 + branch^2); r^2 / (1 + r^2) for a bare skip."""
    split_note: str = ""
    """Why the gradient was not split between skip and branch; "" where it was."""
    previous: int | None = None
    """``order`` of the site before it in its stream: the last of the same parent that its source was made from."""
    norm_placement: str = ""
    """"before" (at the head of the branch), "after" (on the sum: post-norm), "end" (last in the branch),
    "both" (before, and at the end or after), "inside" (every way through the branch crosses one), "none";
    "" for concat and opaque sites."""
    activation_after: str = ""
    """The nonlinearity that alone reads the sum (behind its norm, where that is "after"): "relu"; "" without."""
    added_by: str = ""
    """The op that added: "add", "sub", "addcmul", "lerp", "sum" ..."""
    resets_stream: bool = False
    """The stream starts anew here: the skip is a projection, or its source comes from the earlier blocks
    through weight layers only (a down-sampling between stages)."""
    shortcut: tuple[str, ...] = ()
    """What the skip does, first to last: "1x1", "linear", "pool", "slice", "pad", "norm", "resize"; for a scaled
    one its factors (as in ``branch_factors``), for a gated one "gate", or "mix" where a matrix made from parallel
    streams mixes them; empty for a bare skip."""
    branch_factors: tuple[str, ...] = ()
    """The factors that stand last on the branch, nearest the add first: "number", "scalar" (one learned),
    "channels" (one learned a channel), "mask" (a tensor made from no data: stochastic depth), "gate"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationRecord:
    """One call of a nonlinearity, module or function: what its units do."""

    order: int
    name: str
    """Fully qualified name of the activation module, or of the module whose forward calls the function."""
    op: str
    """"relu", "gelu", "tanh", "sigmoid" ..."""
    call: int
    layer: int | None
    """``order`` of the layer row that is this very tensor, or None."""
    units: int
    """Channels or features that were looked at."""
    observations: int
    """Samples times positions that each unit was seen at."""
    inactive: float | None = None
    """Share of units active (output above 0) in less than 1% of the observations; rectifiers only."""
    sunk: float | None = None
    """Share of units never active whose pre-activation has its mean more than 4 of its standard deviations
    below 0; rectifiers with 16 to 297 observations only, which are too few to tell 1% from none."""
    dormant: float | None = None
    """Share of units with a Sokar score E|h_i| / mean_j E|h_j| of at most 0.1; not for rectifiers and
    sigmoids, nor for a layer of zeros."""
    saturated: float | None = None
    """Share of elements with |z| > 5 (sigmoid) or |z| > 2.5 (tanh); these two only."""
    stuck: float | None = None
    """Share of units on one side of saturation in at least 99% of the observations; these two only."""
    is_gate: bool = False
    """Its output multiplies another stream (a gate), or is the model's output."""
    always_active: float | None = None
    """Share of units active in more than 99% of the observations; rectifiers only."""
    index: int = 0
    """The how-manieth nonlinearity of that call, from 0."""


ENOUGH_UPDATES = 100
"""Of running statistics: with the default momentum of 0.1 their start has then faded to 0.9^100 = 3e-5."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchNormRecord:
    """One call of a batch normalisation, module or function."""

    order: int
    name: str
    """Fully qualified name of the module, or of the module whose forward calls the function."""
    call: int
    """The how-manieth batch normalisation of that module in the forward, from 0."""
    channels: int
    values: int
    """m: values a channel is normalised over, samples times positions."""
    batch_statistics: bool
    """It normalises with the statistics of the batch; else with the running ones, as in eval mode."""
    eps: float
    updates: int | None = None
    """How often its running statistics had been updated before; None where it has none."""
    low_variance: float | None = None
    """Share of channels whose variance in the batch is below ``eps``."""
    mean_shift: float | None = None
    """Median over channels of abs(running mean - batch mean) / running standard deviation."""
    deviation_ratio: float | None = None
    """Median over channels of the running over the batch standard deviation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRecord:
    """One call of attention: a fused kernel, nn.MultiheadAttention, or a softmax over products of data."""

    order: int
    name: str
    """Fully qualified name of the module whose forward runs it."""
    op: str
    """"scaled_dot_product_attention", "multi_head_attention_forward" or "softmax"."""
    call: int
    """The how-manieth attention of that module in the forward, from 0."""
    heads: int
    keys: int
    queries: int
    """How many queries of each head and sample were looked at, of up to two samples."""
    entropies: tuple[float, ...]
    """Hn of each head: the mean over queries that see two keys or more of H(weights) / ln(number of keys seen)."""
    largest_logit: float
    """Largest magnitude of q·k·scale among keys that are seen; of a softmax its largest input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What was run, so that a reader can run it again."""

    target: str
    """As given: "model.py:build", or the class name from Python."""
    model: str
    """Class name of the root module."""
    parameters: int
    """Elements of all parameters, tied ones once."""
    trainable: int
    buffers: int
    inputs: tuple[str, ...]
    """One phrase an input: "x 8×3×32×32 float32"."""
    inputs_from: str
    """Where they came from: "--input", "get_inputs()", "dummy_inputs", "inferred"."""
    loss: str
    """Where the loss came from, in words: "cross-entropy (random targets)", "the output's own .loss", "probe"."""
    loss_values: tuple[float, ...]
    """One a step; empty for a probe (what is measured is then the Jacobian, not a loss)."""
    optimizer: str | None
    """Class name, or None."""
    device: str
    dtype: str
    mode: str
    """"train", "eval" or "mixed", as it ran."""
    seed: int
    steps: int
    batch_size: int
    trained: bool
    gradflow_version: str
    torch_version: str
    notes: tuple[str, ...] = ()
    """What a reader must know: "torch.compile: run eager", "one fixed batch: only the seed varies"."""
    sources: tuple[tuple[str, str], ...] = ()
    """Fully qualified name and "models/net.py:31", the line that defines the module's class; only classes of the
    user's own files. Any other module belongs to the nearest one around it that is here."""
    optimizer_steps: int | None = None
    """Steps that the optimizer had taken before the one measured; None where none was measured."""
    checkpoint: str | None = None
    """The file whose weights were loaded, as given; None where the weights are those that the target came with."""
    running_loss: float | None = None
    """Loss of the first step with the running statistics of the batch normalisations instead of the batch's; None
    without such statistics that have been updated :data:`ENOUGH_UPDATES` times, or without a loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedMeasure:
    """What one seed came to, of a target that was built and recorded with several."""

    seed: int
    gain: float
    """J of the trunk (docs/numbers.md)."""
    signal_gain: float
    largest_drop: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PathOrders:
    """The gradient at the start of one stream, by how many of the stream's branches it came through; exact."""

    sites: tuple[int, ...]
    """``order`` of each site of the stream, first to last; its start is the source of the first."""
    total_norm: float
    """||g||: of the whole gradient at the start."""
    norms: tuple[float, ...]
    """||p_k||: of the part that came through exactly k branches, k = 0, 1, 2 ... The p_k add up to g."""
    inner_products: tuple[float, ...]
    """<p_k, g> / ||g||^2: what part k brings to g; they add up to 1."""
    remainder_norm: float
    """||g - sum of the p_k||: rounding alone where all orders were taken, else also the orders left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchAblation:
    """One residual site with its branch left out: the skip goes on alone. Differences are paired, one a sample."""

    order: int
    """``order`` of the residual record."""
    changes: tuple[float, ...] = ()
    """Loss without the branch minus loss of the whole model; empty for a probe."""
    output_changes: tuple[float, ...] = ()
    """||y - y'|| / ||y|| over all floating outputs, y' without the branch; empty where shapes differ."""
    note: str = ""
    """Why nothing was measured; "" where it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """One step of the greedy order: what this branch and all before it come to when left out together."""

    order: int
    """``order`` of the residual record whose branch goes."""
    changes: tuple[float, ...] = ()
    """As in :class:`BranchAblation`, against the whole model."""
    output_changes: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """What the model does without its branches."""

    order: str
    """"each" or "greedy" (which has what "each" has, too)."""
    measure: str
    """"loss", or "output" where there is no loss but the probe."""
    varied: str
    """What differs between samples: "batches", "seeds", or "" for a single one."""
    losses: tuple[float, ...]
    """Of the whole model, one a sample; empty for a probe."""
    branches: tuple[BranchAblation, ...]
    """In execution order; sites whose kind has no branch to leave out (gated, concat, ...) are not here."""
    removals: tuple[Removal, ...] = ()
    """First to go first; empty but for "greedy"."""
    forwards: int = 0
    """How many were run with something left out."""
    notes: tuple[str, ...] = ()
    """What a reader must know: that the model does not repeat itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One recording, whole: enough for every rule and every report, without the model."""

    run: RunInfo
    layers: tuple[LayerRecord, ...]
    parameters: tuple[ParameterRecord, ...]
    trunk: Trunk
    residuals: tuple[ResidualRecord, ...] = ()
    origins: tuple[NonFiniteOrigin, ...] = ()
    """At most one a phase, the earliest."""
    activations: tuple[ActivationRecord, ...] = ()
    schema: int = SCHEMA_VERSION
    seeds: tuple[SeedMeasure, ...] = ()
    """One a seed, the first of which made this trace; empty where only one was run."""
    paths: tuple[PathOrders, ...] = ()
    """One a stream, longest first; empty where they were not asked for."""
    paths_note: str = ""
    """Why there are none although they were asked for."""
    batch_norms: tuple[BatchNormRecord, ...] = ()
    ablation: Ablation | None = None
    """None where it was not asked for, or the model has no branch to leave out."""
    attentions: tuple[AttentionRecord, ...] = ()
    side_trunks: tuple[Trunk, ...] = ()
    """Towers of further inputs, outputs and branches that the trunk does not run through, longest first."""
    gradient_correlation: float | None = None
    """C: mean cosine of the input's gradients at x and beside it; None where it was not asked for."""
