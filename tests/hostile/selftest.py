"""Cases that do what no case may, for the test of the worker itself."""

from __future__ import annotations

import os
import time

from .case import Case, Scene


def drop(scene: Scene) -> None:
    scene.cache.crop(3)


CASES = [
    Case("crashes", lambda _: os.abort(), ""),
    Case("hangs", lambda _: time.sleep(1000), ""),
    Case("says nothing", lambda _: None, ""),
    Case("drops tokens", drop, ""),
    Case("refuses", lambda scene: scene.cache.crop(-1), ""),
]
