"""Check a data set's folder and list its files; the demo first writes its images there.

Reads   <data set>.root (outside DVC: 150 GB are not hashed; after a change in it, `dvc repro -f -s prepare_<data set>`)
Writes  data/listings/<data set>/{split}.csv for each of <data set>.splits
"""

from pipeline.config import Params
from pipeline.tasks.description import DataSet, load


def run(params: Params, data: DataSet) -> None:
    load(data.prepare)(data.section(params))
