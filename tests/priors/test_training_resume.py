"""What survives: SIGKILL at random moments, damaged files, a full disk; and what a resumed run must have in common."""

import csv
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from invgen.checkpoints import read_checkpoint
from invgen.priors import ArrayData, DiffusionPrior, Training
from invgen.priors.networks import MLPDenoiser, UNet

torch.set_num_threads(1)

# One process imports everything and forks the runs, which it kills; it never runs a backward pass itself.
RUN = """
import os, random, signal, sys, time, torch
torch.set_num_threads(1)
import lightning_fabric, rich.progress
from invgen.priors import ArrayData, DiffusionPrior, Training
from invgen.priors.networks import MLPDenoiser, UNet

KILLS, STEPS = 3, 300

class Data(ArrayData):
    def batch(self, step, size, seed):
        if not told:
            told.append(os.write(out, b"running"))
        return super().batch(step, size, seed)

def run(folder, **options):
    torch.manual_seed(0)
    prior = DiffusionPrior(MLPDenoiser(2, width=16, depth=2), (2,), sigma_data=1.0)
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
    Training(steps=STEPS, batch_size=8, warmup=5, log_every=10, log=f"{folder}/log.csv", validate_every=30, **options).fit(
        prior, Data(x), validation={"x": x[:8]}, progress=False)
    torch.save(prior.state_dict(), f"{folder}/weights.pt")

def start(folder, **options):
    global out, told
    told = []
    seen, out = os.pipe()
    pid = os.fork()
    if pid == 0:
        run(folder, **options)
        os._exit(0)
    os.read(seen, 7)
    return pid

whole, killed = sys.argv[1:]
began = time.perf_counter()
os.waitpid(start(whole), 0)
length = time.perf_counter() - began
moments, kills = random.Random(3), 0
options = {"checkpoint": f"{killed}/run.ckpt", "save_every": 7}
for _ in range(KILLS):
    pid = start(killed, **options)
    time.sleep(moments.uniform(0, length / KILLS))
    os.kill(pid, signal.SIGKILL)
    kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
pid = start(killed, **options)
assert os.waitpid(pid, 0)[1] == 0
print(kills)
"""

DATA = ArrayData(torch.randn(64, 2, generator=torch.Generator().manual_seed(1)))


def prior():
    torch.manual_seed(0)
    return DiffusionPrior(MLPDenoiser(2, width=16, depth=2), (2,), sigma_data=1.0)


def training(path, steps=20, **options):
    return Training(
        steps=steps, batch_size=8, warmup=5, log_every=10, checkpoint=str(path), **{"save_every": 5, **options}
    )


def fit(path, steps=20, data=DATA, settings=None, **options):
    out = prior()
    report = training(path, steps, **options).fit(out, data, progress=False, settings=settings)
    return out, report


def assert_equal_weights(a, b):
    for (name, first), second in zip(a.items(), b.values(), strict=True):
        assert torch.equal(first, second), name


def rows(path):
    with Path(path).open() as file:
        return list(csv.DictReader(file))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills need POSIX")
def test_killed_at_random_moments_and_resumed_equals_uninterrupted(tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    done = subprocess.run(
        [sys.executable, "run.py", "whole", "killed"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= 1
    weights = [torch.load(folder / "weights.pt", weights_only=True) for folder in (whole, killed)]
    assert_equal_weights(*weights)
    first, second = rows(whole / "log.csv"), rows(killed / "log.csv")
    assert [r["step"] for r in second] == [str(10 * k) for k in range(1, 31)]
    for a, b in zip(first, second, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    assert not [p for p in killed.iterdir() if p.name.startswith(".")]  # nothing half-written is left lying about


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    path = tmp_path / "run.ckpt"
    fit(path)
    assert read_checkpoint(f"{path}.previous", "training")[1]["step"] == 15
    path.write_bytes(path.read_bytes()[:900])
    with pytest.warns(UserWarning, match=r"damaged .*going on from run.ckpt.previous, step 15"):
        resumed, _ = fit(path, 20)
    again, _ = fit(tmp_path / "third.ckpt", 20)
    assert_equal_weights(again.state_dict(), resumed.state_dict())
    assert read_checkpoint(path, "training")[1]["step"] == 20
    assert read_checkpoint(f"{path}.previous", "training")[1]["step"] == 15  # not the damaged one
    path.unlink()  # killed between the two moves of a save
    _, report = fit(path, 20)
    assert report.steps == 20
    for file in (path, Path(f"{path}.previous")):
        file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a complete safetensors"):
        fit(path)


def test_a_full_disk_is_a_warning_and_the_old_checkpoint_stays(tmp_path, monkeypatch):
    path = tmp_path / "run.ckpt"
    fit(path, 10)
    before = path.read_bytes()
    write = Path.write_bytes

    def full(self, payload):
        write(self, payload[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(UserWarning, match=r"No space left on device.*Training goes on"):
        out, report = fit(path, 20)
    assert report.steps == 20
    assert path.read_bytes() == before
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.ckpt", "run.ckpt.previous"]
    resumed, _ = fit(path, 20)
    assert_equal_weights(out.state_dict(), resumed.state_dict())


def test_a_full_disk_does_not_stop_the_log(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("invgen.priors._train_log.atomic", full)
    with pytest.warns(UserWarning, match="Cannot write the log") as told:
        Training(steps=30, batch_size=8, log_every=10, log=str(tmp_path / "log.csv")).fit(prior(), DATA, progress=False)
    assert len([w for w in told if "log" in str(w.message)]) == 1


def test_another_configuration_is_refused_by_name(tmp_path):
    path = tmp_path / "run.ckpt"
    fit(path, 10, settings={"network": {"widths": (8, 8)}})
    fit(path, 10, settings={"network": {"widths": [8, 8]}})
    with pytest.raises(ValueError, match=r"batch_size \(was 8, now 4\), seed \(was 0, now 3\)") as told:
        Training(steps=20, batch_size=4, warmup=5, seed=3, checkpoint=str(path)).fit(
            prior(), DATA, progress=False, settings={"network": {"widths": (8, 8)}}
        )
    assert "warmup" not in str(told.value)
    with pytest.raises(ValueError, match="widths"):
        fit(path, 20, settings={"network": {"widths": (8, 16)}})
    with pytest.raises(ValueError, match=r"examples \(was 64, now 32\)"):
        fit(path, 20, ArrayData(DATA.x[:32]), settings={"network": {"widths": (8, 8)}})
    _, report = fit(path, 14, save_every=3, log=str(tmp_path / "l.csv"), settings={"network": {"widths": (8, 8)}})
    assert report.steps == 14


def test_the_log_is_continued_without_duplicates(tmp_path):
    path, log = tmp_path / "run.ckpt", tmp_path / "log.csv"
    fit(path, 20, log=str(log))
    with log.open("a") as file:
        file.write("30,1,2,3,4\n")  # of a run that was killed before its checkpoint
    _, report = fit(path, 40, log=str(log))
    table = rows(log)
    assert [r["step"] for r in table] == ["10", "20", "30", "40"]
    assert list(table[0]) == ["step", "seconds", "loss", "learning_rate", "gradient_norm"]
    seconds = [float(r["seconds"]) for r in table]
    assert seconds == sorted(seconds)
    assert report.seconds >= seconds[-1]
    assert float(table[-1]["loss"]) == pytest.approx(report.losses[-1][1], rel=1e-6)


def test_checkpoints_are_also_written_by_the_clock(tmp_path):
    class Looking:
        def batch(self, step, size, seed):
            found.append((tmp_path / "run.ckpt").exists())
            return DATA.batch(step, size, seed)

    found = []
    fit(tmp_path / "run.ckpt", 6, Looking(), save_every=1000, save_minutes=1e-9)
    assert found == [False, True, True, True, True, True]
    found.clear()
    fit(tmp_path / "other.ckpt", 6, Looking(), save_every=1000)


def test_weights_in_another_memory_layout_resume_to_the_bit(tmp_path):
    """The convolutions of a UNet are channels last; the tensors of a file are not."""
    examples = ArrayData(torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1)))

    class Until8:
        def batch(self, step, size, seed):
            if step == 8:
                raise KeyboardInterrupt
            return examples.batch(step, size, seed)

    def run(data, checkpoint=None):
        torch.manual_seed(0)
        out = DiffusionPrior(UNet(1, widths=(8, 12), blocks=1, embedding=16), (1, 8, 8))
        Training(steps=16, batch_size=4, warmup=5, checkpoint=checkpoint).fit(out, data, progress=False)
        return out.state_dict()

    path = str(tmp_path / "run.ckpt")
    run(Until8(), path)
    assert_equal_weights(run(examples), run(examples, path))


class Worsening(DiffusionPrior):
    """A prior whose validation figure falls until step 30 and rises from then on."""

    calls = 0

    def validation(self, batch):
        self.calls += 1
        return {"figure": abs(self.calls - 3.0)}


def worsening():
    torch.manual_seed(0)
    return Worsening(MLPDenoiser(2, width=16, depth=2), (2,), sigma_data=1.0)


def test_early_stop_keeps_the_best_averaged_weights(tmp_path):
    options = dict(batch_size=8, warmup=5, log_every=10, validate_every=10, patience=2, monitor="figure")
    stopped = worsening()
    report = Training(steps=100, **options, checkpoint=str(tmp_path / "c")).fit(
        stopped, DATA, validation={"x": DATA.x[:8]}, progress=False
    )
    assert report.stopped_early
    assert (report.steps, report.best_step) == (50, 30)
    assert [row["figure"] for row in report.history] == [2, 1, 0, 1, 2]
    assert all("validation_loss" in row and "loss" in row for row in report.history)

    class Until30:
        def batch(self, step, size, seed):
            if step == 30:
                raise KeyboardInterrupt
            return DATA.batch(step, size, seed)

    best = prior()
    Training(steps=100, batch_size=8, warmup=5).fit(best, Until30(), progress=False)
    assert_equal_weights(best.state_dict(), stopped.state_dict())
    again = worsening()  # a stopped run stays stopped
    more = Training(steps=100, **options, checkpoint=str(tmp_path / "c")).fit(
        again, DATA, validation={"x": DATA.x[:8]}, progress=False
    )
    assert more.steps == 50
    assert_equal_weights(again.state_dict(), stopped.state_dict())


def test_validation_does_not_change_the_run():
    a, b = prior(), prior()
    Training(steps=20, batch_size=8).fit(a, DATA, progress=False)
    report = Training(steps=20, batch_size=8, validate_every=3).fit(
        b, DATA, validation={"x": DATA.x[:20]}, progress=False
    )
    assert_equal_weights(a.state_dict(), b.state_dict())
    assert {"validation_loss", "rmse_at_1"} <= set(report.history[0])


def test_the_callers_random_numbers_are_left_alone():
    p = prior()
    state = torch.get_rng_state()
    Training(steps=3, batch_size=8).fit(p, DATA, progress=False)
    assert torch.equal(state, torch.get_rng_state())
