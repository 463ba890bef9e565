"""The tables of each study, made again from its runs.jsonl by its own code, are those in its README.md."""
import importlib.util
import math
import re
import sys

import pytest
from conftest import ROOT

LOGS = ROOT / "logs"
sys.path.insert(0, str(LOGS))
import study        # noqa: E402

STUDIES = sorted(path.parent.name for path in LOGS.glob("*/run.py"))


def load(name):
    spec = importlib.util.spec_from_file_location(f"logs_{name}", LOGS / name / "run.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


@pytest.mark.parametrize("name", STUDIES)
def test_tables_are_those_of_the_runs(name):
    readme = (LOGS / name / "README.md").read_text()
    measured = readme.partition(study.START)[2].partition(study.END)[0]
    assert measured.strip() == load(name).tables(study.records(LOGS / name)).strip()
    assert "|" in measured or not study.records(LOGS / name)


def test_growth_saves_what_a_hand_worked_case_says():
    """Scratch reaches loss 3, 2, 1.5, 1 with 100, 200, 400, 800 FLOPs; a model grown from a source of 60 FLOPs
    reaches 1.5 with 100 more: 75% saved, or 60% with the source counted. 0.9 is beyond what scratch reached."""
    runs = {f"scratch {flops}": dict(points=[(0, 5), (flops, loss)])
            for flops, loss in ((100, 3), (200, 2), (400, 1.5), (800, 1))}
    grown = {"grown": dict(points=[(0, 2), (100, 1.5)], source_flops=60),
             "beyond": dict(points=[(0, 2), (100, 0.9)], source_flops=60)}
    done = {f"{name}, seed {seed}": record for name, record in (runs | grown).items() for seed in (1, 2)}
    saved = load("growth").saved
    not_counted, counted = saved(done, list(runs), "grown")
    assert not_counted == pytest.approx([75, 75]) and counted == pytest.approx([60, 60])
    assert all(map(math.isnan, saved(done, list(runs), "beyond")[0]))


def test_one_job_may_follow_from_the_results_of_others(tmp_path):
    """And what has been done is not done again."""
    ran = []

    def jobs(done):
        def job(name):
            return lambda: ran.append(name) or dict(loss=len(name))
        best = min(done, key=lambda name: done[name]["loss"], default=None) if len(done) >= 2 else None
        return {name: job(name) for name in ("long", "b", *([f"best {best}"] if best else []))}

    study.measure(tmp_path, jobs, only="")
    study.measure(tmp_path, jobs, only="")
    assert ran == ["long", "b", "best b"] == list(study.records(tmp_path))


def test_logs_link_to_files_that_exist_and_hide_no_machine():
    for path in LOGS.rglob("*.md"):
        text = path.read_text()
        assert not re.search(r"/work|/tmp|/root|/home", text), path
        for link in re.findall(r"\]\((?!http)(.*?)\)", text):
            assert (path.parent / link).exists(), (path, link)
    for name in STUDIES:
        assert f"({name}/)" in (LOGS / "README.md").read_text(), name
