"""Compose `experiments/` into `params.yaml`, as `dvc exp run -S` does with the same files."""

from pathlib import Path

from pipeline import paths
from pipeline.config import Params, validate
from pipeline.errors import UserError, unknown


def compose(overrides: list[str], target: Path = paths.PARAMS) -> None:
    """Compose with Hydra, check, and write `target` whole.

    Raises:
        UserError: an unknown group, choice or key, or a value that does not fit; nothing is written.
    """
    import yaml
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        for override in OverridesParser.create().parse_overrides(overrides):
            _check_key(override.key_or_group)
        with initialize_config_dir(str(paths.EXPERIMENTS.absolute()), version_base="1.3"):
            composed = hydra_compose("config", overrides)
        data = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # Hydra raises ValueError for `batch=4096`
        raise UserError(f"{' '.join(overrides)}: {' '.join(str(error).split())}") from None
    validate(Params, data, "the composed parameters")
    with paths.written_atomically(target) as temporary:
        temporary.write_text(yaml.safe_dump(data, sort_keys=False))


def _check_key(key: str) -> None:
    """Name the valid keys for an unknown one, where Hydra would only say that it is not there."""
    groups = sorted(folder.name for folder in paths.EXPERIMENTS.iterdir() if folder.is_dir())
    first, *rest = key.split(".")
    if first in groups:
        return
    if first not in Params.model_fields:
        raise UserError(unknown(f"key {key!r}", first, [*groups, *Params.model_fields]))
    model = Params.model_fields[first].annotation
    if rest and isinstance(model, type) and hasattr(model, "model_fields") and rest[0] not in model.model_fields:
        raise UserError(unknown(f"key {key!r}", rest[0], model.model_fields))
