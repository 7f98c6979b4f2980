"""docs/models.md says what the code does."""

from tests.model.models_page import PAGE, written


def test_tables_are_the_codes():
    text = PAGE.read_text()
    assert written(text) == text, "run python -m tests.model.models_page"
