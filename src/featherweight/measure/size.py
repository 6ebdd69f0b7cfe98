"""Size: what must be shipped, and what one inference computes."""

from __future__ import annotations

from featherweight.core.axis import Axis, Bench
from featherweight.core.reading import Reading

from .inputs import batch_sizes


class Size(Axis, name="size"):
    """Read the bytes on the disk and, off the artifact's own graph, its weights and its multiply-accumulates.

    Gives `file_bytes` (the runtime's file or folder), `weight_bytes` and `parameters` (as stored), `macs`
    (multiply-accumulates of one inference at batch 1, or at the batch size that the artifact is fixed to) and
    `integer_macs` (those of them whose operands are integers). For the compressed artifact also `ratio`: the
    original's file bytes over its own.
    """

    def read(self, bench: Bench) -> list[Reading]:
        """Raises `ArtifactError` if a file is not the one that was written."""
        found: list[Reading] = []
        for subject, artifact in bench.subjects.items():
            artifact.verify()
            work, one = artifact.manifest.work, {"conditions": {"batch": batch_sizes(artifact.manifest, (1,))[0]}}
            found += [
                bench.reading(subject, "size", "file_bytes", artifact.bytes(), "bytes"),
                bench.reading(subject, "size", "weight_bytes", work.weight_bytes, "bytes"),
                bench.reading(subject, "size", "parameters", work.parameters, ""),
                bench.reading(subject, "size", "macs", work.macs, "", **one),
                bench.reading(subject, "size", "integer_macs", work.integer_macs, "", **one),
            ]
        if bench.compressed is not None:
            found.append(
                bench.reading("compressed", "size", "ratio", bench.original.bytes() / bench.compressed.bytes(), "x")
            )
        return found
