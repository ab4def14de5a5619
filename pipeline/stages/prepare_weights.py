"""Check the file that each training starts from, and write down which it is.

Reads   released.folder
Writes  data/start/<task>/{variant}.json
"""

from pipeline.config import Params
from pipeline.launch.starts import write_starts


def run(params: Params) -> None:
    write_starts(params)
