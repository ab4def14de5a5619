"""Convert a data set's splits to FFCV's format.

Reads   data/listings/<data set>, <data set>.root
Writes  data/beton/<data set>/{split}.beton and its manifest for each of <data set>.splits
"""

from pathlib import Path

from pipeline import cluster, paths
from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.launch.submission import refuse_while_read
from pipeline.tasks.description import DataSet, load


def run(params: Params, data: DataSet) -> None:
    section = data.section(params)
    (paths.BETON / data.name).mkdir(parents=True, exist_ok=True)
    if not section.splits:
        return
    if not Path(section.root).exists():
        raise UserError(f"{section.root} is gone since it was listed: run `dvc repro -f -s prepare_{data.name}`")
    refuse_while_read([data.beton(split) for split in section.splits])
    load(data.convert)(section, workers=cluster.cores_here())
