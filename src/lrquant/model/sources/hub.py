"""Why the hub did not give something: offline by choice, without a network, or else."""

from __future__ import annotations

from collections.abc import Iterator

from huggingface_hub import constants

_UNREACHABLE = (
    *("ConnectionError", "ConnectError", "ConnectTimeout", "ConnectTimeoutError", "MaxRetryError"),
    *("NewConnectionError", "LocalEntryNotFoundError", "OfflineModeIsEnabled", "ProxyError"),
)


def offline(error: BaseException) -> str | None:
    """That the hub was not asked, or could not be, in words; None if it answered."""
    if not any(type(each).__name__ in _UNREACHABLE for each in _chain(error)):
        return None
    if constants.HF_HUB_OFFLINE:
        return "offline (HF_HUB_OFFLINE is set), and it is not in the hub's cache"
    return "no network: the hub cannot be reached, and it is not in its cache"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it came from."""
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__ or each.__context__
