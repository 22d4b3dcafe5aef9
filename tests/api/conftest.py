"""A file of API keys, with one that a test has."""

import pytest

from tests.api.harness import API_KEY, hashed


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# who may call\n\n{hashed('other')} a note\n{hashed(API_KEY).upper()}\n")
    yield path
    # An application that is not collected yet looks on, and would log a fault into another test.
    path.unlink(missing_ok=True)
    path.write_text("")
