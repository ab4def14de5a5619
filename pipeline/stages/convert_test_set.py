"""Convert one further test set of the classifiers to FFCV's format.

Reads   test_sets.root/{name}
Writes  data/beton/test_sets/{name}.beton and its manifest
"""

from pipeline import cluster, paths
from pipeline.config import Params
from pipeline.launch.submission import refuse_while_read
from pipeline.tasks.classification.test_sets import convert


def run(params: Params, name: str) -> None:
    refuse_while_read([paths.beton("test_sets", name)])
    convert(params, name, workers=cluster.cores_here())
