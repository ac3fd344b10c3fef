"""SIGKILL at random moments: however often a run is killed, it ends as the one that was not."""

import random
import time

import pytest
import runs

VARIANTS = [{}, {"workers": 2}, {"micro_batch": 3}, {"save_steps": 3}]


def kill_until_done(folder, kills, draw, length, **changes):
    """Start the run again and again, each attempt killed at a random moment, the last one not; the number of kills."""
    done = 0
    while done < kills:
        child = runs.fork(lambda: runs.train(folder, **changes), folder.with_suffix(".log"))
        if not runs.killed_after(child, draw.uniform(0, length)):
            return done
        done += 1
    log = folder.with_suffix(".log")
    assert runs.wait(runs.fork(lambda: runs.train(folder, **changes), log)) == 0, log.read_text()[-3000:]
    return done


def kill_often(tmp_path, kills, seed):
    draw, done, runs_done = random.Random(seed), 0, 0
    wholes = []
    for number, changes in enumerate(VARIANTS):
        begin = time.monotonic()
        assert runs.wait(runs.fork(lambda n=number, c=changes: runs.train(tmp_path / f"whole{n}", **c))) == 0
        wholes.append((runs.outcome(tmp_path / f"whole{number}"), time.monotonic() - begin))
    while done < kills:
        changes = VARIANTS[runs_done % len(VARIANTS)]
        wanted, length = wholes[runs_done % len(VARIANTS)]
        folder = tmp_path / f"run{runs_done}"
        done += kill_until_done(folder, min(kills - done, 3), draw, length, **changes)
        assert runs.outcome(folder) == wanted, (seed, changes)
        runs_done += 1
    return done, runs_done


@pytest.mark.slow
def test_twelve_kills(tmp_path):
    seed = random.randrange(10**6)
    done, _ = kill_often(tmp_path, 12, seed)
    assert done == 12


@pytest.mark.faults
def test_a_thousand_kills(tmp_path):
    done, finished = kill_often(tmp_path, 1000, seed=0)
    print(f"{done} kills, {finished} runs, each bit for bit the one that was not interrupted")
    assert done == 1000


def kill_one_of_two(tmp_path, draw, wanted, length):
    """Kill one rank at a random moment: the other ends by itself, and both go on from what is there."""
    folder, log = tmp_path / f"two{draw.random()}", tmp_path / "two.log"

    def work():
        return runs.train(folder, evaluators=False)

    victim = draw.randrange(2)
    children = runs.fork_ranks(2, work, log)
    end = time.monotonic() + 60
    while not (folder / "attempts.jsonl").exists():  # before they have met, none can know of the other's end
        assert time.monotonic() < end
        time.sleep(0.002)
    if runs.killed_after(children[victim], draw.uniform(0, length)):
        begin = time.monotonic()
        code = runs.wait(children[1 - victim], 40)
        assert time.monotonic() - begin < 30
        text = log.with_name(f"two.log.{1 - victim}").read_text()
        assert code == 0 or (code == 1 and "another process of this run is gone" in text), text  # 0: it was done
    else:
        assert runs.wait(children[1 - victim]) == 0
    assert [runs.wait(child) for child in runs.fork_ranks(2, work, log)] == [0, 0]
    assert runs.outcome(folder) == wanted


def two_ranks(tmp_path, times, seed):
    begin = time.monotonic()
    whole = runs.fork_ranks(2, lambda: runs.train(tmp_path / "whole", evaluators=False), tmp_path / "whole.log")
    assert [runs.wait(child) for child in whole] == [0, 0], (tmp_path / "whole.log.0").read_text()
    length, draw = time.monotonic() - begin, random.Random(seed)
    for _ in range(times):
        kill_one_of_two(tmp_path, draw, runs.outcome(tmp_path / "whole"), length)


@pytest.mark.slow
def test_one_of_two_ranks_is_killed(tmp_path):
    two_ranks(tmp_path, 2, random.randrange(10**6))


@pytest.mark.faults
def test_one_of_two_ranks_is_killed_twenty_times(tmp_path):
    two_ranks(tmp_path, 20, seed=0)


@pytest.mark.slow
def test_three_ranks_resume_bit_for_bit(tmp_path):
    def stop_at_five():
        from clipkit.training.checkpoints.checkpoint import Checkpoints

        save = Checkpoints.save

        def cut(self, step, parts, **options):
            save(self, step, parts, **options)
            if step == 5:
                raise SystemExit(9)

        Checkpoints.save = cut
        runs.train(tmp_path / "run", batch_size=10)

    def wait(children):
        return [runs.wait(child) for child in children]

    assert wait(runs.fork_ranks(3, lambda: runs.train(tmp_path / "whole", batch_size=10))) == [0, 0, 0]
    assert 0 not in wait(runs.fork_ranks(3, stop_at_five))
    assert wait(runs.fork_ranks(3, lambda: runs.train(tmp_path / "run", batch_size=10))) == [0, 0, 0]
    assert runs.outcome(tmp_path / "run") == runs.outcome(tmp_path / "whole")
