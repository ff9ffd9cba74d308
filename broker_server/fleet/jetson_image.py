"""What makes a flashed Jetson a device: a container on the L4T image of its JetPack, built on the board, with the GPU's runtime.

Untried on a Jetson: no board was at hand. What was checked is said in docs/images.md.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from broker_server.fleet.boards import deploy_folder
from broker_server.fleet.images import UPDATES, Image, shell_settings, write_payload
from regrow.errors import UsageError

# JetPack -> the tag of its L4T container: Ubuntu 22.04, Python 3.10.
JETPACKS = {"6.0": "r36.3.0", "6.1": "r36.4.0", "6.2": "r36.4.0"}
BASE = "nvcr.io/nvidia/l4t-jetpack:{tag}"


def base_of(jetpack: str) -> str:
    """The container image of a JetPack version.

    Raises:
        UsageError: none is known for it.
    """
    if jetpack not in JETPACKS:
        raise UsageError(f"--jetpack {jetpack!r}: one of {', '.join(JETPACKS)}; --base names another L4T container with Python 3.10")
    return BASE.format(tag=JETPACKS[jetpack])


def write_jetson(image: Image, base: str, torch: Path | None, folder: Path, data_file: Path | None) -> None:
    """Write everything but the device's wheels: Dockerfile, unit, installer, settings, claim and, where given, the maker's torch wheel.

    Raises:
        UsageError: the torch wheel is not one for this board.
    """
    deploy = deploy_folder() / "image" / "jetson"
    write_payload(image, folder, data_file)
    for name in ("authorized_keys", "wifi.sh", "regrow-agent-identity.conf", "journald@regrow.conf", "update.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "units")
    # The container is the board's environment; a new version is a new image, built on the board.
    (folder / "agent.env").write_text((folder / "agent.env").read_text().replace(UPDATES, "").replace("= ", "="))
    for path in deploy.iterdir():
        shutil.copyfile(path, folder / path.name)
    with (folder / "device.env").open("a") as settings:
        settings.write(shell_settings({"REGROW_BASE": base}))
    if torch is not None:
        if not (torch.name.startswith("torch-") and torch.name.endswith("-cp310-cp310-linux_aarch64.whl")) or not torch.is_file():
            raise UsageError(f"--torch {torch}: expected NVIDIA's torch-*-cp310-cp310-linux_aarch64.whl for this JetPack")
        (folder / "wheels").mkdir(exist_ok=True)
        shutil.copyfile(torch, folder / "wheels" / torch.name)
