"""The comparison of mixers: the task is recall, the runner loses no run, the report ranks what has run."""

import csv
import json
import math
import queue

import pytest
import torch
from torch.nn import functional as F

from benchmarks.quality import __main__ as quality
from benchmarks.quality import mixers, report, runner, tasks
from benchmarks.quality.arms import ARMS
from benchmarks.quality.plan import LRS, SEEDS, TRACKS, next_jobs, state_track, width_track
from benchmarks.quality.training import Job, learning_rate

# The task.


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def check_recall(batch, length):
    """Every queried token is a key of its example (its first occurrence), whose value follows there."""
    row, place = batch.positions // length, batch.positions % length
    asked = batch.tokens[row, place]
    first = (batch.tokens[row] == asked[:, None]).int().argmax(-1)
    assert (first < place).all() and (first % 2 == 0).all()
    assert torch.equal(batch.tokens[row, first + 1], batch.targets)
    assert batch.positions.unique().numel() == batch.positions.numel()


@pytest.mark.parametrize(("length", "pairs"), tasks.TRAINED + tasks.LONGER + ((8, 2),))
def test_mqar_is_recall(length, pairs):
    half, examples = tasks.VOCABULARY // 2, 6
    batch = tasks.mqar(length, pairs, examples, generator())
    assert batch.tokens.shape == (examples, length) and batch.positions.numel() == examples * pairs
    assert 0 <= batch.tokens.min() and batch.tokens.max() < tasks.VOCABULARY
    keys, values = batch.tokens[:, 0 : 2 * pairs : 2], batch.tokens[:, 1 : 2 * pairs : 2]
    assert 1 <= keys.min() and keys.max() < half <= values.min()
    for column in (keys, values):
        assert all(row.unique().numel() == pairs for row in column)
    check_recall(batch, length)
    assert (batch.positions % length >= 2 * pairs).all()
    assert torch.equal(
        batch.positions.view(examples, pairs) // length, torch.arange(examples)[:, None].expand(-1, pairs)
    )
    # All keys are asked for, each once.
    asked = batch.tokens.flatten()[batch.positions].view(examples, pairs)
    assert torch.equal(asked.sort().values, keys.sort().values)
    # A queried key's value does not follow it: the answer is nowhere but in the pairs.
    before_the_end = batch.positions % length < length - 1
    following = batch.tokens.flatten()[(batch.positions + 1).clamp(max=examples * length - 1)]
    assert (following == batch.targets)[before_the_end].float().mean() < 0.1


def test_mqar_asks_sooner_rather_than_later(monkeypatch):
    """One pair in 12 tokens: the query stands at gap i of 5 with a probability in proportion to ``i^-0.99``."""
    monkeypatch.setattr(tasks, "VOCABULARY", 32)
    examples = 20_000
    batch = tasks.mqar(12, 1, examples, generator())
    gaps = (batch.positions % 12 - 2) // 2
    shares = torch.arange(1, 6) ** -0.99
    found = torch.bincount(gaps, minlength=5) / examples
    torch.testing.assert_close(found, shares / shares.sum(), rtol=0, atol=4 * 0.5 / math.sqrt(examples))


def test_mqar_is_given_by_its_generator():
    one, same, other = (tasks.mqar(64, 4, 3, generator(seed)) for seed in (1, 1, 2))
    for name in ("tokens", "positions", "targets"):
        assert torch.equal(getattr(one, name), getattr(same, name))
    assert not torch.equal(one.tokens, other.tokens)


def test_mqar_refuses_pairs_that_do_not_fit():
    tasks.mqar(64, 16, 1, generator())
    with pytest.raises(ValueError, match="17 pairs and their queries do not fit into 64 tokens"):
        tasks.mqar(64, 17, 1, generator())


@pytest.mark.parametrize(("length", "asked"), [(64, 16 * 4), (128, 8 * 8), (256, 2 * 16 + 1 * 32 + 1 * 64)])
def test_a_batch_of_recall(length, asked):
    """1024 tokens whatever their length; examples of several numbers of pairs are shared out evenly."""
    batch = tasks.Recall(1024).batch(length, generator())
    assert batch.tokens.shape == (1024 // length, length)
    assert batch.positions.numel() == batch.targets.numel() == asked
    check_recall(batch, length)


def test_a_schedule_of_recall():
    task = tasks.Recall()
    schedule = task.schedule(1000, seed=0)
    assert {kind: schedule.count(kind) for kind, _ in task.SHARES} == {64: 300, 128: 100, 256: 600}
    assert schedule == task.schedule(1000, seed=0) != task.schedule(1000, seed=1)
    assert task.schedule(7, seed=0) == schedule[:7]


def test_held_out_data_are_the_same_for_every_run():
    task = tasks.Recall(validation=2, test=3)
    validation, test = (dict(task.held_out(part, "cpu")) for part in ("validation", "test"))
    assert list(validation) == [f"{n}x{p}" for n, p in tasks.TRAINED]
    assert list(test) == [f"{n}x{p}" for n, p in tasks.TRAINED + tasks.LONGER]
    assert {len(b.tokens) for b in validation.values()} == {2} and {len(b.tokens) for b in test.values()} == {3}
    again = dict(task.held_out("test", "cpu"))
    assert all(torch.equal(test[name].tokens, again[name].tokens) for name in test)
    validation = dict(tasks.Recall(validation=3).held_out("validation", "cpu"))
    assert not torch.equal(validation["64x4"].tokens, test["64x4"].tokens)


def test_scores_are_accuracies_and_their_means():
    """Of a model that recalls all in up to 256 tokens, but of 64 pairs only the first example's, and nothing in 512."""

    def model(tokens, positions):
        length = tokens.shape[1]
        row, asked = positions // length, tokens.flatten()[positions]
        first = (tokens[row] == asked[:, None]).int().argmax(-1)
        answers = tokens[row, first + 1]
        if length == 512:
            answers = answers - 1
        elif positions.numel() == 2 * 64:
            answers[64:] -= 1
        return F.one_hot(answers, tasks.VOCABULARY)

    scores = tasks.Recall(validation=2, test=2).scores(model, "cpu")
    assert list(scores) == list(tasks.Recall.columns)
    settings = {f"test_{n}x{p}": 0.0 if n == 512 else 0.5 if p == 64 else 1.0 for n, p in tasks.TRAINED + tasks.LONGER}
    assert scores == {"validation": 0.9, "test": round(4.5 / 7, 4), **settings}


def test_learning_rate_rises_and_falls():
    rates = learning_rate(0.01, 1000)
    assert rates.max() == rates[99:102].max() and rates.max() == pytest.approx(0.01, rel=1e-3)
    assert rates[0] == pytest.approx(0.01 / 100) and rates[-1] == pytest.approx(0.001, rel=1e-3)
    assert (rates[:99].diff() > 0).all() and (rates[101:].diff() < 0).all()


# The runner and its CSV.


def row_of(job, validation=0.5, test=0.4, **more):
    row = {**vars(job), "task": "mqar", "options": '{"op": "hla2"}', "state_numbers": 1312, "finite": True}
    row |= {"validation": validation, "test": test, **{f"test_{name}": test for name in report.SETTINGS}}
    row |= {
        "plateau_steps": 75,
        "seconds": 1.5,
        "device": "some device",
        "torch": "2",
        "commit": "abc",
        "date": "today",
    }
    return {**row, "curve": "9.000 8.000 1.000", **more}


def width_job(arm, lr=LRS[0], seed=0, **sizes):
    return Job(track="width", arm=arm, lr=lr, seed=seed, **sizes)


def test_rows_come_back(tmp_path):
    path, jobs = tmp_path / "new" / "rows.csv", [width_job("hla2, p=k", lr) for lr in LRS]
    assert runner.read_rows(path) == []
    runner.append_row(path, row_of(jobs[0]))
    runner.append_row(path, {**vars(jobs[1]), "error": 'ValueError: "a, b"'})  # a failed run has no more than this
    first, second = runner.read_rows(path)
    assert [first["key"], second["key"]] == [job.key() for job in jobs]
    assert (first["validation"], first["options"], first["error"]) == ("0.5", '{"op": "hla2"}', "")
    assert (second["validation"], second["error"]) == ("", 'ValueError: "a, b"')


def test_a_row_of_unknown_columns_is_refused(tmp_path):
    with pytest.raises(ValueError, match="surprise"):
        runner.append_row(tmp_path / "rows.csv", row_of(width_job("linear"), surprise=1))


def test_half_a_line_is_no_row_and_harms_none(tmp_path):
    """A kill may cut the last line anywhere, within quotes and numbers too: all other rows are read."""
    whole, path = tmp_path / "whole.csv", tmp_path / "rows.csv"
    jobs = [width_job("linear", seed=seed) for seed in range(3)]
    for job in jobs[:2]:
        runner.append_row(whole, row_of(job))
    text = whole.read_bytes()
    last = text.rindex(b"\n", 0, -1) + 1
    for cut in range(last, len(text)):
        path.write_bytes(text[:cut])
        assert [row["key"] for row in runner.read_rows(path)] == [jobs[0].key()], text[last:cut]
        runner.append_row(path, row_of(jobs[2]))
        assert [row["key"] for row in runner.read_rows(path)] == [jobs[0].key(), jobs[2].key()], text[last:cut]
    path.write_bytes(text[:last] + b"mqar,width,linear\n" + text[last:])  # as earlier versions left them
    assert [row["key"] for row in runner.read_rows(path)] == [job.key() for job in jobs[:2]]
    for cut in (0, 10):  # within the header
        path.write_bytes(text[:cut])
        assert runner.read_rows(path) == []
        runner.append_row(path, row_of(jobs[2]))
        assert [row["key"] for row in runner.read_rows(path)] == [jobs[2].key()]


def finish(jobs, **values):
    return [
        {**dict.fromkeys(runner.columns("mqar"), ""), **row_of(job, **values), "error": "", "key": job.key()}
        for job in jobs
    ]


def test_next_jobs_resume():
    entries = [e for e in width_track() if e.arm in ("linear", "softmax")]
    jobs = list(next_jobs(entries, [], LRS, SEEDS))
    assert [(j.arm, j.lr, j.seed) for j in jobs] == [(a, lr, 0) for a in ("softmax", "linear") for lr in LRS]
    rows = finish(jobs[:1])
    assert list(next_jobs(entries, rows, LRS, SEEDS)) == jobs[1:]
    rows += finish(jobs[1:])
    while more := list(next_jobs(entries, rows, LRS, SEEDS)):
        assert not {job.key() for job in more} & {row["key"] for row in rows}
        rows += finish(more[:1])
    assert len(rows) == len(entries) * (len(LRS) + len(SEEDS) - 1)
    # Runs of other sizes are other runs.
    assert len(list(next_jobs(entries, rows, LRS, SEEDS, steps=5))) == 4


def test_the_best_point_of_the_first_seed_gets_the_other_seeds():
    """In the state track among learning rates and shapes; a failed run, which has no accuracy, is not the best."""
    entries = [e for e in state_track() if e.arm == "linear"]
    jobs = list(next_jobs(entries, [], LRS, SEEDS))
    assert len(jobs) == len(entries) * len(LRS) == 6
    rows = [row for i, job in enumerate(jobs) for row in finish([job], validation=[0.1, 0.2, 0.9, 0.3, "", 0.8][i])]
    best = jobs[2]
    more = list(next_jobs(entries, rows, LRS, SEEDS))
    assert [(j.lr, j.head_dim, j.head_v_dim, j.seed) for j in more] == [
        (best.lr, best.head_dim, best.head_v_dim, seed) for seed in SEEDS[1:]
    ]
    assert list(next_jobs(entries, rows[:-1], LRS, SEEDS)) == jobs[-1:]  # not before the whole grid is there


class Inline:
    """The runner's `Workers` in this process: every job is done when it is put."""

    def __init__(self, count, device):
        self.device, self.results, self.done = device, queue.Queue(), set()

    def put(self, job):
        assert job not in self.done
        self.done.add(job)
        jobs = queue.Queue()
        for x in (job, None):
            jobs.put(x)
        runner.work(self.device, jobs, self.results)

    def get(self):
        return self.results.get_nowait()

    def close(self):
        pass


class SmallRecall(tasks.Recall):
    def __init__(self, tokens_per_step):
        super().__init__(tokens_per_step, validation=1, test=1)


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs ``python -m benchmarks.quality`` in this process with little to test on; the path of its CSV is ``out``."""
    monkeypatch.setattr(quality, "Workers", Inline)
    monkeypatch.setitem(runner.TASKS, "mqar", SmallRecall)

    def run(*arguments):
        sizes = ("--steps", "2", "--tokens-per-step", "256", "--device", "cpu")
        monkeypatch.setattr("sys.argv", ["quality", *sizes, "--out", str(run.out), *map(str, arguments)])
        quality.main()
        return runner.read_rows(run.out)

    run.out = tmp_path / "rows.csv"
    return run


def test_the_command_end_to_end(command, capsys):
    rows = command("--arms", "linear", "--seeds", 0, 1)
    assert [(row["lr"], row["seed"]) for row in rows][:2] == [(str(lr), "0") for lr in LRS]
    assert len(rows) == 3 and {row["error"] for row in rows} == {""}
    for row in rows:
        scores = [float(row[f"test_{name}"]) for name in report.SETTINGS]
        assert float(row["test"]) == pytest.approx(sum(scores) / len(scores), abs=1e-3)
        assert row["finite"] == "True" and row["plateau_steps"] == "" and row["state_numbers"] == "1312"
        assert [float(x) for x in row["curve"].split()] == pytest.approx([math.log(8192)] * 2, abs=0.3)
        assert json.loads(row["options"]) == ARMS["linear"].options and row["commit"] and row["date"]
    assert "3 rows in" in capsys.readouterr().err
    assert command("--arms", "linear", "--seeds", 0, 1) == rows  # nothing is repeated


def test_a_run_that_fails_has_a_row_and_the_others_go_on(command, monkeypatch, capsys):
    def mix(*args):
        raise RuntimeError("no, thanks\nand more")

    monkeypatch.setattr(mixers.Softmax, "mix", mix)
    rows = command("--arms", "softmax", "linear", "--lrs", 0.01, "--seeds", 0)
    assert [(row["arm"], row["error"]) for row in rows] == [("softmax", "RuntimeError: no, thanks"), ("linear", "")]
    assert rows[0]["test"] == "" and rows[1]["test"] != ""
    capsys.readouterr()


@pytest.mark.parametrize("track", TRACKS)
def test_an_unknown_arm_is_refused_by_name(command, track, capsys, monkeypatch):
    monkeypatch.setattr(quality, "Workers", None)  # nothing is to run
    with pytest.raises(SystemExit) as stop:
        command("--track", track, "--arms", "linear", "no such arm")
    assert stop.value.code == 2 and not command.out.exists()
    message = capsys.readouterr().err
    assert f"track {track} has no arm 'no such arm'" in message and "GatedDeltaNet" in message


def test_workers_are_processes_and_end():
    workers = runner.Workers(1, "cpu")
    job = width_job("no such arm", steps=1, tokens_per_step=64)
    workers.put(job)
    done, row = workers.get()
    workers.close()
    assert done == job and row["error"] == "KeyError: 'no such arm'" and row["lr"] == job.lr
    assert [process.exitcode for process in workers.processes] == [0]


# The report.


def write(path, rows):
    for row in rows:
        runner.append_row(path, row)


def run_report(monkeypatch, path, *arguments):
    monkeypatch.setattr("sys.argv", ["report", "--csv", str(path), *map(str, arguments)])
    report.main()


def grid(arm, validation, test, track="width"):
    """Rows of an arm's grid on seed 0."""
    jobs = [entry.job(lr, 0) for entry in TRACKS[track]() if entry.arm == arm for lr in LRS]
    return [row_of(job, v, t) for job, v, t in zip(jobs, validation, test, strict=True)]


def test_report_ranks_by_the_mean_over_the_seeds_of_the_point_that_validation_chose(tmp_path):
    """linear's other learning rate has the better test accuracy, but validation did not choose it."""
    path = tmp_path / "rows.csv"
    write(path, grid("linear", (0.6, 0.5), (0.55, 0.99)))
    write(path, [row_of(width_job("linear", LRS[0], 2), 0.1, 0.25), row_of(width_job("linear", LRS[0], 1), 0.1, 0.10)])
    write(path, grid("softmax", (0.5, 0.6), (0.2, 0.4)))
    write(path, grid("hla2", (0.9, 0.9), (0.9, 0.9))[:1])
    rows = runner.read_rows(path)
    lines, left_out = report.ranking(rows, "width")
    assert [(line.arm, line.lr) for line in lines] == [("softmax", LRS[1]), ("linear", LRS[0])]
    assert lines[1].values("test") == [0.55, 0.10, 0.25] and lines[1].mean("test") == pytest.approx(0.3)
    assert left_out == {"hla2": "1 of 2 points of its grid have run"}
    text = report.text(rows)
    assert "| 1 | softmax | 40.0 | 40.0 | 40.0 | 1 | 40.0 |" in text
    assert "| 2 | linear | 30.0 | 10.0 | 55.0 | 3 | 30.0 |" in text
    assert "Where there are more seeds (1 arms), the one that chose is on average 37.5 points better" in text
    assert "Not ranked: hla2 (1 of 2" in text and "7 runs of 3000 steps of 8192 tokens on some device" in text


def test_report_chooses_as_the_runner_does(tmp_path):
    path = tmp_path / "rows.csv"
    write(path, grid("linear", (0.1, 0.2, 0.9, 0.3, 0.9, 0.8), [0.5] * 6, "state"))
    rows = runner.read_rows(path)
    job = next(next_jobs([e for e in state_track() if e.arm == "linear"], rows, LRS, SEEDS))
    (line,), _ = report.ranking(rows, "state")
    assert line.entry.job(line.lr, SEEDS[1]) == job
    assert f"| {job.head_dim}/{job.head_v_dim} | {job.lr:g} |" in report.text(rows)


def test_report_lists_failed_runs_and_does_not_rank_them(tmp_path):
    path = tmp_path / "rows.csv"
    write(path, grid("softmax", (0.5, 0.6), (0.2, 0.4)))
    good, bad = grid("linear", (0.3, 0.0), (0.3, 0.0))
    write(path, [good, {**{name: bad[name] for name in vars(width_job("linear"))}, "error": "OutOfMemory: full"}])
    write(path, [{**row, "validation": "", "test": "", "error": "ValueError: bad"} for row in grid("hla2", "ab", "ab")])
    rows = runner.read_rows(path)
    lines, left_out = report.ranking(rows, "width")
    assert [(line.arm, line.lr) for line in lines] == [("softmax", LRS[1]), ("linear", LRS[0])]
    assert left_out == {"hla2": "every run of its grid failed"}
    text = report.text(rows)
    assert "| width | linear | 32 | 32 | 0.01 | 0 | OutOfMemory: full |" in text and text.count("ValueError: bad") == 2


def test_plateau_is_a_median_and_never_counts():
    def line(*plateaus):
        return report.Line(width_track()[0], 0.01, [{"plateau_steps": x} for x in plateaus])

    assert line("75", "900", "150").plateau() == 150 and line("75", "", "150").plateau() == 150
    assert math.isinf(line("", "", "150").plateau())


def test_report_writes_its_files(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.csv"
    write(path, grid("linear", (0.6, 0.5), (0.55, 0.5)) + grid("softmax", (1, 1), (1, 1)))
    write(path, grid("linear", [0.5] * 6, [0.4] * 6, "state"))
    run_report(monkeypatch, path, "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    names = {"rows.md", "quality_width.png", "quality_state.png", "quality_curves.png"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    assert (tmp_path / "out" / "rows.md").read_text() == printed.removesuffix("\n") and "## Equal state" in printed


def test_report_without_results_says_so(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.csv"
    for message in (f"{path} does not exist; python -m benchmarks.quality writes it", "has its whole grid (1 rows"):
        with pytest.raises(SystemExit) as stop:
            run_report(monkeypatch, path)
        assert stop.value.code == 2 and message in capsys.readouterr().err
        write(path, grid("linear", (0.6, 0.5), (0.55, 0.5))[:1])
    assert [p.name for p in tmp_path.iterdir()] == ["rows.csv"]


def test_every_arm_has_the_colour_of_its_family():
    families = {
        "peers": ("softmax", "softmax, RoPE", "linear, gate", "DeltaNet, identity", "GatedDeltaNet"),
        "the paper's operators": ("hla2", "ahla", "hla3", "hla3 published", "hla2, p=k", "hla2, p=proj"),
        "protecting, overwriting, both": ("protecting", "both, weighted, own size", "protecting, own S", "both, gate"),
        "polynomials on the query side": ("query 1", "query 8 Richardson", "exact, identity", "hla_q, gate"),
        "polynomials on the key side": ("key 1", "query 2 + key 1"),
        "others": ("Neumann 3", "hla2, p=k, |k~|=1", "linear + query 4", "an arm of an old CSV"),
    }
    assert {arm: report.family(arm) for arms in families.values() for arm in arms} == {
        arm: name for name, arms in families.items() for arm in arms
    }
    assert set(families) == set(report.FAMILIES) and {report.family(arm) for arm in ARMS} == set(families)


def test_the_kept_results_are_readable():
    """Rows of the repository's own CSV: all of them count, and all are of arms that the plan has."""
    path = runner.RESULTS / "quality_mqar.csv"
    with open(path, newline="") as file:
        lines = sum(1 for _ in csv.reader(file)) - 1
    rows = runner.read_rows(path)
    assert len(rows) == lines
    planned = {(track, entry.arm) for track in TRACKS for entry in TRACKS[track]()}
    assert {(row["track"], row["arm"]) for row in rows} <= planned
