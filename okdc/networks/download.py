"""Downloads from the Hugging Face hub, whose client tries for most of a minute where there is no connection."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants

PATIENCE = 5.0  # seconds for the hub to answer


class Unreachable(ConnectionError):
    """The hub does not answer, and its cache has not what was asked for."""


@contextmanager
def quick_to_fail() -> Iterator[None]:
    """Meanwhile the hub's cache alone is used, if the hub does not answer; Unreachable where that is not enough."""
    before, answers = constants.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE or _answers(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = before or not answers
    try:
        yield
    except Exception as error:
        if not answers and type(error).__module__.startswith("huggingface_hub"):
            raise Unreachable(f"{constants.ENDPOINT} does not answer") from error
        raise
    finally:
        constants.HF_HUB_OFFLINE = before


def _answers(address: str) -> bool:
    """Whether anything answers there, be it to refuse; the hub's client may trust certificates that Python does not."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=PATIENCE).close()
    except urllib.error.HTTPError:
        return True
    except OSError as error:
        return isinstance(getattr(error, "reason", error), ssl.SSLError)
    return True
