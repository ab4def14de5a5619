"""Reference curves: read from timm's files and from runs, held against a run, shown in the report."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pipeline import paths
from pipeline.__main__ import main
from pipeline.catalogue import find_task
from pipeline.config import Params, load_params
from pipeline.errors import UserError
from pipeline.experiments import compose
from pipeline.report.collect import curves
from pipeline.tracking import reference
from pipeline.tracking.about import About

LOG = """
Train: 0 [   0/1251 (  0%)]  Loss:  6.951172 (6.9512)  Time: 9.1s,  112.4/s  LR: 1.000e-06  Data: 5.9 (5.9)
Train: 0 [1250/1251 (100%)]  Loss:  6.851318 (6.9034)  Time: 0.4s,  2412.4/s  LR: 1.000e-06  Data: 0.0 (0.0)
Test: [   0/48]  Time: 3.2 (3.2)  Loss:  6.7109 (6.7109)  Acc@1:  0.4883 ( 0.4883)  Acc@5:  3.1250 ( 3.1250)
Test: [  48/48]  Time: 0.1 (0.5)  Loss:  6.6953 (6.7001)  Acc@1:  1.1792 ( 0.9360)  Acc@5:  4.3632 ( 3.2540)
Current checkpoints: ('output/checkpoint-0.pth.tar', 0.936)
Train: 1 [1250/1251 (100%)]  Loss: 6.52 (6.61)  Time: 0.4s,  2412.4/s  LR: 2.008e-04  Data: 0.0 (0.0)
Test: [  48/48]  Time: 0.1 (0.5)  Loss:  5.4 (5.5)  Acc@1:  9.1 ( 8.2500)  Acc@5:  24.4 ( 22.2)
"""
SUMMARY = """epoch,train_loss,eval_loss,eval_top1,eval_top5
0,6.9034,6.70,0.936,3.254
1,6.7,5.6,8.0,21.0
epoch,train_loss,eval_loss,eval_top1,eval_top5
1,6.61,5.50,8.25,22.2
"""


def test_timms_log_and_summary_are_the_same_curve(tmp_path: Path) -> None:
    log, summary = tmp_path / "s12.log", tmp_path / "summary.csv"
    log.write_text(LOG)
    summary.write_text(SUMMARY)
    for file in (log, summary):
        assert reference.read(file).to_dict("list") == {
            "epoch": [1, 2],
            "loss": [6.9034, 6.61],
            "top1": [0.936, 8.25],
        }, file


def write_run(folder: Path, shift: float = 0.0, epochs: int = 10) -> Path:
    """A run folder with two records per epoch and a validation pass at each end."""
    folder.mkdir(parents=True)
    records = [
        {"step": half * 50, "total_steps": 4000, "epoch": half / 2, "loss": 7.0 - half / 20 + shift}
        for half in range(1, 2 * epochs + 1)
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    passes = [{"step": 100 * epoch, "epoch": epoch, "top1": 4.0 * epoch} for epoch in range(1, epochs + 1)]
    (folder / "validation.jsonl").write_text("".join(json.dumps(each) + "\n" for each in passes))
    return folder


def test_a_run_is_read_by_epochs(tmp_path: Path) -> None:
    curve = reference.read(write_run(tmp_path / "run", epochs=3))
    assert curve["epoch"].tolist() == [1, 2, 3]
    assert curve["loss"].tolist() == pytest.approx([6.925, 6.825, 6.725])
    assert curve["top1"].tolist() == [4.0, 8.0, 12.0]


@pytest.mark.parametrize("content", ["", "nothing of a curve", None])
def test_what_is_no_curve_is_refused_by_name(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "file.log"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=r"file\.log is"):
        reference.read(file)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no history"):
        reference.read(tmp_path / "empty")


@pytest.fixture
def params(in_checkout: Path) -> Params:
    compose(["scale=paper"])
    return load_params(paths.PARAMS)


def history(epochs: float, loss: float) -> list[dict[str, Any]]:
    """A run of 300 epochs of 312 steps that stands where `epochs` says."""
    step = round(epochs * 312)
    return [{"step": step, "total_steps": 300 * 312, "epoch": epochs, "loss": loss}]


def test_a_run_that_leaves_the_band_is_told_so_in_one_sentence(params: Params, tmp_path: Path) -> None:
    files = []
    for seed, shift in enumerate((0.0, 0.1)):
        file = tmp_path / f"{seed}.csv"
        rows = [f"{epoch},{6.0 - epoch / 100 + shift},0,{epoch / 4},0" for epoch in range(300)]
        file.write_text("epoch,train_loss,eval_loss,eval_top1,eval_top5\n" + "\n".join(rows))
        files.append(file)
    folders = reference.add(params, find_task("classifier"), "poolformer_s12", "authors", files)
    assert [folder.name for folder in folders] == ["poolformer_s12-authors-0", "poolformer_s12-authors-1"]
    at_15 = reference.band("poolformer_s12", "loss")[15]
    middle, margin = 5.86 + 0.05, 0.03 * (5.86 + 0.05)
    assert (at_15.low, at_15.high) == pytest.approx((middle - 0.05 - margin, middle + 0.05 + margin))

    def said(epochs: float, loss: float, top1: float = 3.5, variant: str = "poolformer_s12") -> str:
        passes = [{"step": 0, "epoch": 15.0, "top1": top1}, {"step": 1, "epoch": 299.0, "top1": 0.0}]
        return reference.verdict(variant, history(epochs, loss), passes)

    assert said(3.0, 9.9) == "", "before 5 %"
    assert said(15.0, 5.9) == "", "inside"
    high = said(15.0, 6.4)
    assert high == "at 5% (epoch 15) loss 6.400 is above the reference band (5.683 to 6.137) of authors"
    assert "and top-1 9.0 is above the reference band" in said(15.0, 6.4, top1=9.0)
    assert said(15.0, 5.9, top1=0.5).startswith("at 5% (epoch 15) top-1 0.5 is below")
    assert said(30.0, 6.4).startswith("at 10% (epoch 30)")
    assert said(60.0, 6.4).startswith("at 20% (epoch 60)")
    assert said(15.0, 6.4, variant="poolformer_s24") == "", "no reference"
    with pytest.raises(UserError, match="already"):
        reference.add(params, find_task("classifier"), "poolformer_s12", "authors", files)


def test_a_reference_lies_over_the_curves_that_are_trained(
    params: Params, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = tmp_path / "summary.csv"
    summary.write_text(SUMMARY)
    assert main(["reference", "add", "poolformer_s24", str(summary), "--name", "timm"]) == 0
    assert "runs/reference/poolformer_s24-timm-0: 2 epochs" in capsys.readouterr().out
    about = About.read(Path("runs/reference/poolformer_s24-timm-0"))
    assert about is not None
    assert (about.kind, about.tags["reference"]) == ("classifier", "timm")
    compose(["scale=paper", "classification.train=[poolformer_s24]", "segmentation.train=[]", "seeds=[0]"])
    for file, content in {
        "results/train_classifier/poolformer_s24-0.csv": "step,epoch,loss,learning_rate\n312,1,6.9,0.001\n",
        "results/train_classifier/poolformer_s24-0.validation.csv": "step,epoch,top1,top5,val_loss\n",
        "results/evaluate_classifier/poolformer_s24-0.json": '{"top1": 50.0}',
    }.items():
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(content)
    table: pd.DataFrame = curves(load_params(paths.PARAMS))
    theirs = table[table["reference"]]
    losses = theirs[theirs["metric"] == "loss"]
    assert losses[["step", "value"]].to_numpy().tolist() == [[312, 6.9034], [624, 6.61]], "epochs as steps here"
    assert theirs.loc[theirs["metric"] == "top-1, %", "value"].tolist() == [0.936, 8.25]
    assert set(table.loc[~table["reference"], "seed"]) == {0}
