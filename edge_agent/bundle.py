"""NAME.json, what a device with a password needs in order to connect: for the bench, or where a fleet's certificates are not wanted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from regrow import topics
from regrow.errors import LocalError


@dataclass(frozen=True, slots=True)
class Bundle:
    """What a device needs in order to connect; `regrow device add` writes it.

    password: None for a device with an identity; authority: the CA that the broker is checked by (PEM), None: the system's.
    """

    device: str
    broker: str
    password: str | None
    authority: str | None = None


def read_bundle(path: Path) -> Bundle:
    """Read NAME.json.

    Raises:
        LocalError: it cannot be read, or a field is missing or of another type.
    """
    try:
        fields = json.loads(path.read_text())
        bundle = Bundle(fields["device"], fields["broker"], fields["password"], fields.get("ca"))
    except OSError as error:
        raise LocalError(f"{path}: {error.strerror}; make it on the gateway with `regrow device add NAME`") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else "it is not JSON of that form"  # its content may be secret
        raise LocalError(f"{path}: not a device bundle, {what}; make it with `regrow device add NAME`") from error
    if not all(isinstance(value, str) for value in (bundle.device, bundle.broker, bundle.password, bundle.authority or "")):
        raise LocalError(f"{path}: device, broker and password must be strings; make it with `regrow device add NAME`")
    topics.check_name(bundle.device, "device")
    return bundle
