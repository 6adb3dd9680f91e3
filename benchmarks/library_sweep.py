"""Every ``transformers`` architecture that a loop can build small, with random weights: what does gradflow say?

A line a class: verdicts by rule and severity, residual sites by kind, trunks beside the main one, J and seconds of
processor time; below it each warning and error in full. A class that cannot be built, or does not run bare, is
listed with the reason and judged no further. Nothing is asserted: each verdict wants a reader who opens the
model's own forward.

    python benchmarks/library_sweep.py [--only REGEX] [--shard 1/2] [--quiet]
"""

from __future__ import annotations

import argparse
import inspect
import re
import resource
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto as auto

import gradflow
from gradflow.errors import GradflowError
from gradflow.recording.input_inference import infer_inputs

BATCH, LENGTH, VOCABULARY, IMAGE = 4, 16, 100, 32
MOST_PARAMETERS = 20_000_000
MOST_BYTES = 3 * 2**30
MOST_SECONDS = 60
"""Of processor time, for building and running a class bare, and again for inspecting it."""

HEADS = (
    auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
    auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    auto.MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES,
    auto.MODEL_FOR_CTC_MAPPING_NAMES,
    auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_MAPPING_NAMES,
)
"""The class of an architecture is its first in these."""

LAYERS = "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers"
WIDTHS = "hidden_size d_model n_embd dim embedding_size word_embed_proj_dim embed_dim projection_dim"
COUNTS = "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"
INNER = "intermediate_size d_ff encoder_ffn_dim decoder_ffn_dim ffn_dim n_inner hidden_dim"
EXPERTS = "num_experts num_local_experts n_routed_experts"
HEAD_WIDTHS = "head_dim d_kv qk_nope_head_dim qk_rope_head_dim v_head_dim qk_head_dim rotary_dim"
SMALL: dict[str, int] = {
    **dict.fromkeys(LAYERS.split(), 4),
    **dict.fromkeys(WIDTHS.split(), 32),
    **dict.fromkeys(COUNTS.split(), 4),
    **dict.fromkeys(INNER.split(), 64),
    **dict.fromkeys(EXPERTS.split(), 4),
    **dict.fromkeys(HEAD_WIDTHS.split(), 8),
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "vocab_size": VOCABULARY,
    "image_size": IMAGE,
    "patch_size": 8,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
RECIPES: tuple[frozenset[str], ...] = (
    frozenset(),
    frozenset(LAYERS.split()),
    frozenset(HEAD_WIDTHS.split()) | {"num_key_value_heads", "embed_dim"},
    frozenset(COUNTS.split()) | frozenset(HEAD_WIDTHS.split()),
    frozenset({"image_size", "patch_size"}),
    frozenset({"embed_dim", "num_heads", "image_size", "patch_size", *LAYERS.split()}),
)
"""Sizes that are left as the configuration has them: some must agree with lists beside them."""


class Unbuilt(Exception):
    """No small model of a class, or none that runs."""


class OutOfTime(BaseException):
    """A class took longer than its share; no ``except Exception`` on the way may swallow it."""


def architectures() -> Iterator[tuple[str, str]]:
    """Each architecture's name and the class to build."""
    for name in CONFIG_MAPPING:
        found = next((table[name] for table in HEADS if name in table), None)
        if found is not None:
            yield name, found if isinstance(found, str) else found[0]


def shrunk(default: PretrainedConfig, kept: frozenset[str], *, nested: bool = False) -> dict[str, Any]:
    """The options that make a configuration of this class small; the configurations inside it too."""
    sizes = {name: size for name, size in SMALL.items() if name not in kept}
    options: dict[str, Any] = {
        name: size for name, size in sizes.items() if isinstance(_value(default, name), int)
    }
    options |= {name: value for name, value in TOKENS.items() if not nested or _value(default, name)}
    for name, value in vars(default).items():
        if isinstance(value, PretrainedConfig):
            options[name] = shrunk(value, kept, nested=True) | {"model_type": value.model_type}
    return options


def _value(config: PretrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # some configurations refuse to name what differs from layer to layer
        return None


def build(name: str, model_class: str) -> tuple[nn.Module, dict[str, Any]]:
    """The first recipe that builds a model which runs, and its inputs.

    Raises:
        Unbuilt: None does; the first recipe's own reason.
    """
    reasons: list[str] = []
    built: list[nn.Module] = []
    for kept in RECIPES:
        try:
            torch.manual_seed(0)
            config_class = CONFIG_MAPPING[name]
            config = config_class(**shrunk(config_class(), kept))
            built.append(_small_model(getattr(transformers, model_class), config))
            return built[-1], named_inputs(built[-1], config)
        except Exception as error:  # whatever a library class raises, the next recipe is tried
            reasons.append(f"{type(error).__name__}: {error}".replace("\n", " ")[:160])
    if not built:
        raise Unbuilt(reasons[0])
    try:
        return built[0], inferred_inputs(built[0])
    except Exception as error:  # again whatever the class raises
        raise Unbuilt(f"{reasons[0]}; inferred: {type(error).__name__}") from error


def _small_model(model_class: Any, config: PretrainedConfig) -> nn.Module:
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > MOST_PARAMETERS:
        raise Unbuilt(f"{size:,} parameters")
    return model_class(config)


def named_inputs(model: nn.Module, config: PretrainedConfig) -> dict[str, Any]:
    """Inputs that the model runs with, by its main input's name.

    Raises:
        Exception: The model's own, for the last that was tried.
    """
    ids = torch.randint(5, 90, (BATCH, LENGTH))
    side = _value(config, "image_size") if isinstance(_value(config, "image_size"), int) else IMAGE
    pixels = {"pixel_values": torch.randn(BATCH, 3, side, side)}
    tries: dict[str, tuple[dict[str, Any], ...]] = {
        "input_ids": ({"input_ids": ids, "labels": ids}, {"input_ids": ids}, {"input_ids": ids} | pixels),
        "pixel_values": (
            pixels | {"labels": torch.tensor([0, 1, 0, 1])},
            pixels,
            {"input_ids": ids} | pixels,
        ),
        "input_values": ({"input_values": torch.randn(BATCH, 1600)},),
        "input_features": ({"input_features": torch.randn(BATCH, 80, 64)},),
    }
    *others, last = tries[getattr(model, "main_input_name", "")]
    for inputs in others:
        try:
            model(**inputs)
        except Exception:  # the next is tried
            continue
        return inputs
    model(**last)
    return last


def inferred_inputs(model: nn.Module) -> dict[str, Any]:
    """Inputs that gradflow works out; the model has to run with them here too."""
    inferred = infer_inputs(model)
    inputs = dict(zip(inspect.signature(model.forward).parameters, inferred.args, strict=False))
    model(**inputs, **inferred.kwargs)
    return inputs | inferred.kwargs


def verdicts(report: gradflow.Report) -> list[str]:
    """Each warning and error that follows from no other."""
    return [
        f"{f.severity} {f.rule} {f.location}: {f.message}"
        for f in report.findings
        if f.severity != "info" and f.consequence_of is None
    ]


def line(report: gradflow.Report, seconds: float) -> str:
    """One line for one class."""
    counted = Counter(" ".join(verdict.split()[:2]) for verdict in verdicts(report))
    said = ", ".join(f"{count} {what}" for what, count in counted.items()) or "nothing"
    kinds = report.residuals.kind.value_counts().to_dict() if len(report.residuals) else {}
    sites = "+".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"
    beside = len(report.trace.side_trunks)
    return (
        f"says {said}; sites {sites}; {beside} beside the {report.trace.trunk.kind} trunk; "
        f"J {report.profile.gain:.3g}; {seconds:.1f} s"
    )


def look(name: str, model_class: str, *, quiet: bool) -> str:
    """Build, run and inspect one class; print what came of it; return how far it got."""
    head = f"{name} {model_class}"
    try:
        _limit(MOST_SECONDS)
        model, inputs = build(name, model_class)
    except (Unbuilt, OutOfTime, MemoryError) as error:
        print(f"{head}: not run, {error or type(error).__name__}", flush=True)
        return "not run"
    try:
        _limit(MOST_SECONDS)
        begun = time.process_time()
        report = gradflow.inspect(model, inputs)
        print(f"{head}: {line(report, time.process_time() - begun)}", flush=True)
    except (GradflowError, OutOfTime, MemoryError) as error:
        print(f"{head}: FAILED, {type(error).__name__}: {error}", flush=True)
        return "failed"
    finally:
        _limit(0)
    said = verdicts(report)
    for verdict in [] if quiet else said:
        print(f"    {verdict}", flush=True)
    return "loud" if said else "silent"


def _limit(seconds: int) -> None:
    """Stop what runs after so many seconds of processor time; 0 takes the limit off."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _stop(_signal: int, _frame: Any) -> None:
    raise OutOfTime(f"more than {MOST_SECONDS} s")


def main() -> None:
    """Sweep the chosen architectures and count the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="architectures whose name this matches")
    parser.add_argument(
        "--shard", default="1/1", metavar="I/N", help="every N-th architecture, from the I-th"
    )
    parser.add_argument("--quiet", action="store_true", help="leave the verdicts' words out")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGPROF, _stop)
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    index, of = map(int, options.shard.split("/"))
    chosen = [pair for pair in architectures() if re.search(options.only, pair[0])][index - 1 :: of]
    outcomes = Counter(look(*pair, quiet=options.quiet) for pair in chosen)
    print("; ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common()))


if __name__ == "__main__":
    main()
