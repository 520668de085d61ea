"""The sections that any run folder can fill: curves over tokens, expert loads, machine and versions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from sateen.receipt import Receipt
from sateen.receipt.markdown import size
from sateen.report import plots
from sateen.report.folder import Curve, ExpertLoad, RunFolder
from sateen.report.page import cards, figure, missing, section, shown, table

MAX_COLUMNS = 120  # of a heat map over time
MAX_PANELS = 6  # layers drawn over time; a deeper model gets one picture of its last steps
LAST_SHARE = 10  # final loads are those of the last 1/10 of the steps


def run_sections(run: RunFolder) -> Iterator[str]:
    """The body of a plain run's report."""
    losses, bits, held_out = (
        run.curve("loss"),
        run.curve("bits_per_byte"),
        run.curve("heldout_bits_per_byte"),
    )
    speeds = [rate for _, rate in run.curve("tokens_per_s")]
    rows = []
    if run.metrics:
        rows.append(("steps", shown(len(run.metrics)), f"{len(run.stages)} stages"))
    if losses:
        rows.append(("tokens trained", shown(int(losses[-1][0])), "in all stages"))
        rows.append(("last loss", shown(losses[-1][1]), "nats per token, all parts"))
    if held_out:
        rows.append(("held-out bits per byte", shown(held_out[-1][1]), "last evaluation"))
    if speeds:
        rows.append(("tokens/s", shown(float(np.median(speeds))), "median over steps"))
    yield cards(rows)
    parts = {
        "all": losses,
        "main": run.curve("loss_main", "loss_ce"),
        "MTP": run.curve("loss_mtp"),
    }
    yield section("Loss", loss_figure("loss", {k: v for k, v in parts.items() if v}, run))
    if bits or held_out:
        yield section("Bits per byte", bits_figure(bits, held_out, run))
    curves = []
    for key, label, what in (
        (
            "lr",
            "learning rate",
            "Learning rate: that of the recipe times its schedule.",
        ),
        ("grad_norm", "gradient norm", "Norm of all gradients before clipping."),
        ("tokens_per_s", "tokens/s", "Training speed, step by step."),
    ):
        points = run.curve(key)
        if points:
            svg = plots.curves(
                key, what, {label: points}, label=label, borders=_borders(run), is_smooth=key != "lr",
                is_log=key == "grad_norm" and min(y for _, y in points) > 0,
            )  # fmt: skip
            curves.append(figure(svg, what))
        else:
            curves.append(missing(f"{label} ({key} in metrics.jsonl)"))
    yield section("Learning rate, gradients, speed", f'<div class="two">{"".join(curves)}</div>')
    yield section("Expert load", load_figure(run.expert_load))
    yield section("What ran", machine(run.receipt))


def loss_figure(name: str, series: Mapping[str, Curve], run: RunFolder) -> str:
    """Loss curves with the stages of `run` between borders."""
    if not series:
        return missing("loss curves (metrics.jsonl)")
    ends = ", ".join(f"{what} {curve[-1][1]:.3f}" for what, curve in series.items())
    svg = plots.curves(
        name, f"Loss in nats per token over tokens trained; last steps: {ends}.", series,
        label="loss, nats per token", borders=_borders(run),
    )  # fmt: skip
    return figure(
        svg, f"Faint: every step; strong: the average of its neighbours within a stage. {_stage_names(run)} "
        f"Last steps: {ends}.",
    )  # fmt: skip


def bits_figure(bits: Curve, held_out: Curve, run: RunFolder) -> str:
    """Bits per byte of training batches, and of held-out text where it was measured."""
    parts = []
    if bits:
        alt = f"Bits per byte of training batches; the last step has {bits[-1][1]:.3f}."
        svg = plots.curves(
            "bits",
            alt,
            {"training": bits},
            label="bits per byte",
            borders=_borders(run),
        )
        parts.append(figure(svg, alt))
    if held_out:
        alt = f"Bits per byte of held-out text; the last evaluation has {held_out[-1][1]:.3f}."
        svg = plots.curves(
            "heldout", alt, {"held-out": held_out}, label="bits per byte", borders=_borders(run),
            is_smooth=False,
        )  # fmt: skip
        parts.append(figure(svg, alt))
    return f'<div class="two">{"".join(parts)}</div>'


def load_figure(load: ExpertLoad | None) -> str:
    """Heat maps of expert loads: over time per layer, or the final loads of a model with many layers."""
    if load is None:
        return missing("expert loads (traces/expert_load.npz); a model without experts has none")
    steps = len(load.steps_S)
    last_LE = load.relative(load.counts_SLE[-max(1, steps // LAST_SHARE) :].sum(axis=0))
    worst = ", ".join(f"layer {i} {row.max():.2f}x" for i, row in zip(load.layers, last_LE, strict=True))
    caption = (
        "Tokens an expert received over the mean of its layer; 1 is balance. "
        f"Busiest expert over the last {max(1, steps // LAST_SHARE)} of {steps} steps: {worst}."
    )
    if len(load.layers) > MAX_PANELS:
        panel = {"the last steps": last_LE}
        extent = (-0.5, last_LE.shape[1] - 0.5)
        svg = plots.heat(
            "load",
            caption,
            panel,
            xlabel="expert",
            ylabel="layer in order",
            extent=extent,
        )
        return figure(svg, caption)
    bins = np.array_split(np.arange(steps), min(steps, MAX_COLUMNS))
    over_time = np.stack([load.relative(load.counts_SLE[b].sum(axis=0)) for b in bins])
    panels = {f"layer {i}": over_time[:, n].T for n, i in enumerate(load.layers)}
    extent = (float(load.steps_S[0]) - 0.5, float(load.steps_S[-1]) + 0.5)
    return figure(
        plots.heat("load", caption, panels, xlabel="step", ylabel="expert", extent=extent),
        caption,
    )


def machine(receipt: Receipt | None) -> str:
    """Hardware and versions of a receipt as a table."""
    if receipt is None:
        return missing("hardware and versions (receipt.json)")
    hardware = receipt.hardware
    rows = [
        ("processor", hardware.get("cpu") or "-"),
        ("cores", shown(hardware.get("cores"))),
        ("memory", size(hardware.get("memory_bytes"))),
        ("GPU", hardware.get("gpu") or "none"),
        *receipt.versions.items(),
    ]
    return table("Machine and versions", ("what", "value"), rows, is_text=True)


def _borders(run: RunFolder) -> list[float]:
    return [end for _, end in run.stages]


def _stage_names(run: RunFolder) -> str:
    if len(run.stages) < 2:
        return ""
    return "Stages: " + ", ".join(f"{i} {name}" for i, (name, _) in enumerate(run.stages, start=1)) + "."
