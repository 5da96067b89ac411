"""The parts of scripts/dev.py that decide; what it then does is what every run of these tests relies on."""

import re
import shutil

import pytest

import dev


@pytest.mark.parametrize("line", ["torch==2.13.0", 'torch==2.13.0 ; python_version >= "3.11"', "torch==2.13.0;a"])
def test_the_pin_is_read_whatever_surrounds_it(line):
    assert dev.pinned_version("torch", f"torchvision==0.1\nnot-torch==1\n# torch==1\n{line}\nzlib==3\n") == "2.13.0"


def test_a_missing_pin_is_named_with_the_way_out():
    with pytest.raises(dev.DevError, match=r"no pin for torch; add a line 'torch==VERSION'"):
        dev.pinned_version("torch", "torchvision==0.1\ntorch>=2\n")


def test_every_line_of_the_constraints_is_one_exact_pin():
    lines = dev.CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pin = re.compile(r'[\w.-]+==[\w.]+( ; python_version (<|>=) "3\.11")?')
    assert [line for line in lines if not line.startswith("#") and not pin.fullmatch(line)] == []


@pytest.fixture
def project(tmp_path):
    for name in ("constraints.txt", "pyproject.toml"):
        shutil.copy(dev.ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("changed", ["constraints.txt", "pyproject.toml"])
def test_the_fingerprint_follows_what_decides_the_install(project, changed):
    before = dev.fingerprint(project)
    assert dev.fingerprint(project) == before
    with (project / changed).open("a") as file:
        file.write("\n")
    assert dev.fingerprint(project) != before


def test_a_moved_project_is_installed_again(project, tmp_path):
    moved = shutil.copytree(project, tmp_path / "moved")
    assert dev.fingerprint(moved) != dev.fingerprint(project)


def test_a_stamp_holds_for_its_digest_only(tmp_path):
    stamp = tmp_path / "stamp"
    assert dev.installed_extras(stamp, "digest") == set()
    dev.write_stamp(stamp, "digest", {"test", "demo"})
    assert dev.installed_extras(stamp, "digest") == {"demo", "test"}
    assert dev.installed_extras(stamp, "other") == set()


@pytest.mark.parametrize("cut", ["", "\n", "dige", "digest"])
def test_a_stamp_that_was_cut_short_says_that_nothing_is_installed(tmp_path, cut):
    stamp = tmp_path / "stamp"
    stamp.write_text(cut)
    assert dev.installed_extras(stamp, "digest") == set()


class Recorder(list):
    """Stands in for a function: notes each call, and fails if told to."""

    def __init__(self, error=None):
        self.error = error

    def __call__(self, *arguments):
        self.append(arguments)
        if self.error:
            raise self.error


@pytest.fixture
def installer(tmp_path, monkeypatch):
    """`dev` with a stamp of an older pyproject.toml, and nothing that really installs."""
    monkeypatch.setattr(dev, "STAMP", tmp_path / "stamp")
    dev.write_stamp(dev.STAMP, "older", {"demo"})
    for name in ("make_venv", "pip_install", "check_torch"):
        monkeypatch.setattr(dev, name, Recorder())
    monkeypatch.setattr(dev, "venv_works", lambda: True)
    return dev


def test_torch_comes_first_and_alone(installer):
    installer.install("test")
    torch = dev.pinned_version("torch", dev.CONSTRAINTS.read_text(encoding="utf-8"))
    assert installer.pip_install == [(f"torch=={torch}",), ("--editable", ".[test]")]
    assert installer.check_torch == [(torch,)]
    assert installer.make_venv == []


def test_what_is_installed_stays_and_is_not_installed_again(installer):
    for extra in ("demo", "test", "demo", "test"):
        installer.install(extra)
    assert [what[-1] for what in installer.pip_install if "--editable" in what] == [".[demo]", ".[test]"]


@pytest.mark.parametrize("error", [dev.DevError("pip"), KeyboardInterrupt()], ids=["pip fails", "Ctrl-C"])
def test_an_install_that_does_not_end_well_is_done_anew(installer, monkeypatch, error):
    with monkeypatch.context() as during:
        during.setattr(installer, "pip_install", Recorder(error))
        with pytest.raises(type(error)):
            installer.install("test")
    assert not installer.STAMP.exists()
    installer.install("test")
    assert len(installer.make_venv) == 1


def test_a_venv_that_does_not_start_is_made_anew(installer, monkeypatch):
    monkeypatch.setattr(installer, "venv_works", lambda: False)
    installer.install("test")
    assert len(installer.make_venv) == 1


def test_an_unknown_job_names_the_known_ones(capsys):
    with pytest.raises(SystemExit) as exit:
        dev.main(["tset"])
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert "'tset'" in message
    assert all(name in message for name in dev.JOBS)


def test_options_after_the_job_belong_to_the_job():
    assert dev.parse(["test", "-x", "--help", "tests/test_dev.py"]) == ("test", ["-x", "--help", "tests/test_dev.py"])


@pytest.mark.parametrize("job", dev.JOBS.values(), ids=dev.JOBS)
def test_a_job_asks_for_an_extra_and_scripts_that_exist(job):
    extras = re.findall(r"^(\w+) = \[", (dev.ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert job.extra in extras
    assert [step[0] for step in job.steps if step[0] != "-m" and not (dev.ROOT / step[0]).is_file()] == []


def test_the_first_failing_step_ends_the_job_with_its_code(monkeypatch):
    monkeypatch.setattr(dev, "PYTHON", dev.sys.executable)
    exits = [("-c", f"import sys; sys.exit({code})") for code in (0, 7, 9)]
    assert dev.run(dev.Job("", "test", tuple(exits)), []) == 7
    assert dev.run(dev.Job("", "test", tuple(exits[:1])), ["ignored"]) == 0


def test_an_old_python_is_told_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(dev, "OLDEST_PYTHON", (99, 1))
    assert dev.main(["lint"]) == 1
    assert "call this with 99.1 or newer" in capsys.readouterr().err
