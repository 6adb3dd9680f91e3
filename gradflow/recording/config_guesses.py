"""First guesses for models of ``transformers`` and others that carry a config of sizes.

Read by attribute names only: the library is never imported here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradflow.recording.guesses import SEQUENCE, SEQUENCE_BATCH, Guess, Guesses
from gradflow.recording.signatures import ForwardSignature

_PARTS = (
    "text_config",
    "vision_config",
    "audio_config",
    "encoder",
    "decoder",
    "text_encoder",
    "backbone_config",
)
_MODALITIES: tuple[str, ...] = ("input_ids", "pixel_values", "input_features", "input_values")
_SPECIAL_IDS = 5
"""Padding, begin, end … are the first ids of nearly every vocabulary: random text leaves them out."""
_ENCODER_FRAMES = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Sizes from a config object, its parts searched where it lacks one itself."""

    root: Any
    batch: int

    def get(self, *names: str, default: Any = None) -> Any:
        """Return the first of these attributes that is set."""
        for holder in (self.root, *self._parts()):
            for name in names:
                value = _attribute(holder, name)
                if value is not None:
                    return value
        return default

    def number(self, *names: str, default: int) -> int:
        """Return the first that is set, as a whole number (the first of a list)."""
        value = self.get(*names, default=default)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        return int(value) if isinstance(value, (int, float)) else default

    def _parts(self) -> Iterator[Any]:
        for name in _PARTS:
            part = _attribute(self.root, name)
            if part is not None:
                yield part


def _attribute(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)


def config_guesses(
    module: nn.Module, signature: ForwardSignature, batch_size: int | None
) -> Iterator[Guesses]:
    """Propose inputs from ``module.config``, the fullest first; nothing for a model without one."""
    root = getattr(module, "config", None)
    main = getattr(module, "main_input_name", None)
    if root is None or not isinstance(main, str):
        return
    config = Config(root=root, batch=batch_size or SEQUENCE_BATCH)
    wanted: list[str] = [name for name in signature.names if name in signature.required or name == main]
    if main not in wanted and signature.any_keyword:
        wanted.insert(0, main)
    both = [name for name in _MODALITIES if name in signature.names]
    for names in dict.fromkeys((tuple(dict.fromkeys(wanted + both)), tuple(wanted))):
        guesses = {name: guess for name in names if (guess := _guess(name, config, module)) is not None}
        if len(guesses) == len(names):
            yield from _with_targets(guesses, config, module, signature)


def _with_targets(
    guesses: Guesses, config: Config, module: nn.Module, signature: ForwardSignature
) -> Iterator[Guesses]:
    """With labels first, so that the model returns its own loss; then with decoder inputs; then bare."""
    labels = {n: g for n, g in _labels(guesses, config, module).items() if n in signature.names}
    decoder = _decoder_inputs(guesses, config, signature)
    if labels:
        yield {**guesses, **labels}
        if decoder:
            yield {**guesses, **decoder, **labels}
    if decoder:
        yield {**guesses, **decoder}
    yield guesses


def _decoder_inputs(guesses: Guesses, config: Config, signature: ForwardSignature) -> Guesses:
    if "decoder_input_ids" in signature.names and "decoder_input_ids" not in guesses:
        return {"decoder_input_ids": _ids(config)}
    if "decoder_input_values" in signature.names:
        return {
            "decoder_input_values": Guess(
                shape=(config.batch, SEQUENCE, config.number("num_mel_bins", default=80))
            )
        }
    return {}


def _guess(name: str, config: Config, module: nn.Module) -> Guess | None:
    if name in ("input_ids", "decoder_input_ids"):
        ids = _ids(config)
        return _with_choices(ids) if "MultipleChoice" in type(module).__name__ else ids
    if name in ("attention_mask", "decoder_attention_mask"):
        return Guess(shape=(config.batch, SEQUENCE), kind="ones")
    maker = _MAKERS.get(name)
    return maker(config) if maker is not None else None


def _ids(config: Config) -> Guess:
    vocabulary = config.number("vocab_size", "text_vocab_size", default=100)
    # Tables of some models start with an offset, so leave their last rows alone.
    longest = config.number("max_position_embeddings", "n_positions", default=0)
    axial = config.get("axial_pos_shape")
    length = min(SEQUENCE, longest - 2) if longest > 2 else SEQUENCE
    if axial and config.get("axial_pos_embds"):
        length = math.prod(axial)
    last = config.get("eos_token_id") if config.get("is_encoder_decoder") else None
    return Guess(
        shape=(config.batch, length),
        kind="ids",
        high=vocabulary,
        low=_SPECIAL_IDS if vocabulary > 4 * _SPECIAL_IDS else 0,
        last=last if isinstance(last, int) and last < vocabulary else None,
        free=(1,),
    )


def _with_choices(ids: Guess) -> Guess:
    return Guess(shape=(ids.shape[0], 2, ids.shape[1]), kind="ids", high=ids.high, low=ids.low)


def _pixels(config: Config) -> Guess:
    channels = config.number("num_channels", "in_channels", "in_chans", default=3)
    side = config.get("image_size", "img_size", "crop_size", default=64)
    high, wide = side if isinstance(side, (list, tuple)) and len(side) == 2 else (_side(side), _side(side))
    frames = config.get("num_frames", "frames_per_clip")
    if isinstance(frames, int):
        return Guess(shape=(min(config.batch, 2), frames, channels, high, wide))
    return Guess(shape=(config.batch, channels, high, wide), free=(2, 3))


def _side(value: Any) -> int:
    value = value[0] if isinstance(value, (list, tuple)) else value
    return int(value) if isinstance(value, (int, float)) else 64


def _waveform(config: Config) -> Guess:
    """Raw audio, long enough for two dozen frames; a spectrogram where the config has one."""
    if config.get("conv_stride") is not None:
        samples = math.prod(config.get("conv_stride")) * _ENCODER_FRAMES
        return Guess(shape=(config.batch, samples + samples // 4), free=(1,))
    if config.get("max_length") is not None and config.get("num_mel_bins") is not None:
        frames = config.number("max_length", default=128)
        return Guess(shape=(config.batch, frames, config.number("num_mel_bins", default=80)))
    channels = config.number("audio_channels", default=1)
    return Guess(shape=(config.batch, channels, 4096), free=(2,))


def _spectrogram(config: Config) -> Guess:
    if config.get("max_source_positions") is not None and config.get("num_mel_bins") is not None:
        frames = 2 * config.number("max_source_positions", default=1500)
        if config.get("input_feat_per_channel") is None:
            return Guess(shape=(config.batch, config.number("num_mel_bins", default=80), frames))
    features = config.number(
        "input_feat_per_channel", "feature_projection_input_dim", "num_mel_bins", default=80
    )
    return Guess(shape=(config.batch, 2 * _ENCODER_FRAMES, features), free=(1,))


def _past(config: Config) -> Guess:
    length = config.number("context_length", default=SEQUENCE)
    lags = config.get("lags_sequence")
    length += max(lags) if lags else 0
    channels = config.number("num_input_channels", "input_size", default=1)
    shape = (config.batch, length, channels) if config.get("num_input_channels") else (config.batch, length)
    return Guess(shape=shape)


_MAKERS: Mapping[str, Callable[[Config], Guess]] = {
    "pixel_values": _pixels,
    "pixel_values_videos": _pixels,
    "input_values": _waveform,
    "input_features": _spectrogram,
    "past_values": _past,
}


def _labels(guesses: Guesses, config: Config, module: nn.Module) -> Guesses:
    """Labels for the loss that a class of this name computes itself; none where the name does not say."""
    kind = type(module).__name__
    classes = config.number("num_labels", default=2)
    if "MultipleChoice" in kind:
        return {"labels": _classes(config, 2)}
    if "SemanticSegmentation" in kind:
        pixels = guesses.get("pixel_values", Guess(shape=(config.batch, 3, 64, 64)))
        return {"labels": Guess(shape=(pixels.shape[0], *pixels.shape[-2:]), kind="ids", high=classes)}
    if kind.endswith("Classification") and "Token" not in kind:
        batch = next(iter(guesses.values())).shape[0]
        return {"labels": Guess(shape=(batch,), kind="ids", high=classes)}
    if "QuestionAnswering" in kind and "input_ids" in guesses and "pixel_values" not in guesses:
        position = _classes(config, guesses["input_ids"].shape[-1])
        return {"start_positions": position, "end_positions": position}
    return _token_labels(kind, guesses, config, classes)


def _token_labels(kind: str, guesses: Guesses, config: Config, classes: int) -> Guesses:
    ids = guesses.get("input_ids")
    if "CTC" in kind:
        vocabulary = config.number("vocab_size", default=32)
        return {"labels": Guess(shape=(config.batch, 4), kind="ids", low=1, high=vocabulary)}
    if kind.endswith("TokenClassification") and ids is not None:
        return {"labels": Guess(shape=ids.shape, kind="ids", high=classes)}
    if any(word in kind for word in ("CausalLM", "MaskedLM", "LMHead", "ConditionalGeneration", "Seq2Seq")):
        made = ids or _ids(config)
        if "MaskedLM" in kind or "LMHead" in kind or "Causal" in kind or config.get("is_encoder_decoder"):
            return {"labels": Guess(shape=made.shape, kind="ids", high=made.high, low=made.low)}
    return {}


def _classes(config: Config, count: int) -> Guess:
    return Guess(shape=(config.batch,), kind="ids", high=count)
