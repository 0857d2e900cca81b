"""How long training samples are in tokens, and what `data.max_length` does to them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mcit_lightning.config import BackboneConfig
from mcit_lightning.data.collate import TrainCollator
from mcit_lightning.data.records import Sample
from mcit_lightning.processors import read_processor


@dataclass
class Lengths:
    """Tokens of a split's samples, image tokens included.

    Args:
        median: in the middle; None where only the longest were measured.
        longest: the most.
        over: samples above `data.max_length`.
        dropped: of these, the ones that have no answer token left.
        measured: samples that the processor has counted; 0 where everything is estimated.
        faults: a message for each sample that cannot be encoded.
    """

    median: int | None
    longest: int
    over: int
    dropped: int = 0
    measured: int = 0
    faults: list[str] = field(default_factory=list)


def estimate(lengths: np.ndarray, max_length: int) -> Lengths:
    """From the number of characters and images.

    Args:
        lengths: estimated tokens of each sample; at least one.
        max_length: `data.max_length`.
    """
    return Lengths(int(np.median(lengths)), int(lengths.max()), int((lengths > max_length).sum()))


def measure(
    samples: Callable[[int], Sample],
    lengths: np.ndarray,
    collator: TrainCollator,
    *,
    limit: int,
    without: set[int],
) -> Lengths:
    """Encode samples as training does: all of them, or those that are longest by the estimate.

    Args:
        samples: the sample at a position.
        lengths: estimated tokens of each sample.
        collator: encodes them.
        limit: measure at most so many.
        without: row numbers of samples that lack a picture; they are left out.
    """
    order = np.argsort(-lengths, kind="stable")[:limit].tolist()
    counted: list[int] = []
    found = Lengths(None, 0, 0)
    for position in order:
        sample = samples(position)
        if sample.row in without:
            continue
        try:
            batch = collator([sample])
        except ValueError as error:
            found.faults.append(str(error))
            continue
        counted += batch["length"]
        found.over += batch["shortened"] + batch["dropped"]
        found.dropped += batch["dropped"]
    if not counted:
        return replace(estimate(lengths, collator.max_length), faults=found.faults)
    found.measured, found.longest = len(counted), max(counted)
    if len(order) == len(lengths):
        found.median = int(np.median(counted))
    return found


def local_processor(config: BackboneConfig) -> Any:
    """The backbone's processor, if it is on this machine: in a folder, or in the hub's cache.

    Raises:
        ValueError: it is not, or it needs a package that is not installed.
    """
    try:
        return read_processor(
            config.id,
            config.image_processor,
            revision=config.revision or "main",
            trust_remote_code=config.trust_remote_code,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        text = str(error).strip() or type(error).__name__
        raise ValueError(f"the processor of {config.id!r} is not on this machine ({text.splitlines()[0]})") from error
