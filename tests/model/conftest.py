import pytest
from tiny import VISIONS, VLMS, language, vision, vlm


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """originals(kind) -> the flags that name tiny pretrained models, written once: of VLMS, or of VISIONS composed
    with a language model."""
    root = tmp_path_factory.mktemp("originals")

    def made(write, name, *arguments):
        folder = root / name
        return str(folder if folder.exists() else write(*arguments, folder))

    def flags(kind):
        if kind in VLMS:
            return {"backbone": made(vlm, kind, kind)}
        assert kind in VISIONS, kind
        return {"vision_backbone": made(vision, kind, kind), "language_backbone": made(language, "language")}

    return flags
