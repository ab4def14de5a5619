"""Check a data set's folder and list its files; the demo first writes its images there. Warn of what is odd about them.

Reads   <data set>.root (outside DVC: 150 GB are not hashed; after a change in it, `dvc repro -f -s prepare_<data set>`)
Writes  data/listings/<data set>/{split}.csv for each of <data set>.splits
"""

import logging
from collections.abc import Iterator

from pipeline import paths
from pipeline.catalogue import TASKS
from pipeline.config import Params
from pipeline.data.survey import read_listing
from pipeline.tasks.description import DataSet, load

log = logging.getLogger(__name__)


def run(params: Params, data: DataSet) -> None:
    (paths.LISTINGS / data.name).mkdir(parents=True, exist_ok=True)
    if not data.section(params).splits:
        return
    if data.count:
        load(data.count)(params)
    load(data.prepare)(data.section(params))
    for sentence in survey(params, data):
        log.warning("%s: %s", data.title, sentence)


def survey(params: Params, data: DataSet) -> Iterator[str]:
    """What is odd about the listed files, a sentence each; none before they are listed.

    Raises:
        UserError: no training is possible with them.
    """
    recipes, images = {}, len(read_listing(data.name, data.training))
    if not images or not data.survey:
        return
    for task in TASKS.values():
        if task.data is data and not task.takes_released(params):
            for variant in task.variants(params):
                task.refuse_no_steps(params, variant, images)
                recipes[variant] = task.params(params).recipe_for(variant)
    yield from load(data.survey)(params, recipes)
