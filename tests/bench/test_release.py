"""`python -m bench.release`: the gradients are what is saved."""

from bench import modes, release
from bench.gpt import GPTConfig


def test_peak(monkeypatch, tmp_path):
    monkeypatch.setattr(release, "CONFIG", GPTConfig(context=8, layers=6, heads=2, width=64))
    plain, other = (release.iteration(modes.FP32, in_backward) for in_backward in (False, True))
    gradients = plain.kept / 3  # beside as many bytes of parameters, and twice as many of states
    assert plain.kept == other.kept
    assert plain.used[-1] == plain.kept  # all that was allocated has been released
    # The largest gradient is there once, and activations are at their most when there is none yet.
    assert plain.peak - other.peak > 0.5 * gradients
    found = {modes.FP32: {release.ORDINARY: plain, release.IN_BACKWARD: other}}
    assert release.draw(release.Results(run={}), found).save(tmp_path).exists()
