"""What the tests of the data room share: a cache of their own, files made from text, and small images."""

import io
import os
import time

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def write(tmp_path):
    """Writes {name: text or bytes} below tmp_path/root, and returns that folder."""

    def write_files(files):
        root = tmp_path / "root"
        root.mkdir(exist_ok=True)
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return root

    return write_files


@pytest.fixture
def make_old():
    """Sets the times of change below a folder to a minute ago, as of files that nobody is working on."""

    def make(root):
        then = time.time() - 60
        for folder, _, files in os.walk(root):
            for name in [".", *files]:
                os.utime(os.path.join(folder, name), (then, then))

    return make


@pytest.fixture
def jpeg():
    """JPEG bytes of a plain colour or of an array [H, W, 3]."""

    def encode(colour=(200, 30, 60), size=(8, 8), file_format="JPEG", **options):
        from PIL import Image

        image = Image.fromarray(colour) if isinstance(colour, np.ndarray) else Image.new("RGB", size, colour)
        buffer = io.BytesIO()
        image.save(buffer, file_format, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture
def labels_of():
    """{path: set of label names} of annotations, for one of the lists."""

    def of(annotations, name="positive"):
        lists = getattr(annotations, name)
        return {path: {annotations.classes[k] for k in lists[number]} for number, path in enumerate(annotations.paths)}

    return of
