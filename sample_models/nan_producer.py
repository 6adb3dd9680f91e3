"""A classifier of sounds on log power spectra. Fault: silence makes the logarithm infinite.

Recordings are padded with zeros to one length. The power of a silent frame is exactly 0, its logarithm is
-inf, and taking the mean off turns the whole recording into NaN. Expect GF303, naming ``frontend`` and
``log``. ``torch.log(power + 1e-6)`` is the cure.
"""

import torch
from torch import nn
from torch.nn import functional as F


class LogSpectrum(nn.Module):
    """Waveform (batch, samples) -> normalised log power (batch, bins, frames)."""

    def __init__(self, size: int = 128) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("window", torch.hann_window(size))

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        frames = waveform.unfold(1, self.size, self.size // 2) * self.window
        power = torch.fft.rfft(frames).abs().square()
        spectrum = torch.log(power).transpose(1, 2)
        return spectrum - spectrum.mean(dim=(1, 2), keepdim=True)


class SoundClassifier(nn.Module):
    def __init__(self, classes: int = 12) -> None:
        super().__init__()
        self.frontend = LogSpectrum()
        self.first = nn.Conv1d(65, 64, 3, padding=1)
        self.second = nn.Conv1d(64, 64, 3, padding=1)
        self.head = nn.Linear(64, classes)

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(self.frontend(waveform)))
        x = F.relu(self.second(x))
        return self.head(x.mean(dim=2))


model = SoundClassifier()


def get_inputs() -> list[torch.Tensor]:
    waveforms = torch.randn(8, 4096)
    waveforms[5, 3000:] = 0.0  # a shorter recording, padded
    return [waveforms]
