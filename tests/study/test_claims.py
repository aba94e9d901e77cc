"""One holder at a time, a dead one is followed, nobody is asked."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from graftlm.study import claims as module
from graftlm.study.claims import Claims, Holder


def test_one_of_many_gets_it(tmp_path):
    claims, got = Claims(tmp_path), []
    start = threading.Barrier(16)

    def take():
        start.wait()
        got.append(claims.take("run"))

    threads = [threading.Thread(target=take) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(claim is not None for claim in got) == 1
    assert claims.held("run") and not claims.held("other")
    next(claim for claim in got if claim).give_back()
    assert not claims.held("run")
    again = claims.take("run")
    assert again is not None and claims.take("run") is None
    again.give_back()
    assert len(claims.holders("run")) == 2


def test_the_claim_of_a_killed_process_is_free_at_once_and_goes_to_one(tmp_path):
    code = "import sys, time; from pathlib import Path\n"
    code += "from graftlm.study.claims import Claims\n"
    code += "claim = Claims(Path(sys.argv[1])).take('run'); print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    claims = Claims(tmp_path)
    assert claims.held("run") and claims.take("run") is None
    os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while claims.held("run"):  # a zombie from here on: nobody has asked for its status
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.wait()
    process.stdout.close()
    taken = [claims.take("run") for _ in range(3)]
    assert [one is not None for one in taken] == [True, False, False]
    taken[0].give_back()


def test_a_later_process_with_the_same_number_is_not_taken_for_the_holder(tmp_path):
    claims = Claims(tmp_path)
    me = vars(Holder.here())
    (tmp_path / "run.1").write_text(json.dumps(me | {"began": "1"}) + "\n")
    assert not claims.held("run")
    (tmp_path / "run.1").write_text(json.dumps(me) + "\n")
    assert claims.held("run")


@pytest.mark.parametrize("text", ['{"machine": "elsewhere", "pid": 1, "began": null}\n', ""])
def test_a_holder_on_another_machine_is_believed_as_long_as_it_gives_signs_of_life(tmp_path, text):
    claims = Claims(tmp_path)
    file = tmp_path / "run.1"
    file.write_text(text)
    assert claims.held("run")
    now = time.time()
    os.utime(file, (now - module.LEASE - 5,) * 2)
    assert not claims.held("run")
    claim = claims.take("run")
    assert claim is not None
    claim.give_back()


def test_a_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BEAT", 0.01)
    claim = Claims(tmp_path).take("run")
    os.utime(claim.path, (0, 0))
    deadline = time.monotonic() + 10
    while claim.path.stat().st_mtime == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    claim.give_back()
    time.sleep(0.05)
    os.utime(claim.path, (0, 0))
    time.sleep(0.1)
    assert claim.path.stat().st_mtime == 0, "and none after giving it back"


def count_up(folder, names, made):
    claims = Claims(folder)
    for name in names:
        claim = claims.take(name)
        if claim is not None:
            made.put(name)


def test_processes_divide_the_names_among_them(tmp_path):
    context = multiprocessing.get_context("spawn")
    made = context.Queue()
    names = [f"run{number}" for number in range(60)]
    workers = [context.Process(target=count_up, args=(tmp_path, names, made)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [made.get(timeout=60) for _ in names]
    for worker in workers:
        worker.join()
    assert sorted(found) == sorted(names)
