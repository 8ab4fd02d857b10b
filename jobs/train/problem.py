"""What a run trains and is held to: model, data, validation, and the options that shape it."""

import random
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mpi_ef import registry
from mpi_ef.jobs.train import choices, models
from mpi_ef.jobs.train.config import TrainConfig
from mpi_ef.jobs.train.datasets import Dataset, Digits, Loss, Text, own_problem
from mpi_ef.jobs.train.settings import SPECIFIED

__all__ = ["EVALUATION_BATCH", "build", "differences", "evaluated", "shaping"]

EVALUATION_BATCH = 256


def shaping(config: TrainConfig) -> dict[str, Any]:
    """Return the options that the parameters depend on, as a checkpoint can hold them; the text is known by its content."""
    apart = ("out", "overwrite", "resume", "keep", "checkpoint_every", "save_in_background", "stop_after", "on_failure",
             "log_every", "eval_every", "tensorboard", "text", "data", "device", "gpu_aware_mpi")
    return {name: value for name, value in asdict(config).items() if name not in apart and value is not None}


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return which options were others, in words. Local."""
    return [f"{name} was {then.get(name)}, is {value}" for name, value in now.items()
            if then.get(name) != value and not _specify_the_same(name, then.get(name), value)]


def _specify_the_same(name: str, first: Any, second: Any) -> bool:
    texts = name in SPECIFIED and isinstance(first, str) and isinstance(second, str)
    return texts and registry.same(name, first, second)


def build(config: TrainConfig) -> tuple[Dataset, nn.Module] | tuple[Dataset, nn.Module, Loss]:
    """Return data, model and, where it is not cross entropy, loss of a run, with all generators seeded. Local."""
    torch.manual_seed(config.seed)
    random.seed(config.seed)  # models of users may draw from these; equal runs have equal checkpoints
    np.random.seed(config.seed % (1 << 32))  # noqa: NPY002
    if config.model not in choices.MODELS:
        return own_problem(config)
    if config.model != "gpt":
        return Digits(), models.mlp() if config.model == "mlp" else models.cnn()
    sizes = {name: int(getattr(config, name)) for name in ("context", "layers", "heads", "width")}
    text = Text(config.text, context=sizes["context"], seed=config.seed)
    return text, models.GPT(text.vocabulary, **sizes)


@torch.no_grad()
def evaluated(model: nn.Module, data: Dataset, loss_of: Loss, samples: NDArray[np.int64],
              device: torch.device) -> tuple[float, int, int]:
    """Return of held-out samples the sum of losses, how many labels were hit, where there are some, of how many. Local."""
    total, right, count = 0.0, 0, 0
    model.eval()
    for start in range(0, samples.size, EVALUATION_BATCH):
        inputs, targets = (part.to(device) for part in data.held_out(samples[start : start + EVALUATION_BATCH]))
        logits = model(inputs)
        total += float(loss_of(logits, targets)) * targets.numel()
        right += 0 if data.labels is None else int((logits.argmax(-1) == targets).sum())
        count += targets.numel()
    model.train()
    return total, right, count
