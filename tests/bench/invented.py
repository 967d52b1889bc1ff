"""Results that were never measured, what they should be by arithmetic, and commands called here."""

from bench.__main__ import main
from bench.records import Results, Timing

#: Bytes for each parameter of AdamW: parameters, gradients, masters, states. 8-bit states have a
#: scale of 4 bytes for 256 elements, remainders a checksum.
SUMS = 4 / 256
EIGHT = 2 * (1 + 4 / 256)
BYTES = {
    "fp32": (4, 4, 0, 8),
    "fp32+8bit": (4, 4, 0, EIGHT),
    "split": (2, 2, 2 + SUMS, 8),
    "split+bf16": (2, 2, 2 + SUMS, 4),
    "split+8bit": (2, 2, 2 + SUMS, EIGHT),
    "master": (2, 2, 4, 8),
    "stochastic": (2, 2, 0, 8),
    "stochastic+8bit": (2, 2, 0, EIGHT),
    "none": (2, 2, 0, 8),
    "none+bf16": (2, 2, 0, 4),
    "fp16-master": (2, 2, 4, 8),
}


def moved(mode):
    """Bytes that a step moves for each parameter."""
    parameters, gradients, masters, states = BYTES[mode]
    return gradients + 2 * (parameters + masters + states)


def timing(contender="fastopt", precision="fp32", ns=1e6, **others):
    elements = others.get("elements", 1_000_000)
    made = {
        "group": 0,
        "rule": "AdamW",
        "workload": "gpt2",
        "tensors": 100,
        "elements": elements,
        "operation": "step",
        "clock": "wall",
        "contender": contender,
        "precision": precision,
        "samples_ns": [round(ns)] * 3,
        "needed_bytes": 28 * elements,
        "working_set_bytes": 16 * elements,
        "regime": "memory",
    }
    return Timing(**{**made, **others})


def results(*records, **run):
    made = Results({"date": "2026-01-02", "machine": {"cpu": "invented"}, "gpu": {}, **run})
    for record in records:
        made.add(record)
    return made


def saved(path, *records, **run):
    results(*records, **run).save(path)
    return path


def bench(*words):
    """The exit status of ``python -m bench``."""
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code
