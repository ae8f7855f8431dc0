from __future__ import annotations

import json
import multiprocessing

import pytest

from tokenpacker.data.rejects import Rejects, TooManyRejects
from tokenpacker.data.rows import RecordError


def missing(id="a"):
    return RecordError(id, f"{id}.png does not exist", "missing image", "data.json, entry 1")


def written(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_reject_is_counted_and_written_at_once(tmp_path):
    path = tmp_path / "run" / "rejects.jsonl"
    rejects = Rejects(path)
    assert not path.exists()
    rejects.accept(3)
    rejects.reject(missing("é"))
    line = {"id": "é", "kind": "missing image", "reason": "é.png does not exist", "source": "data.json, entry 1"}
    assert written(path) == [line]
    assert (rejects.num_seen, rejects.num_rejected, rejects.share) == (4, 1, 0.25)


def test_it_stops_past_the_share_and_says_what_is_wrong(tmp_path):
    rejects = Rejects(tmp_path / "rejects.jsonl", max_share=0.01, min_seen=1)
    rejects.accept(199)
    rejects.reject(missing("a"))
    rejects.reject(RecordError("b", "too many tokens", "too long"))  # 2 of 201 is within
    with pytest.raises(TooManyRejects) as caught:
        rejects.reject(missing("c"))
    message = str(caught.value)
    assert message.startswith("3 of 202 samples (1.5%) cannot be used, more than data.max_reject_share=0.01 allows")
    assert message.endswith("or raise data.max_reject_share")
    assert "2 missing image, 1 too long" in message
    assert "rejects.jsonl" in message
    assert "\n" not in message


def test_it_does_not_stop_before_enough_was_seen():
    rejects = Rejects(None, max_share=0.01, min_seen=10)
    for number in range(9):
        rejects.reject(missing(str(number)))
    with pytest.raises(TooManyRejects, match="10 of 10"):
        rejects.reject(missing("9"))


def test_the_end_of_a_small_data_set_is_judged_too():
    rejects = Rejects(None, max_share=0.1)
    rejects.accept(9)
    rejects.finish()
    rejects.reject(missing())
    rejects.finish()  # 1 of 10 is just tolerated
    rejects.reject(missing())
    with pytest.raises(TooManyRejects, match="2 of 11"):
        rejects.finish()


def test_epochs_and_resumed_runs_do_not_repeat_lines(tmp_path):
    path = tmp_path / "rejects.jsonl"
    for _ in range(2):
        rejects = Rejects(path)
        for _epoch in range(2):
            rejects.reject(missing("a"))
        assert rejects.num_rejected == 2
    with path.open("a") as file:
        file.write('{"id": "cut o')  # by a crash
    assert len(Rejects(path)._written) == 1
    Rejects(path, keep=False)
    assert not path.exists()


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(ValueError, match="max_share"):
        Rejects(None, max_share=share)


def _reject_many(path, name):
    rejects = Rejects(path, max_share=1.0)
    for number in range(200):
        rejects.reject(missing(f"{name}-{number}-{'x' * 200}"))


def test_several_processes_write_whole_lines(tmp_path):
    path = tmp_path / "rejects.jsonl"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_reject_many, args=(path, name)) for name in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    ids = {line["id"].rsplit("-", 1)[0] for line in written(path)}
    assert ids == {f"{name}-{number}" for name in "abc" for number in range(200)}
