"""Banks as data frames. Needs pandas (the extra ``frames``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pacellm.errors import EngineError
from pacellm.memory.state import COUNTERS, Banks

if TYPE_CHECKING:
    from pandas import DataFrame


def slots_frame(banks: Banks) -> DataFrame:
    """A row for each slot in use: layer, slot, uses, stamp, norms of key and value.

    Raises:
        EngineError: pandas is missing.
    """
    pandas = _pandas()
    columns: dict[str, list[Any]] = {name: [] for name in ("layer", "slot", "usage", "stamp", "key_norm", "value_norm")}
    for layer, bank in banks.items():
        filled = int(bank.filled)
        columns["layer"] += [layer] * filled
        columns["slot"] += range(filled)
        columns["usage"] += bank.usage[:filled].tolist()
        columns["stamp"] += bank.stamp[:filled].tolist()
        columns["key_norm"] += bank.keys[:filled].float().norm(dim=1).tolist()
        columns["value_norm"] += bank.values[:filled].float().norm(dim=1).tolist()
    found: DataFrame = pandas.DataFrame(columns)
    return found


def counters_frame(banks: Banks) -> DataFrame:
    """A row for each layer, a column for each counter.

    Raises:
        EngineError: pandas is missing.
    """
    rows = {layer: dict(zip(COUNTERS, bank.counters.tolist(), strict=True)) for layer, bank in banks.items()}
    found: DataFrame = _pandas().DataFrame.from_dict(rows, orient="index").rename_axis("layer")
    return found


def _pandas() -> Any:
    try:
        import pandas
    except ModuleNotFoundError:
        raise EngineError("data frames need pandas: pip install 'pacellm[frames]'") from None
    return pandas
