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
    """f of theory: sqrt(mean(h^2)) over all elements."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Trunk:
    """The tensors that carry the gradient from the loss back to the input (theory, section 0)."""

    kind: str
    """"residual" (outputs of residual adds), "weights" (outputs of weight layers) or "none"."""
    points: tuple[TrunkPoint, ...] = ()
    batch_norm: bool = False
    """True where a batch normalisation stands between two points."""


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
class ResidualRecord:
    """One residual site: an add of a stream and a branch of it."""

    order: int
    name: str
    """Fully qualified name of the module whose forward adds."""
    index: int
    """The how-manieth residual add of that call, from 0."""
    call: int
    kind: str
    """"identity", "projection", "scaled", "gated", "concat", "low_rank" or "opaque"."""
    source: str
    """"model.py:31", or ""."""
    shape: tuple[int, ...]
    gradient_norm: float | None = None


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
    schema: int = SCHEMA_VERSION
