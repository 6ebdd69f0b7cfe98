"""The benchmark of adapters: its page shows every row, and a run goes on from what the ledger holds."""

from benchmarks import adapters
from benchmarks.adapters import Learned, Ledger, Merged, Run, Switched, arguments, tool
from benchmarks.adapters_page import page
from benchmarks.record import Figure
from featherweight.core.recipe import Recipe
from featherweight.core.target import target

FIGURE = Figure(value=4.5, low=4.25, high=4.75, n=20)


def learned(way: str, base: str, given) -> Learned:
    item = tool(way, given)
    return Learned(
        task="text", base=base, way=way, step=item.full(), quality=FIGURE, before=FIGURE, trained=1234, bytes=5678,
        step_ms=12.4, peak_mb=None,
    )  # fmt: skip


def test_the_page_shows_what_was_trained_switched_and_merged():
    given = arguments(["--date", "2026-01-31"])
    names = ("none", *adapters.STYLES)
    switched = Switched(
        base="int8", base_bytes=1000, adapter_bytes=dict.fromkeys(adapters.STYLES, 77), one_session=True,
        quality={text: dict.fromkeys(names, 3.25) for text in adapters.STYLES}, switch_ms=0.25, load_ms=30.0,
        torch_quality=dict.fromkeys(adapters.STYLES, 3.24), run_ms=dict.fromkeys(("without slots", *names), 1.5),
        switching_mb=0.5,
    )  # fmt: skip
    merged = Merged(
        task="text", base="4 bits", bound=0.1, moved={"nearest": 0.5, "with data": 0.05}, refused="more than bound",
        quality=dict.fromkeys(("base", "beside", "nearest", "with data"), FIGURE),
    )  # fmt: skip
    ledger = Ledger(
        date="2026-01-31", command="c", machine="m", versions={"torch": "2"}, metrics={"text": "perplexity"},
        learned=[learned("LoRA", "int8", given)], switched=[switched], merged=[merged],
    )  # fmt: skip
    text = page(ledger)
    assert "| int8 | LoRA | 4.50 [4.25, 4.75] | 4.50 | 1,234 | 5,678 | 12 |  |" in text
    assert "| int8 | 1,000 | 77, 77, 77 | 30.0 | 0.25 | 1.50 |" in text and text.count("| 3.250 |") >= 3
    assert "| text | 4 bits | 0.500 | 0.050 | 0.1: yes |" in text and "`more than bound`" in text


def test_a_run_goes_on_from_its_ledger(tmp_path, monkeypatch):
    words = ["--date", "2026-01-31", "--bases", "int8", "--ways", "LoRA", "IA3", "--out", str(tmp_path)]
    given = arguments([*words, "--page", str(tmp_path / "page.md")])
    made = []

    def counted(task, base, way, item, given) -> Learned:
        made.append(way)
        return learned(way, base, given)

    class Named:
        name = "text"

        class metric:
            name = "perplexity"

    monkeypatch.setattr(adapters, "learned", counted)
    Run(given, words).learn(Named)
    Run(given, words).learn(Named)
    assert made == ["LoRA", "IA3"] and (tmp_path / "page.md").is_file()


def test_every_way_and_base_is_a_recipe_that_onnxruntime_takes():
    given = arguments(["--date", "2026-01-31"])
    for steps in adapters.BASES.values():
        for way in adapters.WAYS:
            Recipe([*steps, tool(way, given)]).check(target("onnxruntime"))
