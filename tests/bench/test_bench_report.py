"""``python -m bench plot`` and ``report``, on invented records."""

import re

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from invented import bench, results, saved, timing

from bench import page, plots
from bench.records import Failure, FirstStep, Footprint, Skip, Slope

RUN = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef",
    "command": "python -m bench run",
    "machine": {"cpu": "invented <CPU>", "threads": 2},
    "versions": {"fastopt": "0.1.0", "torch": "2.13.0"},
    "rounds": 4,
    "threads": 2,
    "used_by_others": 0.01,
}
SIZES = {"small": (2000, 128_000), "medium": (148, 124_000_000), "large": (200, 1_100_000_000)}
SWING = (1.0, 1.3, 1.0, 1.1)  # of the machine, which all who take turns see


def took(group, contender, precision, ms, workload="medium", clock="wall"):
    tensors, elements = SIZES[workload]
    where = {"workload": workload, "tensors": tensors, "elements": elements, "clock": clock}
    samples = [round(1e6 * ms * swing) for swing in SWING]
    return timing(contender, precision, group=group, samples_ns=samples, **where)


def whole_run(clocks=("wall",), workloads=tuple(SIZES), limit="bound", **run):
    """A win of 2 and a loss of 0.8 in each group, and one of everything else."""
    made = results(**{**RUN, **run})
    for number, workload in enumerate(workloads):
        for clock in clocks:
            for contender, ms in (("fastopt", 100), ("torch fused", 80), ("torch foreach", 200)):
                made.add(took(number, contender, "fp32", ms, workload, clock))
            made.add(took(number, limit, "fp32", 50, workload, clock))
    for contender, mode in (("fastopt", "fp32"), ("fastopt", "split"), ("bound", "split")):
        made.add(took(len(workloads), contender, mode, 90, clock=clocks[0]))
    made.add(took(len(workloads), "torchao 8-bit", "bf16+8bit", 9000, clock=clocks[0]))
    for gradients in ("kept", "fresh"):
        for contender in ("fastopt", "torch fused"):
            points = {"500": 200.0, "4000": 1250.0}
            made.add(Slope("AdamW", contender, "fp32", gradients, clocks[-1], 0.3, 50.0, points))
    made.add(Footprint("medium", "fastopt", "split+8bit", 2, 2, 2.03, 6.03, 2))
    made.add(Footprint("medium", "torch fused", "fp32", 4, 0, 8, 12, 4))
    made.add(FirstStep("AdamW", "empty", 2.5))
    made.add(Skip("apex", "AdamW, medium, fp32", "No module named <apex>"))
    made.add(Failure("Adam, large", "RuntimeError: <script>alert(1)</script> & more"))
    return made


def test_a_peer_is_compared_with_the_mode_of_its_precision():
    found = {v.peer.contender: v for v in plots.comparisons(whole_run(workloads=["medium"]))}
    assert set(found) == {"torch fused", "torch foreach", "torchao 8-bit"}
    assert found["torch fused"].ratio == pytest.approx(0.8)
    assert found["torch fused"].loses
    assert not found["torch foreach"].loses
    assert found["torchao 8-bit"].ours.precision == "fp32"  # split+8bit did not take turns


def test_variants_of_fastopt_are_no_peers():
    contenders = ("fastopt", "fastopt, torch's GradScaler", "bound", "copy", "torch fused")
    found = plots.comparisons(results(*map(timing, contenders)))
    assert [v.peer.contender for v in found] == ["torch fused"]


def test_limits_are_scaled_to_the_bytes_that_are_needed():
    """A copy of a 7th of the bytes in a 10th of the time would take 70% of it for all."""
    step = timing(ns=1e9)
    copy = timing("copy", "", ns=1e8, needed_bytes=step.needed_bytes // 7)
    assert plots.of_limit(step, copy) == pytest.approx(10 / 7)


def test_those_who_did_the_same_twice_have_two_rows():
    both = ("fastopt", "torch fused")
    made = results(*(timing(name, group=group) for group in range(2) for name in both))
    assert plots.labelled(list(plots.comparisons(made))) == ["torch fused", "torch fused (2)"]


@pytest.mark.parametrize("clocks", [["wall"], ["device", "host", "wall"]])
def test_there_is_a_picture_of_everything(clocks):
    limit = "copy" if "device" in clocks else "bound"
    names = [picture.name for picture in plots.pictures(whole_run(clocks, limit=limit))]
    ratio = ["ratio-adamw"] if clocks == ["wall"] else ["ratio-adamw-device", "ratio-adamw"]
    assert names == ["time", *ratio, "modes", "bandwidth", "overhead", "memory"]


def test_every_loss_is_marked():
    found = whole_run(workloads=["medium", "large"])
    (picture,) = plots.draw_ratios(found)
    texts = [text.get_text() for axes in picture.figure.axes for text in axes.texts]
    assert sorted(texts) == ["0.800x loses", "0.800x loses", "100x", "2.00x", "2.00x"]
    assert "2 of 5" in picture.sentence


def test_names_that_would_touch_move_apart():
    assert plots.spread([0.1, 0.5, 0.51, 0.9], 0.05) == pytest.approx([0.1, 0.5, 0.55, 0.9])
    assert plots.spread([0.98, 0.99, 1.0], 0.05) == pytest.approx([0.9, 0.95, 1.0])


def test_plot_writes_what_was_measured(tmp_path, capsys):
    both = [timing(name, samples_ns=[5]) for name in ("fastopt", "torch fused")]
    assert bench("plot", saved(tmp_path / "run.json", *both)) == 0
    written = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert written == ["bandwidth.png", "ratio-adamw.png"]
    said = capsys.readouterr().out
    assert str(tmp_path / "run" / "bandwidth.png") in said
    assert "No picture of bytes per parameter: it was not measured." in said


def test_the_page_holds_everything_and_needs_nothing(tmp_path):
    runs = {
        "cpu.json": whole_run(),
        "gpu.json": whole_run(["device", "host", "wall"], limit="copy", gpu={"name": "H"}),
        "empty.json": results(**RUN),
    }
    for name, made in runs.items():
        made.save(tmp_path / name)
    output = tmp_path / "page.html"
    assert bench("report", *(tmp_path / name for name in runs), "--output", output) == 0
    text = output.read_text()
    assert text.count("<section id=") == len(runs) + 1
    assert text.count('src="data:image/png;base64,') == text.count("<img") > 10
    assert not re.search(r"<script|https?://|url\(|@import|<link", text)
    assert "RuntimeError: &lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in text
    assert "No module named &lt;apex&gt;" in text
    assert "invented &lt;CPU&gt;" in text
    assert "Not measured in this run, and without a picture: time against parameters" in text


def test_the_page_has_a_row_for_every_timing():
    made = whole_run()
    lines = [line for _, lines in page.timing_table(made).parts for line in lines]
    assert len(lines) == len(made.timings)
    losses = [cell.text for line in lines for cell in line if cell.loses]
    assert len(losses) == 3
    assert all("loses" in text for text in losses)
    for table in page.tables(made):
        assert all(len(line) == len(table.columns) for _, lines in table.parts for line in lines)


def test_the_summary_tells_wins_and_losses():
    said = " ".join(page.summary(whole_run()))
    assert "faster in 4 of 7 comparisons of wall time and slower in 3" in said
    assert "The worst loss: 0.800 times the speed of torch fused (AdamW, step, small, fp32)" in said
    assert "6.03 bytes in mode split+8bit" in said
    assert 3 <= len(list(page.summary(whole_run()))) <= 7


@pytest.mark.parametrize(
    ("used", "said"), [(0.2, "was busy"), (0.0, "was quiet"), (None, "is not known")]
)
def test_the_page_says_whether_the_machine_was_busy(used, said):
    assert said in page.busy(whole_run(used_by_others=used))
