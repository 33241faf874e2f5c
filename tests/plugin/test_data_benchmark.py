"""The benchmark of data preparation on tiny tokenizers, through Axolotl's pipeline."""

import csv

from benchmarks import data


def test_rows_a_minute_with_the_plugin_and_without(tmp_path):
    file = tmp_path / "results.csv"
    data.main(["--pair", "tiny", "--rows", "8", "--words", "20", "--processes", "1", "--results", str(file)])
    with file.open(newline="") as stream:
        ours, alone = csv.DictReader(stream)
    assert ours["baseline"] == "without it" and float(ours["ratio"]) > 0
    assert float(ours["value"]) > 0 and float(alone["value"]) > 0
    assert ours["setting"].startswith("tiny tokenizers, 8 rows of ")
