"""The page of a ledger of distillation: every figure, and by seed what a teacher gained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from featherweight.measure.statistics import mean_estimate

if TYPE_CHECKING:
    from .distillation import Ledger, Taught

INTRODUCTION = """\
# Benchmarks: distillation

This page is generated from a ledger by the command below; do not edit it. Within a section every student is trained
with the same number of epochs, schedule and data; *alone* is without a teacher. Figures are those of the whole test
split. *Gain* is over the same student alone with the same seed. Brackets are 95% intervals over seeds, by Student's
t."""
ABOUT = {
    "plain": "the student of the teacher's kind (ResNet-20's shape), from scratch",
    "separable": "the same with depthwise-separable convolutions, from scratch",
    "kl, mse, dkd, dist": "`distill.logits` with that loss",
    "hint, attention, rkd, crd, cosine": "`distill.features` with that loss, without soft targets",
    "ensemble": "`distill.logits` with the loss kl, by the teacher and a second one",
}
ABOUT_SENTENCES = {
    "every other layer": "the first, third, fifth layer of the model, then trained",
    "outputs": "`distill.logits`: the embeddings and the task's loss, 5 to 2",
    "DistilBERT": "`distill.features`: those, and the cosine of the last hidden states, 5 to 2 to 1",
}


def page(ledger: Ledger) -> str:
    """The whole page in Markdown."""
    lines = [
        INTRODUCTION,
        "",
        f"* Date: {ledger.date}",
        f"* Machine: {ledger.machine}",
        f"* Versions: {', '.join(f'{name} {version}' for name, version in ledger.versions.items())}",
        f"* Command: `{ledger.command}`",
    ]
    images = [row for row in ledger.rows if row.section == "images"]
    if images:
        lines += ["", f"## Images: {ledger.teacher} teaches on {ledger.images}", ""]
        lines += [*head(ledger, "images"), f"The second teacher of the ensemble: {ledger.ensemble}.", ""]
        lines += [*table(images), "", *(f"* {name}: {about}" for name, about in ABOUT.items())]
    sentences = [row for row in ledger.rows if row.section == "sentences"]
    if sentences:
        lines += ["", f"## Sentences: {ledger.sentences}", "", *head(ledger, "sentences")]
        lines += [*table(sentences, ledger.originals["sentences"].value), "", *sizes(ledger)]
        lines += [f"* {name}: {about}" for name, about in ABOUT_SENTENCES.items()]
    return "\n".join(lines) + "\n"


def head(ledger: Ledger, section: str) -> Iterator[str]:
    teacher = ledger.originals[section]
    yield (
        f"The teacher: {teacher.value:.2f} [{teacher.low:.2f}, {teacher.high:.2f}] on {teacher.n} test inputs. "
        f"{ledger.notes[section]}"
    )
    yield ""


def table(rows: list[Taught], original: float | None = None) -> Iterator[str]:
    """Every way over its seeds, and its gain seed by seed; with `original` also the share of it that is kept."""
    kept = original is not None
    for epochs in dict.fromkeys(row.step["epochs"] for row in rows):
        yield f"{epochs:g} epochs:"
        yield ""
        yield f"| student | parameters | trained | by seed | mean |{' kept |' if kept else ''} gain | mean | seconds |"
        yield f"|---|---:|---|---:|---:|{'---:|' if kept else ''}---:|---:|---:|"
        same = [row for row in rows if row.step["epochs"] == epochs]
        for student, way in dict.fromkeys((row.student, row.way) for row in same):
            yield line([row for row in same if (row.student, row.way) == (student, way)], same, original)
        yield ""


def line(own: list[Taught], rows: list[Taught], original: float | None) -> str:
    first = own[0]
    alone = {row.seed: row.accuracy.value for row in rows if (row.student, row.way) == (first.student, "alone")}
    gains = [row.accuracy.value - alone[row.seed] for row in own if row.seed in alone and row.way != "alone"]
    values = [row.accuracy.value for row in own]
    kept = [f"{sum(values) / len(values) / original:.1%}"] if original else []
    cells = [
        first.student,
        f"{first.parameters:,}",
        first.way,
        ", ".join(f"{value:.2f}" for value in values),
        spread(values),
        *kept,
        ", ".join(f"{gain:+.2f}" for gain in gains),
        spread(gains),
        f"{sum(row.seconds for row in own) / len(own):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def sizes(ledger: Ledger) -> Iterator[str]:
    """What the artifacts weigh and take."""
    if not ledger.sizes:
        return
    batches = [timing.batch for timing in ledger.sizes[0].timings]
    yield "As artifacts of ONNX Runtime, before training (it changes no time and no bytes):"
    yield ""
    yield f"| model | parameters | bytes | {' | '.join(f'ms at batch {batch} | faster' for batch in batches)} |"
    yield f"|---|---:|---:|{'---:|' * 2 * len(batches)}"
    for each in ledger.sizes:
        cells = [each.student, f"{each.parameters:,}", f"{each.bytes:,}"]
        for timing in each.timings:
            ratio = timing.faster
            cells += [f"{timing.p50_ms.value:.3g}", f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"]
        yield f"| {' | '.join(cells)} |"
    yield ""


def spread(values: list[float]) -> str:
    """The mean and its interval; of a single value the value alone."""
    if not values:
        return ""
    found = mean_estimate(values)
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]" if len(values) > 1 else f"{found.value:.2f}"
