import pytest

from mlfast.training import TrainConfig


@pytest.fixture(autouse=True, scope="session")
def one_cache_for_all_tests(tmp_path_factory):
    """Keep the generated images out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def every_test_has_one_thread(one_thread):
    pass


@pytest.fixture
def tiny(tmp_path):
    """Make the configuration of a run of seconds; stochastic depth makes it depend on the random state."""

    def make(**settings):
        defaults = {
            "backbone": "test_resnet",
            "backbone_args": {"drop_path_rate": 0.2},
            "image_size": 32,
            "train_images": 64,
            "val_images": 32,
            "batch_size": 16,
            "epochs": 3,
            "lr": 0.1,
            "report": False,
            "device": "cpu",
            "runs_dir": str(tmp_path / "runs"),
            "name": "tiny",
        }
        return TrainConfig(**defaults | settings)

    return make
