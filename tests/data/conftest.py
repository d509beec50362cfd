"""What tests of pictures share."""

import pytest

from vla.data import frames


@pytest.fixture
def decoded(monkeypatch):
    """The frames that are decoded from now on."""
    numbers, read = [], frames.Decoder.read

    def watched(self, wanted, *arguments):
        numbers.extend(wanted.tolist())
        return read(self, wanted, *arguments)

    monkeypatch.setattr(frames.Decoder, "read", watched)
    return numbers
