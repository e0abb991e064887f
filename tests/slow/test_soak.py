"""A short soak: the job killed in every way and resumed at other world sizes, and its report."""

from pathlib import Path

from soak import Report, damaged, soak


def test_a_short_soak(tmp_path: Path) -> None:
    kinds = ("one", "stop")
    report = soak(tmp_path, steps=16, ranks=2, life=(4, 5), interval=2, kinds=kinds)
    said = report.table()
    assert {kind for kind, *_ in report.kills} == {*kinds}, said
    assert {world for _, world, _, _ in report.kills} == {1, 2}, said
    assert {*report.budgets} >= {2**32, 0}, said
    assert report.steps == 16, said
    assert report.damaged == report.hung == 0, said
    assert set(report.lost("stop")) == {0}, said
    # One stop at least struck a job that had steps left to take.
    assert any(reached < 16 for kind, _, reached, _ in report.kills if kind == "stop"), said
    assert all(reached >= resumed for _, _, reached, resumed in report.kills), said
    assert report.difference < 1e-4, said
    assert report.final < 1e-4, said
    early, late = report.memory
    assert late < early * 1.2, said
    assert late


def test_the_report_is_a_table() -> None:
    kills = [("one", 2, 30, 25), ("one", 3, 60, 50), ("all", 4, 80, 75), ("stop", 1, 90, 90)]
    table = Report(kills=kills, steps=100, difference=1e-6, memory=(300.0, 301.0)).table()
    assert "| one rank killed | 2 times; steps lost: 7.5 on average, 10 at most |" in table
    assert "| asked to stop | 1 times; steps lost: 0.0 on average, 0 at most |" in table
    assert "| world sizes killed | 1, 2, 3, 4 |" in table
    assert "| resident memory of a rank, early and at the end | 300, 301 MiB |" in table


def test_damage_is_counted(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "a").write_bytes(b"a")
    digest = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    (checkpoint / "trainer.json").write_text(f'{{"files": {{"a": "{digest}"}}}}')
    assert damaged(tmp_path) == 0
    (checkpoint / "a").write_bytes(b"b")
    assert damaged(tmp_path) == 1
