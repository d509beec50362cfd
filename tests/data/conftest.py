"""What tests of data sets share."""

import pytest
from lerobot_sets import write

from vla.data import frames


@pytest.fixture(scope="session")
def png(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sets") / "png")


@pytest.fixture(scope="session")
def h264(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sets") / "h264", codec="h264")


@pytest.fixture
def decoded(monkeypatch):
    """The frames that are decoded from now on."""
    numbers, read = [], frames.Decoder.read

    def watched(self, wanted, *arguments):
        numbers.extend(wanted.tolist())
        return read(self, wanted, *arguments)

    monkeypatch.setattr(frames.Decoder, "read", watched)
    return numbers
