import pytest

from tokenpacker.compare.results import RUN, append_row, latest, of_one_protocol, read_rows


def row(fingerprint: str, protocol: str = "p", **content) -> dict:
    return {"kind": RUN, "protocol": protocol, "fingerprint": fingerprint, **content}


def test_rows_come_back_in_order_and_the_last_of_a_fingerprint_counts(tmp_path):
    path = tmp_path / "results.jsonl"
    assert read_rows(path) == []
    rows = [row("a", value=1), row("b", value=2), row("a", value=3)]
    for one in rows:
        append_row(path, one)
    assert read_rows(path) == rows
    assert latest(rows, RUN) == {"a": rows[2], "b": rows[1]}


def test_a_row_that_was_cut_off_is_left_out_and_replaced_by_the_next(tmp_path):
    path = tmp_path / "results.jsonl"
    append_row(path, row("a"))
    with path.open("a") as file:
        file.write('{"kind": "run", "prot')
    assert read_rows(path) == [row("a")]
    append_row(path, row("b"))
    assert read_rows(path) == [row("a"), row("b")]


@pytest.mark.parametrize("line", ["no json", "[1]", '{"kind": "run"}'])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    path = tmp_path / "results.jsonl"
    append_row(path, row("a"))
    with path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=r"results\.jsonl, line 2 is no row of a comparison; delete the line"):
        read_rows(path)


def test_rows_of_other_settings_stay_out_of_the_table():
    assert of_one_protocol([row("a", "old"), row("b", "new"), row("c", "old"), row("d", "new")]) == [
        row("b", "new"),
        row("d", "new"),
    ]
    assert of_one_protocol([]) == []
